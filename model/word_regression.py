"""Scores of unseen classes in closed form: a ridge regression from features to seen classes, and on to words.

    W = (X'DX + a I)^-1 X'DY         features -> seen classes, every class weighing the same (D)
    A = (S S' + b I)^-1 S U'         seen classes -> unseen ones, by how near their words are

The score of unseen class u for a feature x is x W A_u. This is ESZSL (Romera-Paredes & Torr, "An embarrassingly simple
approach to zero-shot learning", ICML 2015), written with words as a kernel. A network trained by steps on the same
labels scores unseen classes too, but how well varies with the seed far more than how well it knows the seen ones; here
nothing is drawn.
"""

import torch
import torch.nn.functional as F


def word_regression(
    features: torch.Tensor,
    label: torch.Tensor,
    class_embeddings: torch.Tensor,
    num_seen: int,
    num_auxiliary: int = 0,
    feature_ridge: float = 0.1,
    word_ridge: float = 1.0,
) -> torch.Tensor:
    """The map from features to scores of unseen classes.

    Args:
        features: [P, C], of about unit deviation.
        label: integer [P] in [0, num_auxiliary + num_seen).
        class_embeddings: [K, D], unit rows, seen classes first.
        num_seen: how many of them are seen.
        num_auxiliary: classes without a word, before the seen ones in `label`: other classes are told from them, and
            nothing is learnt about a word.
        feature_ridge, word_ridge: a and b above.

    Returns:
        [C + 1, K - num_seen]; its last row goes with a constant feature of 1.
    """
    features = with_constant(features)
    target = F.one_hot(label.long(), num_auxiliary + num_seen).to(features.dtype)  # [P, num_auxiliary + num_seen]
    count = target.sum(0)
    weight = (1 / count.clamp(min=1))[label.long()] / (count > 0).sum()  # [P], a class together as much as another
    weighted = features * weight[:, None]
    gram = weighted.T @ features
    gram.diagonal().add_(feature_ridge)
    to_seen = torch.linalg.solve(gram, weighted.T @ target)[:, num_auxiliary:]  # [C + 1, num_seen]
    seen, unseen = class_embeddings[:num_seen], class_embeddings[num_seen:]
    kernel = seen @ seen.T
    kernel.diagonal().add_(word_ridge)
    return to_seen @ torch.linalg.solve(kernel, seen @ unseen.T)


def with_constant(features: torch.Tensor) -> torch.Tensor:
    """[..., C] -> [..., C + 1], with a last feature of 1."""
    return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], dim=-1)

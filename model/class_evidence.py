"""How well each unseen class fits a pixel's features, without a label of it: two sources of evidence.

Word regression maps features to seen classes and on to unseen ones by their word vectors:

    W = (X'DX + a I)^-1 X'DY         features -> seen classes, every class weighing the same (D)
    A = (S S' + b I)^-1 S U'         seen classes -> unseen ones, by how near their words are

The score of unseen class u for a feature x is x W A_u. This is ESZSL (Romera-Paredes & Torr, "An embarrassingly simple
approach to zero-shot learning", ICML 2015), written with words as a kernel. It is solved in closed form, so that no
seed moves it.

ImageNet names come from ConSE (Norouzi et al., ICLR 2014): an image of a class that a classifier does not know lies, in
the space of words, among the classes that it takes the image for. Here for every cell of the trunk's features.
"""

import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 8192
"""Rows that are worked on at a time: copies of a whole data set's features would be gigabytes."""


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
        num_auxiliary: classes without a word, before the seen ones in `label`: pixels of other classes are
            distinguished from theirs, and nothing is learnt about a word.
        feature_ridge, word_ridge: a and b above.

    Returns:
        [C + 1, K - num_seen]; its last row goes with a constant feature of 1.
    """
    label = label.long()
    count = label.bincount(minlength=num_auxiliary + num_seen)
    class_weight = 1 / count.clamp(min=1) / (count > 0).sum()  # the pixels of each class weigh as much as another's
    size = features.shape[1] + 1
    gram, cross = features.new_zeros(size, size), features.new_zeros(size, len(count))
    for x, y in zip(features.split(CHUNK), label.split(CHUNK)):
        x = with_constant(x)
        weighted = x * class_weight[y][:, None]
        gram += weighted.T @ x
        cross += weighted.T @ F.one_hot(y, len(count)).to(x.dtype)
    gram.diagonal().add_(feature_ridge)
    to_seen = torch.linalg.solve(gram, cross)[:, num_auxiliary:]  # [C + 1, num_seen]
    seen, unseen = class_embeddings[:num_seen], class_embeddings[num_seen:]
    kernel = seen @ seen.T
    kernel.diagonal().add_(word_ridge)
    return to_seen @ torch.linalg.solve(kernel, seen @ unseen.T)


def with_constant(features: torch.Tensor) -> torch.Tensor:
    """[..., C] -> [..., C + 1], with a last feature of 1."""
    return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], dim=-1)


class ImageNetEvidence(nn.Module):
    """Expected similarity of a cell's ImageNet class to each unseen class.

    Args:
        head: features [P, C] -> ImageNet logits [P, 1000], the published classifier of the trunk's weights.
        similarity: [1000, U], see `embeddings.imagenet.imagenet_similarity`; a row of zeros takes no part.
    """

    def __init__(self, head: nn.Module, similarity: torch.Tensor):
        super().__init__()
        self.head = head
        self.register_buffer("similarity", similarity)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features [P, C] of the ImageNet trunk -> evidence [P, U], each class with mean 0 and deviation 1."""
        chunks = [self.head(x.float()).softmax(dim=1) @ self.similarity for x in features.split(CHUNK)]
        return _unit_columns(torch.cat(chunks))


def standardise(evidence: torch.Tensor) -> torch.Tensor:
    """Evidence [P, U] less each pixel's mean over the classes, then with mean 0 and unit deviation for each class.

    Without it a class whose word is near to every other would be assigned most clusters (hubness); on seen classes held
    out as if unseen, this was worth more than any other change of the class assignment.
    """
    return _unit_columns(evidence - evidence.mean(dim=1, keepdim=True))


def _unit_columns(evidence: torch.Tensor) -> torch.Tensor:
    return (evidence - evidence.mean(dim=0)) / evidence.std(dim=0).clamp(min=1e-6)

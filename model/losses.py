"""The losses of both stages, as pure functions of logits.

Logits are [N, K, H, W] with the seen classes first; `valid` is bool [N, H, W]. A mean over no pixel is 0.
"""

import torch
import torch.nn.functional as F

EPSILON = 1e-5
"""Keeps the bias loss finite where no probability is left for the unseen classes."""


def cross_entropy(logits: torch.Tensor, label: torch.Tensor, ignore_index: int = 255) -> torch.Tensor:
    """Mean cross-entropy over the labelled pixels; all K classes compete.

    Args:
        logits: [N, K, H, W].
        label: integer [N, H, W] of class indices; `ignore_index` is left out.

    Returns:
        A scalar, 0 (with a gradient of 0) where no pixel is labelled.
    """
    label = label.long()
    if torch.are_deterministic_algorithms_enabled():  # a GPU has no such sum over pixels in one go
        total = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="none").sum()
    else:
        total = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="sum")
    return total / (label != ignore_index).sum().clamp(min=1)


def bias_loss(logits: torch.Tensor, num_seen: int, valid: torch.Tensor) -> torch.Tensor:
    """B = mean over valid pixels of -log( sum over unseen c of softmax_c + 1e-5 ).

    It pulls probability from the seen to the unseen classes without saying to which of them.

    Args:
        logits: [N, K, H, W].
        num_seen: the first so many of the K classes are seen.
        valid: bool [N, H, W].

    Returns:
        A scalar, 0 (with a gradient of 0) where no pixel is valid.
    """
    probability = logits.softmax(dim=1)[:, num_seen:].sum(dim=1)  # of the unseen classes together, [N, H, W]
    loss = -torch.log(probability + EPSILON)
    return (loss * valid).sum() / valid.sum().clamp(min=1)


@torch.no_grad()
def pseudo_labels(
    logits: torch.Tensor,
    num_seen: int,
    valid: torch.Tensor,
    keep: float = 0.6,
    ignore_index: int = 255,
    balanced: bool = False,
) -> torch.Tensor:
    """The best unseen class of each pixel, kept where its logit is among the highest.

    Args:
        logits: [N, K, H, W].
        num_seen: the first so many of the K classes are seen.
        valid: bool [N, H, W], the pixels to choose from.
        keep: share of pixels that get a label; equal logits at the cut are all kept.
        balanced: False keeps the highest `keep` of the batch's valid pixels, as published; True the highest `keep` of
            each class's own, so that a class whose logits are lower than another's is not left without a label
            (Zou et al., class-balanced self-training, ECCV 2018).

    Returns:
        Class indices, int64 [N, H, W], in [num_seen, K) or `ignore_index`.
    """
    score, unseen = logits[:, num_seen:].float().max(dim=1)  # [N, H, W]
    groups = [valid & (unseen == c) for c in range(logits.shape[1] - num_seen)] if balanced else [valid]
    chosen = torch.stack([_highest(score, group, keep) for group in groups]).any(dim=0)
    return torch.where(chosen, unseen + num_seen, ignore_index)


def _highest(score: torch.Tensor, among: torch.Tensor, share: float) -> torch.Tensor:
    """Where `score` is one of the highest `share` of its values `among`; bool, of the same shape."""
    # The cut is found without asking the device how many pixels there are: a sync a step would cost more.
    ranked = score.masked_fill(~among, -torch.inf).flatten().sort(descending=True).values
    kept = (among.sum() * share).long()
    return among & (score >= ranked[(kept - 1).clamp(min=0)]) & (kept > 0)

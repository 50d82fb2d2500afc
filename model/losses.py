"""The losses of both stages, as pure functions of logits.

Logits are [N, K, H, W] with the seen classes first; `valid` is bool [N, H, W]. A mean over no pixel is 0.

Where several processes share a batch, `joined` makes of a process's count the sum over all of them (with a gradient,
where it has one). Then what a loss returns is the process's part: the sum of these is the loss of the whole batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

EPSILON = 1e-5
"""Keeps the bias loss finite where no probability is left for the unseen classes."""

Joined = Callable[[torch.Tensor], torch.Tensor]
"""Turns the number (or the sum of weights) of the pixels that a loss sees into what their sum is divided by."""


def alone(count: torch.Tensor) -> torch.Tensor:
    """The `joined` of a process that has the batch for itself: a mean over its pixels."""
    return count


def undivided(count: torch.Tensor) -> torch.Tensor:
    """The `joined` that makes of a mean over pixels their sum, as a block of a batch's pixels gives it."""
    return torch.ones_like(count)


def cross_entropy(
    logits: torch.Tensor, label: torch.Tensor, weight: torch.Tensor | None = None, ignore_index: int = 255,
    joined: Joined = alone,
) -> torch.Tensor:  # fmt: skip
    """Mean cross-entropy over the labelled pixels, sum(w * CE) / sum(w); all K classes compete.

    Args:
        logits: [N, K, H, W].
        label: integer [N, H, W] of class indices; `ignore_index` is left out.
        weight: w, float [N, H, W], not negative; None: 1.
        joined: sums a count over processes.

    Returns:
        A scalar, 0 (with a gradient of 0) where no pixel is labelled or all weights are 0.
    """
    labelled = label != ignore_index
    loss = F.cross_entropy(logits, label.long(), ignore_index=ignore_index, reduction="none")  # [N, H, W]
    weight = labelled if weight is None else weight * labelled
    total = joined(weight.sum())
    return (loss * weight).sum() / torch.where(total > 0, total, 1)


def bias_loss(
    logits: torch.Tensor,
    num_seen: int,
    valid: torch.Tensor,
    joined: Joined = alone,
) -> torch.Tensor:
    """B = mean over valid pixels of -log( sum over unseen c of softmax_c + 1e-5 ).

    It pulls probability from the seen to the unseen classes without saying to which of them.

    Args:
        logits: [N, K, H, W].
        num_seen: the first so many of the K classes are seen.
        valid: bool [N, H, W].
        joined: sums a count over processes.

    Returns:
        A scalar, 0 (with a gradient of 0) where no pixel is valid.
    """
    probability = logits.softmax(dim=1)[:, num_seen:].sum(dim=1)  # of the unseen classes together, [N, H, W]
    loss = -torch.log(probability + EPSILON)
    return (loss * valid).sum() / joined(valid.sum()).clamp(min=1)


@torch.no_grad()
def pseudo_labels(
    logits: torch.Tensor,
    num_seen: int,
    valid: torch.Tensor,
    keep: float = 0.6,
    ignore_index: int = 255,
    balanced: bool = False,
    joined: Joined = alone,
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
        joined: sums a count over processes, whose batches get one cut.

    Returns:
        Class indices, int64 [N, H, W], in [num_seen, K) or `ignore_index`.
    """
    best = best_unseen(logits, num_seen)
    return choose_labels(*best, num_seen, logits.shape[1], valid, keep, ignore_index, balanced, joined)


def best_unseen(logits: torch.Tensor, num_seen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest unseen logit of each pixel and whose it is, float32 and int64 [N, H, W], counted from `num_seen`."""
    return logits[:, num_seen:].float().max(dim=1)


def choose_labels(
    score: torch.Tensor, unseen: torch.Tensor, num_seen: int, num_classes: int, valid: torch.Tensor, keep: float,
    ignore_index: int = 255, balanced: bool = False, joined: Joined = alone,
) -> torch.Tensor:  # fmt: skip
    """`pseudo_labels`, from what `best_unseen` gives."""
    groups = [valid & (unseen == c) for c in range(num_classes - num_seen)] if balanced else [valid]
    chosen = torch.stack([_highest(score, group, keep, joined) for group in groups]).any(dim=0)
    return torch.where(chosen, unseen + num_seen, ignore_index)


def _highest(score: torch.Tensor, among: torch.Tensor, share: float, joined: Joined) -> torch.Tensor:
    """Where `score` is one of the highest `share` of its values `among`; bool, of the same shape."""
    kept = (joined(among.sum()) * share).long()
    return among & (score >= _value_of_rank(score.masked_fill(~among, -torch.inf), kept, joined)) & (kept > 0)


def _value_of_rank(score: torch.Tensor, rank: torch.Tensor, joined: Joined) -> torch.Tensor:
    """The `rank`-th highest value (1: the highest) of float32 `score`, a scalar; for rank 0 no number.

    It is found bit by bit, by counting how many values are not below it. So processes need to add up only counts, the
    device is never asked how many pixels there are, and on a CPU it takes a fraction of the time of sorting.
    """
    bits = score.view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats that they stand for
    cut = torch.full((), -(2**31), dtype=torch.int64, device=score.device)
    for bit in range(31, -1, -1):
        higher = cut + 2**bit
        cut = torch.where(joined((order >= higher).sum()) >= rank, higher, cut)
    cut = torch.where(cut < 0, cut ^ 0x7FFFFFFF, cut)
    return cut.to(torch.int32).view(torch.float32)

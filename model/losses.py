"""The losses of both stages, as pure functions of logits.

Logits are [N, K, H, W] with the seen classes first, a tensor or a `PixelLogits`, of which a block of rows is upsampled
at a time. `valid` is bool [N, H, W]. A mean over no pixel is 0.

Where several processes share a batch, `all_reduce_sum` gives the sum of a count over all of them. What a loss returns
is then the process's part: the sum of these is the loss of the whole batch. Pseudo-labels then share one threshold.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from model.upsampling import PixelLogits

EPSILON = 1e-5
"""Keeps the bias loss finite where no probability is left for the unseen classes."""

Reduce = Callable[[torch.Tensor], torch.Tensor]


def identity(count: torch.Tensor) -> torch.Tensor:
    """The `all_reduce_sum` of a single process."""
    return count


def cross_entropy(
    logits: PixelLogits | torch.Tensor, label: torch.Tensor, ignore_index: int = 255, all_reduce_sum: Reduce = identity
) -> torch.Tensor:
    """CE = mean over labelled pixels of -log softmax of the label; all K classes compete.

    Args:
        logits: [N, K, H, W].
        label: integer [N, H, W] of class indices; `ignore_index` is left out.

    Returns:
        A scalar, 0 (with a gradient of 0) where no pixel is labelled.
    """

    def block_sum(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        # Not its own sum over pixels, which is not deterministic on a GPU.
        return F.cross_entropy(logits, label.long(), ignore_index=ignore_index, reduction="none").sum()

    return _by_pixel(logits).sum_over_pixels(block_sum, label) / _count(label != ignore_index, all_reduce_sum)


def bias_loss(
    logits: PixelLogits | torch.Tensor, num_seen: int, valid: torch.Tensor, all_reduce_sum: Reduce = identity
) -> torch.Tensor:
    """B = mean over valid pixels of -log( sum over unseen c of softmax_c + 1e-5 ).

    It moves probability from the seen to the unseen classes without saying to which of them.

    Args:
        logits: [N, K, H, W].
        num_seen: the first `num_seen` of the K classes are seen.
        valid: bool [N, H, W].

    Returns:
        A scalar, 0 (with a gradient of 0) where no pixel is valid.
    """

    def block_sum(logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        unseen = logits.softmax(dim=1)[:, num_seen:].sum(dim=1)  # [n, r, W]
        return (-torch.log(unseen + EPSILON) * valid).sum()

    return _by_pixel(logits).sum_over_pixels(block_sum, valid) / _count(valid, all_reduce_sum)


@torch.no_grad()
def pseudo_labels(
    logits: PixelLogits | torch.Tensor, num_seen: int, valid: torch.Tensor, keep: float = 0.6, balanced: bool = False,
    ignore_index: int = 255, all_reduce_sum: Reduce = identity,
) -> torch.Tensor:  # fmt: skip
    """The best unseen class of each pixel, kept where its logit is among the highest.

    Args:
        logits: [N, K, H, W].
        num_seen: the first `num_seen` of the K classes are seen.
        valid: bool [N, H, W], the pixels to choose from.
        keep: share of the n pixels that get a label, floor(keep n) + 1 of them; logits equal to the last are all kept.
        balanced: False keeps the highest `keep` of the batch's valid pixels, as published; True the highest `keep` of
            each class's pixels, so that a class of low logits gets labels too (Zou et al., class-balanced
            self-training, ECCV 2018).

    Returns:
        Class indices, int64 [N, H, W], in [num_seen, K) or `ignore_index`.
    """
    score, unseen = _by_pixel(logits).map_pixels(lambda block: block[:, num_seen:].float().max(dim=1))  # [N, H, W] each
    num_unseen = logits.shape[1] - num_seen
    groups = [valid & (unseen == c) for c in range(num_unseen)] if balanced else [valid]
    kept = torch.stack([_highest(score, group, keep, all_reduce_sum) for group in groups]).any(dim=0)
    return torch.where(kept, unseen + num_seen, ignore_index)


def _by_pixel(logits: PixelLogits | torch.Tensor) -> PixelLogits:
    return logits if isinstance(logits, PixelLogits) else PixelLogits(logits, *logits.shape[-2:])


def _count(pixels: torch.Tensor, all_reduce_sum: Reduce) -> torch.Tensor:
    """How many of all processes' pixels there are, at least 1."""
    return all_reduce_sum(pixels.sum()).clamp(min=1)


def _highest(score: torch.Tensor, among: torch.Tensor, share: float, all_reduce_sum: Reduce) -> torch.Tensor:
    """Where `score` is one of the highest floor(share n) + 1 of its n values `among`; bool, of the same shape."""
    number = all_reduce_sum(among.sum())
    rank = torch.minimum((number * share).long() + 1, number)
    return among & (score >= _value_of_rank(score.masked_fill(~among, -torch.inf), rank, all_reduce_sum))


def _value_of_rank(score: torch.Tensor, rank: torch.Tensor, all_reduce_sum: Reduce) -> torch.Tensor:
    """The `rank`-th highest value (1: the highest) of float32 `score`, a scalar; for rank 0 no number.

    It is found bit by bit, by counting how many values are not below it. So processes need to add up only counts, the
    device is never asked how many pixels there are, and on a CPU it takes a fraction of the time of sorting.
    """
    bits = score.view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    found = torch.full((), -(2**31), dtype=torch.int64, device=score.device)
    for bit in range(31, -1, -1):
        higher = found + 2**bit
        found = torch.where(all_reduce_sum((order >= higher).sum()) >= rank, higher, found)
    found = torch.where(found < 0, found ^ 0x7FFFFFFF, found)
    return found.to(torch.int32).view(torch.float32)

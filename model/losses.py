"""The losses of both stages, as pure functions of logits.

Logits are [N, K, H, W] with the seen classes first, a tensor or a `PixelLogits`, of which a block of rows is upsampled
at a time. `valid` is bool [N, H, W]. A mean over no pixel is 0, with a gradient of 0.

Where several processes share a batch, pixels are counted over all of them. What a loss returns is then the process's
part: the sum of these is the loss of the whole batch. Pseudo-labels then share one threshold.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dataset.splits import VOID
from model.upsampling import PixelLogits
from utils.distributed import all_reduce_sum

Logits = PixelLogits | torch.Tensor

EPSILON = 1e-5
"""Keeps the bias loss finite where no probability is left for the unseen classes."""


def cross_entropy(logits: Logits, label: torch.Tensor) -> torch.Tensor:
    """CE = mean over labelled pixels of -log softmax of the label, a scalar; all K classes compete.

    `logits` are [N, K, H, W]; `label` are class indices, integers [N, H, W], of which `VOID` is left out.
    """

    def block_sum(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        # Not its own sum over pixels, which is not deterministic on a GPU.
        return F.cross_entropy(logits, label.long(), ignore_index=VOID, reduction="none").sum()

    return _mean(block_sum, logits, label, label != VOID)


def bias_loss(logits: Logits, num_seen: int, valid: torch.Tensor) -> torch.Tensor:
    """B = mean over valid pixels of -log( sum over unseen c of softmax_c + 1e-5 ), a scalar.

    It moves probability from the seen to the unseen classes without saying to which of them. `logits` are [N, K, H, W],
    of which the first `num_seen` classes are seen; `valid` is bool [N, H, W].
    """

    def block_sum(logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        unseen = logits.softmax(dim=1)[:, num_seen:].sum(dim=1)  # [n, r, W]
        return (-torch.log(unseen + EPSILON) * valid).sum()

    return _mean(block_sum, logits, valid, valid)


@torch.no_grad()
def pseudo_labels(logits: Logits, num_seen: int, valid: torch.Tensor, keep=0.6, balanced=False) -> torch.Tensor:
    """The best unseen class of each pixel, kept where its logit is among the highest; int64 [N, H, W], else `VOID`.

    `logits` are [N, K, H, W], of which the first `num_seen` classes are seen; `valid` is bool [N, H, W], the pixels to
    choose from. Of n pixels floor(keep n) + 1 get a label; logits equal to the last are all kept. These n are the
    batch's valid pixels, as published, or if `balanced` those of each class, so that a class of low logits gets labels
    too (Zou et al., class-balanced self-training, ECCV 2018).
    """
    score, unseen = _by_pixel(logits).map_pixels(lambda block: block[:, num_seen:].float().max(dim=1))  # [N, H, W] each
    groups = [valid & (unseen == c) for c in range(logits.shape[1] - num_seen)] if balanced else [valid]
    kept = torch.stack([_highest(score, group, keep) for group in groups]).any(dim=0)
    return torch.where(kept, unseen + num_seen, VOID)


def _by_pixel(logits: Logits) -> PixelLogits:
    return logits if isinstance(logits, PixelLogits) else PixelLogits(logits, *logits.shape[-2:])


def _mean(block_sum: Callable, logits: Logits, pixels: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The sum over this process's pixels, see `PixelLogits.sum_over_pixels`, divided by all processes' `counted`."""
    return _by_pixel(logits).sum_over_pixels(block_sum, pixels) / all_reduce_sum(counted.sum()).clamp(min=1)


def _highest(score: torch.Tensor, among: torch.Tensor, share: float) -> torch.Tensor:
    """Where float32 `score` is one of the highest floor(share n) + 1 of its n values `among`; bool, of the same shape.

    The lowest of them is found bit by bit, by counting how many values are not below it. So processes need to add up
    only counts, no count leaves the device, and on a CPU it takes a fraction of the time of sorting.
    """
    number = all_reduce_sum(among.sum())
    rank = torch.minimum((number * share).long() + 1, number)
    bits = (score + 0.0).masked_fill(~among, -torch.inf).view(torch.int32)  # -0.0 + 0.0 is 0.0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    lowest = torch.full((), -(2**31), dtype=torch.int64, device=score.device)
    for bit in range(31, -1, -1):
        higher = lowest + 2**bit
        lowest = torch.where(all_reduce_sum((order >= higher).sum()) >= rank, higher, lowest)
    return among & (order >= lowest)

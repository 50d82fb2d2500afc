"""The losses of both stages, of logits that are upsampled a block at a time.

The formulas are those of `model.losses`; here they are summed over blocks, so that logits,
softmax and gradients of all pixels are never there at once: at 171 classes, those of eight crops of 512 pixels fill
1.4 GB each. Arguments and results are as there; the logits are a `PixelLogits`, or a tensor [N, K, H, W].
"""

from functools import partial

import torch

from model import losses
from model.losses import Joined, alone, undivided
from model.upsampling import PixelLogits


def cross_entropy(
    logits: PixelLogits, label: torch.Tensor, weight: torch.Tensor | None = None, ignore_index: int = 255,
    joined: Joined = alone,
) -> torch.Tensor:  # fmt: skip
    """See `losses.cross_entropy`."""
    labelled = label != ignore_index
    weight = labelled if weight is None else weight * labelled

    def formula(block: torch.Tensor, label: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return losses.cross_entropy(block, label, weight, ignore_index, undivided)

    total = joined(weight.sum())
    return _lazy(logits).sum_over_pixels(formula, label, weight) / torch.where(total > 0, total, 1)


def bias_loss(logits: PixelLogits, num_seen: int, valid: torch.Tensor, joined: Joined = alone) -> torch.Tensor:
    """See `losses.bias_loss`."""
    formula = partial(losses.bias_loss, num_seen=num_seen, joined=undivided)
    total = joined(valid.sum()).clamp(min=1)
    return _lazy(logits).sum_over_pixels(lambda block, valid: formula(block, valid=valid), valid) / total


@torch.no_grad()
def pseudo_labels(
    logits: PixelLogits, num_seen: int, valid: torch.Tensor, keep: float = 0.6, ignore_index: int = 255,
    balanced: bool = False, joined: Joined = alone,
) -> torch.Tensor:  # fmt: skip
    """See `losses.pseudo_labels`."""
    best = _lazy(logits).map_pixels(partial(losses.best_unseen, num_seen=num_seen))
    return losses.choose_labels(*best, num_seen, logits.shape[1], valid, keep, ignore_index, balanced, joined)


def _lazy(logits: PixelLogits | torch.Tensor) -> PixelLogits:
    return logits if isinstance(logits, PixelLogits) else PixelLogits(logits, *logits.shape[-2:])

"""The losses of both stages, of logits that are upsampled a block at a time.

The formulas are those of `model.losses` and `model.soft_weights`; here they are summed over blocks, so that logits,
softmax and gradients of all pixels are never there at once: at 171 classes, those of eight crops of 512 pixels fill
1.4 GB each. Arguments and results are as there; the logits are a `PixelLogits`, or a tensor [N, K, H, W].
"""

from functools import partial

import torch

from model import losses, soft_weights
from model.losses import Joined, alone, undivided
from model.upsampling import PixelLogits


def cross_entropy(
    logits: PixelLogits, label: torch.Tensor, ignore_index: int = 255, joined: Joined = alone
) -> torch.Tensor:
    """See `losses.cross_entropy`."""
    formula = partial(losses.cross_entropy, ignore_index=ignore_index, joined=undivided)
    return _lazy(logits).sum_over_pixels(formula, label) / joined((label != ignore_index).sum()).clamp(min=1)


def weighted_cross_entropy(
    logits: PixelLogits, label: torch.Tensor, weight: torch.Tensor, ignore_index: int = 255, joined: Joined = alone
) -> torch.Tensor:
    """See `soft_weights.weighted_cross_entropy`."""
    formula = partial(soft_weights.weighted_cross_entropy, ignore_index=ignore_index, joined=undivided)
    total = joined(weight.masked_fill(label == ignore_index, 0.0).sum())
    return _lazy(logits).sum_over_pixels(formula, label, weight) / torch.where(total > 0, total, 1.0)


def bias_loss(
    logits: PixelLogits, num_seen: int, valid: torch.Tensor, gate: torch.Tensor | None = None,
    keep_shape: bool = False, joined: Joined = alone,
) -> torch.Tensor:  # fmt: skip
    """See `losses.bias_loss`."""
    weight = valid if gate is None else valid * gate

    def formula(block: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return losses.bias_loss(block, num_seen, weight, keep_shape=keep_shape, joined=undivided)

    return _lazy(logits).sum_over_pixels(formula, weight) / joined(weight.sum()).clamp(min=1)


def known_gate(logits: PixelLogits, num_seen: int, gamma: float) -> torch.Tensor:
    """See `losses.known_gate`."""
    (gate,) = _lazy(logits).map_pixels(lambda block: (losses.known_gate(block, num_seen, gamma),))
    return gate


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

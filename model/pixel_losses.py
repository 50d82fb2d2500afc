"""The losses of both stages, of logits that are upsampled a block at a time.

The formulas are those of `model.losses` and `model.soft_weights`; here they are summed over blocks, so that logits,
softmax and gradients of all pixels are never there at once: at 171 classes, those of eight crops of 512 pixels fill
1.4 GB each. Arguments and results are as there; the logits are a `PixelLogits`, or a tensor [N, K, H, W].
"""

from functools import partial

import torch

from model import losses, soft_weights
from model.upsampling import PixelLogits


def cross_entropy(
    logits: PixelLogits, label: torch.Tensor, ignore_index: int = 255, total: torch.Tensor | None = None
) -> torch.Tensor:
    """See `losses.cross_entropy`."""
    formula = partial(losses.cross_entropy, ignore_index=ignore_index, total=1)
    total = (label != ignore_index).sum().clamp(min=1) if total is None else total
    return _lazy(logits).sum_over_pixels(formula, label) / total


def weighted_cross_entropy(
    logits: PixelLogits, label: torch.Tensor, weight: torch.Tensor, ignore_index: int = 255,
    total: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """See `soft_weights.weighted_cross_entropy`."""
    formula = partial(soft_weights.weighted_cross_entropy, ignore_index=ignore_index, total=1)
    if total is None:
        total = weight.masked_fill(label == ignore_index, 0.0).sum()
        total = torch.where(total > 0, total, 1.0)
    return _lazy(logits).sum_over_pixels(formula, label, weight) / total


def bias_loss(
    logits: PixelLogits, num_seen: int, valid: torch.Tensor, gate: torch.Tensor | None = None,
    keep_shape: bool = False, total: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """See `losses.bias_loss`."""
    weight = valid if gate is None else valid * gate

    def formula(block: torch.Tensor, *maps: torch.Tensor) -> torch.Tensor:
        return losses.bias_loss(block, num_seen, *maps, keep_shape=keep_shape, total=1)

    total = weight.sum().clamp(min=1) if total is None else total
    return _lazy(logits).sum_over_pixels(formula, *([valid] if gate is None else [valid, gate])) / total


def known_gate(logits: PixelLogits, num_seen: int, gamma: float) -> torch.Tensor:
    """See `losses.known_gate`."""
    (gate,) = _lazy(logits).map_pixels(lambda block: (losses.known_gate(block, num_seen, gamma),))
    return gate


@torch.no_grad()
def pseudo_labels(
    logits: PixelLogits, num_seen: int, valid: torch.Tensor, keep: float = 0.6, ignore_index: int = 255,
    balanced: bool = False,
) -> torch.Tensor:  # fmt: skip
    """See `losses.pseudo_labels`."""
    best = _lazy(logits).map_pixels(partial(losses.best_unseen, num_seen=num_seen))
    return losses.choose_labels(*best, num_seen, logits.shape[1], valid, keep, ignore_index, balanced)


def _lazy(logits: PixelLogits | torch.Tensor) -> PixelLogits:
    return logits if isinstance(logits, PixelLogits) else PixelLogits(logits, *logits.shape[-2:])

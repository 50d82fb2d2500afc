"""Soft weights of pseudo-labels instead of a cut, and the cross-entropy that takes them."""

import torch
import torch.nn.functional as F

from model.losses import Joined, alone


@torch.no_grad()
def soft_weights(score: torch.Tensor, valid: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax of temperature * score over each picture's valid pixels, divided by its maximum.

    The surest pixel of each picture weighs 1, one whose score is d lower exp(-temperature * d). After the Annealed
    Self-Training of Cheng et al., "SIGN: Spatial-information Incorporated Generative Network for Generalized
    Zero-shot Semantic Segmentation", arXiv 2108.12517.

    Args:
        score: how sure each pixel's label is, [N, H, W]; anything outside `valid`.
        valid: bool [N, H, W], the pixels that have a label.
        temperature: 0 weighs all valid pixels alike; the higher, the fewer count.

    Returns:
        float32 [N, H, W] in [0, 1], 0 where not valid.
    """
    scaled = (temperature * score.float()).masked_fill(~valid, -torch.inf)
    weight = (scaled - scaled.amax(dim=(1, 2), keepdim=True)).exp()
    return weight.masked_fill(~valid, 0.0)  # a picture without a valid pixel is NaN before


def weighted_cross_entropy(
    logits: torch.Tensor, label: torch.Tensor, weight: torch.Tensor, ignore_index: int = 255, joined: Joined = alone
) -> torch.Tensor:
    """sum(w * CE) / sum(w) over the labelled pixels; all K classes compete.

    Args:
        logits: [N, K, H, W].
        label: integer [N, H, W] of class indices; `ignore_index` is left out.
        weight: [N, H, W], not negative; a common factor changes nothing.
        joined: sums the weights over processes, see `model.losses`.

    Returns:
        A scalar, 0 (with a gradient of 0) where no pixel is labelled or all weights are 0.
    """
    label = label.long()
    loss = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="none")  # [N, H, W]
    weight = weight.masked_fill(label == ignore_index, 0.0)
    total = joined(weight.sum())
    return (loss * weight).sum() / torch.where(total > 0, total, 1.0)

"""Backbone and projection together: pictures in, a score for each class and pixel out."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model.backbone import build_backbone, parameter_groups
from model.projection import EmbeddingProjection


def upsample(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear upsampling with align_corners, [N, K, h, w] -> [N, K, height, width].

    Two products with small matrices, since bilinear interpolation is one along rows and one along columns. On a CPU
    the backward pass is several times as fast as that of `F.interpolate`, which it equals to rounding.
    """
    rows, columns = (_interpolation(n, m, logits) for n, m in zip(logits.shape[-2:], (height, width)))
    return rows @ (logits @ columns.T)


def _interpolation(num_inputs: int, num_outputs: int, like: torch.Tensor) -> torch.Tensor:
    """The matrix [num_outputs, num_inputs] of linear interpolation with align_corners."""
    units = torch.eye(num_inputs, device=like.device, dtype=like.dtype)
    return F.interpolate(units[None], size=num_outputs, mode="linear", align_corners=True)[0].T.contiguous()


class Segmenter(nn.Module):
    """A network that scores pixels against word vectors.

    Args:
        backbone: its name, one of `model.backbone.BACKBONES`.
        class_embeddings: float [K, D], a row a class, seen classes first.
        weights: "imagenet", "none" or a path, see `build_backbone`.
        frozen: never train the backbone's trunk.
        cache: folder to keep a frozen trunk's features in.
        scoring: "dot" or "cosine", see `EmbeddingProjection`.

    Raises:
        ModelError: if the backbone can't be built as asked.
    """

    def __init__(
        self,
        backbone: str,
        class_embeddings: torch.Tensor,
        weights: str = "none",
        frozen: bool = False,
        cache: Path | None = None,
        scoring: str = "dot",
    ):
        super().__init__()
        self.backbone = build_backbone(backbone, weights, frozen, cache)
        self.projection = EmbeddingProjection(self.backbone.channels, class_embeddings, scoring)
        # Convolutions are fastest with the channels innermost, upsampling and the losses with the pixels: a
        # frozen EfficientNet-Lite0 step takes 0.8 of the time that it takes with either layout throughout.
        self.to(memory_format=torch.channels_last)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 image [N, 3, H, W] -> logits [N, K, H, W]."""
        return self.score(self.project(image), *image.shape[-2:])

    def project(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 image [N, 3, H, W] -> projections [N, D, h, w], at the resolution of the features."""
        image = image.contiguous(memory_format=torch.channels_last)
        return self.projection.project(self.backbone(image))

    def score(self, projection: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Projections [N, D, h, w] -> logits [N, K, height, width]."""
        return upsample(self.projection.score(projection).contiguous(), height, width)

    def parameter_groups(self, learning_rate: float, factor: float = 10.0) -> list[dict]:
        """Optimiser groups: the trunk at `learning_rate`, classifier and projection `factor` times as fast."""
        return parameter_groups(self.backbone, self.projection, learning_rate, factor)

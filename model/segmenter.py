"""Backbone and projection together: pictures in, a score for each class and pixel out."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model.backbone import ModelError, build_backbone, parameter_groups
from model.parts import in_parts
from model.projection import EmbeddingProjection


def upsample(logits: torch.Tensor, height: int, width: int, stride: int = 1) -> torch.Tensor:
    """Bilinear upsampling with align_corners, [N, K, h, w] -> [N, K, height, width].

    With `stride` only every so manieth row and column of that, from the first on.

    Two products with small matrices, since bilinear interpolation is one along rows and one along columns. On a CPU
    the backward pass is several times as fast as that of `F.interpolate`, which it equals to rounding.
    """
    rows, columns = (_interpolation(n, m, logits)[::stride] for n, m in zip(logits.shape[-2:], (height, width)))
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
        loss_stride: in training mode, logits of every so manieth row and column of pixels only.
        num_auxiliary: classes without a word, before the K others: trained on, but no part of evaluation mode.
        parts: in training mode the batch goes through the backbone in so many parts, see `in_parts`.

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
        loss_stride: int = 1,
        num_auxiliary: int = 0,
        parts: int = 1,
    ):
        super().__init__()
        self.loss_stride, self.num_auxiliary, self.parts = loss_stride, num_auxiliary, parts
        self.backbone = build_backbone(backbone, weights, frozen, cache)
        self.projection = EmbeddingProjection(self.backbone.channels, class_embeddings, scoring, num_auxiliary)
        # Convolutions are fastest with the channels innermost, upsampling and the losses with the pixels: a
        # frozen EfficientNet-Lite0 step takes 0.8 of the time that it takes with either layout throughout.
        self.to(memory_format=torch.channels_last)

    def forward(self, image: torch.Tensor, with_features: bool = False) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """uint8 image [N, 3, H, W] -> logits [N, K, H, W], and the features if asked for.

        In evaluation mode without the auxiliary classes, in training mode at every `loss_stride`-th pixel.
        """
        features = self.features(image)
        logits = self.score(features, *image.shape[-2:])
        return (logits, features) if with_features else logits

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 image [N, 3, H, W] -> what the projection takes, [N, C, h, w]."""
        image = image.contiguous(memory_format=torch.channels_last)
        if self.parts == 1 or not self.training:
            return self.backbone(image)
        if len(image) < self.parts:
            raise ModelError(f"--accumulate {self.parts}: a step has {len(image)} pictures a process: give no more")
        return in_parts(self.backbone, image, self.parts)

    def score(self, features: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Features [N, C, h, w] of pictures height x width -> logits, as `forward` gives them."""
        logits = self.projection(features).contiguous()  # [N, K, h, w]
        if self.training:
            return upsample(logits, height, width, self.loss_stride)
        return upsample(logits[:, self.num_auxiliary :], height, width)

    def score_features(self, features: torch.Tensor) -> torch.Tensor:
        """Trunk features [N, C, h, w] -> logits of all classes [N, K, h, w], the auxiliary ones among them."""
        return self.projection(self.backbone.classifier(features))

    def parameter_groups(self, learning_rate: float, factor: float = 10.0) -> list[dict]:
        """Optimiser groups: the trunk at `learning_rate`, classifier and projection `factor` times as fast."""
        return parameter_groups(self.backbone, self.projection, learning_rate, factor)

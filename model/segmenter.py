"""Backbone and projection together: pictures in, a score for each class and pixel out."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2.functional import resize

from model.backbone import Backbone, build_backbone, parameter_groups
from model.parts import in_parts
from model.projection import EmbeddingProjection
from model.upsampling import PixelLogits, upsample
from utils.errors import UserError

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The precision of the convolutions in training, by the names of --amp."""


@functools.cache
def _compiled() -> Callable[[Backbone, torch.Tensor], torch.Tensor]:
    """backbone(image), compiled. A free function: the network's weights keep their names, and it can be copied."""
    return torch.compile(lambda backbone, image: backbone(image), dynamic=False)


class Segmenter(nn.Module):
    """A network that scores pixels against word vectors.

    Args:
        backbone: its name, one of `model.backbone.BACKBONES`.
        class_embeddings: float [K, D], a row a class, seen classes first.
        weights: "imagenet", "none" or a path, see `build_backbone`.
        frozen: never train the backbone's trunk.
        cache: folder to keep a frozen trunk's features in.
        loss_stride: in training mode, logits of every so manieth row and column of pixels only.
        num_auxiliary: classes without a word, before the K others: trained on, but no part of evaluation mode.
        amp: one of `AMP`, the precision of the backbone in training mode; weights and projection are float32 always.
        compiled: in training mode, run the backbone through torch.compile.
        parts: in training mode the batch goes through the backbone in so many parts, see `in_parts`.

    Raises:
        UserError: if the backbone can't be built as asked.
    """

    def __init__(
        self,
        backbone: str,
        class_embeddings: torch.Tensor,
        weights: str = "none",
        frozen: bool = False,
        cache: Path | None = None,
        loss_stride: int = 1,
        num_auxiliary: int = 0,
        amp: str = "off",
        compiled: bool = False,
        parts: int = 1,
    ):
        super().__init__()
        self.loss_stride, self.num_auxiliary, self.parts = loss_stride, num_auxiliary, parts
        self.amp, self.compiled = AMP[amp], compiled
        self.backbone = build_backbone(backbone, weights, frozen, cache)
        self.projection = EmbeddingProjection(self.backbone.channels, class_embeddings, num_auxiliary)
        # Convolutions are fastest with the channels innermost, upsampling and the losses with the pixels: a
        # frozen EfficientNet-Lite0 step takes 0.8 of the time that it takes with either layout throughout.
        self.to(memory_format=torch.channels_last)

    def forward(self, image: torch.Tensor) -> torch.Tensor | PixelLogits:
        """uint8 image [N, 3, H, W] -> logits [N, K, H, W].

        In evaluation mode without the auxiliary classes. In training mode at every `loss_stride`-th pixel, and not yet
        upsampled: `model.pixel_losses` takes them like that.
        """
        return self.score(self.features(image), *image.shape[-2:])

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 image [N, 3, H, W] -> what the projection takes, float32 [N, C, h, w]."""
        # Crops are all of one size, so a GPU may try which algorithm is fastest; pictures to evaluate are not.
        torch.backends.cudnn.benchmark = self.training and not torch.are_deterministic_algorithms_enabled()
        image = image.contiguous(memory_format=torch.channels_last)
        if not self.training:
            return self.backbone(image)
        if len(image) < self.parts:
            raise UserError(f"--accumulate {self.parts}: a step has {len(image)} pictures a process: give no more")
        compiled = self.compiled and self.backbone.cache is None  # files are no matter for a compiler
        run = _compiled() if compiled else nn.Module.__call__
        with torch.autocast(image.device.type, self.amp, enabled=self.amp is not None):
            features = in_parts(self.backbone, image, self.parts, run)
        return features.float()

    def score(self, features: torch.Tensor, height: int, width: int) -> torch.Tensor | PixelLogits:
        """Features [N, C, h, w] of pictures height x width -> logits, as `forward` gives them."""
        logits = self.projection(features).contiguous()  # [N, K, h, w]
        if self.training:
            return PixelLogits(logits, height, width, self.loss_stride)
        return upsample(logits[:, self.num_auxiliary :], height, width)

    def score_features(self, features: torch.Tensor) -> torch.Tensor:
        """Trunk features [N, C, h, w] -> logits of all classes [N, K, h, w], the auxiliary ones among them."""
        return self.projection(self.backbone.classifier(features))

    def parameter_groups(self, learning_rate: float, factor: float = 10.0) -> list[dict]:
        """Optimiser groups: the trunk at `learning_rate`, classifier and projection `factor` times as fast."""
        return parameter_groups(self.backbone, self.projection, learning_rate, factor)


@torch.no_grad()
def mean_over_views(
    model: Segmenter, image: torch.Tensor, scales: Sequence[float] = (1.0,), flip: bool = False
) -> torch.Tensor:
    """Logits [N, K, H, W] whose softmax is the mean of the softmax over views of images uint8 [N, 3, H, W].

    Args:
        model: in evaluation mode.
        scales: sizes of the views, as multiples of the image's.
        flip: each scale mirrored left to right too.
    """
    size, total = image.shape[-2:], 0.0
    for scale in scales:  # one view at a time, summed at once: memory does not grow with their number
        scaled_size = [max(1, round(side * scale)) for side in size]
        scaled = image if scaled_size == list(size) else resize(image, scaled_size, antialias=True)
        for mirrored in (False, True) if flip else (False,):
            probability = model(scaled.flip(-1) if mirrored else scaled).float().softmax(dim=1)  # [N, K, h, w]
            probability = probability.flip(-1) if mirrored else probability
            if probability.shape[-2:] != size:
                # Pixel centres as in the resizing of the image, which align_corners would shift.
                probability = F.interpolate(probability, size, mode="bilinear", align_corners=False, antialias=True)
            total = total + probability
    mean = total / (len(scales) * (1 + flip))
    return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()

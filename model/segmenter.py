"""Backbone and projection together: images in, a score for each class and pixel out."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2.functional import resize

from model.backbone import Backbone, start_new_layer
from model.upsampling import PixelLogits

LONGEST_SIDE = 1024
"""Pixels at which larger images are predicted. Those of VOC, PASCAL Context and COCO are smaller."""

MIN_SIDE = 32
"""Pixels to which narrower images are stretched: the strides of the networks leave nothing of less."""


class EmbeddingProjection(nn.Module):
    """logits = projection(features) . class_embeddings^T

    Features have C `channels`. `class_embeddings`, float [K, D], have a row a class, seen classes first; they are kept
    L2-normalised and never trained. `num_auxiliary` classes without a word are scored by a learnt 1x1 convolution,
    before the others and in training only.
    """

    def __init__(self, channels: int, class_embeddings: torch.Tensor, num_auxiliary: int = 0):
        super().__init__()
        self.auxiliary = nn.Conv2d(channels, num_auxiliary, kernel_size=1) if num_auxiliary else None
        self.project = nn.Conv2d(channels, class_embeddings.shape[1], kernel_size=1)
        start_new_layer(self.project)
        self.register_buffer("class_embeddings", F.normalize(class_embeddings.float(), dim=1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, C, h, w] -> logits [N, num_auxiliary + K, h, w], in evaluation mode [N, K, h, w]."""
        logits = F.conv2d(self.project(features), self.class_embeddings[:, :, None, None])  # [N, K, h, w]
        if self.auxiliary is None or not self.training:
            return logits
        return torch.cat([self.auxiliary(features), logits], dim=1)


class Segmenter(nn.Module):
    """A network that scores pixels against word vectors, float [K, D]: see `build_backbone`, `EmbeddingProjection`.

    In training mode it gives logits of every `loss_stride`-th row and column of pixels, and the backbone has the
    precision `amp`, "bf16" or "off"; weights and projection are float32 always.
    """

    def __init__(self, backbone: Backbone, class_embeddings: torch.Tensor, num_auxiliary=0, loss_stride=1, amp="off"):
        super().__init__()
        self.backbone = backbone
        self.projection = EmbeddingProjection(backbone.channels, class_embeddings, num_auxiliary)
        self.loss_stride, self.amp = loss_stride, amp
        # Convolutions are fastest with the channels innermost, upsampling and the losses with the pixels: a
        # frozen EfficientNet-Lite0 step takes 0.8 of the time that it takes with either layout throughout.
        self.to(memory_format=torch.channels_last)

    def forward(self, image: torch.Tensor) -> torch.Tensor | PixelLogits:
        """uint8 image [N, 3, H, W] -> logits [N, K, H, W]; in training mode not yet upsampled, for `model.losses`."""
        logits = PixelLogits(self.coarse_logits(image), *image.shape[-2:], self.loss_stride if self.training else 1)
        return logits if self.training else logits.whole()

    def coarse_logits(self, image: torch.Tensor) -> torch.Tensor:
        """The same before upsampling, float32 [N, K, h, w]."""
        # Crops are all of one size, so a GPU may try which algorithm is fastest; images to evaluate are not.
        torch.backends.cudnn.benchmark = self.training and not torch.are_deterministic_algorithms_enabled()
        image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.training and self.amp == "bf16"):
            features = self.backbone(image).float()  # [N, C, h, w]
        return self.projection(features).contiguous()

    @torch.no_grad()
    def pixel_logits(
        self, image: torch.Tensor, longest_side: int = LONGEST_SIDE, scales: Sequence[float] = (1.0,),
        flip: bool = False, edges: bool = False,
    ) -> PixelLogits:  # fmt: skip
        """Logits [N, K, H, W] of images uint8 [N, 3, H, W] of any size, upsampled only where they are read.

        Larger images than `longest_side` are resized to it for the network; memory grows with it and hardly with the
        size of the images. The softmax is averaged over `scales` and, with `flip`, mirror images. With `edges`, borders
        between classes follow the edges of the image, see `guided_filter`. Evaluation mode only.
        """
        size = image.shape[-2:]
        image = _resized(image, longest_side / max(*size, longest_side))
        if not edges and not flip and tuple(scales) == (1.0,):
            return PixelLogits(self.coarse_logits(image), *size)
        total = 0.0
        for view in (_resized(image, scale) for scale in scales):  # summed one by one: memory stays that of a view
            coarse = [self.coarse_logits(view)] + [self.coarse_logits(view.flip(-1)).flip(-1)] * flip
            total = total + sum(PixelLogits(logits, *image.shape[-2:]).whole().softmax(dim=1) for logits in coarse)
        probability = total / (len(scales) * (1 + flip))
        if edges:
            probability = guided_filter(probability, image)
        return PixelLogits(probability.clamp(min=torch.finfo(torch.float32).tiny).log(), *size)

    def parameter_groups(self, learning_rate: float, factor: float = 10.0) -> list[dict]:
        """Optimiser groups: the trunk at `learning_rate`; classifier and projection `factor` times as fast."""
        trunk = [p for p in self.backbone.trunk.parameters() if p.requires_grad]
        head = [*self.backbone.classifier.parameters(), *self.projection.parameters()]
        groups = [{"params": trunk, "lr": learning_rate}, {"params": head, "lr": factor * learning_rate}]
        return groups if trunk else groups[1:]


def _resized(image: torch.Tensor, scale: float) -> torch.Tensor:
    """The image at a multiple of its size, `MIN_SIDE` at least."""
    size = [max(MIN_SIDE, round(side * scale)) for side in image.shape[-2:]]
    return image if size == list(image.shape[-2:]) else resize(image, size, antialias=True)


def guided_filter(probability: torch.Tensor, image: torch.Tensor, radius=8, epsilon=1e-3) -> torch.Tensor:
    """Probabilities that follow the edges of the image: He, Sun and Tang, "Guided Image Filtering", ECCV 2010.

    In each window of the image the probability of a class is fitted by a linear function of the brightness, by ridge
    regression; a pixel gets the mean of the functions of all windows that it lies in. Windows of little contrast blur.

    `probability` is float [N, K, H, W], `image` uint8 [N, 3, H, W]; `radius` is that of a window in pixels, `epsilon`
    that of the ridge regression, a variance of brightness in [0, 1].
    """

    def box(x: torch.Tensor) -> torch.Tensor:
        """Mean over the window of each pixel."""
        x = F.avg_pool2d(x, (2 * radius + 1, 1), 1, (radius, 0), count_include_pad=False)
        return F.avg_pool2d(x, (1, 2 * radius + 1), 1, (0, radius), count_include_pad=False)

    grey = image.float().mean(dim=1, keepdim=True) / 255
    mean = box(grey)
    variance = box(grey.square()) - mean.square()
    result = torch.empty_like(probability)
    for p, out in zip(probability.split(1, dim=1), result.split(1, dim=1)):  # a class at a time, to save memory
        slope = (box(grey * p) - mean * box(p)) / (variance + epsilon)  # [N, 1, H, W]
        out.copy_(box(slope) * grey + box(box(p) - slope * mean))
    return result

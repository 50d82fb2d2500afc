"""Backbone and projection together: images in, a score for each class and pixel out."""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2.functional import resize

from model.backbone import Backbone, build_backbone, start_new_layer
from model.upsampling import PixelLogits, upsample
from utils.errors import UserError

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The precision of the convolutions in training, by the names of --amp."""

LONGEST_SIDE = 1024
"""Pixels at which larger images are predicted. Those of VOC, PASCAL Context and COCO are smaller."""

MIN_SIDE = 32
"""Pixels to which narrower images are stretched: the strides of the networks leave nothing of less."""


class EmbeddingProjection(nn.Module):
    """Projects features into the embedding space and scores them against the class embeddings.

    logits = projection(features) . class_embeddings^T

    Args:
        channels: depth C of the features.
        class_embeddings: float [K, D], a row a class, seen classes first. Kept L2-normalised, never trained.
        num_auxiliary: classes without a word, scored by a learnt 1x1 convolution, before the others.
    """

    def __init__(self, channels: int, class_embeddings: torch.Tensor, num_auxiliary: int = 0):
        super().__init__()
        self.auxiliary = nn.Conv2d(channels, num_auxiliary, kernel_size=1) if num_auxiliary else None
        self.project = nn.Conv2d(channels, class_embeddings.shape[1], kernel_size=1)
        start_new_layer(self.project)
        self.register_buffer("class_embeddings", F.normalize(class_embeddings.float(), dim=1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, C, h, w] -> logits [N, num_auxiliary + K, h, w]."""
        logits = F.conv2d(self.project(features), self.class_embeddings[:, :, None, None])  # [N, K, h, w]
        return logits if self.auxiliary is None else torch.cat([self.auxiliary(features), logits], dim=1)


@functools.cache
def _compiled() -> Callable[[Backbone, torch.Tensor], torch.Tensor]:
    """backbone(image), compiled. A free function: the network's weights keep their names, and it can be copied."""
    return torch.compile(lambda backbone, image: backbone(image), dynamic=False)


class Segmenter(nn.Module):
    """A network that scores pixels against word vectors.

    Args:
        backbone: see `model.backbone.build_backbone`.
        class_embeddings: float [K, D], a row a class, seen classes first.
        num_auxiliary: classes without a word, before the K others: trained on, but no part of evaluation mode.
        loss_stride: in training mode, logits of every loss_stride-th row and column of pixels only.
        amp: one of `AMP`, the precision of the backbone in training; weights and projection are float32 always.
        compiled: in training mode, run the backbone through torch.compile.

    Raises:
        UserError: if the backbone can't be compiled.
    """

    def __init__(
        self,
        backbone: Backbone,
        class_embeddings: torch.Tensor,
        num_auxiliary: int = 0,
        loss_stride: int = 1,
        amp: str = "off",
        compiled: bool = False,
    ):
        super().__init__()
        if compiled and backbone.checkpoint_activations:
            raise UserError("--compile can't be used with --checkpoint-activations: leave one of them out")
        self.backbone = backbone
        self.projection = EmbeddingProjection(backbone.channels, class_embeddings, num_auxiliary)
        self.num_auxiliary, self.loss_stride, self.amp = num_auxiliary, loss_stride, AMP[amp]
        self.compiled = compiled and backbone.cache is None  # a compiler can't read files
        # Convolutions are fastest with the channels innermost, upsampling and the losses with the pixels: a
        # frozen EfficientNet-Lite0 step takes 0.8 of the time that it takes with either layout throughout.
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_weights(cls, backbone: str, weights: Mapping[str, torch.Tensor]) -> "Segmenter":
        """The network of a checkpoint, from the backbone's name and the state dict alone.

        Raises:
            UserError: if there is no such backbone.
            KeyError, RuntimeError: if the weights are not those of such a network.
        """
        auxiliary = weights.get("projection.auxiliary.weight", ())
        model = cls(build_backbone(backbone), weights["projection.class_embeddings"], len(auxiliary))
        model.load_state_dict(weights)
        return model

    def forward(self, image: torch.Tensor) -> torch.Tensor | PixelLogits:
        """uint8 image [N, 3, H, W] -> logits [N, K, H, W].

        In evaluation mode without the auxiliary classes. In training mode at every `loss_stride`-th pixel, and not yet
        upsampled: `model.losses` takes them like that.
        """
        logits = self.projection(self.features(image)).contiguous()  # [N, num_auxiliary + K, h, w]
        if self.training:
            return PixelLogits(logits, *image.shape[-2:], self.loss_stride)
        return upsample(logits[:, self.num_auxiliary :], *image.shape[-2:])

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 image [N, 3, H, W] -> what the projection takes, float32 [N, C, h, w]."""
        # Crops are all of one size, so a GPU may try which algorithm is fastest; images to evaluate are not.
        torch.backends.cudnn.benchmark = self.training and not torch.are_deterministic_algorithms_enabled()
        image = image.contiguous(memory_format=torch.channels_last)
        if not self.training:
            return self.backbone(image)
        run = _compiled() if self.compiled else nn.Module.__call__
        with self.autocast(image.device):
            return run(self.backbone, image).float()

    def autocast(self, device: torch.device) -> torch.autocast:
        """Within it convolutions run in the precision of training."""
        return torch.autocast(device.type, self.amp, enabled=self.amp is not None)

    @torch.no_grad()
    def pixel_logits(
        self, image: torch.Tensor, longest_side: int = LONGEST_SIDE, scales: Sequence[float] = (1.0,),
        flip: bool = False, edges: bool = False,
    ) -> PixelLogits:  # fmt: skip
        """Logits [N, K, H, W] of images uint8 [N, 3, H, W] of any size, upsampled only where they are read.

        Memory grows with `longest_side` and hardly with the size of the images. Evaluation mode only.

        Args:
            longest_side: larger images are resized to this for the network.
            scales, flip: views over which the softmax is averaged, see `mean_over_views`.
            edges: let borders between classes follow the edges of the image, see `guided_filter`.
        """
        height, width = image.shape[-2:]
        scale = min(1.0, longest_side / max(height, width))
        size = [max(MIN_SIDE, round(side * scale)) for side in (height, width)]
        image = image if size == [height, width] else resize(image, size, antialias=True)
        if edges or flip or tuple(scales) != (1.0,):
            logits = mean_over_views(self, image, scales, flip)
            if edges:
                probability = guided_filter(logits.softmax(dim=1), image.float() / 255)
                logits = probability.clamp(min=torch.finfo(torch.float32).tiny).log()
            return PixelLogits(logits, height, width)
        logits = self.projection(self.features(image)).contiguous()  # [N, num_auxiliary + K, h, w]
        return PixelLogits(logits[:, self.num_auxiliary :], height, width)

    def parameter_groups(self, learning_rate: float, factor: float = 10.0) -> list[dict]:
        """Optimiser groups: the trunk at `learning_rate`; classifier and projection `factor` times as fast."""
        trunk = [p for p in self.backbone.trunk.parameters() if p.requires_grad]
        head = [*self.backbone.classifier.parameters(), *self.projection.parameters()]
        groups = [{"params": trunk, "lr": learning_rate}, {"params": head, "lr": factor * learning_rate}]
        return [group for group in groups if group["params"]]


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


def guided_filter(
    probability: torch.Tensor, image: torch.Tensor, radius: int = 8, epsilon: float = 1e-3, least: float = 0.05
) -> torch.Tensor:
    """Probabilities that follow the edges of the image: He, Sun and Tang, "Guided Image Filtering", ECCV 2010.

    In each window of the image the probability of a class is fitted by a linear function of the colour, by ridge
    regression; a pixel gets the mean of the functions of all windows that it lies in.

    Args:
        probability: float [N, K, H, W].
        image: float [N, 3, H, W] in [0, 1].
        radius: of a window, in pixels.
        epsilon: of the ridge regression, a variance of colours: below it a window counts as flat.
        least: classes whose probability stays below this are left as they are.
    """

    def window_mean(size: int) -> torch.Tensor:  # [size, size]
        place = torch.arange(size, device=image.device)
        inside = ((place[:, None] - place).abs() <= radius).float()
        return inside / inside.sum(dim=1, keepdim=True)

    def box(x: torch.Tensor) -> torch.Tensor:
        """Mean over the window of each pixel."""
        return rows @ (x @ columns.T)

    rows, columns = map(window_mean, image.shape[-2:])
    mean = box(image)
    products = box((image[:, :, None] * image[:, None]).flatten(1, 2)).unflatten(1, (3, 3))
    covariance = (products - mean[:, :, None] * mean[:, None]).movedim((1, 2), (-2, -1))  # [N, H, W, 3, 3]
    inverse = torch.linalg.inv(covariance + epsilon * torch.eye(3, device=image.device))
    result = probability.clone()
    for c in (probability.amax((0, 2, 3)) > least).nonzero()[:, 0].tolist():
        p = probability[:, c : c + 1]
        mean_p = box(p)
        slope = torch.einsum("nhwij,njhw->nihw", inverse, box(image * p) - mean * mean_p)  # [N, 3, H, W]
        offset = mean_p - (slope * mean).sum(1, keepdim=True)
        result[:, c] = (box(slope) * image).sum(1) + box(offset)[:, 0]
    return result


def calibrate(logits: torch.Tensor, num_seen: int, gamma: float) -> torch.Tensor:
    """Calibrated stacking: softmax, less `gamma` for the seen classes.

    A network that never had a label of an unseen class prefers the seen ones; gamma is by how much more probable a seen
    class must be (Chao et al., ECCV 2016; SPNet, Xian et al., CVPR 2019). The order among the seen classes stays, and
    that among the unseen ones.

    Args:
        logits: [N, K, H, W], seen classes first.
        num_seen: the first `num_seen` of the K classes are seen.
        gamma: in [0, 1]; 0 changes nothing, 1 lets no seen class win.

    Returns:
        Scores [N, K, H, W] for an argmax; they are no probabilities. With gamma 0 the logits themselves.
    """
    if gamma == 0:
        return logits
    scores = logits.softmax(dim=1)
    scores[:, :num_seen] -= gamma
    return scores

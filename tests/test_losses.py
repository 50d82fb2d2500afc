"""Each loss against a plain NumPy version, at the edges, and in blocks; the scripts' weighted sums of them."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import nn

from helpers import STAGES
from model import losses, upsampling
from model.losses import bias_loss, cross_entropy, pseudo_labels
from model.upsampling import PixelLogits

SEEN, CLASSES, VOID = 3, 5, 255


def numpy_cross_entropy(logits, label):
    known = np.where(label == VOID, 0, label)[:, None].astype(int)
    picked = np.take_along_axis(softmax(logits.astype(float), axis=1), known, axis=1)[:, 0]
    return -np.log(picked[label != VOID]).sum() / max((label != VOID).sum(), 1)


def numpy_bias(logits, valid, num_seen=SEEN):
    loss = -np.log(softmax(logits.astype(float), axis=1)[:, num_seen:].sum(axis=1) + 1e-5)
    return (loss * valid).sum() / max(valid.sum(), 1)


def numpy_pseudo(logits, valid, keep, num_seen=SEEN):
    """The best unseen class of the floor(keep n) + 1 valid pixels with the highest unseen logit."""
    unseen = logits[:, num_seen:]
    best = np.where(valid, unseen.max(axis=1), -np.inf)
    order = np.argsort(-best, axis=None)[: min(int(keep * valid.sum()) + 1, valid.sum())]
    label = np.full(valid.shape, VOID)
    label.flat[order] = num_seen + unseen.argmax(axis=1).flat[order]
    return label


def scene(seed, scale=3.0):
    """Random logits, labels with void pixels, and valid pixels, as arrays."""
    draw = np.random.default_rng(seed)
    logits = (scale * draw.standard_normal((3, CLASSES, 6, 7))).astype(np.float32)
    label = draw.integers(0, CLASSES, (3, 6, 7)).astype(np.uint8)
    label[draw.random(label.shape) < 0.3] = VOID
    return logits, label, draw.random(label.shape) < 0.6


@pytest.mark.parametrize("seed, scale", [(0, 3.0), (1, 3.0), (2, 1000.0)])
@pytest.mark.parametrize("num_seen", [1, 3, 4])
def test_losses_are_those_of_numpy(seed, scale, num_seen):
    """At a scale of 1000, no probability is left for the unseen classes of many pixels."""
    logits, label, valid = scene(seed, scale)
    label[softmax(logits.astype(float), axis=1).min(axis=1) == 0] = VOID  # where NumPy's logarithm is not finite
    ce = cross_entropy(*map(torch.tensor, (logits, label)))
    bias = bias_loss(torch.tensor(logits), num_seen, torch.tensor(valid))
    assert ce.item() == pytest.approx(numpy_cross_entropy(logits, label), rel=1e-5)
    assert bias.item() == pytest.approx(numpy_bias(logits, valid, num_seen), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", [0.0, 0.25, 0.6, 1.0])
def test_pseudo_labels_are_those_of_numpy(seed, keep):
    logits, _, valid = scene(seed)
    logits[:, :SEEN] += 50 * (seed == 2)  # a seen class that wins is no candidate
    found = pseudo_labels(torch.tensor(logits, requires_grad=True), SEEN, torch.tensor(valid), keep)
    np.testing.assert_array_equal(found.numpy(), numpy_pseudo(logits, valid, keep))
    assert not found.requires_grad


@pytest.mark.parametrize(
    "balanced, expected", [(False, [1, 1, 1, 1] + [VOID] * 4), (True, [1, 1, VOID, VOID, VOID, 2, VOID, 2])]
)
def test_balanced_pseudo_labels_keep_the_highest_of_each_class(balanced, expected):
    logits = torch.full((1, 3, 1, 8), -9.0)
    logits[0, 1, 0, :4] = torch.tensor([8.0, 7.0, 6.0, 5.0])
    logits[0, 2, 0, 4:] = torch.tensor([1.0, 4.0, 2.0, 3.0])  # lower than every logit of class 1
    valid = torch.ones(1, 1, 8, dtype=torch.bool)
    assert pseudo_labels(logits, 1, valid, keep=0.4, balanced=balanced).flatten().tolist() == expected


SIZES = [(37, 29, 1), (37, 29, 4), (8, 5, 1), (1, 1, 1)]  # of the images, and the stride of the losses


@pytest.fixture(params=[1, 700, 2**18], ids=["rows", "images", "whole"])
def block(request, monkeypatch):
    """Blocks of a few rows of an image, of an image, and of all."""
    monkeypatch.setitem(upsampling.BLOCK, "cpu", request.param)


@pytest.fixture
def coarse():
    torch.manual_seed(0)
    return (2 * torch.randn(3, CLASSES, 6, 4)).requires_grad_()


@pytest.mark.parametrize("size", SIZES)
def test_blocks_give_values_gradients_and_pseudo_labels_of_the_whole(block, coarse, size, monkeypatch):
    logits = PixelLogits(coarse, *size)
    shape = (3, *logits.shape[2:])
    label = torch.randint(CLASSES, shape, dtype=torch.uint8).masked_fill(torch.rand(shape) < 0.3, VOID)
    valid = torch.rand(shape) < 0.7
    found, expected = (pseudo_labels(x, SEEN, valid, 0.4) for x in (logits, logits.whole()))
    assert found.shape == expected.shape and (found != expected).sum() <= 1  # rounding may move one pixel
    monkeypatch.setattr(losses, "all_reduce_sum", lambda count: count + 7)  # pixels of other processes
    for loss, given in ((cross_entropy, {"label": label}), (bias_loss, {"num_seen": SEEN, "valid": valid})):
        value, expected = (loss(x, **given) for x in (logits, logits.whole()))
        (gradient,), (slope,) = (torch.autograd.grad(3 * x, coarse) for x in (value, expected))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-5 * slope.abs().max().item())


def test_upsampling_aligns_corners_and_parts_are_those_of_the_whole(coarse):
    logits = PixelLogits(coarse, 37, 29, 4)
    expected = nn.functional.interpolate(coarse, (37, 29), mode="bilinear", align_corners=True)
    torch.testing.assert_close(PixelLogits(coarse, 37, 29).whole(), expected)
    torch.testing.assert_close(logits.whole(), expected[..., ::4, ::4])
    for part, images in zip(logits.split([1, 2]), expected[..., ::4, ::4].split([1, 2])):
        torch.testing.assert_close(part.whole(), images)
    assert logits.shape == (3, CLASSES, 10, 8)


def tiny():
    """uint8 image -> logits of the same size, by one 1x1 convolution."""
    torch.manual_seed(1)
    network = nn.Conv2d(3, CLASSES, 1)
    network.register_forward_pre_hook(lambda _, images: images[0].float() / 32)
    return network


def batches():
    """Source and target batch, with void and invalid pixels; seen labels only."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (5, 3, 6, 6), generator=draw, dtype=torch.uint8)
    label = torch.randint(0, SEEN, (3, 6, 6), generator=draw, dtype=torch.uint8)
    label[:, 0] = VOID
    return (image[:3], label), (image[3:], torch.rand(2, 6, 6, generator=draw) < 0.7, torch.ones(2) > 0)


def step(stage, network, rate=0.1, momentum=0.0, data=None, num_seen=SEEN, **changes):
    """One step of the script's own `train_step`; gives its losses."""
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=momentum)
    settings = {"lambda_": 0.7, "weak_proportion": 0.3, "self_training_weight": 0.7, "keep": 0.5,
                "balance_classes": False, "loss_stride": 1}  # fmt: skip
    return STAGES[stage].train_step(network, optimizer, *(data or batches()), num_seen, Namespace(**settings | changes))


def numpy_total(stage, network):
    """The script's loss by the NumPy formulas."""
    (image, label), (target_image, valid, _) = batches()
    with torch.no_grad():
        logits, target_logits = network(image).numpy(), network(target_image).numpy()
    label, valid, w = label.numpy(), valid.numpy(), 0.3
    if stage == 1:
        bias = (1 - w) * numpy_bias(logits, label != VOID) + w * numpy_bias(target_logits, valid)
        return numpy_cross_entropy(logits, label) + 0.7 * bias
    pseudo = numpy_pseudo(target_logits, valid, 0.5)
    return numpy_cross_entropy(logits, label) + w * 0.7 * numpy_cross_entropy(target_logits, pseudo)


@pytest.mark.parametrize("stage", STAGES)
def test_train_step_follows_the_slope_of_the_formula(stage):
    """Measured by small changes of a weight; a gradient of an earlier step does not count."""
    network = tiny()
    before, expected = network.bias.detach().clone(), numpy_total(stage, network)
    slopes = []
    for change in 1e-3 * torch.eye(CLASSES):
        sides = []
        for sign in (1, -1):
            network.bias.data = before + sign * change
            sides.append(numpy_total(stage, network))
        slopes.append((sides[0] - sides[1]) / 2e-3)
    network.bias.data = before.clone()
    network.bias.grad = torch.full_like(before, 1e6)
    assert step(stage, network, rate=1.0)["total"].item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose((before - network.bias.detach()).numpy(), slopes, atol=2e-3)


IMAGES = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(2)).byte()
NO_LABEL, ONE_CLASS = torch.full((2, 16, 16), VOID).byte(), torch.zeros(2, 16, 16).byte()
NO_PIXEL, ALL_PIXELS = torch.zeros(2, 16, 16, dtype=torch.bool), torch.ones(2, 16, 16, dtype=torch.bool)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("label, valid, changes", [
    pytest.param(ONE_CLASS, ALL_PIXELS, {}, id="one class in the batch"),
    pytest.param(ONE_CLASS, NO_PIXEL, {}, id="no valid target pixel"),
    pytest.param(ONE_CLASS, NO_PIXEL[:0], {}, id="no target image"),
    pytest.param(NO_LABEL, ALL_PIXELS, {}, id="no label"),
    pytest.param(ONE_CLASS, ALL_PIXELS, {"num_seen": 1}, id="one seen class"),
    pytest.param(ONE_CLASS, ALL_PIXELS, {"num_seen": 4}, id="one unseen class"),
    pytest.param(ONE_CLASS, ALL_PIXELS, {"keep": 0.0}, id="nothing kept"),
    pytest.param(ONE_CLASS, ALL_PIXELS, {"keep": 1.0, "balance_classes": True}, id="everything kept, balanced"),
    pytest.param(ONE_CLASS, ALL_PIXELS, {"lambda_": 0.0, "self_training_weight": 0.0}, id="source only"),
    pytest.param(NO_LABEL, NO_PIXEL, {"momentum": 0.9}, id="no pixel"),
])  # fmt: skip
def test_step_at_the_edge_is_finite_and_learns_where_there_is_a_pixel(stage, label, valid, changes):
    network = tiny()
    before = network.weight.detach().clone()
    losses = step(stage, network, data=((IMAGES, label), (IMAGES[: len(valid)], valid, valid.any(2).any(1))), **changes)
    assert all(loss.isfinite() for loss in losses.values()) and network.weight.isfinite().all()
    learns = bool((label != VOID).any() or valid.any())
    assert torch.equal(before, network.weight) != learns and bool(losses["total"]) == learns

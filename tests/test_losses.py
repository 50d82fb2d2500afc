"""Each loss against a plain NumPy version, at the edges, and in blocks; the scripts' weighted sums of them."""

import math
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import STAGES
from model import upsampling
from model.losses import EPSILON, _value_of_rank, bias_loss, cross_entropy, identity, pseudo_labels
from model.upsampling import PixelLogits, upsample

SEEN, CLASSES, VOID = 3, 5, 255


def softmax(logits):
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def numpy_cross_entropy(logits, label, weight=None):
    weight = np.where(label == VOID, 0, 1.0 if weight is None else weight)
    picked = np.take_along_axis(softmax(logits), np.where(label == VOID, 0, label)[:, None].astype(int), axis=1)[:, 0]
    return (-np.log(picked) * weight).sum() / max(weight.sum(), 1e-9)


def numpy_bias(logits, valid, num_seen=SEEN):
    loss = -np.log(softmax(logits)[:, num_seen:].sum(axis=1) + 1e-5)
    return (loss * valid).sum() / max(valid.sum(), 1)


def numpy_pseudo(logits, valid, keep, num_seen=SEEN):
    """The best unseen class of the floor(keep n) + 1 valid pixels with the highest unseen logit."""
    unseen = logits[:, num_seen:]
    best = np.where(valid, unseen.max(axis=1), -np.inf)
    order = np.argsort(-best, axis=None)[: min(int(keep * valid.sum()) + 1, valid.sum())]
    label = np.full(valid.shape, VOID)
    label.flat[order] = num_seen + unseen.argmax(axis=1).flat[order]
    return label


def scene(seed=0, size=(2, CLASSES, 6, 7)):
    """Random logits, labels with void pixels, and valid pixels, as arrays."""
    draw = np.random.default_rng(seed)
    logits = (3 * draw.standard_normal(size)).astype(np.float32)
    label = draw.integers(0, CLASSES, (size[0], *size[2:])).astype(np.uint8)
    label[draw.random(label.shape) < 0.3] = VOID
    return logits, label, draw.random(label.shape) < 0.6


# Formulas


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(seed, weighted):
    logits, label, _ = scene(seed)
    weight = np.random.default_rng(seed).random(label.shape) if weighted else None
    found = cross_entropy(torch.tensor(logits), torch.tensor(label), None if weight is None else torch.tensor(weight))
    assert found.item() == pytest.approx(numpy_cross_entropy(logits, label, weight), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_seen", [1, 3, 4])
def test_bias_loss(seed, num_seen):
    logits, _, valid = scene(seed)
    found = bias_loss(torch.tensor(logits), num_seen, torch.tensor(valid))
    assert found.item() == pytest.approx(numpy_bias(logits, valid, num_seen), rel=1e-5)


def test_bias_loss_without_unseen_probability_is_the_log_of_epsilon():
    logits = torch.zeros(1, CLASSES, 2, 2)
    logits[:, 0] = 1000.0
    found = bias_loss(logits, SEEN, torch.ones(1, 2, 2, dtype=torch.bool))
    assert found.item() == pytest.approx(-math.log(EPSILON), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", [0.0, 0.25, 0.6, 1.0])
def test_pseudo_labels(seed, keep):
    logits, _, valid = scene(seed, size=(3, CLASSES, 5, 4))
    logits[:, :SEEN] += 50 * (seed == 2)  # a seen class that wins is no candidate
    found = pseudo_labels(torch.tensor(logits, requires_grad=True), SEEN, torch.tensor(valid), keep)
    np.testing.assert_array_equal(found.numpy(), numpy_pseudo(logits, valid, keep))
    assert not found.requires_grad


def test_balanced_pseudo_labels_keep_the_highest_of_each_class():
    logits = torch.full((1, 3, 1, 8), -9.0)
    logits[0, 1, 0, :4] = torch.tensor([8.0, 7.0, 6.0, 5.0])
    logits[0, 2, 0, 4:] = torch.tensor([1.0, 4.0, 2.0, 3.0])  # lower than every logit of class 1
    valid = torch.ones(1, 1, 8, dtype=torch.bool)
    assert pseudo_labels(logits, 1, valid, keep=0.4).flatten().tolist() == [1, 1, 1, 1, 255, 255, 255, 255]
    balanced = pseudo_labels(logits, 1, valid, keep=0.4, balanced=True)
    assert balanced.flatten().tolist() == [1, 1, 255, 255, 255, 2, 255, 2]


@pytest.mark.parametrize("power", [-30, 0, 30])
def test_value_of_a_rank_is_that_of_sorting(power):
    """To the bit, with ties, zeros of both signs and -inf."""
    torch.manual_seed(1)
    score = torch.randn(5, 4, 5) * 10.0**power
    score[0], score[1, 0], score[1, 1], score[2] = -torch.inf, 0.0, -0.0, score[3]
    ranked = score.flatten().sort(descending=True).values
    for rank in range(1, 101):
        assert _value_of_rank(score, torch.tensor(rank), identity) == ranked[rank - 1]


@pytest.mark.parametrize("balanced", [False, True])
def test_processes_share_one_threshold(balanced):
    """Two threads that add up their counts give the labels of one that has all images."""
    torch.manual_seed(0)
    logits, valid = torch.randn(5, 4, 6, 6), torch.rand(5, 6, 6) < 0.7
    counts, both = {}, threading.Barrier(2)

    def labels(images):
        def all_reduce_sum(count):
            counts[images.start] = count
            both.wait()
            total = sum(counts.values())
            both.wait()
            return total

        return pseudo_labels(logits[images], 2, valid[images], 0.4, balanced, all_reduce_sum=all_reduce_sum)

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(labels, [slice(0, 3), slice(3, 5)]))
    assert torch.equal(torch.cat(found), pseudo_labels(logits, 2, valid, 0.4, balanced))


# Edges


def loss_of(name, logits, any_pixel=True):
    """A loss with all pixels to learn from, or none."""
    shape = (logits.shape[0], *logits.shape[2:])
    if name == "bias":
        return bias_loss(logits, SEEN, torch.full(shape, any_pixel))
    label = torch.full(shape, 0 if any_pixel else VOID)
    if name == "self_training":
        label = pseudo_labels(logits, SEEN, torch.full(shape, any_pixel), keep=0.6)
    return cross_entropy(logits, label)


LOSSES = ["ce", "bias", "self_training"]


@pytest.mark.parametrize("name, images", [("ce", 2), ("bias", 2), ("self_training", 2), ("bias", 0)])
def test_no_pixel_gives_no_loss_and_no_gradient(name, images):
    logits = torch.randn(images, CLASSES, 3, 3, requires_grad=True)
    loss = loss_of(name, logits, any_pixel=False)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e2, 1e30])
@pytest.mark.parametrize("sign", [1, -1])
def test_losses_are_finite_for_extreme_logits(name, scale, sign):
    logits = torch.randn(1, CLASSES, 3, 3, generator=torch.Generator().manual_seed(0)).abs() + 1
    direction = sign * torch.tensor([1.0] * SEEN + [-1.0] * (CLASSES - SEEN))
    logits = (scale * logits * direction[:, None, None]).requires_grad_()
    loss = loss_of(name, logits)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_fall_under_gradient_steps(name):
    torch.manual_seed(0)
    logits = torch.randn(2, CLASSES, 4, 4, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    values = []
    for _ in range(60):
        loss = loss_of(name, logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]


# In blocks

SIZES = [(37, 29, 1), (37, 29, 4), (8, 5, 1), (1, 1, 1)]  # of the images, and the stride of the losses


@pytest.fixture(params=[1, 700, 2**18], ids=["rows", "images", "whole"])
def block(request, monkeypatch):
    """Blocks of a few rows of an image, of an image, and of all."""
    monkeypatch.setitem(upsampling.BLOCK, "cpu", request.param)


def coarse_scene(height, width, stride=1, dtype=torch.float32):
    """Coarse logits, and {name: loss of logits} with labels and valid pixels of their size."""
    torch.manual_seed(0)
    coarse = (2 * torch.randn(3, CLASSES, 6, 4, dtype=dtype)).requires_grad_()
    num_images, _, *pixels = PixelLogits(coarse, height, width, stride).shape
    shape = (num_images, *pixels)
    label = torch.randint(CLASSES, shape, dtype=torch.uint8).masked_fill(torch.rand(shape) < 0.3, VOID)
    valid, weight = torch.rand(shape) < 0.7, torch.rand(shape, dtype=dtype)
    return coarse, {
        "cross entropy": lambda logits, **more: cross_entropy(logits, label, **more),
        "weighted": lambda logits, **more: cross_entropy(logits, label, weight, **more),
        "bias": lambda logits, **more: bias_loss(logits, SEEN, valid, **more),
        "pseudo-labels": lambda logits: pseudo_labels(logits, SEEN, valid, 0.4),
    }


NAMES = ["cross entropy", "weighted", "bias"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extra", [0, 7])
def test_blocks_give_value_and_gradient_of_the_whole(block, name, size, extra):
    """`extra`: pixels of other processes."""
    coarse, losses = coarse_scene(*size)
    logits = PixelLogits(coarse, *size)
    value, expected = (losses[name](x, all_reduce_sum=lambda count: count + extra) for x in (logits, logits.whole()))
    (gradient,), (slope,) = (torch.autograd.grad(3 * loss, coarse) for loss in (value, expected))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-5 * slope.abs().max().item())


@pytest.mark.parametrize("size", [(13, 9, 1), (13, 9, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_slopes(block, name, size):
    coarse, losses = coarse_scene(*size, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda coarse: losses[name](PixelLogits(coarse, *size)), coarse)


@pytest.mark.parametrize("size", SIZES)
def test_blocks_give_the_pseudo_labels_of_the_whole(block, size):
    coarse, losses = coarse_scene(*size)
    logits = PixelLogits(coarse, *size)
    found, expected = (losses["pseudo-labels"](x) for x in (logits, logits.whole()))
    assert found.shape == expected.shape and (found != expected).sum() <= 1  # rounding may move one pixel


def test_half_precision_logits_are_summed_in_full():
    coarse, losses = coarse_scene(37, 29)
    coarse = coarse.detach().bfloat16().requires_grad_()
    value = losses["bias"](PixelLogits(coarse, 37, 29))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, losses["bias"](PixelLogits(coarse.float(), 37, 29).whole()))


def test_parts_are_those_of_the_whole():
    coarse, _ = coarse_scene(37, 29)
    logits = PixelLogits(coarse, 37, 29, 4)
    assert logits.whole().shape == logits.shape == (3, CLASSES, 10, 8)
    for part, expected in zip(logits.split([1, 2]), logits.whole().split([1, 2])):
        torch.testing.assert_close(part.whole(), expected)


def test_upsampling_aligns_corners():
    coarse, _ = coarse_scene(1, 1)
    expected = nn.functional.interpolate(coarse, (37, 29), mode="bilinear", align_corners=True)
    torch.testing.assert_close(upsample(coarse, 37, 29), expected)
    torch.testing.assert_close(upsample(coarse, 37, 29, stride=4), expected[..., ::4, ::4])


class LargestTensor(TorchDispatchMode):
    """Counts the numbers of the largest tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("name", [*NAMES, "pseudo-labels"])
def test_no_tensor_is_larger_than_a_block(name, monkeypatch):
    monkeypatch.setitem(upsampling.BLOCK, "cpu", 1)
    coarse, losses = coarse_scene(128, 96)
    with LargestTensor() as largest:
        result = losses[name](PixelLogits(coarse, 128, 96))
        if name != "pseudo-labels":
            result.backward()
    whole = len(coarse) * CLASSES * 128 * 96
    assert largest.numbers <= max(whole // CLASSES, CLASSES * 16 * 96) < whole // 4


# The weighted sum of each script

SETTINGS = {
    "lambda_": 0.7, "weak_proportion": 0.3, "self_training_weight": 0.7, "keep": 0.5, "balance_classes": False,
    "loss_stride": 1,
}  # fmt: skip


class Tiny(nn.Module):
    """uint8 image -> logits of the same size, by one 1x1 convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.score = nn.Conv2d(3, CLASSES, 1)

    def forward(self, image):
        return self.score(image.float() / 32)


def batches():
    """Source (image, label) and target (image, valid), with void and invalid pixels; seen labels only."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (5, 3, 6, 6), generator=draw, dtype=torch.uint8)
    label = torch.randint(0, SEEN, (3, 6, 6), generator=draw, dtype=torch.uint8)
    label[:, 0] = VOID
    return (image[:3], label), (image[3:], torch.rand(2, 6, 6, generator=draw) < 0.7)


def step(stage, network, rate=0.1, momentum=0.0, source=None, target=None, num_seen=SEEN, **changes):
    """One step of the script's own `train_step`; gives its losses."""
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=momentum)
    usual = batches()
    args = Namespace(**SETTINGS | changes)
    return STAGES[stage].train_step(network, optimizer, source or usual[0], target or usual[1], num_seen, args)


def numpy_total(stage, network):
    """The script's loss by the NumPy formulas."""
    (image, label), (target_image, valid) = batches()
    with torch.no_grad():
        logits, target_logits = network(image).numpy(), network(target_image).numpy()
    label, valid, w = label.numpy(), valid.numpy(), 0.3
    if stage == 1:
        bias = (1 - w) * numpy_bias(logits, label != VOID) + w * numpy_bias(target_logits, valid)
        return numpy_cross_entropy(logits, label) + 0.7 * bias
    pseudo = numpy_pseudo(target_logits, valid, 0.5)
    return numpy_cross_entropy(logits, label) + w * 0.7 * numpy_cross_entropy(target_logits, pseudo)


@pytest.mark.parametrize("stage", STAGES)
def test_train_step_adds_up_the_formula(stage):
    network = Tiny()
    expected = numpy_total(stage, network)
    assert step(stage, network)["total"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_train_step_follows_the_slope_of_the_formula(stage):
    """Measured by small changes of a weight; a gradient of an earlier step does not count."""
    network = Tiny()
    before = network.score.bias.detach().clone()
    slopes = []
    for change in 1e-3 * torch.eye(CLASSES):
        sides = []
        for sign in (1, -1):
            network.score.bias.data = before + sign * change
            sides.append(numpy_total(stage, network))
        slopes.append((sides[0] - sides[1]) / 2e-3)
    network.score.bias.data = before.clone()
    network.score.bias.grad = torch.full_like(before, 1e6)
    step(stage, network, rate=1.0)
    np.testing.assert_allclose((before - network.score.bias.detach()).numpy(), slopes, atol=2e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_train_step_lowers_the_loss(stage):
    network = Tiny()
    values = [step(stage, network, rate=0.05)["total"].item() for _ in range(30)]
    assert values[-1] < 0.8 * values[0]


IMAGES = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(2)).byte()
NO_LABEL, ONE_CLASS = torch.full((2, 16, 16), VOID).byte(), torch.zeros(2, 16, 16).byte()
NO_PIXEL, ALL_PIXELS = torch.zeros(2, 16, 16, dtype=torch.bool), torch.ones(2, 16, 16, dtype=torch.bool)
EDGES = {
    "one class in the batch": (ONE_CLASS, ALL_PIXELS, 3, {}),
    "no valid target pixel": (ONE_CLASS, NO_PIXEL, 3, {}),
    "no label": (NO_LABEL, ALL_PIXELS, 3, {}),
    "one seen class": (ONE_CLASS, ALL_PIXELS, 1, {}),
    "one unseen class": (ONE_CLASS, ALL_PIXELS, 4, {}),
    "nothing kept": (ONE_CLASS, ALL_PIXELS, 3, {"keep": 0.0}),
    "everything kept, balanced": (ONE_CLASS, ALL_PIXELS, 3, {"keep": 1.0, "balance_classes": True}),
    "source only": (ONE_CLASS, ALL_PIXELS, 3, {"lambda_": 0.0, "self_training_weight": 0.0}),
    "no target image": (ONE_CLASS, NO_PIXEL[:0], 3, {}),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("label, valid, num_seen, changes", EDGES.values(), ids=EDGES)
def test_step_at_the_edge_is_finite_and_learns(stage, label, valid, num_seen, changes):
    network = Tiny()
    before = network.score.weight.detach().clone()
    target = IMAGES[: len(valid)], valid
    losses = step(stage, network, source=(IMAGES, label), target=target, num_seen=num_seen, **changes)
    assert all(loss.isfinite() for loss in losses.values()) and network.score.weight.isfinite().all()
    assert not torch.equal(before, network.score.weight)


@pytest.mark.parametrize("stage", STAGES)
def test_batch_without_a_pixel_changes_nothing(stage):
    network = Tiny()
    before = network.score.weight.detach().clone()
    losses = step(stage, network, momentum=0.9, source=(IMAGES, NO_LABEL), target=(IMAGES, NO_PIXEL))
    assert all(loss.item() == 0 for loss in losses.values()) and torch.equal(before, network.score.weight)

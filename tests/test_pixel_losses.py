"""Losses that upsample a block at a time against the same losses of logits upsampled at once."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import losses, pixel_losses, soft_weights, upsampling
from model.upsampling import PixelLogits

VOID = 255
SEEN, CLASSES = 3, 5
SIZES = [(37, 29, 1), (37, 29, 4), (8, 5, 1), (1, 1, 1)]  # of the pictures, and the stride of the losses


@pytest.fixture(params=[1, 700, 2**18], ids=["lines", "pictures", "whole"])
def block(request, monkeypatch):
    """Blocks of a few lines of one picture, of one picture, and of all."""
    monkeypatch.setitem(upsampling.BLOCK, "cpu", request.param)


def scene(height, width, stride, dtype=torch.float32, pictures=3):
    """Coarse logits, and label, valid, gate and weight of the pixels that count."""
    torch.manual_seed(0)
    coarse = (2 * torch.randn(pictures, CLASSES, 6, 4, dtype=dtype)).requires_grad_()
    shape = PixelLogits(coarse, height, width, stride).shape
    shape = (shape[0], *shape[2:])
    label = torch.randint(CLASSES, shape, dtype=torch.uint8)
    label[torch.rand(shape) < 0.3] = VOID
    valid = torch.rand(shape) < 0.7
    gate, weight = torch.rand(shape, dtype=dtype), torch.rand(shape, dtype=dtype)
    return coarse, label, valid, gate, weight


def both(name, label, valid, gate, weight):
    """A loss of `pixel_losses` and its formula, as functions of the logits."""
    if name == "cross_entropy":
        return [partial(module.cross_entropy, label=label) for module in (pixel_losses, losses)]
    if name == "weighted":
        places = pixel_losses, soft_weights
        return [partial(module.weighted_cross_entropy, label=label, weight=weight) for module in places]
    changes = {
        "bias": {},
        "gated": {"gate": gate},
        "shape": {"keep_shape": True},
        "both": {"gate": gate, "keep_shape": True},
    }
    return [partial(module.bias_loss, num_seen=SEEN, valid=valid, **changes[name]) for module in (pixel_losses, losses)]


NAMES = ["cross_entropy", "weighted", "bias", "gated", "shape", "both"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("joined", [losses.alone, lambda count: count + 7], ids=["alone", "joined"])
def test_value_and_gradient_are_those_of_logits_upsampled_at_once(block, name, size, joined):
    coarse, *maps = scene(*size)
    blocks, formula = both(name, *maps)
    logits = PixelLogits(coarse, *size)
    value, expected = blocks(logits, joined=joined), formula(logits.whole(), joined=joined)
    (gradient,), (slope,) = (torch.autograd.grad(3 * loss, coarse) for loss in (value, expected))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-5 * slope.abs().max().item())
    assert (value > 0 and gradient.abs().max() > 0) or size == (1, 1, 1)


@pytest.mark.parametrize("size", [(13, 9, 1), (13, 9, 2)])
@pytest.mark.parametrize("name", NAMES[:4])  # keeping the shape is no gradient of anything
def test_gradients_are_the_slopes(block, name, size):
    coarse, *maps = scene(*size, dtype=torch.float64, pictures=2)
    loss, _ = both(name, *maps)
    assert torch.autograd.gradcheck(lambda coarse: loss(PixelLogits(coarse, *size)), coarse)


@pytest.mark.parametrize("name", NAMES)
def test_with_deterministic_algorithms_too(block, name):
    size = SIZES[0]
    coarse, *maps = scene(*size)
    loss, _ = both(name, *maps)
    free = torch.autograd.grad(loss(PixelLogits(coarse, *size)), coarse)
    torch.use_deterministic_algorithms(True)
    try:
        bound, again = (torch.autograd.grad(loss(PixelLogits(coarse, *size)), coarse) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(free, bound, rtol=1e-5, atol=1e-8)
    assert torch.equal(bound[0], again[0])


@pytest.mark.parametrize("size", SIZES)
def test_gate_and_pseudo_labels_are_those_of_logits_upsampled_at_once(block, size):
    coarse, _, valid, *_ = scene(*size)
    logits = PixelLogits(coarse, *size)
    whole = logits.whole()
    torch.testing.assert_close(
        pixel_losses.known_gate(logits, SEEN, 0.3), losses.known_gate(whole, SEEN, 0.3), rtol=1e-5, atol=1e-5
    )
    for balanced in (False, True):
        arguments = {"num_seen": SEEN, "valid": valid, "keep": 0.4, "balanced": balanced}
        label, expected = (m.pseudo_labels(x, **arguments) for m, x in ((pixel_losses, logits), (losses, whole)))
        assert label.shape == expected.shape and label.dtype == expected.dtype
        assert (label != expected).sum() <= 1  # rounding may move the cut by a pixel


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_logits_are_summed_in_full(name):
    coarse, *maps = scene(37, 29, 1)
    coarse = coarse.detach().bfloat16().requires_grad_()
    blocks, formula = both(name, *maps)
    value, expected = blocks(PixelLogits(coarse, 37, 29)), formula(PixelLogits(coarse.float(), 37, 29).whole())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)


def test_parts_are_those_of_the_whole():
    coarse, *_ = scene(37, 29, 4)
    logits = PixelLogits(coarse, 37, 29, 4)
    assert logits.whole().shape == logits.shape == (3, CLASSES, 10, 8)
    for part, expected in zip(logits.split([1, 2]), logits.whole().split([1, 2])):
        torch.testing.assert_close(part.whole(), expected)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation gives."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("name", [*NAMES, "pseudo_labels", "known_gate"])
def test_no_tensor_is_larger_than_a_block(name, monkeypatch):
    size, lines = (128, 96), 16
    monkeypatch.setitem(upsampling.BLOCK, "cpu", 1)
    coarse, label, valid, gate, weight = scene(*size, 1)
    with Largest() as largest:
        logits = PixelLogits(coarse, *size)
        if name == "pseudo_labels":
            pixel_losses.pseudo_labels(logits, SEEN, valid)
        elif name == "known_gate":
            pixel_losses.known_gate(logits, SEEN, 0.2)
        else:
            both(name, label, valid, gate, weight)[0](logits).backward()
    whole = coarse.shape[0] * CLASSES * 128 * 96
    a_class_s_worth = whole // CLASSES
    assert largest.numbers <= max(a_class_s_worth, CLASSES * lines * 96) < whole // 4

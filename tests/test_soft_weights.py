"""Soft weights and the cross-entropy that takes them, against the formulas a pixel at a time."""

import math

import pytest
import torch

from model.losses import cross_entropy
from model.soft_weights import soft_weights, weighted_cross_entropy

VOID = 255


def scene(seed=0):
    """Logits [2, 4, 5, 6], labels with void pixels, weights in [0, 1], scores."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 4, 5, 6, generator=generator)
    label = torch.randint(0, 4, (2, 5, 6), generator=generator)
    label[torch.rand(2, 5, 6, generator=generator) < 0.3] = VOID
    return logits, label, torch.rand(2, 5, 6, generator=generator), torch.randn(2, 5, 6, generator=generator)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_weights_are_the_softmax_over_its_maximum(temperature):
    _, label, _, score = scene()
    valid = label != VOID
    weight = soft_weights(score, valid, temperature)
    for n in range(2):  # each picture by itself
        share = (temperature * score[n][valid[n]]).softmax(dim=0)
        assert torch.allclose(weight[n][valid[n]], share / share.max())
        assert weight[n].max() == 1.0 and not weight[n][~valid[n]].any()


def test_temperature_0_weighs_all_alike_and_a_high_one_the_surest():
    _, label, _, score = scene()
    valid = label != VOID
    assert torch.equal(soft_weights(score, valid, 0.0), valid.float())
    assert soft_weights(score, valid, 1e6).sum() == 2  # a pixel in each picture


def test_scores_outside_valid_dont_matter():
    _, label, _, score = scene()
    valid = label != VOID
    other = torch.where(valid, score, torch.tensor([math.nan, 1e9, -math.inf] * 20).view(2, 5, 6))
    assert torch.equal(soft_weights(score, valid, 2.0), soft_weights(other, valid, 2.0))


def test_a_picture_without_a_valid_pixel_weighs_nothing():
    score, valid = torch.randn(2, 3, 3), torch.ones(2, 3, 3, dtype=torch.bool)
    valid[0] = False
    weight = soft_weights(score.requires_grad_(), valid, 2.0)
    assert not weight[0].any() and weight[1].max() == 1.0 and not weight.requires_grad


@pytest.mark.parametrize("seed", range(3))
def test_cross_entropy_is_the_formula(seed):
    logits, label, weight, _ = scene(seed)
    log_share = logits.double().log_softmax(dim=1)
    above = below = 0.0
    for n, y, x in (label != VOID).nonzero().tolist():
        above -= float(weight[n, y, x]) * float(log_share[n, label[n, y, x], y, x])
        below += float(weight[n, y, x])
    assert weighted_cross_entropy(logits, label, weight).item() == pytest.approx(above / below, rel=1e-5)


def test_equal_weights_are_the_plain_cross_entropy_at_any_scale():
    logits, label, weight, _ = scene()
    plain = cross_entropy(logits, label.to(torch.uint8))
    for factor in (1.0, 0.01):
        loss = weighted_cross_entropy(logits, label.to(torch.uint8), torch.full_like(weight, factor))
        assert loss.item() == pytest.approx(plain.item(), rel=1e-5)


def test_only_what_weighs_has_a_gradient():
    logits, label, weight, _ = scene()
    weight[:, :2] = 0.0
    logits.requires_grad_()
    weighted_cross_entropy(logits, label, weight).backward()
    assert torch.equal(logits.grad.abs().sum(dim=1) > 0, (label != VOID) & (weight > 0))


@pytest.mark.parametrize("nothing", ["labels", "weights"])
def test_nothing_to_learn_is_0_with_a_gradient_of_0(nothing):
    logits, label, weight, _ = scene()
    (label.fill_(VOID) if nothing == "labels" else weight.zero_())
    logits.requires_grad_()
    loss = weighted_cross_entropy(logits, label, weight)
    loss.backward()
    assert loss.item() == 0.0 and not logits.grad.any() and logits.grad.isfinite().all()

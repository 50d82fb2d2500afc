"""The losses against slow versions written from the formulas, and the scripts' weighted sums of them."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import train_split_lambda
import train_st_split
from model.losses import (
    EPSILON,
    _value_of_rank,
    alone,
    bias_loss,
    cross_entropy,
    pseudo_labels,
)

VOID = 255
SEEN, CLASSES = 3, 5


def slow_softmax(scores):
    shares = [math.exp(s - max(scores)) for s in scores]
    return [share / sum(shares) for share in shares]


def pixels(array):
    """[N, K, H, W] -> the K scores of each pixel, as lists of float64."""
    return np.moveaxis(array, 1, -1).reshape(-1, array.shape[1]).astype(np.float64).tolist()


def slow_cross_entropy(logits, label):
    """Mean of -log softmax_label over the labelled pixels, a pixel at a time."""
    losses = [-math.log(slow_softmax(scores)[c]) for scores, c in zip(pixels(logits), label.flatten()) if c != VOID]
    return sum(losses) / len(losses) if losses else 0.0


def slow_bias(logits, valid, num_seen=SEEN):
    """Mean of -log( sum over unseen c of softmax_c + 1e-5 ) over the valid pixels, a pixel at a time."""
    losses = [
        -math.log(sum(slow_softmax(scores)[num_seen:]) + 1e-5)
        for scores, v in zip(pixels(logits), valid.flatten())
        if v
    ]
    return sum(losses) / len(losses) if losses else 0.0


def slow_pseudo(logits, valid, keep, num_seen=SEEN):
    """The best unseen class of the valid pixels with the highest unseen logit, VOID elsewhere."""
    unseen = logits[:, num_seen:]
    best = unseen.max(axis=1)
    order = sorted(np.argwhere(valid).tolist(), key=lambda at: -best[tuple(at)])
    label = np.full(valid.shape, VOID, np.int64)
    for n, y, x in order[: int(keep * len(order))]:
        label[n, y, x] = num_seen + int(unseen[n, :, y, x].argmax())
    return label


def scene(seed=0, size=(2, CLASSES, 6, 7), scale=3.0):
    """Random logits, labels with void pixels, and valid pixels."""
    rng = np.random.default_rng(seed)
    logits = (scale * rng.standard_normal(size)).astype(np.float32)
    label = rng.integers(0, CLASSES, (size[0], *size[2:])).astype(np.uint8)
    label[rng.random(label.shape) < 0.3] = VOID
    return logits, label, rng.random(label.shape) < 0.6


# --- cross-entropy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_cross_entropy_is_the_formula(seed):
    logits, label, _ = scene(seed)
    loss = cross_entropy(torch.tensor(logits), torch.tensor(label))
    assert loss.item() == pytest.approx(slow_cross_entropy(logits, label), rel=1e-5)


def test_cross_entropy_ignores_what_is_not_labelled():
    logits, label, _ = scene()
    other = np.where(label[:, None] == VOID, 100.0, logits).astype(np.float32)
    a, b = (cross_entropy(torch.tensor(x), torch.tensor(label)) for x in (logits, other))
    assert a.item() == pytest.approx(b.item(), rel=1e-6)


def test_cross_entropy_makes_all_classes_compete():
    """A high unseen logit costs: the sum runs over seen and unseen classes."""
    logits = torch.zeros(1, CLASSES, 1, 1)
    label = torch.zeros(1, 1, 1, dtype=torch.uint8)
    before = cross_entropy(logits, label)
    logits[:, -1] = 4
    assert before.item() == pytest.approx(math.log(CLASSES)) and cross_entropy(logits, label) > before + 1


# --- bias loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_seen", [1, 3, 4])
def test_bias_loss_is_the_formula(seed, num_seen):
    logits, _, valid = scene(seed)
    loss = bias_loss(torch.tensor(logits), num_seen, torch.tensor(valid))
    assert loss.item() == pytest.approx(slow_bias(logits, valid, num_seen), rel=1e-5)


def test_bias_loss_has_its_epsilon():
    """Without probability for the unseen classes the loss is -log(1e-5), not infinite."""
    logits = torch.zeros(1, CLASSES, 2, 2)
    logits[:, 0] = 1000.0
    loss = bias_loss(logits, SEEN, torch.ones(1, 2, 2, dtype=torch.bool))
    assert EPSILON == 1e-5 and loss.item() == pytest.approx(-math.log(1e-5), rel=1e-6)


def test_bias_loss_looks_at_valid_pixels_only():
    logits, _, valid = scene()
    other = np.where(valid[:, None], logits, 50.0).astype(np.float32)
    other[:, 0] = np.where(valid, other[:, 0], -50.0)
    a, b = (bias_loss(torch.tensor(x), SEEN, torch.tensor(valid)) for x in (logits, other))
    assert a.item() == pytest.approx(b.item(), rel=1e-6)


# --- both: where there is nothing to learn from, and where logits are extreme ---------------------------


def loss_of(name, logits, anything):
    """A loss of `logits`, with all pixels to learn from, or none."""
    shape = (logits.shape[0], *logits.shape[2:])
    if name == "bias":
        return bias_loss(logits, SEEN, torch.full(shape, anything))
    label = torch.full(shape, 0 if anything else VOID)
    if name == "self_training":
        label = pseudo_labels(logits, SEEN, torch.full(shape, anything), keep=0.6)
    return cross_entropy(logits, label)


@pytest.mark.parametrize("name, pictures", [("ce", 2), ("bias", 2), ("self_training", 2), ("bias", 0)])
def test_no_pixel_means_no_loss_and_no_gradient(name, pictures):
    logits = torch.randn(pictures, CLASSES, 3, 3, requires_grad=True)
    loss = loss_of(name, logits, anything=False)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("name", ["ce", "bias", "self_training"])
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
@pytest.mark.parametrize("favoured", ["seen", "unseen"])
def test_losses_stay_finite_for_extreme_logits(name, scale, favoured):
    logits = torch.randn(1, CLASSES, 3, 3, generator=torch.Generator().manual_seed(0))
    sign = torch.tensor([1.0] * SEEN + [-1.0] * (CLASSES - SEEN)) * (1 if favoured == "seen" else -1)
    logits = (scale * (logits.abs() + 1) * sign[:, None, None]).requires_grad_()
    loss = loss_of(name, logits, anything=True)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", ["ce", "bias", "self_training"])
def test_losses_fall_under_gradient_steps(name):
    torch.manual_seed(0)
    logits = torch.randn(2, CLASSES, 4, 4, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    values = []
    for _ in range(60):
        loss = loss_of(name, logits, anything=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]


def test_bias_loss_prefers_no_unseen_class():
    """It moves probability to the unseen classes in proportion to what each has already."""
    logits = torch.zeros(1, CLASSES, 1, 1, requires_grad=True)
    bias_loss(logits, SEEN, torch.ones(1, 1, 1, dtype=torch.bool)).backward()
    seen, unseen = logits.grad.flatten().split([SEEN, CLASSES - SEEN])
    assert (seen > 0).all() and (unseen < 0).all() and torch.allclose(unseen, unseen[0])


# --- bias loss: gate and kept shape ---------------------------------------------------------------------


# --- pseudo-labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", [0.0, 0.25, 0.6, 1.0])
def test_pseudo_labels_are_the_formula(seed, keep):
    logits, _, valid = scene(seed, size=(3, CLASSES, 5, 4))
    found = pseudo_labels(torch.tensor(logits), SEEN, torch.tensor(valid), keep).numpy()
    np.testing.assert_array_equal(found, slow_pseudo(logits, valid, keep))


def test_pseudo_labels_are_unseen_even_where_a_seen_class_wins():
    logits, _, valid = scene()
    logits[:, :SEEN] += 100
    found = pseudo_labels(torch.tensor(logits), SEEN, torch.tensor(valid), keep=1.0).numpy()
    assert (found[valid] >= SEEN).all() and (found[valid] < CLASSES).all() and (found[~valid] == VOID).all()


def test_pseudo_labels_share_is_of_the_batch_not_of_the_picture():
    """The surer picture of a batch may keep all of its pixels."""
    logits = torch.zeros(2, CLASSES, 10, 10)
    logits[:, SEEN] = torch.rand(2, 10, 10) + torch.tensor([0.0, 5.0])[:, None, None]
    found = pseudo_labels(logits, SEEN, torch.ones(2, 10, 10, dtype=torch.bool), keep=0.5)
    assert (found[1] == SEEN).all() and (found[0] == VOID).all()


def test_pseudo_labels_never_choose_an_invalid_pixel():
    logits, _, valid = scene()
    logits[:, SEEN:] += 100 * ~valid[:, None]  # the surest pixels are the invalid ones
    found = pseudo_labels(torch.tensor(logits), SEEN, torch.tensor(valid), keep=0.6).numpy()
    assert (found[~valid] == VOID).all() and (found != VOID).sum() == int(0.6 * valid.sum())


def test_pseudo_labels_without_a_valid_pixel_are_void():
    valid = torch.zeros(2, 3, 3, dtype=torch.bool)
    assert (pseudo_labels(torch.randn(2, CLASSES, 3, 3), SEEN, valid, keep=1.0) == VOID).all()


def test_pseudo_labels_carry_no_gradient():
    logits, _, valid = scene()
    assert not pseudo_labels(torch.tensor(logits, requires_grad=True), SEEN, torch.tensor(valid)).requires_grad


# --- the weighted sum of each script --------------------------------------------------------------------


def batches(seed=0):
    """Source (image, label) and target (image, valid), with void and invalid pixels; seen labels only."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (5, 3, 6, 6), generator=generator, dtype=torch.uint8)
    label = torch.randint(0, SEEN, (3, 6, 6), generator=generator, dtype=torch.uint8)
    label[:, 0] = VOID
    valid = torch.rand(2, 6, 6, generator=generator) < 0.7
    return (image[:3], label), (image[3:], valid)


class Tiny(nn.Module):
    """uint8 image -> logits of the same size, by one 1x1 convolution."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.score = nn.Conv2d(3, CLASSES, 1)

    def forward(self, image):
        return self.score(image.float() / 32)


ARGS = {
    1: SimpleNamespace(
        lambda_=0.7,
        weak_proportion=0.3,
        loss_stride=1,
    ),
    2: SimpleNamespace(weak_proportion=0.3, st_lambda=0.7, keep=0.5, balance_classes=False, loss_stride=1),
}
STEP = {1: train_split_lambda.train_step, 2: train_st_split.train_step}


def slow_total(stage, model, source, target, args):
    """The script's loss by the slow formulas."""
    with torch.no_grad():
        source_logits, target_logits = model(source[0]).numpy(), model(target[0]).numpy()
    label, valid = source[1].numpy(), target[1].numpy()
    total = slow_cross_entropy(source_logits, label)
    w = args.weak_proportion
    if stage == 1:
        bias = (1 - w) * slow_bias(source_logits, label != VOID) + w * slow_bias(target_logits, valid)
        return total + args.lambda_ * bias
    pseudo = slow_pseudo(target_logits, valid, args.keep)
    return total + w * args.st_lambda * slow_cross_entropy(target_logits, pseudo)


@pytest.mark.parametrize("stage", [1, 2])
def test_train_step_adds_up_the_formula(stage):
    model, (source, target) = Tiny(), batches()
    expected = slow_total(stage, model, source, target, ARGS[stage])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = STEP[stage](model, optimizer, source, target, SEEN, ARGS[stage])
    assert losses["total"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_train_step_goes_down_the_gradient_of_the_sum(stage):
    """The step taken is the slope of the slow formula, measured by small changes of a weight."""
    model, (source, target) = Tiny(), batches()
    before = model.score.bias.detach().clone()
    slopes = []
    for c in range(CLASSES):
        sides = []
        for change in (1e-3, -1e-3):
            model.score.bias.data = before.clone()
            model.score.bias.data[c] += change
            sides.append(slow_total(stage, model, source, target, ARGS[stage]))
        slopes.append((sides[0] - sides[1]) / 2e-3)
    model.score.bias.data = before.clone()
    STEP[stage](model, torch.optim.SGD(model.parameters(), lr=1.0), source, target, SEEN, ARGS[stage])
    np.testing.assert_allclose((before - model.score.bias.detach()).numpy(), slopes, atol=2e-3)


@pytest.mark.parametrize("stage", [1, 2])
def test_train_step_forgets_the_gradient_of_the_step_before(stage):
    model, (source, target) = Tiny(), batches()
    model.score.weight.grad = torch.full_like(model.score.weight, 1e6)
    before = model.score.weight.detach().clone()
    STEP[stage](model, torch.optim.SGD(model.parameters(), lr=0.1), source, target, SEEN, ARGS[stage])
    assert (model.score.weight - before).abs().max() < 10


def test_stage_1_with_lambda_0_is_plain_cross_entropy():
    model, (source, target) = Tiny(), batches()
    plain = Tiny()
    cross_entropy(plain(source[0]), source[1]).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    args = SimpleNamespace(**vars(ARGS[1]) | {"lambda_": 0.0})
    train_split_lambda.train_step(model, optimizer, source, target, SEEN, args)
    torch.testing.assert_close(model.score.weight.grad, plain.score.weight.grad)
    assert model.score.weight.grad.abs().max() > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_train_step_lowers_the_loss(stage):
    model, (source, target) = Tiny(), batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    values = [STEP[stage](model, optimizer, source, target, SEEN, ARGS[stage])["total"].item() for _ in range(30)]
    assert values[-1] < 0.8 * values[0]


def test_balanced_pseudo_labels_keep_the_surest_of_each_class():
    """Class 2 has low logits everywhere: one cut through all classes starves it, a cut a class does not."""
    logits = torch.full((1, 3, 1, 8), -9.0)
    logits[0, 1, 0, :4] = torch.tensor([8.0, 7.0, 6.0, 5.0])
    logits[0, 2, 0, 4:] = torch.tensor([1.0, 4.0, 2.0, 3.0])
    valid = torch.ones(1, 1, 8, dtype=torch.bool)
    together = pseudo_labels(logits, 1, valid, keep=0.5)
    assert together.flatten().tolist() == [1, 1, 1, 1, 255, 255, 255, 255]
    balanced = pseudo_labels(logits, 1, valid, keep=0.5, balanced=True)
    assert balanced.flatten().tolist() == [1, 1, 255, 255, 255, 2, 255, 2]
    valid[..., 5] = False  # class 2 keeps half of the three that are left: one
    assert pseudo_labels(logits, 1, valid, keep=0.5, balanced=True).flatten().tolist()[4:] == [255, 255, 255, 2]


@pytest.mark.parametrize("power", [-30, 0, 30])
def test_the_value_of_a_rank_is_that_of_sorting(power):
    """To the bit, with ties, zeros of both signs and what is left out at -inf."""
    torch.manual_seed(1)
    score = torch.randn(5, 4, 5) * 10.0**power
    score[0], score[1, 0], score[1, 1], score[2] = -torch.inf, 0.0, -0.0, score[3]
    ranked = score.flatten().sort(descending=True).values
    for rank in range(1, 101):
        assert _value_of_rank(score, torch.tensor(rank), alone) == ranked[rank - 1]


@pytest.mark.parametrize("balanced", [False, True])
def test_processes_find_one_cut(balanced):
    """Two threads, that add their counts up: the labels of one that has all pictures."""
    torch.manual_seed(0)
    logits, valid = torch.randn(5, 4, 6, 6), torch.rand(5, 6, 6) < 0.7
    counts, both = {}, threading.Barrier(2)

    def labels(pictures):
        def joined(count):
            counts[pictures.start] = count
            both.wait()
            total = sum(counts.values())
            both.wait()
            return total

        return pseudo_labels(logits[pictures], 2, valid[pictures], 0.4, balanced=balanced, joined=joined)

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(labels, [slice(0, 3), slice(3, 5)]))
    assert torch.equal(torch.cat(found), pseudo_labels(logits, 2, valid, 0.4, balanced=balanced))

"""Metrics against confusion matrices worked out by hand, and against a slow loop over the pixels."""

import json
import math

import pytest
import torch

from utils import metrics
from utils.metrics import ConfusionMatrix, ZeroShotMetrics, as_json, format_table

KEYS = {"miou_seen", "miou_unseen", "hiou", "miou_zsl", "bias", "pixel_accuracy", "mean_accuracy", "fwiou", "per_class"}
NAMES = ("cat", "dog", "bus", "tv")  # the first two are seen
LABEL = torch.zeros(1, 2, 2).long()


def as_logits(prediction, num_classes, second=None):
    """[N, H, W] -> [N, K, H, W] with the prediction as argmax and `second` as the runner-up class."""
    logits = torch.zeros(prediction.shape[0], num_classes, *prediction.shape[1:])
    if second is not None:
        logits.scatter_(1, second[:, None], 1.0)
    return logits.scatter_(1, prediction[:, None], 2.0)


def run(label, prediction, second=None):
    """One picture of one row of pixels, seen and unseen classes as in NAMES."""
    metric = ZeroShotMetrics(NAMES, num_seen=2)
    second = None if second is None else torch.tensor([[second]])
    metric.update(as_logits(torch.tensor([[prediction]]), 4, second), torch.tensor([[label]]))
    return metric


def slow_counts(label, prediction, num_classes, ignore_index=255):
    counts = [[0] * num_classes for _ in range(num_classes)]
    for truth, guess in zip(label.flatten().tolist(), prediction.flatten().tolist()):
        if truth != ignore_index:
            counts[truth][guess] += 1
    return counts


def slow_iou(counts, number):
    hit = counts[number][number]
    union = sum(counts[number]) + sum(row[number] for row in counts) - hit
    return hit / union if union else math.nan


def test_counts_by_hand():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([[0, 0, 1], [2, 255, 1]]), torch.tensor([[0, 1, 1], [0, 2, 1]]))
    assert matrix.matrix.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert matrix.matrix.dtype == torch.int64
    matrix.update(torch.tensor([2], dtype=torch.uint8), torch.tensor([2], dtype=torch.int32))
    assert matrix.matrix.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]


def test_metrics_by_hand():
    """Truth in rows, GZSL prediction in columns:

        cat dog bus  tv
    cat   3   1   0   0     IoU 3 / (4 + 5 - 3) = 1/2
    dog   0   2   0   0     IoU 2 / (2 + 4 - 2) = 1/2
    bus   2   0   2   0     IoU 2 / (4 + 2 - 2) = 1/2
    tv    0   1   0   1     IoU 1 / (2 + 1 - 1) = 1/2
    """
    label = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 255]
    guess = [0, 0, 0, 1, 1, 1, 0, 0, 2, 2, 1, 3, 0]
    # Of the three unseen pixels that went to seen classes, the runner-up is bus, tv and bus.
    second = [2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 2, 2, 3]
    metric = run(label, guess, second)
    assert metric.gzsl.matrix.tolist() == [[3, 1, 0, 0], [0, 2, 0, 0], [2, 0, 2, 0], [0, 1, 0, 1]]
    assert metric.zsl.matrix.tolist() == [[3, 1], [1, 1]]
    result = metric.compute()
    assert set(result) == KEYS
    assert result["per_class"] == {"cat": 0.5, "dog": 0.5, "bus": 0.5, "tv": 0.5}
    assert result["miou_seen"] == result["miou_unseen"] == result["hiou"] == result["fwiou"] == 0.5
    assert result["bias"] == pytest.approx(3 / 6)
    assert result["pixel_accuracy"] == pytest.approx(8 / 12)
    assert result["mean_accuracy"] == pytest.approx((3 / 4 + 2 / 2 + 2 / 4 + 1 / 2) / 4)
    assert metric.per_class_zsl() == pytest.approx({"bus": 3 / 5, "tv": 1 / 3})
    assert result["miou_zsl"] == pytest.approx((3 / 5 + 1 / 3) / 2)


def test_unequal_classes_by_hand():
    """Here all numbers differ, so that swapping any two of them shows.

        cat dog bus  tv
    cat   6   0   0   0     IoU 6 / (6 + 9 - 6) = 2/3
    dog   0   1   1   0     IoU 1 / (2 + 1 - 1) = 1/2
    bus   2   0   1   0     IoU 1 / (3 + 2 - 1) = 1/4
    tv    1   0   0   1     IoU 1 / (2 + 1 - 1) = 1/2
    """
    label = [0] * 6 + [1] * 2 + [2] * 3 + [3] * 2
    metric = run(label, [0] * 6 + [1, 2] + [0, 0, 2] + [0, 3], second=[2] * 13)
    result = metric.compute()
    assert result["per_class"] == pytest.approx({"cat": 2 / 3, "dog": 1 / 2, "bus": 1 / 4, "tv": 1 / 2})
    assert result["miou_seen"] == pytest.approx(7 / 12)
    assert result["miou_unseen"] == pytest.approx(3 / 8)
    assert result["hiou"] == pytest.approx(2 * 7 / 12 * 3 / 8 / (7 / 12 + 3 / 8))
    assert metric.per_class_zsl() == pytest.approx({"bus": 3 / 4, "tv": 1 / 2})
    assert result["miou_zsl"] == pytest.approx(5 / 8)
    assert result["bias"] == pytest.approx(3 / 5)
    assert result["pixel_accuracy"] == pytest.approx(9 / 13)
    assert result["mean_accuracy"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert result["fwiou"] == pytest.approx((6 * 2 / 3 + 2 * 1 / 2 + 3 * 1 / 4 + 2 * 1 / 2) / 13)


def test_harmonic_mean_by_hand():
    assert metrics.harmonic_mean(0.6, 0.3) == pytest.approx(0.4)
    assert metrics.harmonic_mean(0.0, 0.0) == 0.0
    assert metrics.harmonic_mean(0.5, 0.0) == 0.0
    assert math.isnan(metrics.harmonic_mean(0.5, math.nan))


@pytest.mark.parametrize("num_seen", [1, 4, 6])
def test_both_argmaxes_are_those_of_all_scores(num_seen):
    """Also where scores are equal, of which the first class gets the pixel, and infinite."""
    scores = torch.randint(0, 4, (3, 7, 6, 5), generator=torch.Generator().manual_seed(0)).float()
    scores[0, 2], scores[1, :, 0] = math.inf, -math.inf
    best, unseen = metrics.best_classes(scores, num_seen)
    assert torch.equal(best, scores.argmax(dim=1)) and torch.equal(unseen, scores[:, num_seen:].argmax(dim=1))
    scores[2, 0, 1, 1] = scores[2, 6, 2, 2] = math.nan
    best, unseen = metrics.best_classes(scores, num_seen)
    assert (best == -1).nonzero().tolist() == [[2, 1, 1], [2, 2, 2]] and (unseen == -1).nonzero().tolist() == [
        [2, 2, 2]
    ]


def test_counts_of_each_picture_add_up():
    label, prediction = torch.randint(0, 4, (2, 3, 5, 6), generator=torch.Generator().manual_seed(0))
    label[0, :2] = 255
    matrix = ConfusionMatrix(4)
    each = matrix.update_each(label, prediction)
    assert each.sum(0).equal(matrix.matrix)
    assert [counts.tolist() for counts in each] == [slow_counts(*pair, 4) for pair in zip(label, prediction)]


def test_details_name_the_pictures_in_their_own_order():
    """Whatever the order of counting was, as in batches of pictures of one size."""
    label = torch.tensor([[[0, 0]], [[0, 1]], [[2, 0]]])
    logits = as_logits(torch.zeros(3, 1, 2).long(), 4)
    in_turn, grouped = ZeroShotMetrics(NAMES, 2), ZeroShotMetrics(NAMES, 2)
    in_turn.update(logits, label)
    for order in ([2, 0], [1]):
        grouped.update(logits[order], label[order], torch.tensor(order))
    details = in_turn.details(["p", "q", "r"])
    assert grouped.details(["p", "q", "r"]) == details
    assert list(grouped.details(["p", "q", "r"])["per_picture"]) == ["p", "q", "r"]
    assert [pixels for _, pixels in details["per_picture"].values()] == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_a_slow_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    names, num_seen = [f"class {number}" for number in range(7)], 4
    logits = torch.randn(3, 7, 6, 5, generator=generator)
    label = torch.randint(0, 7, (3, 6, 5), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.2] = 255

    metric = ZeroShotMetrics(names, num_seen)
    metric.update(logits[:2], label[:2].byte())  # in two batches and two types
    metric.update(logits[2:], label[2:])
    result = metric.compute()

    counts = slow_counts(label, logits.argmax(1), 7)
    unseen_label = torch.where((label >= num_seen) & (label != 255), label - num_seen, 255)
    zsl_counts = slow_counts(unseen_label, logits[:, num_seen:].argmax(1), 3)
    assert metric.gzsl.matrix.tolist() == counts
    assert metric.zsl.matrix.tolist() == zsl_counts

    iou = [slow_iou(counts, number) for number in range(7)]
    total = sum(map(sum, counts))
    unseen_total = sum(map(sum, counts[num_seen:]))
    seen, unseen = sum(iou[:4]) / 4, sum(iou[4:]) / 3
    assert result["per_class"] == pytest.approx(dict(zip(names, iou)))
    assert result["miou_seen"] == pytest.approx(seen)
    assert result["miou_unseen"] == pytest.approx(unseen)
    assert result["hiou"] == pytest.approx(2 * seen * unseen / (seen + unseen))
    assert result["miou_zsl"] == pytest.approx(sum(slow_iou(zsl_counts, number) for number in range(3)) / 3)
    assert result["bias"] == pytest.approx(sum(sum(row[:4]) for row in counts[4:]) / unseen_total)
    assert result["pixel_accuracy"] == pytest.approx(sum(counts[c][c] for c in range(7)) / total)
    assert result["mean_accuracy"] == pytest.approx(sum(counts[c][c] / sum(counts[c]) for c in range(7)) / 7)
    assert result["fwiou"] == pytest.approx(sum(sum(counts[c]) / total * iou[c] for c in range(7)))


def test_class_that_never_occurs_is_left_out_of_the_means():
    result = run([0, 0, 2, 2], [0, 0, 2, 0]).compute()  # no dog and no tv anywhere
    assert math.isnan(result["per_class"]["dog"]) and math.isnan(result["per_class"]["tv"])
    assert result["miou_seen"] == pytest.approx(2 / 3)
    assert result["miou_unseen"] == pytest.approx(1 / 2)
    assert result["mean_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert result["fwiou"] == pytest.approx(1 / 2 * 2 / 3 + 1 / 2 * 1 / 2)


def test_class_that_is_only_predicted_counts_as_zero():
    result = run([0, 0, 2, 2], [0, 1, 2, 2]).compute()
    assert result["per_class"]["dog"] == 0.0
    assert result["miou_seen"] == pytest.approx((1 / 2 + 0) / 2)
    assert result["mean_accuracy"] == pytest.approx((1 / 2 + 1) / 2)  # recall has no dog


def test_everything_wrong_gives_zero_and_not_nan():
    result = run([0, 1, 2, 3], [1, 0, 3, 2]).compute()
    assert result["miou_seen"] == result["miou_unseen"] == result["hiou"] == result["bias"] == 0.0


def test_without_unseen_pixels_bias_is_undefined():
    result = run([0, 1, 255], [0, 1, 3]).compute()
    assert result["miou_seen"] == 1.0
    for key in ("bias", "miou_unseen", "hiou", "miou_zsl"):
        assert math.isnan(result[key]), key
    written = json.loads(json.dumps(as_json(result), allow_nan=False))
    assert written["bias"] is None and written["per_class"]["tv"] is None
    assert written["miou_seen"] == 1.0 and set(written) == KEYS


def test_without_any_pixel_all_is_undefined():
    result = ZeroShotMetrics(NAMES, 2).compute()
    numbers = list(result.pop("per_class").values()) + list(result.values())
    assert all(isinstance(number, float) and math.isnan(number) for number in numbers)


def test_only_unseen_pixels_enter_zsl():
    metric = run([0, 1, 2, 3], [0, 0, 0, 0], second=[3, 3, 2, 2])
    assert metric.zsl.matrix.tolist() == [[1, 0], [1, 0]]
    result = metric.compute()
    assert result["bias"] == 1.0 and result["miou_unseen"] == 0.0
    assert metric.per_class_zsl() == {"bus": 0.5, "tv": 0.0}


def test_ignored_pixels_change_nothing():
    logits, label = torch.randn(1, 4, 8, 8), torch.randint(0, 4, (1, 8, 8))
    results = []
    for rows in (0, 3):
        metric = ZeroShotMetrics(NAMES, 2)
        metric.update(
            torch.cat([logits, torch.randn(1, 4, rows, 8)], 2), torch.cat([label, torch.full((1, rows, 8), 255)], 1)
        )
        results.append(metric.compute())
    assert results[0] == results[1]


def test_ignore_index_may_be_another_number():
    metric = ZeroShotMetrics(NAMES, 2, ignore_index=-100)
    metric.update(as_logits(torch.tensor([[[0, 2]]]), 4), torch.tensor([[[0, -100]]]))
    assert metric.gzsl.matrix.sum() == 1 and metric.zsl.matrix.sum() == 0
    inside = ConfusionMatrix(3, ignore_index=0)
    inside.update(torch.tensor([0, 1]), torch.tensor([1, 1]))
    assert inside.matrix.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_states_of_two_processes_add_up():
    logits, label = torch.randn(4, 4, 5, 5), torch.randint(0, 4, (4, 5, 5))
    whole, first, second = (ZeroShotMetrics(NAMES, 2) for _ in range(3))
    whole.update(logits, label)
    first.update(logits[:1], label[:1])
    second.update(logits[1:], label[1:])
    for here, there in zip(first.state(), second.state()):
        here += there  # what all_reduce does, in place
    assert first.compute() == whole.compute()
    assert [list(tensor.shape) for tensor in whole.state()] == [[4, 4], [2, 2]]
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in whole.state())


@pytest.mark.parametrize("label, prediction", [(3, 0), (-1, 0), (0, 3), (0, -1), (254, 0)])
def test_value_out_of_range_raises_and_is_not_counted(label, prediction):
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([1, 1]), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"1 pixels have a label or prediction outside 0 \.\.\. 2"):
        matrix.update(torch.tensor([label]), torch.tensor([prediction]))
    assert matrix.matrix.tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 0]]


def test_value_out_of_range_raises_at_reading_where_update_cannot_look():
    matrix = ConfusionMatrix(3)
    matrix._bins[9] += 2  # what an update on an accelerator leaves behind
    with pytest.raises(ValueError, match="2 pixels"):
        _ = matrix.matrix


def test_prediction_at_an_ignored_pixel_may_be_anything():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([255, 255, 1]), torch.tensor([99, -1, 1]))
    assert matrix.matrix.sum() == 1


def test_nan_score_raises():
    logits = torch.zeros(1, 4, 1, 2)
    logits[0, 3, 0, 1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        ZeroShotMetrics(NAMES, 2).update(logits, torch.tensor([[[0, 1]]]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ConfusionMatrix(3).update(torch.zeros(2, 3).long(), torch.zeros(3, 2).long()), "shapes differ"),
        (lambda: ConfusionMatrix(3).update(torch.zeros(2).long(), torch.zeros(2)), "integer"),
        (lambda: ConfusionMatrix(3).update(torch.zeros(2).bool(), torch.zeros(2).long()), "integer"),
        (lambda: ConfusionMatrix(0), "at least one class"),
        (lambda: ZeroShotMetrics(NAMES, 0), "num_seen"),
        (lambda: ZeroShotMetrics(NAMES, 4), "num_seen"),
        (lambda: ZeroShotMetrics(("cat", "cat", "bus"), 1), "repeat"),
        (lambda: ZeroShotMetrics(NAMES, 2).update(torch.zeros(1, 5, 2, 2), LABEL), "logits"),
        (lambda: ZeroShotMetrics(NAMES, 2).update(torch.zeros(1, 4, 3, 2), LABEL), "differ"),
    ],
)
def test_misuse_raises_with_a_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_empty_batch_and_single_pixel():
    metric = ZeroShotMetrics(NAMES, 2)
    metric.update(torch.zeros(0, 4, 3, 3), torch.zeros(0, 3, 3).long())
    metric.update(as_logits(torch.tensor([[[3]]]), 4), torch.tensor([[[3]]]))
    assert metric.compute()["miou_unseen"] == 1.0


def test_table_shows_percent_stars_and_dashes():
    result = run([0, 0, 0, 0, 2, 2], [0, 0, 0, 2, 2, 2]).compute()
    table = format_table(result, NAMES, num_seen=2, columns=2)
    assert table == format_table(as_json(result), NAMES, num_seen=2, columns=2)
    headline, numbers = (line.split() for line in table.splitlines()[:2])
    assert headline == ["seen", "unseen", "hIoU", "ZSL", "bias", "pixel", "acc", "mean", "acc", "fwIoU"]
    assert numbers == ["75.0", "66.7", "70.6", "100.0", "0.0", "83.3", "87.5", "72.2"]
    assert [line.split() for line in table.splitlines()[4:]] == [
        ["cat", "75.0", "bus*", "66.7"],
        ["dog", "-", "tv*", "-"],
    ]


def test_metric_prints_its_table():
    metric = run([0, 1, 2, 3], [0, 1, 2, 3])
    assert str(metric) == format_table(metric.compute(), NAMES, 2)
    assert "100.0" in str(metric)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_update_on_a_gpu_never_waits_and_counts_the_same():
    logits, label = torch.randn(2, 4, 33, 31), torch.randint(0, 4, (2, 33, 31))
    label[0, :5] = 255
    here, there = ZeroShotMetrics(NAMES, 2), ZeroShotMetrics(NAMES, 2, device="cuda")
    here.update(logits, label)
    logits, label = logits.cuda(), label.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there.update(logits, label)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert here.compute() == there.compute()
    there.update(logits, label + 4)  # 4 ... 7 and 259 are out of range
    with pytest.raises(ValueError, match=r"outside 0 \.\.\. 3"):
        there.compute()

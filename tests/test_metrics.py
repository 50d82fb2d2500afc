"""Figures against confusion matrices worked out by hand; the evaluation pass."""

import json
import math

import pytest
import torch

from dataset.loaders import evaluation_loader
from dataset.splits import Split
from dataset.voc import evaluation_dataset
from model.upsampling import PixelLogits
from utils import metrics
from utils.errors import UserError
from utils.metrics import ZeroShotMetrics, format_rows, format_table

NAMES = ("cat", "dog", "bus", "tv")  # the first two are seen
SPLIT = Split.named(1)
CPU = torch.device("cpu")


def count(label, prediction, second=None):
    """The metrics of two images of one row of pixels: the first pixel, and the others with labels of another type.

    `second` is the runner-up class of each pixel.
    """
    metric, logits = ZeroShotMetrics(NAMES, num_seen=2), torch.zeros(1, 4, 1, len(label))
    for height, classes in ((1.0, second), (2.0, prediction)):
        if classes is not None:
            logits.scatter_(1, torch.tensor([[[classes]]]), height)
    label = torch.tensor([[label]])
    metric.update(*metrics.best_classes(logits[..., :1], 2), label[..., :1].byte())
    metric.update(*metrics.best_classes(logits[..., 1:], 2), label[..., 1:])
    return metric


def test_figures_by_hand():
    """All figures differ here, so that exchanging any two shows. Labels in rows, GZSL predictions in columns:

        cat dog bus  tv
    cat   6   0   0   0     IoU 6 / (6 + 9 - 6) = 2/3
    dog   0   1   1   0     IoU 1 / (2 + 1 - 1) = 1/2
    bus   2   0   1   0     IoU 1 / (3 + 2 - 1) = 1/4
    tv    1   0   0   1     IoU 1 / (2 + 1 - 1) = 1/2
    """
    label = [0] * 6 + [1] * 2 + [2] * 3 + [3] * 2 + [255]
    metric = count(label, [0] * 6 + [1, 2] + [0, 0, 2] + [0, 3] + [0], second=[2] * 14)
    assert metric.gzsl.tolist() == [[6, 0, 0, 0], [0, 1, 1, 0], [2, 0, 1, 0], [1, 0, 0, 1]]
    assert metric.zsl.tolist() == [[3, 0], [1, 1]] and metric.gzsl.dtype == torch.int64
    result = metric.compute()
    zsl, _ = result.pop("per_class_zsl"), result.pop("confusion")
    assert result.pop("per_class") == pytest.approx({"cat": 2 / 3, "dog": 1 / 2, "bus": 1 / 4, "tv": 1 / 2})
    assert result == pytest.approx({
        "miou_seen": 7 / 12, "miou_unseen": 3 / 8, "hiou": 2 * 7 / 12 * 3 / 8 / (7 / 12 + 3 / 8), "miou_zsl": 5 / 8,
        "bias": 3 / 5, "pixel_accuracy": 9 / 13, "mean_accuracy": (1 + 1 / 2 + 1 / 3 + 1 / 2) / 4,
        "fwiou": (6 * 2 / 3 + 2 * 1 / 2 + 3 * 1 / 4 + 2 * 1 / 2) / 13,
    })  # fmt: skip
    assert zsl == pytest.approx({"bus": 3 / 4, "tv": 1 / 2})


@pytest.mark.parametrize(
    "label, prediction, expected",
    [
        # a class that never occurs is left out of the means; one that is only predicted counts as 0
        ([0, 0, 2, 2], [0, 0, 2, 0], {"miou_seen": 2 / 3, "miou_unseen": 1 / 2, "mean_accuracy": 3 / 4}),
        ([0, 0, 2, 2], [0, 1, 2, 2], {"miou_seen": 1 / 4, "mean_accuracy": 3 / 4}),
        # everything wrong is 0 and not undefined
        ([0, 1, 2, 3], [1, 0, 3, 2], dict.fromkeys(["miou_seen", "miou_unseen", "hiou", "bias"], 0.0)),
        ([0, 1, 2, 3], [0, 0, 0, 0], {"bias": 1.0, "miou_unseen": 0.0}),
        # without unseen pixels
        ([0, 1, 255], [0, 1, 3], {"miou_seen": 1.0, "bias": None, "miou_unseen": None, "hiou": None, "miou_zsl": None}),
        ([255, 255], [0, 3], dict.fromkeys([key for _, key in metrics.HEADLINES])),
    ],
)
def test_classes_without_pixels(label, prediction, expected):
    result = count(label, prediction).compute()
    json.dumps(result, allow_nan=False)
    assert {key: result[key] for key in expected} == pytest.approx(expected)


def test_table_shows_percent_stars_and_dashes():
    result = count([0, 0, 0, 0, 2, 2], [0, 0, 0, 2, 2, 2]).compute()
    table = format_table(result, columns=2)
    headline, numbers = (line.split() for line in table.splitlines()[:2])
    assert headline == ["seen", "unseen", "hIoU", "ZSL", "bias", "pixel", "acc", "mean", "acc", "fwIoU"]
    assert numbers == ["75.0", "66.7", "70.6", "100.0", "0.0", "83.3", "87.5", "72.2"]
    rows = [line.split() for line in table.splitlines()[4:]]
    assert rows == [["cat", "75.0", "bus*", "66.7"], ["dog", "-", "tv*", "-"]]
    assert format_rows({"a": result, "b": result}).splitlines()[2].split() == ["b", *numbers]


class BrokenOnce(torch.nn.Module):
    """Scores that are all alike but for one in one call."""

    def __init__(self, call: int, value: float):
        super().__init__()
        self.call, self.value, self.calls = call, value, 0

    def pixel_logits(self, image):
        assert not self.training and not torch.is_grad_enabled()
        self.calls += 1
        scores = torch.zeros(len(image), len(SPLIT.names), *image.shape[-2:])
        scores[0, 3, 5, 5] = self.value if self.calls == self.call else 0.0
        return PixelLogits(scores, *image.shape[-2:])


@pytest.mark.parametrize("call, value", [(1, math.nan), (8, -math.inf)])
def test_a_score_that_is_not_finite_is_an_error(data, call, value):
    loader = evaluation_loader(evaluation_dataset(data, SPLIT), 0)
    with pytest.raises(UserError, match="not finite"):
        metrics.evaluate(BrokenOnce(call, value), loader, ZeroShotMetrics(SPLIT.names, SPLIT.num_seen), CPU)


def test_calibration_takes_gamma_from_the_seen_classes():
    logits = torch.tensor([[2.0, 1.0, 1.9]])[:, :, None, None]  # softmax 0.43, 0.16, 0.39
    for gamma, best in ((0.0, 0), (0.02, 0), (0.1, 2), (1.0, 2)):
        assert [index.item() for index in metrics.best_classes(logits, 2, gamma)] == [best, 0]

"""Segmentation metrics from confusion matrices, for generalised (GZSL) and plain (ZSL) zero-shot evaluation.

Everything is counted in whole pixels (int64) and divided once, at the end, in float64. So a result does not
depend on the batch size, the order of the pictures or the number of processes.

Convention of the field: a class that occurs neither in the truth nor in the predictions has an empty union,
so its IoU is undefined (NaN) and it is left out of the means. A class that is absent from the truth but
predicted somewhere counts as 0.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from utils import distributed

HEADLINES = (
    ("seen", "miou_seen"),
    ("unseen", "miou_unseen"),
    ("hIoU", "hiou"),
    ("ZSL", "miou_zsl"),
    ("bias", "bias"),
    ("pixel acc", "pixel_accuracy"),
    ("mean acc", "mean_accuracy"),
    ("fwIoU", "fwiou"),
)

DETAILS = ("seen", "unseen", "confusion", "per_picture")
"""What `ZeroShotMetrics.details` adds to the figures of `compute`: for a report, not for a log."""


class ConfusionMatrix:
    """Pixel counts, int64 [C, C]: the row is the true class, the column the predicted one.

    The counts live on `device`; with None they follow the tensors of the first update. `update` never waits
    for an accelerator. So a value outside 0 ... C - 1 goes to a bin of its own: on the CPU it raises at once
    (and that batch is not counted), elsewhere it raises when `matrix` is next read.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str | None = None):
        if num_classes < 1:
            raise ValueError(f"a confusion matrix needs at least one class, not {num_classes}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self._settled = device is not None
        # C * C counts; then a bin for values out of range, and one for ignored pixels, which nobody reads.
        self._bins = torch.zeros(num_classes**2 + 2, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, label: Tensor, prediction: Tensor) -> None:
        """Count one batch: integer tensors of one shape (any), less the pixels with label == ignore_index.

        Raises ValueError for shapes that differ, tensors that are not integer and, as said above, values out
        of range.
        """
        if label.shape != prediction.shape:
            raise ValueError(f"shapes differ: label {list(label.shape)}, prediction {list(prediction.shape)}")
        self.update_each(label.reshape(1, -1), prediction.reshape(1, -1))

    @torch.no_grad()
    def update_each(self, label: Tensor, prediction: Tensor) -> Tensor:
        """Count one batch as `update` does; integer [N, ...] twice -> the counts of each picture, int64 [N, C, C]."""
        if label.shape != prediction.shape:
            raise ValueError(f"shapes differ: label {list(label.shape)}, prediction {list(prediction.shape)}")
        for name, tensor in (("label", label), ("prediction", prediction)):
            if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                raise ValueError(f"{name} must be an integer tensor, not {tensor.dtype}")
        if not self._settled:
            self._bins, self._settled = self._bins.to(label.device), True

        index = self._bin_index(label.flatten(1).long(), prediction.flatten(1).long())
        # torch.bincount would wait for the GPU to learn the highest index. This does not, and integer sums
        # are exact in any order.
        bins = torch.zeros(len(index), len(self._bins), dtype=torch.int64, device=index.device)
        bins.scatter_add_(1, index, torch.ones_like(index))
        if index.device.type == "cpu":
            self._raise_out_of_range(bins.sum(0))
        self._bins += bins.sum(0).to(self._bins.device)
        return bins[:, : self.num_classes**2].view(-1, self.num_classes, self.num_classes)

    @property
    def matrix(self) -> Tensor:
        """The counts, int64 [C, C], as a view: adding to it in place (all_reduce) changes this object."""
        self._raise_out_of_range(self._bins)
        return self._bins[: self.num_classes**2].view(self.num_classes, self.num_classes)

    def _bin_index(self, label: Tensor, prediction: Tensor) -> Tensor:
        """int64 [N, P], int64 [N, P] -> bin of each pixel, int64 [N, P]. (Boolean indexing would wait for the GPU.)"""
        count = self.num_classes
        inside = (label >= 0) & (label < count) & (prediction >= 0) & (prediction < count)
        index = torch.where(inside, label * count + prediction, count**2)
        return torch.where(label == self.ignore_index, count**2 + 1, index)

    def _raise_out_of_range(self, bins: Tensor) -> None:
        count = self.num_classes
        wrong = int(bins[count**2])
        if wrong:
            raise ValueError(
                f"{wrong} pixels have a label or prediction outside 0 ... {count - 1} "
                f"(ignore_index is {self.ignore_index}; a NaN score counts as prediction -1)"
            )


class ZeroShotMetrics:
    """GZSL and ZSL metrics of one pass over the evaluation pictures.

    Args:
        names: the K class names, seen classes first, then unseen ones.
        num_seen: how many of them are seen; 0 < num_seen < K.
        ignore_index: label of the pixels that do not count.
        device: where the counts live; None: where the first batch lives.
    """

    def __init__(
        self, names: Sequence[str], num_seen: int, ignore_index: int = 255, device: torch.device | str | None = None
    ):
        if not 0 < num_seen < len(names):
            raise ValueError(f"num_seen is {num_seen}: {len(names)} classes must hold seen and unseen ones")
        if len(set(names)) != len(names):
            raise ValueError(f"class names repeat: {list(names)}")
        self.names = tuple(names)
        self.num_seen = num_seen
        self.ignore_index = ignore_index
        self.gzsl = ConfusionMatrix(len(names), ignore_index, device)
        self.zsl = ConfusionMatrix(len(names) - num_seen, -1, device)
        self._pictures: list[Tensor] = []
        self._order: list[int] = []

    @torch.no_grad()
    def update(self, logits: Tensor, label: Tensor, index: Tensor | None = None) -> None:
        """Count one batch: logits [N, K, H, W] (or any other score), label [N, H, W] of 0 ... K - 1.

        `index`, int64 [N] on the CPU, says which pictures they are; None: those that follow.

        GZSL: argmax over all K classes at every pixel. ZSL: argmax over the unseen classes where the truth is
        unseen.
        A NaN score raises (see ConfusionMatrix), for argmax would quietly take it for the best one.
        """
        if logits.dim() != 4 or logits.shape[1] != len(self.names):
            raise ValueError(f"logits must be [N, {len(self.names)}, H, W], not {list(logits.shape)}")
        unseen = (label >= self.num_seen) & (label != self.ignore_index)
        zsl_label = torch.where(unseen, label.long() - self.num_seen, self.zsl.ignore_index)
        best, best_unseen = best_classes(logits, self.num_seen)
        self._pictures.append(picture_figures(self.gzsl.update_each(label, best)))
        self.zsl.update(zsl_label, best_unseen)
        next_one = len(self._order)
        self._order += range(next_one, next_one + len(label)) if index is None else index.tolist()

    def join(self) -> None:
        """Takes in what all processes counted; if these share the pictures out, each names its own to `update`."""
        for counts in self.state():
            counts.copy_(distributed.all_reduce_sum(counts.cpu()))
        self._pictures = distributed.gather_list([figures.cpu() for figures in self._pictures])
        self._order = distributed.gather_list(self._order)

    def state(self) -> list[Tensor]:
        """[GZSL counts int64 [K, K], ZSL counts int64 [U, U]], as views: processes sum them in place."""
        return [self.gzsl.matrix, self.zsl.matrix]

    def compute(self) -> dict:
        """All numbers as plain floats in [0, 1]; NaN is "undefined".

        miou_seen, miou_unseen: mean IoU of the seen / the unseen classes under the GZSL argmax
        hiou:            their harmonic mean
        miou_zsl:        mean IoU of the unseen classes on unseen pixels under the ZSL argmax
        bias:            share of the unseen pixels that the GZSL argmax gave to a seen class
        pixel_accuracy, mean_accuracy, fwiou: over all classes, GZSL
        per_class:       {name: IoU}, GZSL, in the order of `names`
        """
        matrix = self.gzsl.matrix.cpu()
        iou = class_iou(matrix)
        seen, unseen = nan_mean(iou[: self.num_seen]), nan_mean(iou[self.num_seen :])
        return {
            "miou_seen": seen,
            "miou_unseen": unseen,
            "hiou": harmonic_mean(seen, unseen),
            "miou_zsl": nan_mean(class_iou(self.zsl.matrix.cpu())),
            "bias": seen_bias(matrix, self.num_seen),
            "pixel_accuracy": pixel_accuracy(matrix),
            "mean_accuracy": mean_accuracy(matrix),
            "fwiou": frequency_weighted_iou(matrix),
            "per_class": dict(zip(self.names, iou.tolist())),
        }

    def per_class_zsl(self) -> dict[str, float]:
        """{unseen name: IoU under the ZSL argmax on unseen pixels}."""
        return dict(zip(self.names[self.num_seen :], class_iou(self.zsl.matrix.cpu()).tolist()))

    def details(self, pictures: Sequence[str]) -> dict:
        """What a report needs besides `compute`, in plain types.

        Args:
            pictures: the names of all pictures, in whose order those that were counted come.

        seen, unseen: class names; confusion: pixel counts, a row a true class
        per_picture:  {picture: [mean IoU of the classes that it shows or is given, pixel accuracy]}
        """
        figures = torch.cat(self._pictures).tolist() if self._pictures else []
        counted = sorted(zip(self._order, figures))
        return {
            "seen": list(self.names[: self.num_seen]),
            "unseen": list(self.names[self.num_seen :]),
            "confusion": self.gzsl.matrix.cpu().tolist(),
            "per_picture": {pictures[index]: as_json(figure) for index, figure in counted},
        }

    def __str__(self) -> str:
        return format_table(self.compute(), self.names, self.num_seen)


def picture_figures(counts: Tensor) -> Tensor:
    """How well each picture was done, from its pixel counts: int64 [N, C, C] -> float64 [N, 2].

    The first figure is the mean IoU of the classes that the picture shows or is given, the second its pixel
    accuracy; NaN for a picture without a valid pixel.
    """
    hit = counts.diagonal(dim1=1, dim2=2)  # [N, C]
    iou = hit.double() / (counts.sum(1) + counts.sum(2) - hit)  # 0 / 0 is NaN, and no part of the mean
    return torch.stack([iou.nanmean(dim=1), hit.sum(1).double() / counts.sum((1, 2))], dim=1)


def class_iou(matrix: Tensor) -> Tensor:
    """IoU_c = TP_c / (TP_c + FP_c + FN_c), int64 [C, C] -> float64 [C]; NaN where the union is empty."""
    hit = matrix.diagonal().double()
    return hit / (matrix.sum(0) + matrix.sum(1) - hit)  # 0 / 0 is NaN, as wanted


def pixel_accuracy(matrix: Tensor) -> float:
    """Share of the counted pixels that are right; NaN without pixels."""
    return float(matrix.diagonal().sum().double() / matrix.sum().double())


def mean_accuracy(matrix: Tensor) -> float:
    """Mean over the classes present in the truth of TP_c / (TP_c + FN_c); NaN without pixels."""
    return nan_mean(matrix.diagonal().double() / matrix.sum(1).double())


def frequency_weighted_iou(matrix: Tensor) -> float:
    """sum_c n_c IoU_c / sum_c n_c with n_c the true pixels of class c; NaN without pixels."""
    # A class without true pixels weighs nothing, even where its IoU is undefined.
    weighted = matrix.sum(1).double() * class_iou(matrix).nan_to_num(0.0)
    return float(weighted.sum() / matrix.sum().double())


def seen_bias(matrix: Tensor, num_seen: int) -> float:
    """Share of the unseen classes' pixels (rows from num_seen) given a seen class; NaN without any."""
    unseen = matrix[num_seen:].double()
    return float(unseen[:, :num_seen].sum() / unseen.sum())


def harmonic_mean(seen: float, unseen: float) -> float:
    """2 s u / (s + u); 0 where s + u is 0, NaN where one of them is undefined."""
    return 0.0 if seen + unseen == 0 else 2 * seen * unseen / (seen + unseen)


def nan_mean(values: Tensor) -> float:
    """Mean of the defined values; NaN if there is none."""
    return float(values.nanmean())


def as_json(result):
    """The same dict (or list, or number) with None for NaN, which JSON does not have."""
    if isinstance(result, dict):
        return {key: as_json(value) for key, value in result.items()}
    if isinstance(result, (list, tuple)):
        return [as_json(value) for value in result]
    return None if isinstance(result, float) and math.isnan(result) else result


def format_table(result: dict, names: Sequence[str], num_seen: int, columns: int = 4) -> str:
    """A result of `compute` (or of `as_json`) as text for a terminal, in percent; unseen classes bear a star.

    The headline, then IoU by class in `columns` columns, read downwards; '-' is undefined.
    """
    lines = [*_headline_rows([result]), "", "IoU by class, % (* unseen)"]
    width = max(len(name) for name in names) + 1
    cells = [
        f"{name + ('*' if number >= num_seen else ''):<{width}} {_percent(result['per_class'][name]):>5}"
        for number, name in enumerate(names)
    ]
    rows = -(-len(cells) // columns)
    return "\n".join(lines + ["   ".join(cells[row::rows]) for row in range(rows)])


def format_rows(results: Mapping[str, dict]) -> str:
    """Several results of `compute` as a table of headlines in percent, a row each; the key names the row."""
    width = max(map(len, results))
    rows = zip(["", *results], _headline_rows(results.values()))
    return "\n".join(f"{name:<{width}}  {row}" for name, row in rows)


def _headline_rows(results: Iterable[dict]) -> list[str]:
    """The titles of the headlines, and a line of figures for each result."""
    widths = [max(len(title), 5) for title, _ in HEADLINES]
    rows = [[title for title, _ in HEADLINES], *([_percent(r[key]) for _, key in HEADLINES] for r in results)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def best_classes(scores: Tensor, num_seen: int) -> tuple[Tensor, Tensor]:
    """The class with the highest score, and the unseen class with the highest one: two argmaxes in one look.

    Args:
        scores: [N, K, H, W], the seen classes first.

    Returns:
        Indices among all classes and among the unseen ones, int64 [N, H, W]; -1 where one of their scores is NaN.
    """
    seen, seen_index = scores[:, :num_seen].max(dim=1)
    unseen, unseen_index = scores[:, num_seen:].max(dim=1)
    best = torch.where(seen >= unseen, seen_index, unseen_index + num_seen)  # of equal ones the first
    no_number = unseen.isnan()
    return best.masked_fill_(seen.isnan() | no_number, -1), unseen_index.masked_fill_(no_number, -1)

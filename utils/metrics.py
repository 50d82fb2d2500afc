"""The evaluation pass and its figures, for generalised (GZSL) and plain (ZSL) zero-shot segmentation.

Everything is counted in whole pixels (int64) and divided once, at the end, in float64. So a result depends neither on
the batch size nor on the order of the images or the number of processes.

Convention of the field: a class that occurs neither in the labels nor in the predictions has an empty union, so its
IoU is undefined (NaN) and it is left out of the means. A class that is predicted but never labelled counts as 0.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import distributed
from utils.errors import UserError

HEADLINES = (  # title and key of the figures in a table
    ("seen", "miou_seen"), ("unseen", "miou_unseen"), ("hIoU", "hiou"), ("ZSL", "miou_zsl"), ("bias", "bias"),
    ("pixel acc", "pixel_accuracy"), ("mean acc", "mean_accuracy"), ("fwIoU", "fwiou"),
)  # fmt: skip


@torch.inference_mode()
def predictions(
    model: nn.Module, loader: DataLoader, device: torch.device, **options: Any
) -> Iterator[tuple[Tensor, Tensor, Tensor, Any]]:
    """Image, label, index and logits of each batch, on the device of the network except for the index.

    `loader` gives image uint8 [N, 3, H, W], label [N, H, W] and index [N]; `model.pixel_logits(image, **options)` gives
    a `PixelLogits` [N, K, H, W]. The network is in evaluation mode; its mode is restored at the end.

    Raises `UserError` at the end if a score was not finite; looking at each batch would wait for an accelerator.
    """
    broken, training = torch.zeros((), dtype=torch.bool, device=device), model.training
    model.eval()
    try:
        for image, label, index in tqdm(loader, desc="evaluation", unit="batch", leave=False, disable=None):
            image, label = image.to(device, non_blocking=True), label.to(device, non_blocking=True)
            logits = model.pixel_logits(image, **options)
            broken |= ~logits.coarse.isfinite().all()
            yield image, label, index, logits
    finally:
        model.train(training)
    if broken:
        raise UserError("the network's scores are not finite: train again with a lower --learning-rate")


def evaluate(
    model: nn.Module, loader: DataLoader, metrics: "ZeroShotMetrics", device: torch.device, gamma: float = 0.0,
    save: Callable | None = None, **options: Any,
) -> dict:  # fmt: skip
    """One pass: all the figures of `metrics`. For the arguments see `predictions` and `best_classes`.

    Where several processes divide the images among them, each gets the figures of all images.
    `save(image, label, index, prediction)` is called for each batch.
    """
    for image, label, index, logits in predictions(model, loader, device, **options):
        best, best_unseen = logits.map_pixels(partial(best_classes, num_seen=metrics.num_seen, gamma=gamma))
        metrics.update(best, best_unseen, label)
        if save is not None:
            save(image, label, index, best)
    return metrics.compute()


def images_at_once(batch_size: int | None, device: torch.device) -> int:
    """Images of one size to evaluate together: `batch_size`, or several on a GPU alone, since they need more memory."""
    return batch_size or (1 if device.type == "cpu" else 8)


class ZeroShotMetrics:
    """Pixel counts and figures of one pass over the evaluation images. No update waits for an accelerator.

    The first `num_seen` of the K class `names` are seen, and U unseen ones follow. `gzsl`, int64 [K, K], is the
    confusion matrix of all classes, a row a label and a column a prediction; `zsl`, int64 [U, U], that of the unseen
    classes on unseen pixels.
    """

    def __init__(self, names: Sequence[str], num_seen: int):
        self.names, self.num_seen = tuple(names), num_seen
        self.gzsl = torch.zeros(len(names), len(names), dtype=torch.int64)
        self.zsl = torch.zeros(len(names) - num_seen, len(names) - num_seen, dtype=torch.int64)

    @torch.no_grad()
    def update(self, best: Tensor, best_unseen: Tensor, label: Tensor) -> None:
        """Counts one batch, integer [N, H, W] each: the predicted class among all K (GZSL), and among the unseen ones
        from 0 (ZSL), which counts where the label is unseen. Pixels with the label 255 do not count.
        """
        label = torch.where(label == 255, -1, label.long())
        unseen_label = label - self.num_seen  # seen ones are negative
        self.gzsl = self.gzsl.to(label.device) + count_pixels(label, best, len(self.gzsl))
        self.zsl = self.zsl.to(label.device) + count_pixels(unseen_label, best_unseen, len(self.zsl))

    def compute(self) -> dict:
        """What all processes counted, each of images of its own, as plain floats in [0, 1]; None is "undefined".

        Besides the figures below, "confusion": pixel counts under the GZSL argmax, a row a labelled class.
        """
        gzsl, zsl = (distributed.all_reduce_sum(counts.cpu()) for counts in (self.gzsl, self.zsl))
        matrix, num_seen = gzsl.double(), self.num_seen
        iou, iou_zsl, hits, labelled = class_iou(matrix), class_iou(zsl), matrix.diagonal(), matrix.sum(1)
        seen, unseen = iou[:num_seen].nanmean(), iou[num_seen:].nanmean()
        figures = {  # under the GZSL argmax, but for the two of ZSL: those of the unseen classes on unseen pixels
            "miou_seen": seen,  # mean IoU of the seen classes
            "miou_unseen": unseen,
            "hiou": 2 * seen * unseen / (seen + unseen) if seen + unseen != 0 else 0.0,  # harmonic mean
            "miou_zsl": iou_zsl.nanmean(),
            "bias": matrix[num_seen:, :num_seen].sum() / labelled[num_seen:].sum(),  # unseen pixels given a seen class
            "pixel_accuracy": hits.sum() / matrix.sum(),
            "mean_accuracy": (hits / labelled).nanmean(),  # over the labelled classes
            "fwiou": (labelled * iou.nan_to_num(0.0)).sum() / matrix.sum(),  # IoU weighted by labelled pixels
        }
        by_class = {"per_class": zip(self.names, iou), "per_class_zsl": zip(self.names[num_seen:], iou_zsl)}
        result = _none_for_nan(figures.items()) | {key: _none_for_nan(pairs) for key, pairs in by_class.items()}
        return {**result, "confusion": gzsl.tolist()}


def best_classes(logits: Tensor, num_seen: int, gamma: float = 0.0) -> tuple[Tensor, Tensor]:
    """The best class of each pixel, and its best unseen class from 0, int64 [N, H, W] each, in one pass.

    Of the K classes of `logits`, [N, K, H, W], the first `num_seen` are seen. `gamma`, in [0, 1], is that of calibrated
    stacking: by how much more probable a seen class must be. A network that never had a label of an unseen class
    prefers the seen ones (Chao et al., ECCV 2016; SPNet, Xian et al., CVPR 2019).
    """
    scores = logits.softmax(dim=1) if gamma else logits
    seen, seen_index = scores[:, :num_seen].max(dim=1)
    unseen, unseen_index = scores[:, num_seen:].max(dim=1)
    best = torch.where(seen - gamma >= unseen, seen_index, unseen_index + num_seen)  # of equal ones the first
    return best, unseen_index


def count_pixels(label: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix: int64 [N, H, W] twice -> int64 [C, C]. Negative labels do not count."""
    index = torch.where(label < 0, num_classes**2, label * num_classes + prediction).flatten(1)  # [N, H * W]
    # torch.bincount would wait for the GPU to learn the highest index.
    counts = torch.zeros(len(index), num_classes**2 + 1, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(1, index, torch.ones_like(index)).sum(0)[:-1].unflatten(0, (num_classes, num_classes))


def class_iou(matrix: Tensor) -> Tensor:
    """IoU_c = TP_c / (TP_c + FP_c + FN_c), [C, C] -> float64 [C]; NaN where the union is empty."""
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(0) + matrix.sum(1) - hits)  # 0 / 0 is NaN, as wanted


def _none_for_nan(pairs: Iterable[tuple[str, float | Tensor]]) -> dict[str, float | None]:
    """Plain floats by name, with None for NaN, which JSON does not have."""
    return {name: None if math.isnan(value) else float(value) for name, value in pairs}


def percent(value: float | None) -> str:
    """A share in percent with one decimal, "-" where it is undefined."""
    return "-" if value is None else f"{100 * value:.1f}"


def format_table(result: dict, columns: int = 4) -> str:
    """A result of `compute` as text for a terminal, in percent: headlines, then IoU by class (* unseen)."""
    lines = [format_rows({"": result}), "", "IoU by class, % (* unseen)"]
    iou = {name + "*" * (name in result["per_class_zsl"]): value for name, value in result["per_class"].items()}
    width = max(map(len, iou))
    cells = [f"{name:<{width}} {percent(value):>5}" for name, value in iou.items()]
    rows = -(-len(cells) // columns)
    return "\n".join(lines + ["   ".join(cells[row::rows]) for row in range(rows)])


def format_rows(results: Mapping[str, dict]) -> str:
    """Several results of `compute` as a table of headlines in percent, a row each; the key names the row."""
    rows = [[name, *(percent(result[key]) for _, key in HEADLINES)] for name, result in results.items()]
    rows = [["", *(title for title, _ in HEADLINES)], *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("   ".join(map(str.rjust, row, widths)) for row in rows)

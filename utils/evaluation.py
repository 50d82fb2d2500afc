"""One pass of a network over the evaluation pictures."""

import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader

from utils import distributed
from utils.errors import UserError
from utils.logging import progress, warn_if_loader_slow
from utils.metrics import ZeroShotMetrics

LOOK_EVERY = 32
"""Batches between looks at whether the scores are finite: each look waits for an accelerator."""


@torch.inference_mode()
def predictions(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    score: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[tuple]:
    """Goes over `loader` with the network in evaluation mode, which is undone at the end.

    Args:
        model: image uint8 [N, 3, H, W] -> logits [N, K, H, W].
        loader: gives image, label [N, H, W] and index [N].
        device: where the network is.
        score: gives the logits in the network's place, as from several views.

    Yields:
        image, label, index and logits of each batch, on the device but for the index.

    Raises:
        UserError: if a score is not finite: the network's weights are not, or nearly so. On an accelerator some
            batches later, so that it never waits for one.
    """
    training, score = model.training, score or model
    model.eval()
    broken = torch.zeros((), dtype=torch.bool, device=device)
    try:
        batches = progress(warn_if_loader_slow(loader), total=len(loader), desc="evaluation", unit="batch", leave=False)
        for number, (image, label, index) in enumerate(batches, start=1):
            image, label = image.to(device, non_blocking=True), label.to(device, non_blocking=True)
            logits = score(image)
            # Several times as fast as looking at all scores; a NaN among them is the least and the greatest.
            broken |= ~torch.stack([logits.amin(), logits.amax()]).isfinite().all()
            if device.type == "cpu" or number % LOOK_EVERY == 0 or number == len(loader):
                _check_finite(broken)
            yield image, label, index, logits
    finally:
        model.train(training)


def _check_finite(broken: torch.Tensor) -> None:
    if broken:
        raise UserError("the network's scores are not finite: train again with a lower --learning-rate")


def evaluate(model: nn.Module, loader: DataLoader, metrics: ZeroShotMetrics, device: torch.device) -> dict:
    """All the figures and details of `metrics` in one pass; see `predictions` for the arguments.

    The loader's dataset has the names of its pictures in `ids`. Where several processes share the pictures out,
    each gets the figures of all.
    """
    counted = 0
    for _, label, index, logits in predictions(model, loader, device):
        metrics.update(logits, label, index)
        counted += len(index)
    metrics.join()
    counted = int(distributed.all_reduce_sum(torch.tensor(counted)))
    if counted != len(loader.dataset):
        print(f"warning: {counted} of {len(loader.dataset)} pictures were evaluated", file=sys.stderr)
    return {**metrics.compute(), **metrics.details(loader.dataset.ids)}


def pictures_at_once(batch_size: int | None, device: torch.device) -> int:
    """Pictures of one size to show the network together: `batch_size`, or what is fast on `device`.

    A GPU wants several. A CPU works as fast on one, and holds a fraction of the memory.
    """
    return batch_size or (1 if device.type == "cpu" else 8)

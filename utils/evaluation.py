"""One pass of a network over the evaluation pictures."""

import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader

from utils import distributed
from utils.errors import InputError
from utils.metrics import ZeroShotMetrics
from utils.records import progress


@torch.inference_mode()
def predictions(model: nn.Module, loader: DataLoader, device: torch.device) -> Iterator[tuple]:
    """Goes over `loader` with the network in evaluation mode, which is undone at the end.

    Args:
        model: image uint8 [N, 3, H, W] -> logits [N, K, H, W].
        loader: gives image, label [N, H, W] and index [N].
        device: where the network is.

    Yields:
        image, label, index and logits of each batch, on the device but for the index.

    Raises:
        InputError: if a score is not finite: the network's weights are not, or nearly so.
    """
    training = model.training
    model.eval()
    try:
        for image, label, index in progress(loader, desc="evaluation", unit="picture", leave=False):
            image, label = image.to(device, non_blocking=True), label.to(device, non_blocking=True)
            logits = model(image)
            if not logits.isfinite().all():
                raise InputError("the network's scores are not finite: train again with a lower --learning-rate")
            yield image, label, index, logits
    finally:
        model.train(training)


def evaluate(model: nn.Module, loader: DataLoader, metrics: ZeroShotMetrics, device: torch.device) -> dict:
    """All the figures and details of `metrics` in one pass; see `predictions` for the arguments.

    The loader's dataset has the names of its pictures in `ids`. Where several processes share the pictures out, in
    their order, each gets the figures of all.
    """
    counted = 0
    for _, label, index, logits in predictions(model, loader, device):
        metrics.update(logits, label)
        counted += len(index)
    metrics.join()
    counted = int(distributed.joined(torch.tensor(counted)))
    if counted != len(loader.dataset):
        print(f"warning: {counted} of {len(loader.dataset)} pictures were evaluated", file=sys.stderr)
    return {**metrics.compute(), **metrics.details(loader.dataset.ids)}

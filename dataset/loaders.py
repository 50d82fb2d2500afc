"""Loaders whose every batch is a function of (seed, step), whatever the number of workers."""

import functools
import itertools
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from utils.errors import UserError


@dataclass(frozen=True)
class StepSampler:
    """Batches of (index, seed) for the steps `first_step` ... `last_step` - 1.

    The dataset is gone through in a new random order again and again; an order that ends inside a batch is followed by
    the next one. The seed that goes with an index draws that image's augmentation, so a run that begins at step k
    sees exactly what an uninterrupted one sees from step k on. Raises `UserError` if a share would be empty.
    """

    num_items: int  # length of the dataset
    batch_size: int
    first_step: int
    last_step: int
    seed: int  # what all orders and augmentations derive from
    share: tuple[int, int] = (0, 1)  # of each batch the k-th of n shares, see `shared`

    def __post_init__(self):
        if self.batch_size < self.share[1]:
            sizes = f"--batch-size or --target-batch-size {self.batch_size}"
            raise UserError(f"{sizes} can't be shared by {self.share[1]} processes: raise it, or start fewer")

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, length = functools.lru_cache(1)(self._order), self.num_items
        for step in range(self.first_step, self.last_step):
            positions = range(step * self.batch_size, (step + 1) * self.batch_size)
            batch = [(order(place // length)[place % length], _mix(self.seed, place)) for place in positions]
            yield shared(batch, self.share)

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        return torch.randperm(self.num_items, generator=generator).tolist()


def shared(items: Sequence, share: tuple[int, int]) -> Sequence:
    """The k-th of n consecutive parts of `items` for `share` (k, n); they differ by one item at most."""
    number, parts = share
    start, end = (-(-k * len(items) // parts) for k in (number, number + 1))
    return items[start:end]


def _mix(seed: int, number: int) -> int:
    """One 63-bit seed from two numbers, far apart for neighbouring ones (constants of splitmix64)."""
    state = (seed * 0x9E3779B97F4A7C15 + number + 1) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return (state ^ (state >> 31)) % 2**63


def training_loader(
    dataset: Dataset, batch_size: int, first_step: int, last_step: int, seed: int, num_workers: int,
    share: tuple[int, int] = (0, 1),
) -> DataLoader:  # fmt: skip
    """Batches of `dataset` for the steps from `first_step` to before `last_step`, see `StepSampler`."""
    return _loader(dataset, num_workers, StepSampler(len(dataset), batch_size, first_step, last_step, seed, share))


def empty_batches(size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Target batches of no image, as `TargetDataset` makes them: for source-only training."""
    nothing = torch.empty(0, dtype=torch.bool)
    image = torch.empty(0, 3, size, size, dtype=torch.uint8)
    return itertools.repeat((image, nothing.view(0, 1, 1).expand(0, size, size), nothing))


def evaluation_loader(
    dataset: Dataset, num_workers: int, batch_size: int = 1, share: tuple[int, int] = (0, 1)
) -> DataLoader:
    """The images of `dataset`, each once, in batches of up to `batch_size` that are of one size, or a share of these.

    With a batch size of 1 they come in order; else images of one size come in order, and so do the sizes.
    """
    sizes = dataset.sizes() if batch_size > 1 else range(len(dataset))
    return _loader(dataset, num_workers, shared(batches_by_size(sizes, batch_size), share))


def batches_by_size(sizes: Sequence, batch_size: int) -> list[list[int]]:
    """Indices of `sizes` in batches of up to `batch_size` equal ones, each index once."""
    alike: dict = {}
    for index, size in enumerate(sizes):
        alike.setdefault(size, []).append(index)
    return [indices[i : i + batch_size] for indices in alike.values() for i in range(0, len(indices), batch_size)]


def _loader(dataset: Dataset, num_workers: int, batches: Iterable) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_the_main_process,
    )


def leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C and many a SIGTERM go to all processes; a worker must live until the main process is done with it.

    A second SIGTERM ends it: so an interpreter that shuts down ends a worker that hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))

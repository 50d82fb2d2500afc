"""A slow disk shows as a line on the screen, not as a standstill."""

import sys
import threading
from collections.abc import Iterable, Iterator
from time import monotonic

from tqdm import tqdm

PATIENCE = 30.0
"""Seconds to wait for a batch before saying so; starting the loaders' workers takes some of them."""


def watched(batches: Iterable, seconds: float = PATIENCE) -> Iterator:
    """The same batches; says once for each that takes longer than `seconds` what is likely the matter.

    Args:
        batches: a loader, whose `num_workers` are named, or anything else to go over.
    """
    workers = getattr(batches, "num_workers", 0)
    waiting_since: list[float] = []  # at most one; the thread below holds nothing that would keep the loader alive
    over = threading.Event()

    def watch() -> None:
        told = None
        while not over.wait(seconds / 8):
            begun = next(iter(waiting_since), told)
            if begun != told and monotonic() - begun > seconds:
                told = begun
                tqdm.write(
                    f"waiting for pictures for more than {seconds:g} s: the disk is slow, or too few processes read "
                    f"(--num-workers {workers}); raise --num-workers, or copy the pictures to a disk of this machine",
                    file=sys.stderr,
                )

    iterator = iter(batches)
    threading.Thread(target=watch, daemon=True).start()
    try:
        while True:
            waiting_since[:] = [monotonic()]
            try:
                batch = next(iterator)
            except StopIteration:
                return
            waiting_since.clear()
            yield batch
    finally:
        over.set()

"""One function over thousands of files, with all cores."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tqdm import tqdm

CHUNK = 128
"""Jobs that a process is handed at a time: enough that handing over costs nothing beside them."""

# A fork starts at once; a new interpreter would import torch again, which takes longer than a thousand masks. The
# children only read files, so they may be forked from a process that holds threads, as PyTorch's loaders are.
START_METHOD, WORTHWHILE = ("fork", 2 * CHUNK) if sys.platform == "linux" else ("spawn", 32 * CHUNK)


def spread(function: Callable, jobs: Sequence, title: str, unit: str, workers: int | None = None) -> Iterator:
    """`function(job)` of each job, in their order, with a progress bar where stderr is a terminal.

    Args:
        function: takes one job; it and the jobs go to other processes.
        jobs: what to work on. A few are done in this process.
        title, unit: for the bar.
        workers: processes; None: one a core that this process may use.

    Raises:
        What `function` raises, for the first such job.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bar = tqdm(total=len(jobs), desc=title, unit=unit, disable=None if len(jobs) > 1 else True)
    if workers < 2 or len(jobs) < WORTHWHILE:
        with bar:
            for job in jobs:
                yield function(job)
                bar.update()
        return
    ignore = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}  # Ctrl-C is this process's
    pool = ProcessPoolExecutor(workers, mp_context=get_context(START_METHOD), **ignore)
    try:
        with bar:
            for result in pool.map(function, jobs, chunksize=CHUNK):
                yield result
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)

"""What a run writes and prints besides checkpoints: args.json, log.jsonl, evaluation.json, the bar, warnings."""

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torchvision
from tqdm import tqdm

from utils.errors import UserError, remove_leftovers, write_text

LOADER_PATIENCE = 30.0
"""Seconds to wait for a batch before a warning; starting the loaders' workers takes some of them."""


def open_run_folder(folder: Path, first_step: int, arguments: dict[str, Any], **more: Any) -> None:
    """Prepares a run's folder: clears what a killed process left, drops later log lines, writes args.json.

    Args:
        folder: made if it is not there.
        first_step: the step that the run begins with; 0 for a new run.
        arguments: every setting, in plain types.
        more: further entries of args.json.

    Raises:
        UserError: if the folder can't be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    except OSError as error:
        raise UserError(
            f"--output-dir {folder} can't be made ({error.strerror}): choose a folder you may write"
        ) from error
    _drop_log_lines(folder / "log.jsonl", first_step)
    if first_step == 0:
        (folder / "best.pth").unlink(missing_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    content = {"arguments": arguments, "versions": versions, "commit": _commit(), **more}
    write_text(folder / "args.json", json.dumps(content, indent=2, default=str) + "\n")


def _commit() -> str | None:
    """The commit of this code, with `-dirty` where files differ; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _drop_log_lines(path: Path, after: int) -> None:
    """Removes lines of steps above `after`, and one that was cut off as the process died."""
    write_text(path, "".join(f"{line}\n" for line in _log_lines(path) if _step_of(line) <= after))


def has_log_line(folder: Path, step: int) -> bool:
    """Whether log.jsonl has the evaluation of this step."""
    return any(_step_of(line) == step for line in _log_lines(folder / "log.jsonl"))


def _log_lines(path: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    return []


def _step_of(line: str) -> float:
    """The step of a line of log.jsonl; infinity where it is no such line."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def append_log(folder: Path, entry: dict[str, Any]) -> None:
    """One more line of log.jsonl, on the disk when this returns. Raises `UserError`."""
    path = folder / "log.jsonl"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}): make room there") from error


def json_lines(content: dict[str, Any]) -> str:
    """JSON with one key a line, however long its value."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items())
    return f"{{\n{lines}\n}}\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `json_lines`. Raises `UserError`."""
    write_text(path, json_lines(content))


class LossMeter:
    """Keeps the losses of the last steps on the device and reads them only when asked, since each read waits for it.

    Args:
        all_reduce_sum: adds up the parts of several processes.
    """

    def __init__(self, all_reduce_sum: Callable[[torch.Tensor], torch.Tensor]):
        self._all_reduce_sum = all_reduce_sum
        self._steps: list[tuple[int, dict[str, torch.Tensor]]] = []
        self.last: dict[str, float] = {}

    def add(self, step: int, losses: dict[str, torch.Tensor]) -> None:
        """Keeps the scalars `losses` of `step`."""
        self._steps.append((step, {name: loss.detach() for name, loss in losses.items()}))

    def means(self) -> dict[str, float]:
        """Means over the steps since the last call; those of before where there were none.

        Raises:
            UserError: if a loss is not finite, with the step and the loss.
        """
        if self._steps:
            names = list(self._steps[0][1])
            rows = torch.stack([torch.stack([losses[n].float() for n in names]) for _, losses in self._steps])
            rows = self._all_reduce_sum(rows)  # [steps, losses]
            for (step, _), row in zip(self._steps, rows.tolist()):
                for name, value in zip(names, row):
                    if not math.isfinite(value):
                        raise UserError(
                            f"the loss {name} is {value} at step {step}: begin again with a lower --learning-rate and "
                            "another --output-dir (continue takes a lower rate too, where the saved losses were normal)"
                        )
            self._steps.clear()
            self.last = dict(zip(names, rows.mean(dim=0).tolist()))
        return self.last


def summary_writer() -> type:
    """TensorBoard's writer. Raises `UserError` if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("tensorboard needs a package that is not installed: pip install tensorboard") from error
    return SummaryWriter


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held so far, in GB: reserved on the GPU, or resident without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    status = Path("/proc/self/status")  # of Linux, whose `ru_maxrss` begins with that of the process that started this
    if status.exists():
        found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if found:
            return int(found[0]) * 1024 / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def duration(seconds: float) -> str:
    """Seconds for a reader: 42 s, 7 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def progress(items: Iterable, **options: Any) -> Iterator:
    """A tqdm bar that is quiet where the output is no terminal."""
    return tqdm(items, disable=None, dynamic_ncols=True, file=sys.stderr, **options)


def warn_if_loader_slow(batches: Iterable, seconds: float = LOADER_PATIENCE) -> Iterator:
    """The same batches; prints a line for each that takes longer than `seconds`, with the likely reason.

    Args:
        batches: a loader, whose `num_workers` are named, or another iterable.
    """
    workers = getattr(batches, "num_workers", 0)
    waiting_since: list[float] = []  # at most one; the thread below keeps no reference to the loader
    over = threading.Event()

    def watch() -> None:
        warned = None
        while not over.wait(seconds / 8):
            begun = next(iter(waiting_since), warned)
            if begun != warned and monotonic() - begun > seconds:
                warned = begun
                tqdm.write(
                    f"waiting for images for more than {seconds:g} s: the disk is slow, or too few processes read "
                    f"(--num-workers {workers}); raise --num-workers, or copy the images to a local disk",
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

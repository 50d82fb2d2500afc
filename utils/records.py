"""What a run leaves behind besides checkpoints, and what it shows: arguments, log, figures, bar, TensorBoard."""

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision
from tqdm import tqdm

from utils import distributed
from utils.errors import UserError, atomic_write, remove_leftovers

GOES_ON = "--restore-from-where continue goes on from it"
KEPT = f"the last checkpoint is whole, and {GOES_ON}"


def make_run_folder(path: Path) -> None:
    """Makes the folder `path` if need be, and clears it of what a killed process left. Raises `UserError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
    except OSError as error:
        raise UserError(
            f"--output-dir {path} can't be made ({error.strerror}): choose a folder you may write"
        ) from error


def write_arguments(folder: Path, arguments: dict[str, Any], **more: Any) -> None:
    """`args.json`: the flags of the run, the versions under it and the commit of the code."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
    }
    record = {"arguments": arguments, "versions": versions, "commit": _commit(), **more}
    _replace(folder / "args.json", json.dumps(record, indent=2, default=str) + "\n")


def _commit() -> str | None:
    """The commit that this code stands at, with `-dirty` where files differ; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_evaluation(folder: Path, record: dict[str, Any]) -> None:
    """`evaluation.json`: all that the last evaluation found, for `utils.report`."""
    _replace(folder / "evaluation.json", lines_json(record))


def lines_json(record: dict[str, Any]) -> str:
    """JSON that people can read beside tables that they don't: a key a line, however long its value."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in record.items())
    return f"{{\n{lines}\n}}\n"


def append_log(folder: Path, record: dict[str, Any]) -> None:
    """One JSON line more in `log.jsonl`, on the disk before the checkpoint that comes after it."""
    path = folder / "log.jsonl"
    with _writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def forget_log(folder: Path, after: int = -1) -> None:
    """Drops the lines of `log.jsonl` that are of steps above `after`, or were cut off as the process died."""

    def step(line: str) -> float:
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            return math.inf

    path, lines = folder / "log.jsonl", []
    with _writing(path), contextlib.suppress(FileNotFoundError):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    _replace(path, "".join(f"{line}\n" for line in lines if step(line) <= after))


def _replace(path: Path, text: str) -> None:
    with _writing(path), atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} can't be written ({error.strerror}): make room there, or choose an --output-dir you may write"
        ) from error


class LossMeter:
    """Keeps the losses of the last steps on the device and looks at them only when asked.

    Every look is a device sync, so the loop looks at the log interval and before it saves. Several processes look
    together, and see the sums of their parts.
    """

    def __init__(self):
        self._steps: list[tuple[int, dict[str, torch.Tensor]]] = []
        self.last: dict[str, float] = {}

    def add(self, step: int, losses: dict[str, torch.Tensor]) -> None:
        """Notes the scalars `losses` of `step`."""
        self._steps.append((step, {name: loss.detach() for name, loss in losses.items()}))

    def means(self) -> dict[str, float]:
        """Means over the steps since the last look, which `last` keeps; those of before if there were none.

        Raises:
            UserError: if a loss is not finite, naming the step and the loss.
        """
        if self._steps:
            names = list(self._steps[0][1])
            rows = torch.stack([torch.stack([losses[n].float() for n in names]) for _, losses in self._steps])
            rows = distributed.joined(rows)
            for (step, _), row in zip(self._steps, rows.tolist()):
                for name, value in zip(names, row):
                    if not math.isfinite(value):
                        raise UserError(f"the loss {name} is {value} at step {step}: lower --learning-rate; {KEPT}")
            self._steps.clear()
            self.last = dict(zip(names, rows.mean(dim=0).tolist()))
        return self.last


def summary_writer() -> type:
    """TensorBoard's writer. Raises `UserError` if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard") from error
    return SummaryWriter


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held so far, in GB: of the GPU, or of the machine without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")  # of Linux, whose `ru_maxrss` begins with that of the process that started this
    if status.exists():
        held = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if held:
            return int(held[0]) * 1024 / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 7 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def progress(items: Iterable, **options: Any) -> Iterator:
    """A tqdm bar that is quiet where the output is no terminal, as in a process that is not the main one."""
    return tqdm(items, disable=None, dynamic_ncols=True, file=sys.stderr, **options)

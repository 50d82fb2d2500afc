"""What a run writes and prints besides checkpoints: args.json, log.jsonl, mean losses, a progress bar."""

import json
import math
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from tqdm import tqdm

from utils import distributed
from utils.errors import UserError, remove_leftovers, write_text


def open_run_folder(folder: Path, first_step: int, arguments: dict[str, Any]) -> None:
    """Prepares a run's folder: clears what a killed process left, drops later log lines, writes args.json.

    Args:
        folder: made if it is not there.
        first_step: the step that the run begins with; 0 for a new run.
        arguments: every setting, in plain types.

    Raises:
        UserError: if a file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    write_log(folder, [entry for entry in read_log(folder) if entry["step"] <= first_step])
    if first_step == 0:
        (folder / "best.pth").unlink(missing_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    content = {"arguments": arguments, "versions": versions, "commit": _commit()}
    write_text(folder / "args.json", json.dumps(content, indent=2, default=str) + "\n")


def _commit() -> str | None:
    """The commit of this code, with `-dirty` where files differ; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl, an evaluation each. Raises `UserError` for one that is no JSON."""
    path = folder / "log.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    except ValueError as error:
        raise UserError(f"{path} has a line that is no JSON ({error}): delete that line") from error


def write_log(folder: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Writes log.jsonl. Raises `UserError` if the disk does not take it; the old one is then kept."""
    write_text(folder / "log.jsonl", "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries))


def json_lines(content: dict[str, Any]) -> str:
    """JSON with one key a line, however long its value."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items())
    return f"{{\n{lines}\n}}\n"


class LossMeter:
    """Keeps the losses of the last steps on the device and reads them only when asked, since each read waits for it."""

    def __init__(self):
        self._steps: list[tuple[int, dict[str, torch.Tensor]]] = []
        self.last: dict[str, float] = {}

    def add(self, step: int, losses: dict[str, torch.Tensor]) -> None:
        """Keeps the scalars `losses` of `step`; those of several processes add up."""
        self._steps.append((step, {name: loss.detach() for name, loss in losses.items()}))

    def means(self) -> dict[str, float]:
        """Means over the steps since the last call; those of before where there were none.

        Raises:
            UserError: if a loss is not finite, with the step and the loss.
        """
        if self._steps:
            names = list(self._steps[0][1])
            rows = torch.stack([torch.stack([losses[n].float() for n in names]) for _, losses in self._steps])
            rows = distributed.all_reduce_sum(rows)  # [steps, losses]
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


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held so far, in GB: reserved on the GPU, or resident without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    status = Path("/proc/self/status")  # of Linux, whose `ru_maxrss` begins with that of the process that started this
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024 / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def progress(items: Iterable, **options: Any) -> Iterator:
    """A tqdm bar that is quiet where the output is no terminal."""
    return tqdm(items, disable=None, dynamic_ncols=True, file=sys.stderr, **options)

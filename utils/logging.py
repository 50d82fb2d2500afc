"""What a run writes and prints besides checkpoints: args.json, log.jsonl, mean losses, a progress bar."""

import json
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision

from utils import distributed
from utils.errors import UserError, write_text


def open_run_folder(folder: Path, first_step: int, arguments: dict[str, Any]) -> None:
    """Prepares the folder of a run that begins with `first_step`: drops what is of later steps, writes args.json.

    `arguments` are the settings, in plain types. Raises `UserError` if a file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    write_log(folder, [entry for entry in read_log(folder) if entry["step"] <= first_step])
    if first_step == 0:
        (folder / "best.pth").unlink(missing_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    content = {"arguments": arguments, "versions": versions, "commit": _commit()}
    write_text(folder / "args.json", json.dumps(content, indent=2) + "\n")


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
        self._steps: list[dict[str, torch.Tensor]] = []
        self.last: dict[str, float] = {}

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """Keeps the scalars `losses` of a step; those of several processes add up."""
        self._steps.append({name: loss.detach().float() for name, loss in losses.items()})

    def means(self, step: int) -> dict[str, float]:
        """Means over the steps since the last call, up to `step`; those of before where there were none.

        Raises `UserError` for the first that is not finite.
        """
        if self._steps:
            rows = torch.stack([torch.stack(list(losses.values())) for losses in self._steps])
            rows = distributed.all_reduce_sum(rows).cpu()  # [steps, losses]
            names, broken = list(self._steps[0]), (~rows.isfinite()).nonzero().tolist()
            if broken:
                row, column = broken[0]
                at = f"is {rows[row, column]} at step {step + 1 + row - len(rows)}"
                hint = "begin again, or continue where the saved losses were normal, with a lower --learning-rate"
                raise UserError(f"the loss {names[column]} {at}: {hint}")
            self.last = dict(zip(names, rows.mean(dim=0).tolist()))
            self._steps.clear()
        return self.last


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held so far, in GB: reserved on the GPU, or resident without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    status = Path("/proc/self/status")  # of Linux, whose `ru_maxrss` begins with that of the process that started this
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9

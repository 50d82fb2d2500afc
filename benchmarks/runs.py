"""What the ablation and the demo share: rows of a table, their trainings, each done once, and Markdown tables."""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError, write_text
from utils.logging import read_log
from utils.metrics import HEADLINES
from utils.trainer import stage_folder

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {1: "train_split_lambda.py", 2: "train_st_split.py"}
PAPER = ("--lambda", 0.2, "--weak-proportion", 0.2)
PAPER2 = ("--pseudo-labels", "network", "--keep", 0.6, "--self-training-weight", 0.4, "--weak-proportion", 0.2)
"""What turns the best setting into the paper's, in stage 1 and in stage 2."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str  # its heading
    start: str  # folder of stage 1; rows that share it share that run
    stage1: tuple = ()  # flags besides the shared ones
    stage2: tuple | None = None  # None: the figures are those of stage 1

    def folder(self, root: Path, split: int | str, seed: int) -> Path:
        """Where the stage is kept, below `root`, that the figures are of."""
        name = re.sub(r"\W", "_", self.name if self.stage2 else self.start)
        return stage_folder(root / name / f"seed{seed}", split, 1 if self.stage2 is None else 2)

    def train(self, root: Path, split: int | str, seed: int, shared: Sequence) -> None:
        """Trains the stages that are not done, with the flags `shared`."""
        start, shared = root / self.start / f"seed{seed}", [*shared, "--split", split, "--seed", seed]
        last = train(SCRIPTS[1], [*shared, "--output-dir", start, *self.stage1], stage_folder(start, split, 1))
        if self.stage2 is not None:
            run = self.folder(root, split, seed)
            flags = ["--output-dir", run.parents[1], "--stage1-checkpoint", last, *self.stage2]
            train(SCRIPTS[2], [*shared, *flags], run)

    def figures(self, root: Path, split: int | str, seed: int) -> dict | None:
        """The evaluation of the last step, with the figures that eval.py gives; None if the run is not done."""
        folder = self.folder(root, split, seed)
        return read_log(folder)[-1] if (folder / "done.json").is_file() else None


def command(arguments: Sequence, log: Path) -> None:
    """Runs a script of the project, with its output in `log`. Raises `UserError` if it fails."""
    line = [sys.executable, *map(str, arguments)]
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(line, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise UserError(f"{' '.join(line[1:])} ended with exit code {code}; see {log}")


def train(script: str, flags: Sequence, folder: Path) -> Path:
    """Trains a stage, or resumes it, unless it is done with the same flags and the same settings file after `--config`.

    `folder` is where the stage keeps its run; run.log there gets the output. Returns the path of latest.pth.
    """
    flags = list(map(str, flags))
    config = (ROOT / flags[flags.index("--config") + 1]).read_text(encoding="utf-8") if "--config" in flags else ""
    wanted = json.dumps({"script": script, "flags": flags, "config": config})
    begun, done, latest = folder / "begun.json", folder / "done.json", folder / "latest.pth"
    if not begun.is_file() or begun.read_text(encoding="utf-8") != wanted:
        for path in (latest, done):
            path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(begun, wanted)
    if not done.is_file():
        print(f"{folder / 'run.log'}", file=sys.stderr, flush=True)
        resume = ["--restore-from-where", "continue"] if latest.is_file() else []
        command([script, *flags, *resume], folder / "run.log")
        write_text(done, wanted)
    return latest


def format_results(rows: Mapping[str, Sequence[Mapping]]) -> str:
    """A Markdown table in percent, a row a method: the mean over seeds, and the spread (standard deviation)."""
    lines = [["", *(title for title, _ in HEADLINES[:5]), "seeds"]]
    for name, results in rows.items():
        lines.append([name, *(summary([r[key] for r in results]) for _, key in HEADLINES[:5]), str(len(results))])
    return format_table(lines)


def format_table(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first one the head, as a Markdown table that also reads well as plain text."""
    lines = [lines[0], ["---", *["---:"] * (len(lines[0]) - 1)], *lines[1:]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in lines)


def summary(values: Sequence[float | None]) -> str:
    """Mean and standard deviation of shares, in percent; "-" where one is undefined."""
    if None in values:
        return "-"
    text = f"{100 * statistics.mean(values):.1f}"
    return f"{text} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else text

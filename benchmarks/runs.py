"""What the benchmarks share: a training or an evaluation as a command, done once, and tables of results."""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FIGURES = {"seen": "miou_seen", "unseen": "miou_unseen", "hIoU": "hiou", "ZSL": "miou_zsl", "bias": "bias"}
"""Columns of a table, and the keys of `eval.py --json` that they show."""


def command(arguments: Sequence[str], log: Path | None) -> None:
    """Runs a script or module of the project, with its output in `log` if there is one.

    Raises:
        SystemExit: with the command's exit code, if it fails.
    """
    line = [sys.executable, *map(str, arguments)]
    if log is None:
        code = subprocess.run(line, cwd=ROOT, check=False).returncode
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            code = subprocess.run(line, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        where = "" if log is None else f"; see {log}"
        print(f"error: {' '.join(map(str, arguments))} ended with exit code {code}{where}", file=sys.stderr)
        raise SystemExit(code)


def train(script: str, flags: Sequence[str], folder: Path, log: Path | None = None) -> Path:
    """Trains a stage, or resumes it, unless it is done with the same flags and the same settings file.

    Args:
        script: train_split_lambda.py or train_st_split.py.
        flags: all but `--restore-from-where continue`; the settings file is the first one after `--config`.
        folder: where the stage keeps its run.
        log: for the output; None shows it.

    Returns:
        The path of `latest.pth`.
    """
    flags = list(map(str, flags))
    config = (ROOT / flags[flags.index("--config") + 1]).read_text(encoding="utf-8") if "--config" in flags else ""
    wanted = {"script": script, "flags": flags, "config": config}
    begun, done, latest = folder / "begun.json", folder / "done.json", folder / "latest.pth"

    def matches(path: Path) -> bool:
        return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == wanted

    if not matches(done):
        resumes = matches(begun) and latest.is_file()
        if not resumes:
            latest.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)  # it would vouch for the checkpoint of other flags
        begun.write_text(json.dumps(wanted), encoding="utf-8")
        command([script, *flags, *(["--restore-from-where", "continue"] if resumes else [])], log)
        done.write_text(json.dumps(wanted), encoding="utf-8")
    return latest


def evaluate(
    checkpoint: Path, data_path: Path, more: Sequence[str] = (), log: Path | None = None, name: str = "result.json"
) -> dict:
    """The figures of a checkpoint by eval.py, kept beside it as `name` until the checkpoint changes."""
    result = checkpoint.with_name(name)
    if not (result.is_file() and result.stat().st_mtime >= checkpoint.stat().st_mtime):
        flags = ["--checkpoint", checkpoint, "--data-path", data_path, "--json", result]
        command(["eval.py", *flags, *more], log)
    return json.loads(result.read_text(encoding="utf-8"))


def format_results(rows: Mapping[str, Sequence[Mapping]]) -> str:
    """A Markdown table in percent, a row a method: the mean over seeds, and the spread (standard deviation)."""
    head = ["", *FIGURES, "seeds"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, results in rows.items():
        cells = [summary([result[key] for result in results]) for key in FIGURES.values()]
        lines.append([name, *cells, str(len(results))])
    return align(lines)


def format_classes(rows: Mapping[str, Sequence[Mapping]], marked: Sequence[str]) -> str:
    """A Markdown table of IoU by class in percent, mean over seeds, a column a method; `marked` bear a star."""
    names = next(iter(rows.values()))[0]["per_class"]
    lines = [["IoU", *rows], ["---", *["---:"] * len(rows)]]
    for name in names:
        cells = [summary([r["per_class"][name] for r in results], spread=False) for results in rows.values()]
        lines.append([name + ("*" if name in marked else ""), *cells])
    return align(lines)


def summary(values: Sequence[float | None], spread: bool = True) -> str:
    """Mean and standard deviation of shares, in percent; "-" where one is undefined."""
    if any(value is None or math.isnan(value) for value in values):
        return "-"
    text = f"{100 * statistics.mean(values):.1f}"
    return f"{text} ± {100 * statistics.stdev(values):.1f}" if spread and len(values) > 1 else text


def align(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table that also reads well as plain text."""
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]

    def cell(text: str, width: int) -> str:
        if text in ("---", "---:"):
            return text[3:].rjust(width, "-")
        return text.ljust(width)

    return "\n".join("| " + " | ".join(map(cell, row, widths)) + " |" for row in lines)


def add_seeds(parser: argparse.ArgumentParser, default: Sequence[int]) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=list(default), help="one run of each stage a seed")

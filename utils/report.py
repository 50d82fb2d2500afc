"""One page that compares runs: figures, curves, classes, confusions, worst and best images, and what differs.

    python -m utils.report runs/split1/stage1 runs/split1/stage2
    python -m utils.report runs/*/split1/stage2 --output report.html

A run is the folder that a training keeps, or a file that `eval.py --json PATH` wrote. The page is one HTML file that
opens without a network. Its charts need matplotlib (pip install matplotlib).
"""

import base64
import io
import itertools
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from utils.config import Parser
from utils.errors import UserError, one_line_errors, write_text
from utils.metrics import HEADLINES, format_rows, percent

PAGE = Path(__file__).with_suffix(".html")
COLOURS = ("#2563a8", "#c2561a", "#2e7d4f", "#8b3fa0", "#b08900", "#c2316b", "#4c5a67", "#0f8a9d")
CURVES = HEADLINES[:5]
NUM_EXTREMES = 3  # worst and best images that are shown, of each
NEEDED = {"seen", "unseen", "confusion", "per_image", "per_class", *(key for _, key in HEADLINES)}


class Run:
    """A run on the page, from its folder or a file of `eval.py --json`.

    Raises:
        UserError: where a file is missing or not complete.
    """

    def __init__(self, path: Path, colour: str):
        is_folder = path.is_dir()
        self.name, self.colour, self.folder = str(path), colour, path if is_folder else path.parent
        self.label = f'<span class="run" style="background:{colour}"></span>{escape(self.name)}'
        self.last = read_json(path / "evaluation.json" if is_folder else path)
        if not set(self.last) >= NEEDED:
            raise UserError(f"{path} lacks {min(NEEDED - set(self.last))}: evaluate the run again")
        self.classes = [*self.last["seen"], *(f"{unseen}*" for unseen in self.last["unseen"])]
        if np.shape(self.last["confusion"]) != (len(self.classes), len(self.classes)):
            raise UserError(f"{path} lacks a confusion matrix of its classes: evaluate the run again")
        self.log = read_log(path / "log.jsonl") if is_folder else []  # the figures of all evaluations
        arguments = read_json(path / "args.json") if is_folder else {}
        facts = {key: self.last.get(key) for key in ("stage", "selection", "protocol")}
        facts |= {f"--{key.strip('_').replace('_', '-')}": v for key, v in arguments.get("arguments", {}).items()}
        facts |= {"commit": arguments.get("commit"), **arguments.get("versions", {})}
        self.metadata = {
            key: " ".join(map(str, value)) if isinstance(value, list) else str(value)
            for key, value in facts.items()
            if value is not None
        }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` if the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        reason = "holds no JSON object" if path.is_file() else "is missing"
        raise UserError(f"{path} {reason}: give the folder of a run that has been evaluated, or a file of eval.py")
    return content


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without a last one that is cut off."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def figures_table(runs: Sequence[Run]) -> str:
    """The headlines of each run, the best ones bold."""
    known = {key: {run.last[key] for run in runs} - {None} for _, key in HEADLINES}
    best = {key: (min if key == "bias" else max)(values) for key, values in known.items() if len(values) > 1}
    rows = [["run", "step", *(title for title, _ in HEADLINES)]]
    for run in runs:
        oracle = ' <span class="oracle">oracle</span>' if "ORACLE" in run.metadata.get("protocol", "") else ""
        bold = {key: "<b>{}</b>" if run.last[key] == best.get(key, -1) else "{}" for _, key in HEADLINES}
        figures = [bold[key].format(percent(run.last[key])) for _, key in HEADLINES]
        rows.append([run.label + oracle, str(run.last.get("step", "-")), *figures])
    return table(rows)


def table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """HTML cells as a table; the first row is its head. It scrolls where the screen is narrow."""
    head, *body = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows]
    content = f"<thead>{head.replace('td>', 'th>')}</thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="wide"><table class="{kind}">{content}</table></div>'


def new_chart(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure of so many inches and its axes. Raises `UserError` if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the report's charts need matplotlib: pip install matplotlib") from error
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def chart_image(figure: Any, text: str) -> str:
    """A matplotlib figure as an <img> that carries it as SVG."""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return image_tag(file.getvalue(), "svg+xml", text)


def image_tag(content: bytes, kind: str, text: str) -> str:
    """An <img> that carries its image."""
    return f'<img alt="{escape(text)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def curves(runs: Sequence[Run]) -> str:
    """A chart for each figure in percent over the steps, a line a run."""
    if all(len(run.log) < 2 for run in runs):
        return ""
    charts = ""
    for title, key in CURVES:
        figure, axes = new_chart(3.6, 2.4)
        for run in runs:
            points = [(entry["step"], 100 * entry[key]) for entry in run.log if entry.get(key) is not None]
            axes.plot([step for step, _ in points], [y for _, y in points], "o-", color=run.colour, markersize=3)
        axes.set(title=f"{title}, %", xlabel="step", ylim=(0, None))
        axes.grid(axis="y", color="#e4e4e4")
        charts += chart_image(figure, f"{title} over the steps")
    return f'<div class="grid">{charts}</div>'


def class_bars(runs: Sequence[Run]) -> str:
    """A bar a run for each class, in the order of the first run's classes; classes of other runs follow."""
    values = [(run.colour, dict(zip(run.classes, run.last["per_class"].values()))) for run in runs]
    rows = ""
    for name in dict.fromkeys(name for run in runs for name in run.classes):
        bars = ""
        for colour, iou in values:
            width = f"width:{75 * (iou.get(name) or 0):.1f}%"
            bar = f'<div class="bar"><i style="{width};background:{colour}"></i>{percent(iou.get(name))}</div>'
            bars += bar if name in iou else ""
        rows += f"<div>{escape(name)}</div><div>{bars}</div>"
    return f'<div class="bars">{rows}</div>'


def confusions(runs: Sequence[Run]) -> str:
    """The confusion matrix of each run, each row the shares of a class's pixels."""
    charts = ""
    for run in runs:
        counts, ticks = np.asarray(run.last["confusion"], np.float64), range(len(run.classes))
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        figure, axes = new_chart(6, 6)
        axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)  # the square root shows small confusions
        axes.set_xticks(ticks, run.classes, rotation=90, fontsize=min(9, 250 / len(ticks)))
        axes.set_yticks(ticks, run.classes, fontsize=min(9, 250 / len(ticks)))
        for line in (axes.axhline, axes.axvline):
            line(len(run.last["seen"]) - 0.5, color="#888", linewidth=0.8)
        charts += f"<div><h3>{run.label}</h3>{chart_image(figure, f'confusion matrix of {run.name}')}</div>"
    return f'<div class="grid large">{charts}</div>'


def extreme_images(run: Run) -> str:
    """The images with the lowest and the highest mean IoU, as far as they were drawn, and their figures."""
    scored = sorted((iou, name, accuracy) for name, (iou, accuracy) in run.last["per_image"].items() if iou is not None)
    count, content = min(NUM_EXTREMES, len(scored) // 2), ""
    for kind, chosen in (("worst", scored[:count]), ("best", scored[len(scored) - count :][::-1])):
        figures = ""
        for iou, name, accuracy in chosen:
            text = f"{escape(name)}: mean IoU {percent(iou)} %, {percent(accuracy)} % of the pixels right"
            drawn = run.folder / run.last.get("drawn", {}).get(name, "")
            kind_of_file = drawn.suffix[1:].replace("jpg", "jpeg")
            image = image_tag(drawn.read_bytes(), kind_of_file, name) if drawn.is_file() else ""
            figures += f"<figure>{image}<figcaption>{text}</figcaption></figure>"
        content += f'<h3>{run.label}: {kind}</h3><div class="grid large">{figures}</div>'
    return content


def metadata_tables(runs: Sequence[Run]) -> str:
    """Flags, versions and commit: those that differ, and those that all runs share, folded."""
    names = dict.fromkeys(name for run in runs for name in run.metadata)
    rows = [[name, *(run.metadata.get(name, "-") for run in runs)] for name in names]
    differing = [list(map(escape, row)) for row in rows if len(set(row[1:])) > 1]
    shared = [list(map(escape, row[:2])) for row in rows if len(set(row[1:])) == 1]
    content = table([["", *(run.label for run in runs)], *differing], "words") if differing else ""
    opened, same = " open" if len(runs) == 1 else "", table([["", "value"], *shared], "words")
    return content + f"<details{opened}><summary>The same in all runs</summary>{same}</details>"


def page(runs: Sequence[Run], title: str) -> str:
    """The whole HTML file: sections with a heading, their content, and a note on how to read it."""
    sections = [
        ("Figures", figures_table(runs), "Percent. seen, unseen: mean IoU where all classes compete; hIoU: their "
         "harmonic mean; ZSL: unseen pixels, unseen classes alone; bias: share of unseen pixels given a seen class, "
         "where less is better."),
        ("During training", curves(runs), " &emsp; ".join(run.label for run in runs)),
        ("IoU of each class", class_bars(runs), 'Percent; * unseen class; "-": neither labelled nor predicted.'),
        ("Confusion", confusions(runs), "Rows: labelled classes. Columns: predicted classes, dark for many pixels "
         "(square root of the share)."),
        ("Worst and best images", "".join(map(extreme_images, runs)), ""),
        ("What differs", metadata_tables(runs), ""),
    ]  # fmt: skip
    body = "\n".join(
        f'<section><h2>{heading}</h2>{content}<p class="muted">{note}</p></section>'
        for heading, content, note in sections
        if content
    )
    return Template(PAGE.read_text(encoding="utf-8")).substitute(title=escape(title), body=body)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m utils.report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or file of eval.py --json")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page to write")
    parser.add_argument("--title", default="Runs side by side", help="heading of the page")
    args = parser.parse_args(argv)
    if args.output.suffix not in (".html", ".htm"):
        parser.error(f"--output {args.output}: give a name that ends in .html")
    if len(set(map(Path.resolve, args.runs))) < len(args.runs):
        parser.error("a run is given twice: give each once")
    runs = [Run(path, colour) for path, colour in zip(args.runs, itertools.cycle(COLOURS))]
    write_text(args.output, page(runs, args.title))
    print(format_rows({run.name: run.last for run in runs}))
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

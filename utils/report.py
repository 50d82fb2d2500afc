"""One page that compares runs: figures, curves, classes, confusions, worst and best images, and what differs.

    python -m utils.report runs/split1/stage1 runs/split1/stage2
    python -m utils.report runs/*/split1/stage2 --output report.html

A run is the folder that a training keeps, or a file that `eval.py --json PATH` wrote. The page is one HTML file that
opens without a network. Its charts need matplotlib (pip install matplotlib).
"""

import argparse
import base64
import html
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from utils.config import Parser
from utils.errors import UserError, one_line_errors, write_text
from utils.metrics import HEADLINES, format_rows, percent

PAGE = Path(__file__).with_suffix(".html")
COLOURS = ("#2563a8", "#c2561a", "#2e7d4f", "#8b3fa0", "#b08900", "#c2316b", "#4c5a67", "#0f8a9d")
CURVES = HEADLINES[:5]
NUM_EXTREMES = 3  # worst and best images that are shown, of each
IMAGE_SIDE = 1000  # pixels; a larger image is shrunk


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Args:
        name: distinct from the other runs' on the page.
        colour: of its lines and bars.
        folder: the paths of its images start here.
        last: the last evaluation with all details.
        log: the figures of all evaluations, with `step`.
        metadata: flag or fact -> value as text.
    """

    name: str
    colour: str
    folder: Path
    last: dict[str, Any]
    log: list[dict[str, Any]]
    metadata: dict[str, str]

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the confusion matrix; "*" marks the unseen ones."""
        return [*self.last["seen"], *(f"{name}*" for name in self.last["unseen"])]

    @property
    def label(self) -> str:
        """The name as HTML, after a square of the run's colour."""
        return f'<span class="run" style="background:{self.colour}"></span>{html.escape(self.name)}'


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m utils.report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or file of eval.py --json")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page to write")
    parser.add_argument("--title", default="Runs side by side", help="heading of the page")
    args = parser.parse_args(argv)
    if args.output.suffix not in (".html", ".htm"):
        parser.error(f"--output {args.output}: give a name that ends in .html")
    if len(set(map(Path.resolve, args.runs))) < len(args.runs):
        parser.error("a run is given twice: give each once")
    return args


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` if the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        reason = "holds no JSON object" if path.is_file() else "is missing"
        raise UserError(
            f"{path} {reason}: give the folder of a run that has been evaluated, or a file of eval.py --json"
        )
    return content


def read_run(path: Path, name: str, colour: str) -> Run:
    """A run's folder, or a file of eval.py. Raises `UserError` where a file is missing or not complete."""
    is_folder = path.is_dir()
    folder = path if is_folder else path.parent
    last = read_json(path / "evaluation.json" if is_folder else path)
    needed = {"seen", "unseen", "confusion", "per_image", "per_class", *(key for _, key in HEADLINES)}
    size = len(last.get("seen", ())) + len(last.get("unseen", ()))
    if not needed <= set(last) or np.shape(last["confusion"]) != (size, size):
        lacking = min(needed - set(last), default="a confusion matrix of its classes")
        raise UserError(f"{path} lacks {lacking}: evaluate the run again")
    arguments = read_json(path / "args.json") if is_folder else {}
    log, lines = [], path / "log.jsonl"
    for line in lines.read_text(encoding="utf-8").splitlines() if is_folder and lines.is_file() else ():
        try:
            log.append(json.loads(line))
        except ValueError:
            continue  # the last line, where a process died while it wrote
    metadata = {key: last[key] for key in ("stage", "selection", "protocol") if key in last}
    metadata |= {f"--{key.strip('_').replace('_', '-')}": v for key, v in arguments.get("arguments", {}).items()}
    metadata |= {f"version of {key}": value for key, value in arguments.get("versions", {}).items()}
    metadata["commit"] = arguments.get("commit")
    texts = {k: " ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in metadata.items() if v is not None}
    return Run(name, colour, folder, last, log or [{"step": 0, **last}], texts)


def run_names(paths: Sequence[Path]) -> list[str]:
    """The paths without the folders that all share."""
    whole = [path.resolve() for path in paths]
    common = Path(os.path.commonpath([path.parent for path in whole]))
    return [str(path.relative_to(common)) for path in whole] if len(paths) > 1 else [str(paths[0])]


def figures_table(runs: Sequence[Run]) -> str:
    """The headlines of each run, the best ones bold, and under which protocol they were trained."""
    known = {key: [run.last[key] for run in runs if run.last[key] is not None] for _, key in HEADLINES}
    best = {key: (min if key == "bias" else max)(values) for key, values in known.items() if len(set(values)) > 1}
    rows = [["run", "step", *(title for title, _ in HEADLINES)]]
    for run in runs:
        oracle = ' <span class="oracle">oracle</span>' if "ORACLE" in str(run.last.get("protocol")) else ""
        cells = [f"<b>{percent(run.last[k])}</b>" if run.last[k] == best.get(k, -1) else percent(run.last[k])
                 for _, k in HEADLINES]  # fmt: skip
        rows.append([run.label + oracle, str(run.last.get("step", "-")), *cells])
    note = (
        "Percent. seen, unseen: mean IoU where all classes compete; hIoU: their harmonic mean; ZSL: unseen pixels, "
        "unseen classes alone; bias: share of unseen pixels given a seen class, where less is better."
    )
    protocols = [f"{run.label}: {html.escape(str(run.last.get('protocol', '')))}" for run in runs]
    return table(rows) + "".join(f'<p class="muted">{text}</p>' for text in (note, *protocols))


def table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """HTML cells as a table; the first row is its head. It scrolls where the screen is narrow."""
    head, *body = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{row}</tr>\n" for row in body)
    head = head.replace("td>", "th>")
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def curves(runs: Sequence[Run]) -> str:
    """A chart for each figure in percent over the steps, a line a run."""
    if all(len(run.log) < 2 for run in runs):
        return ""
    charts = ""
    for title, key in CURVES:
        figure, axes = new_chart(3.6, 2.4)
        for run in runs:
            points = [(row["step"], 100 * row[key]) for row in run.log if row.get(key) is not None]
            axes.plot(*zip(*points), color=run.colour, marker="o", markersize=3) if points else None
        axes.set(title=f"{title}, %", xlabel="step", ylim=(0, None))
        axes.grid(axis="y", color="#e4e4e4")
        charts += chart_image(figure, f"{title} over the steps")
    return f'<div class="grid">{charts}</div><p class="muted">{" &emsp; ".join(run.label for run in runs)}</p>'


def new_chart(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure of so many inches and its axes. Raises `UserError` if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the report's charts need matplotlib: pip install matplotlib") from error
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.title.set_fontsize(10)
    return figure, axes


def chart_image(figure: Any, text: str) -> str:
    """A matplotlib figure as an <img> that carries it as SVG."""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return f'<img alt="{html.escape(text)}" src="{data_uri(file.getvalue(), "svg+xml")}">'


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def class_bars(runs: Sequence[Run]) -> str:
    """A bar a run for each class, in the order of the first run's classes; classes of other runs follow."""
    values = [(run, dict(zip(run.classes, run.last["per_class"].values()))) for run in runs]
    rows = ""
    for name in dict.fromkeys(name for run in runs for name in run.classes):
        bars = "".join(
            f'<div class="bar"><i style="width:{75 * (iou[name] or 0):.1f}%;background:{run.colour}"></i>'
            f"{percent(iou[name])}</div>"
            for run, iou in values
            if name in iou
        )
        rows += f"<div>{html.escape(name)}</div><div>{bars}</div>"
    return (
        f'<div class="bars">{rows}</div><p class="muted">Percent; * unseen class; "-": neither labelled nor given.</p>'
    )


def confusions(runs: Sequence[Run]) -> str:
    """The confusion matrix of each run, each row the shares of a class's pixels."""
    charts = ""
    for run in runs:
        counts = np.asarray(run.last["confusion"], np.float64)
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        size = len(run.classes)
        figure, axes = new_chart(6, 6)
        axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)  # the square root shows small confusions
        axes.set_xticks(range(size), run.classes, rotation=90, fontsize=min(9, 250 / size))
        axes.set_yticks(range(size), run.classes, fontsize=min(9, 250 / size))
        axes.axhline(len(run.last["seen"]) - 0.5, color="#888", linewidth=0.8)
        axes.axvline(len(run.last["seen"]) - 0.5, color="#888", linewidth=0.8)
        charts += f"<div><h3>{run.label}</h3>{chart_image(figure, f'confusion matrix of {run.name}')}</div>"
    note = "Rows: labelled classes. Columns: what their pixels were given, dark for many (square root of the share)."
    return f'<div class="grid large">{charts}</div><p class="muted">{note}</p>'


def extreme_images(run: Run) -> str:
    """The images with the lowest and the highest mean IoU, as far as they were drawn, and their figures."""
    scored = sorted((iou, name, accuracy) for name, (iou, accuracy) in run.last["per_image"].items() if iou is not None)
    count, content = min(NUM_EXTREMES, len(scored) // 2), ""
    for kind, chosen in (("worst", scored[:count]), ("best", scored[len(scored) - count :][::-1])):
        figures = ""
        for iou, name, accuracy in chosen:
            text = f"{html.escape(name)}: mean IoU {percent(iou)} %, {percent(accuracy)} % of the pixels right"
            drawn = run.last.get("drawn", {}).get(name)
            image = embed_image(run.folder / drawn) if drawn else ""
            figures += f"<figure>{image}<figcaption>{text}</figcaption></figure>"
        content += f'<h3>{run.label}: {kind}</h3><div class="grid large">{figures}</div>'
    return content


def embed_image(path: Path) -> str:
    """An <img> that carries the image; nothing where the file is gone."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError:
        return ""
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return f'<img alt="image, label and prediction" src="{data_uri(buffer.getvalue(), "jpeg")}">'


def metadata_tables(runs: Sequence[Run]) -> str:
    """Flags, versions and commit: those that differ, and those that all runs share, folded."""
    values = {
        n: [run.metadata.get(n, "-") for run in runs] for n in dict.fromkeys(n for run in runs for n in run.metadata)
    }
    differing = {name: texts for name, texts in values.items() if len(set(texts)) > 1}
    rows = [["", *(run.label for run in runs)]]
    rows += [[html.escape(text) for text in (name, *texts)] for name, texts in differing.items()]
    shared = [["", "value"], *([html.escape(n), html.escape(t[0])] for n, t in values.items() if n not in differing)]
    opened = " open" if len(runs) == 1 else ""
    folded = f"<details{opened}><summary>The same in all runs</summary>{table(shared, 'words')}</details>"
    return (table(rows, "words") if differing else "") + folded


def page(runs: Sequence[Run], title: str) -> str:
    """The whole HTML file."""
    sections = {
        "Figures": figures_table(runs),
        "During training": curves(runs),
        "IoU of each class": class_bars(runs),
        "Confusion": confusions(runs),
        "Worst and best images": "".join(map(extreme_images, runs)),
        "What differs": metadata_tables(runs),
    }
    body = "".join(f"<section><h2>{heading}</h2>{text}</section>\n" for heading, text in sections.items() if text)
    return Template(PAGE.read_text(encoding="utf-8")).substitute(title=html.escape(title), body=body)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    names = run_names(args.runs)
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(names))]
    runs = [read_run(*run) for run in zip(args.runs, names, colours)]
    write_text(args.output, page(runs, args.title))
    print(format_rows({run.name: run.last for run in runs}))
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One page about one or several runs: figures side by side, curves, classes, confusions, pictures, what differs.

    python -m utils.report runs/split1/stage1 runs/split1/stage2
    python -m utils.report runs/*/split1/stage2 --output report.html

A run is the folder that a training keeps, or a file that `eval.py --json PATH` wrote. The page is one HTML file that
needs nothing beside it: no network, no scripts. The table stands beside it as Markdown.
"""

import argparse
import base64
import html
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.config import Parser
from utils.errors import UserError, one_line_errors
from utils.metrics import HEADLINES

COLOURS = ("#2563a8", "#c2561a", "#2e7d4f", "#8b3fa0", "#b08900", "#c2316b", "#4c5a67", "#0f8a9d")
"""Of the runs, in turn; dark enough to be read as text on white."""

CURVES = HEADLINES[:5]
TOOLTIPS = 40  # classes up to which each cell of a confusion matrix says what it is
EXTREMES = 3  # worst and best pictures that are shown, of either so many
PICTURE_SIDE = 1000  # pixels; a drawn picture that is wider is shrunk

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: #222; background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; }
.muted { color: #666; font-size: .875rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; max-width: 55vw;
       min-width: 7rem; white-space: normal; overflow-wrap: anywhere; }
.words td, .words th { text-align: left; }
.words td { overflow-wrap: anywhere; white-space: normal; min-width: 7rem; }
thead th { border-bottom: 2px solid #999; vertical-align: bottom; }
.run { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.oracle { background: #fbe3d4; color: #8a3200; border-radius: 3px; padding: 0 .35em; font-size: .8rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.grid > * { min-width: 0; margin: 0; }
.matrix svg { min-width: 28rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: #444; }
.bars { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr; gap: .35rem .8rem; align-items: center; }
.bar { display: flex; align-items: center; height: .95rem; font-size: .75rem; color: #444; }
.bar i { display: block; height: .75rem; margin-right: .4rem; border-radius: 0 2px 2px 0; min-width: 1px; }
figure img { width: 100%; height: auto; display: block; border: 1px solid #ddd; }
figcaption { font-size: .875rem; overflow-wrap: anywhere; }
details summary { cursor: pointer; }
@media (max-width: 40rem) { table { font-size: .875rem; } th, td { padding: .3rem .45rem; } }
"""


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run: its last evaluation, all of them, and its flags.

    Args:
        name: unlike that of any other run on the page.
        folder: what paths in `last` start from.
        last: the evaluation with all details.
        log: one dict an evaluation, with `step` and the figures.
        arguments: flags, and below other keys versions and commit; empty for a file of eval.py.
    """

    name: str
    folder: Path
    last: dict[str, Any]
    log: list[dict[str, Any]]
    arguments: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        """Class names with a star for those unseen, in the order of the matrix."""
        return [*self.last["seen"], *(f"{name}*" for name in self.last["unseen"])]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m utils.report", description=__doc__)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or a file of eval.py --json PATH"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), metavar="FILE",
        help="the page; the table goes beside it, with .md for .html",
    )  # fmt: skip
    parser.add_argument("--title", default="Runs side by side", help="what stands above the page")
    return parser.parse_args(argv)


# Reading


def read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {hint}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as JSON: {hint}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: {hint}")
    return content


def read_run(path: Path, name: str) -> RunRecord:
    """A run's folder, or a file of eval.py. Raises `UserError` where a record is missing or not whole."""
    folder = path if path.is_dir() else path.parent
    hint = "give the folder of a run that has been evaluated, or a file of eval.py --json PATH"
    last = read_json(path / "evaluation.json" if path.is_dir() else path, hint)
    needed = {"seen", "unseen", "confusion", "per_picture", "per_class", *(key for _, key in HEADLINES)}
    if not needed <= set(last):
        raise UserError(f"{path} lacks {sorted(needed - set(last))[0]}: {hint}")
    size = len(last["seen"]) + len(last["unseen"])
    if np.shape(last["confusion"]) != (size, size):
        raise UserError(f"{path}: the confusion matrix is not of its {size} classes: {hint}")
    if not path.is_dir():
        return RunRecord(name, folder, last, [{"step": 0, **last}], {})
    log = []
    for line in (path / "log.jsonl").read_text(encoding="utf-8").splitlines() if (path / "log.jsonl").is_file() else ():
        try:
            log.append(json.loads(line))
        except ValueError:
            continue  # the last line, where a process died while it wrote
    return RunRecord(name, folder, last, log or [last], read_json(path / "args.json", hint))


def name_runs(paths: Sequence[Path]) -> list[str]:
    """The shortest names that tell the runs apart: their paths without the folders that all share."""
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        raise UserError("a run is named twice: give each once")
    if len(whole) == 1:
        return [str(paths[0])]
    common = Path(os.path.commonpath(whole))
    return [str(path.relative_to(common)) if path != common else path.name for path in whole]


def percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


# The Markdown table


def markdown(runs: Sequence[RunRecord]) -> str:
    """A table of the figures in percent, one row a run, and one of the arguments that differ."""
    rows = [["run", "step", *(title for title, _ in HEADLINES)], ["---", *["---:"] * (1 + len(HEADLINES))]]
    for run in runs:
        rows.append([run.name, str(run.last.get("step", "-")), *(percent(run.last[key]) for _, key in HEADLINES)])
    text = markdown_rows(rows)
    differing, _ = compare_arguments(runs)
    if differing:
        head = [["argument", *(run.name for run in runs)], ["---"] * (1 + len(runs))]
        text += "\n\n" + markdown_rows([*head, *([name, *values] for name, values in differing.items())])
    return text + "\n"


def markdown_rows(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns, so that the table can also be read as it is; a bar in a cell is told from a column's."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells if not row[i].startswith("---")) for i in range(len(cells[0]))]
    padded = [
        [
            cell[3:].rjust(width, "-") if cell.startswith("---") else cell.ljust(width)
            for cell, width in zip(row, widths)
        ]
        for row in cells
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in padded)


def compare_arguments(runs: Sequence[RunRecord]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Flags, versions and commit of the runs: those that differ, a value a run, and those that all share."""
    tables = []
    for run in runs:
        flags = {
            "--" + key.strip("_").replace("_", "-"): value for key, value in run.arguments.get("arguments", {}).items()
        }
        others = {f"version of {name}": version for name, version in run.arguments.get("versions", {}).items()}
        told = {key: run.last[key] for key in ("stage", "selection", "protocol") if key in run.last}
        tables.append({**told, **flags, **others, "commit": run.arguments.get("commit")})
    names = list(dict.fromkeys(name for table in tables for name in table))
    shown = {name: [as_text(table.get(name)) for table in tables] for name in names}
    differing = {name: values for name, values in shown.items() if len(set(values)) > 1}
    return differing, {name: values[0] for name, values in shown.items() if name not in differing}


def as_text(value: Any) -> str:
    return "-" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


# The page


def page(runs: Sequence[RunRecord], title: str) -> str:
    """The whole HTML file."""
    sections = [
        ("Figures", figures_table(runs)),
        ("While it was trained", curves(runs)),
        ("IoU of each class", class_bars(runs)),
        ("Confusions", confusions(runs)),
        ("Worst and best pictures", "".join(pictures(runs, n) for n in range(len(runs)))),
        ("What differs", arguments(runs)),
    ]
    body = "".join(f"<section><h2>{heading}</h2>{content}</section>\n" for heading, content in sections if content)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}</body>\n</html>\n"
    )


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def label(runs: Sequence[RunRecord], number: int) -> str:
    """A run's name with the square of its colour."""
    return f'<span class="run" style="background:{colour(number)}"></span>{html.escape(runs[number].name)}'


def table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """HTML cells as a table that scrolls by itself where the screen is narrow; the first row is its head."""
    head, *body = rows
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in body)
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    content = f"<thead><tr>{heads}</tr></thead>\n<tbody>{cells}</tbody>"
    return f'<div class="wide"><table class="{kind}">{content}</table></div>\n'


def figures_table(runs: Sequence[RunRecord]) -> str:
    rows = [["run", "step", *(title for title, _ in HEADLINES)]]
    known = {key: [run.last[key] for run in runs if run.last[key] is not None] for _, key in HEADLINES}
    best = {key: (min if key == "bias" else max)(values) for key, values in known.items() if len(set(values)) > 1}
    for number, run in enumerate(runs):
        cells = [percent(run.last[key]) for _, key in HEADLINES]
        cells = [f"<b>{c}</b>" if best.get(k) == run.last[k] and c != "-" else c for c, (_, k) in zip(cells, HEADLINES)]
        oracle = ' <span class="oracle">oracle</span>' if "ORACLE" in str(run.last.get("protocol")) else ""
        rows.append([label(runs, number) + oracle, str(run.last.get("step", "-")), *cells])
    protocols = "".join(
        f'<p class="muted">{label(runs, n)}: {html.escape(str(run.last.get("protocol", "")))}</p>'
        for n, run in enumerate(runs)
    )
    about = (
        '<p class="muted">Percent, at the step named. seen, unseen: mean IoU where all classes compete; hIoU: their '
        "harmonic mean; ZSL: unseen pixels among the unseen classes alone; bias: share of unseen pixels given a seen "
        "class, where less is better.</p>"
    )
    return table(rows) + about + protocols


def curves(runs: Sequence[RunRecord]) -> str:
    """A small chart for each figure, a line a run; a run of one evaluation is a dot."""
    if all(len(run.log) < 2 for run in runs):
        return ""
    return '<div class="grid">' + "".join(chart(runs, title, key) for title, key in CURVES) + "</div>" + legend(runs)


def legend(runs: Sequence[RunRecord]) -> str:
    return (
        '<p class="muted">' + " &emsp; ".join(label(runs, n) for n in range(len(runs))) + "</p>"
        if len(runs) > 1
        else ""
    )


def chart(runs: Sequence[RunRecord], title: str, key: str) -> str:
    """Inline SVG: `key` in percent over the steps."""
    width, height, left, right, top, bottom = 360, 220, 38, 12, 26, 30
    lines = [[(r["step"], 100 * r[key]) for r in run.log if r.get(key) is not None] for run in runs]
    last_step = max((step for line in lines for step, _ in line), default=0) or 1
    ticks = nice_ticks(max((value for line in lines for _, value in line), default=0.0))

    def place(step: float, value: float) -> tuple[float, float]:
        across, up = (width - left - right) * step / last_step, (height - top - bottom) * value / ticks[-1]
        return round(left + across, 1), round(height - bottom - up, 1)

    parts = [f'<text x="{left}" y="15" font-weight="600">{title}, %</text>']
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for step, anchor in ((0, "start"), (last_step, "end")):
        parts.append(f'<text x="{place(step, 0)[0]}" y="{height - 10}" text-anchor="{anchor}">{step}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 10}" text-anchor="middle">step</text>')
    for number, line in enumerate(lines):
        points = [place(*point) for point in line]
        drawn = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour(number)}" stroke-width="2"/>')
        for (x, y), (step, value) in zip(points, line):
            told = f"{html.escape(runs[number].name)}, step {step}: {value:.1f}"
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour(number)}"><title>{told}</title></circle>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title} over the steps">{"".join(parts)}</svg>'


def nice_ticks(highest: float) -> list[float]:
    """Four or five round numbers from 0 to `highest` or a little above, at most 100."""
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 25) if s * 4 >= min(highest, 100) or s == 25)
    return [step * n for n in range(max(1, math.ceil(min(highest, 100) / step)) + 1)]


def class_bars(runs: Sequence[RunRecord]) -> str:
    """A bar a run for each class, in the order of the first run's classes; classes of other runs follow."""
    values = [dict(zip(run.classes, run.last["per_class"].values())) for run in runs]
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.classes):
        bars = ""
        for n, iou in enumerate(values):
            if name in iou:
                style = f"width:{75 * (iou[name] or 0):.1f}%;background:{colour(n)}"
                bars += f'<div class="bar"><i style="{style}"></i>{percent(iou[name])}</div>'
        rows.append(f"<div>{html.escape(name)}</div><div>{bars}</div>")
    note = '<p class="muted">Percent; * unseen class; "-": neither shown nor predicted.</p>'
    return f'<div class="bars">{"".join(rows)}</div>{note}{legend(runs)}'


def confusions(runs: Sequence[RunRecord]) -> str:
    matrices = (
        f'<div><h3>{label(runs, n)}</h3><div class="wide matrix">{confusion(run)}</div></div>'
        for n, run in enumerate(runs)
    )
    told = (
        '<p class="muted">Rows: true classes. Columns: what their pixels were given, dark for many (square root).</p>'
    )
    return f'<div class="grid large">{"".join(matrices)}</div>{told}'


def confusion(run: RunRecord) -> str:
    """Inline SVG: the matrix as a picture, each row the shares of a true class's pixels."""
    counts = np.asarray(run.last["confusion"], np.float64)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    white, dark = np.array([255.0, 255.0, 255.0]), np.array([16.0, 62.0, 120.0])
    # The square root shows small confusions, which a linear scale would leave white.
    pixels = white + np.sqrt(share)[..., None] * (dark - white)
    names, number = run.classes, len(counts)
    cell = max(3, min(22, 700 // number))
    left, top = 8 + 6.6 * max(map(len, names)), 8 + 6.6 * max(map(len, names))
    side = cell * number
    width, height = left + side + 8, top + side + 8
    picture = data_uri(Image.fromarray(pixels.round().astype(np.uint8)), "PNG")
    parts = [
        f'<image x="{left:.0f}" y="{top:.0f}" width="{side}" height="{side}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="{picture}"/>'
    ]
    size = min(11, max(3, cell))
    for n, name in enumerate(names):
        middle, told = (n + 0.5) * cell, html.escape(name)
        font = f'style="font-size:{size}px"'
        parts.append(
            f'<text x="{left - 4:.0f}" y="{top + middle + size / 3:.1f}" text-anchor="end" {font}>{told}</text>'
        )
        x, y = left + middle + size / 3, top - 4
        parts.append(f'<text x="{x:.1f}" y="{y:.0f}" transform="rotate(-90 {x:.1f} {y:.0f})" {font}>{told}</text>')
    border = len(run.last["seen"]) * cell
    for x1, y1, x2, y2 in (
        (0, border, side, border), (border, 0, border, side),
        (0, 0, side, 0), (0, 0, 0, side), (side, 0, side, side), (0, side, side, side),
    ):  # fmt: skip
        parts.append(
            f'<line x1="{left + x1:.0f}" y1="{top + y1:.0f}" x2="{left + x2:.0f}" y2="{top + y2:.0f}" stroke="#888"/>'
        )
    if number <= TOOLTIPS:
        for row, column in np.argwhere(counts > 0).tolist():
            told = f"{names[row]} given {names[column]}: {share[row, column]:.1%}"
            parts.append(
                f'<rect x="{left + column * cell:.0f}" y="{top + row * cell:.0f}" width="{cell}" height="{cell}" '
                f'fill="transparent"><title>{html.escape(told)}</title></rect>'
            )
    return (
        f'<svg style="max-width:{width:.0f}px" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="confusion matrix">{"".join(parts)}</svg>'
    )


def pictures(runs: Sequence[RunRecord], number: int) -> str:
    """The pictures that were drawn, the worst first, with their figures; names alone where nothing was drawn."""
    run = runs[number]
    scored = sorted((f[0], name, f[1]) for name, f in run.last["per_picture"].items() if f[0] is not None)
    drawn = {name: run.folder / path for name, path in run.last.get("drawn", {}).items()}
    count = min(EXTREMES, len(scored) // 2)
    content = ""
    for kind, chosen in (("worst", scored[:count]), ("best", scored[len(scored) - count :][::-1])):
        figures = []
        for score, name, accuracy in chosen:
            told = f"{html.escape(name)}: mean IoU {percent(score)} %, {percent(accuracy)} % of the pixels right"
            image = embed_picture(drawn[name]) if name in drawn else ""
            figures.append(f"<figure>{image}<figcaption>{told}</figcaption></figure>")
        content += (
            f'<h3>{label(runs, number)}: {kind}</h3><div class="grid large">{"".join(figures)}</div>' if figures else ""
        )
    return content


def embed_picture(path: Path) -> str:
    """An <img> that carries its picture; nothing where the picture is gone."""
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except OSError:
        return ""
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return f'<img alt="photo, truth and prediction" src="{data_uri(picture, "JPEG")}">'


def data_uri(picture: Image.Image, form: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, form, **({"quality": 82} if form == "JPEG" else {"optimize": True}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def arguments(runs: Sequence[RunRecord]) -> str:
    """Flags, versions and commit: first those that differ, the others folded away."""
    differing, shared = compare_arguments(runs)
    content = ""
    if len(runs) > 1:
        rows = [["", *(label(runs, n) for n in range(len(runs)))]]
        rows += [[html.escape(name), *map(html.escape, values)] for name, values in differing.items()]
        content += table(rows, "words") if differing else "<p>Nothing does.</p>"
    rows = [["", "value"], *([html.escape(name), html.escape(value)] for name, value in shared.items())]
    said = "What all runs share" if len(runs) > 1 else "Arguments"
    return (
        content
        + f"<details{' open' if len(runs) == 1 else ''}><summary>{said}</summary>{table(rows, 'words')}</details>"
    )


def write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path} can't be written ({error.strerror}): choose another path") from error


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.output.suffix not in (".html", ".htm"):
        raise UserError(f"--output {args.output}: give a name that ends in .html")
    runs = [read_run(path, name) for path, name in zip(args.runs, name_runs(args.runs))]
    text = markdown(runs)
    write(args.output, page(runs, args.title))
    write(args.output.with_suffix(".md"), text)
    print(f"{text}\n{args.output}, {args.output.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

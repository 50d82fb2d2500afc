"""One page that compares runs: figures, curves, classes, confusions, images, and what differs.

    python -m utils.report runs/split1/stage1 runs/split1/stage2
    python -m utils.report runs/*/split1/stage2 --output report.html

A run is the folder that a training keeps, or a file that `eval.py --json PATH` wrote. The page is one HTML file that
opens without a network. Its charts need matplotlib (pip install matplotlib).
"""

import base64
import io
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from types import SimpleNamespace
from typing import Any

import numpy as np

from utils.config import Parser
from utils.errors import UserError, one_line_errors, write_text
from utils.logging import read_log
from utils.metrics import HEADLINES, format_rows, percent

PAGE = Path(__file__).with_suffix(".html")
NEEDED = {"confusion", "per_class", "per_class_zsl", *(key for _, key in HEADLINES)}


def read_run(path: Path) -> SimpleNamespace:
    """A run's `name`, `folder`, last `result`, `log` of evaluations, `classes`, and `facts` {name: text}.

    Raises:
        UserError: where a file is missing or not complete.
    """
    is_folder = path.is_dir()
    result = _read_json(path / "evaluation.json" if is_folder else path)
    kept = _read_json(path / "args.json") if is_folder else {}
    classes = [name + "*" * (name in result.get("per_class_zsl", ())) for name in result.get("per_class", ())]
    if not set(result) >= NEEDED or np.shape(result["confusion"]) != (len(classes), len(classes)):
        raise UserError(f"{path} lacks figures or the confusion matrix of its classes: evaluate the run again")
    facts = {key: result.get(key) for key in ("step", "selection", "protocol")} | kept.get("arguments", {})
    facts |= {"commit": kept.get("commit"), **kept.get("versions", {})}
    return SimpleNamespace(
        name=str(path), folder=path if is_folder else path.parent, result=result, classes=classes,
        log=read_log(path) if is_folder else [], facts={k: str(v) for k, v in facts.items() if v is not None},
    )  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        reason = "holds no JSON object" if path.is_file() else "is missing"
        raise UserError(f"{path} {reason}: give the folder of a run that has been evaluated, or a file of eval.py")
    return content


def table(rows: Sequence[Sequence[str]]) -> str:
    """Texts as an HTML table; the first row is its head."""
    head, *body = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows]
    return f"<table><thead>{head.replace('td>', 'th>')}</thead><tbody>{''.join(body)}</tbody></table>"


def image_tag(content: bytes, kind: str, text: str) -> str:
    """An <img> that carries its image."""
    return f'<img alt="{escape(text)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def chart(text: str, width: float, height: float, draw, columns: int = 1) -> str:
    """What `draw` makes of so many axes of a matplotlib figure, in inches, as an image. Raises `UserError`."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the report's charts need matplotlib: pip install matplotlib") from error
    with matplotlib.rc_context({"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}):
        figure, file = Figure((width, height), layout="constrained"), io.BytesIO()
        draw(figure.subplots(1, columns))
        figure.savefig(file, format="svg")
    return image_tag(file.getvalue(), "svg+xml", text)


def figures_table(runs: Sequence[SimpleNamespace]) -> str:
    """The headlines of each run in percent."""
    rows = [["run", "step", *(title for title, _ in HEADLINES)]]
    for run in runs:
        name = run.name + " (oracle)" * ("ORACLE" in run.facts.get("protocol", ""))
        rows.append([name, run.facts.get("step", "-"), *(percent(run.result[key]) for _, key in HEADLINES)])
    return table(rows)


def curves(runs: Sequence[SimpleNamespace]) -> str:
    """The first five figures over the steps, a line a run."""

    def draw(all_axes) -> None:
        for axes, (title, key) in zip(all_axes, HEADLINES):
            for run in runs:
                points = [(entry["step"], 100 * entry[key]) for entry in run.log if entry.get(key) is not None]
                axes.plot(*zip(*points or [(0, np.nan)]), "o-", markersize=3, label=run.name)
            axes.set(title=f"{title}, %", xlabel="step", ylim=(0, None))
        all_axes[0].figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower left", frameon=False)

    several = any(len(run.log) > 1 for run in runs)
    return chart("figures over the steps", 14, 2.6 + 0.25 * len(runs), draw, columns=5) if several else ""


def class_table(runs: Sequence[SimpleNamespace]) -> str:
    """IoU in percent, a row a class, in the order of the first run's classes; classes of other runs follow."""
    iou = [dict(zip(run.classes, run.result["per_class"].values())) for run in runs]
    names = dict.fromkeys(name for of_run in iou for name in of_run)
    rows = [[name, *(percent(of_run.get(name)) for of_run in iou)] for name in names]
    return table([["", *(run.name for run in runs)], *rows])


def confusion(run: SimpleNamespace) -> str:
    """The confusion matrix, each row the shares of a class's pixels."""

    def draw(axes) -> None:
        counts, ticks = np.asarray(run.result["confusion"], np.float64), range(len(run.classes))
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)  # the square root shows small confusions
        axes.set_xticks(ticks, run.classes, rotation=90, fontsize=min(9, 250 / len(ticks)))
        axes.set_yticks(ticks, run.classes, fontsize=min(9, 250 / len(ticks)))
        for line in (axes.axhline, axes.axvline):
            line(len(ticks) - len(run.result["per_class_zsl"]) - 0.5, color="#888", linewidth=0.8)

    return figure(run, chart("confusion matrix", 6, 6, draw))


def images(run: SimpleNamespace) -> str:
    """The sheet of a run's last evaluation: images that show its unseen classes, labels and predictions."""
    sheets = sorted(run.folder.glob("images/evaluation_*.jpg"))
    return figure(run, image_tag(sheets[-1].read_bytes(), "jpeg", "predictions")) if sheets else ""


def figure(run: SimpleNamespace, image: str) -> str:
    """An image with the name of its run below it."""
    return f"<figure>{image}<figcaption>{escape(run.name)}</figcaption></figure>"


def facts_tables(runs: Sequence[SimpleNamespace]) -> str:
    """Settings, versions and commit: those that differ, and those that all runs share, folded."""
    names = dict.fromkeys(name for run in runs for name in run.facts)
    rows = [[name, *(run.facts.get(name, "-") for run in runs)] for name in names]
    differing = [["", *(run.name for run in runs)], *(row for row in rows if len(set(row[1:])) > 1)]
    shared = [["", "value"], *(row[:2] for row in rows if len(set(row[1:])) == 1)]
    return f"{table(differing)}<details><summary>The same in all runs</summary>{table(shared)}</details>"


def page(runs: Sequence[SimpleNamespace]) -> str:
    """The whole HTML file: sections with a heading, their content, and a note on how to read it."""
    sections = [
        ("Figures", figures_table(runs), "Percent. seen, unseen: mean IoU where all classes compete; hIoU: their "
         "harmonic mean; ZSL: unseen pixels, unseen classes alone; bias: share of unseen pixels given a seen class, "
         "where less is better."),
        ("During training", curves(runs), ""),
        ("IoU of each class", class_table(runs), 'Percent; * unseen class; "-": neither labelled nor predicted.'),
        ("Confusion", f'<div class="grid">{"".join(map(confusion, runs))}</div>', "Rows: labelled classes. Columns: "
         "predicted classes, dark for many pixels (square root of the share)."),
        ("Images", "".join(map(images, runs)), "Of the last evaluation; * unseen class."),
        ("What differs", facts_tables(runs), ""),
    ]  # fmt: skip
    body = "\n".join(
        f'<section><h2>{heading}</h2><div class="wide">{content}</div><p class="muted">{note}</p></section>'
        for heading, content, note in sections
        if content
    )
    return Template(PAGE.read_text(encoding="utf-8")).substitute(body=body)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m utils.report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or file of eval.py --json")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page to write")
    args = parser.parse_args(argv)
    runs = [read_run(path) for path in dict.fromkeys(args.runs)]
    write_text(args.output, page(runs))
    print(format_rows({run.name: run.result for run in runs}))
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

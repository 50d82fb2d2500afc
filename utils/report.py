"""One page that compares runs: figures, curves, classes, confusions, images, and what differs.

    python -m utils.report runs/split1/stage1 runs/split1/stage2
    python -m utils.report runs/*/split1/stage2 --output report.html

A run is the folder that a training keeps, or a file that `eval.py --json PATH` wrote. The page is one HTML file that
opens without a network. Its charts need matplotlib (pip install matplotlib).
"""

import base64
import contextlib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import chain
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

    Raises `UserError` where a file is missing or not complete.
    """
    is_folder = path.is_dir()
    result = _read_json(path / "evaluation.json" if is_folder else path)
    kept = _read_json(path / "args.json") if is_folder else {}
    classes = [name + "*" * (name in result.get("per_class_zsl", ())) for name in result.get("per_class", ())]
    if not set(result) >= NEEDED or np.shape(result["confusion"]) != (len(classes), len(classes)):
        raise UserError(f"{path} lacks figures or the confusion matrix of its classes: evaluate the run again")
    facts = {key: result.get(key) for key in ("step", "selection", "protocol")} | kept.get("arguments", {})
    facts |= {"commit": kept.get("commit"), **kept.get("versions", {})}
    facts = {key: str(value) for key, value in facts.items() if value is not None}
    name = str(path) + " (oracle)" * ("ORACLE" in facts.get("protocol", ""))
    folder, log = (path, read_log(path)) if is_folder else (path.parent, [])
    return SimpleNamespace(name=name, folder=folder, result=result, log=log, classes=classes, facts=facts)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        reason = "holds no JSON object" if path.is_file() else "is missing"
        hint = "give the folder of a run that has been evaluated, or a file of eval.py"
        raise UserError(f"{path} {reason}: {hint}") from error


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Texts as an HTML table."""
    cells = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in (head, *rows)]
    return f"<table><thead>{cells[0].replace('td>', 'th>')}</thead><tbody>{''.join(cells[1:])}</tbody></table>"


def image(content: bytes, kind: str, text: str, caption: str = "") -> str:
    """An <img> that carries its image, with a caption below it."""
    tag = f'<img alt="{text}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'
    return f"<figure>{tag}<figcaption>{escape(caption)}</figcaption></figure>" if caption else tag


@contextlib.contextmanager
def chart(width: float, height: float) -> Iterator[tuple[Any, io.BytesIO]]:
    """A matplotlib figure, in inches, that the block draws on, and the SVG file that it becomes. Raises `UserError`."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the report's charts need matplotlib: pip install matplotlib") from error
    with matplotlib.rc_context({"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}):
        figure, file = Figure((width, height), layout="constrained"), io.BytesIO()
        yield figure, file
        figure.savefig(file, format="svg")


def curves(runs: Sequence[SimpleNamespace]) -> str:
    """The first five figures over the steps, a line a run."""
    if all(len(run.log) < 2 for run in runs):
        return ""
    with chart(14, 2.6 + 0.25 * len(runs)) as (figure, file):
        all_axes = figure.subplots(1, 5)
        for axes, (title, key) in zip(all_axes, HEADLINES):
            for run in runs:
                points = [(entry["step"], 100 * entry[key]) for entry in run.log if entry.get(key) is not None]
                axes.plot(*zip(*points or [(0, np.nan)]), "o-", markersize=3, label=run.name)
            axes.set(title=f"{title}, %", xlabel="step", ylim=(0, None))
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower left", frameon=False)
    return image(file.getvalue(), "svg+xml", "figures over the steps")


def confusion(run: SimpleNamespace) -> str:
    """The confusion matrix, each row the shares of a class's pixels."""
    counts, ticks = np.asarray(run.result["confusion"], np.float64), range(len(run.classes))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with chart(6, 6) as (figure, file):
        axes = figure.subplots()
        axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)  # the square root shows small confusions
        axes.set_xticks(ticks, run.classes, rotation=90, fontsize=min(9, 250 / len(ticks)))
        axes.set_yticks(ticks, run.classes, fontsize=min(9, 250 / len(ticks)))
        for line in (axes.axhline, axes.axvline):
            line(len(ticks) - len(run.result["per_class_zsl"]) - 0.5, color="#888", linewidth=0.8)
    return image(file.getvalue(), "svg+xml", "confusion matrix", run.name)


def page(runs: Sequence[SimpleNamespace]) -> str:
    """The whole HTML file."""
    names = [run.name for run in runs]
    rows = ((run.name, run.facts.get("step", "-"), *(percent(run.result[key]) for _, key in HEADLINES)) for run in runs)
    iou = [dict(zip(run.classes, run.result["per_class"].values())) for run in runs]
    classes = [[name, *(percent(of_run.get(name)) for of_run in iou)] for name in dict.fromkeys(chain(*iou))]
    facts = dict.fromkeys(chain(*(run.facts for run in runs)))
    facts = [[fact, *(run.facts.get(fact, "-") for run in runs)] for fact in facts]
    sheets = [(run, path) for run in runs for path in sorted(run.folder.glob("images/evaluation_*.jpg"))[-1:]]
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        figures=table(["run", "step", *(title for title, _ in HEADLINES)], rows),
        curves=curves(runs),
        classes=table(["", *names], classes),
        confusion="".join(map(confusion, runs)),
        images="".join(image(path.read_bytes(), "jpeg", "predictions", run.name) for run, path in sheets),
        differing=table(["", *names], [row for row in facts if len(set(row[1:])) > 1]),
        shared=table(["", "value"], [row[:2] for row in facts if len(set(row[1:])) == 1]),
    )


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

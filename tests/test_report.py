"""The report: its figures are the run's, it is one file, and it takes names of any kind."""

import html
import json
import re
import sys

import pytest

from helpers import evaluate, failure, read_log
from utils import report
from utils.metrics import HEADLINES


def make(runs, output):
    """Writes the report and returns the page."""
    pytest.importorskip("matplotlib")
    assert report.main([*map(str, runs), "--output", str(output)]) == 0
    return output.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def both(finished, tmp_path_factory):
    """The page of both stages."""
    return make([finished.stage1, finished.stage2], tmp_path_factory.mktemp("report") / "report.html")


def result(**changes):
    """The content of evaluation.json for a run with three classes."""
    figures = dict.fromkeys((key for _, key in HEADLINES), 0.5)
    return {
        "step": 7, **figures, "per_class": {"cat": 1.0, "dog": 0.25, "cow": None}, "per_class_zsl": {"cow": None},
        "confusion": [[90, 10, 0], [0, 0, 50], [0, 0, 0]],
    } | changes  # fmt: skip


def write_run(folder, arguments=None, **changes):
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(result(**changes)))
    (folder / "args.json").write_text(json.dumps({"arguments": arguments or {}, "versions": {}, "commit": "abc"}))
    return folder


def cells(page):
    """The texts of all table rows."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[html.unescape(text) for text in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


def test_figures_are_those_of_the_last_evaluation(finished, both):
    for run in (finished.stage1, finished.stage2):
        last = read_log(run)[-1]
        wanted = ["3", *("-" if last[key] is None else f"{100 * last[key]:.1f}" for _, key in HEADLINES)]
        assert [str(run), *wanted] in cells(both)


def test_page_is_one_file_that_opens_without_a_network(both):
    assert both.count("data:image/svg+xml") == 1 + 2 and both.count("data:image/jpeg") == 2
    page = re.sub(r'"data:[^"]*"', '""', both)
    assert not re.search(r"https?:|<script|<link rel=\"style|@import|url\(|src=\"[^\"]", page)
    assert 'name="viewport"' in page and page.startswith("<!doctype html>")


def test_settings_that_differ_are_separate_from_the_same_ones(both):
    page, shared = both.split("The same in all runs")
    assert ["restore_from_where", "pretrained", "saved"] in cells(page) and ["lambda_", "0.2", "-"] in cells(page)
    assert ["learning_rate", "0.01"] in cells(shared) and not any("learning_rate" in row for row in cells(page))


def test_oracle_is_marked(tmp_path):
    runs = [write_run(tmp_path / "a", protocol="x ORACLE: y"), write_run(tmp_path / "b", protocol="-", hiou=0.75)]
    assert [row[0].endswith(" (oracle)") for row in cells(make(runs, tmp_path / "r.html"))[1:3]] == [True, False]


def test_names_are_never_read_as_html(tmp_path):
    name = '<b>"bold" & | co'
    classes = {"per_class": {"<i>cat": 0.5, "$dog$": 0.5, "cow": 0.5}}
    runs = [write_run(tmp_path / name, **classes), write_run(tmp_path / "plain", arguments={"x": "<u>"})]
    page = make(runs, tmp_path / "r.html")
    assert not re.search(r'<b>"|<i>cat|<u>', page) and html.escape(name) in page


def test_file_of_eval_is_a_run_too(finished, tmp_path):
    evaluate(finished.stage1 / "latest.pth", finished.data, "--json", tmp_path / "result.json")
    assert "IoU of each class" in make([tmp_path / "result.json"], tmp_path / "r.html")
    written = json.loads((tmp_path / "result.json").read_text())
    kept = json.loads((finished.stage1 / "evaluation.json").read_text())
    assert all(written[key] == kept[key] for key in ("confusion", "per_class", "hiou"))


BROKEN = [
    (lambda run: (run / "evaluation.json").unlink(), ["evaluation.json is missing", "has been evaluated"]),
    (lambda run: (run / "log.jsonl").write_text("{"), ["log.jsonl has a line that is no JSON", "delete"]),
    (lambda run: (run / "evaluation.json").write_text("{"), ["evaluation.json holds no JSON object"]),
    (lambda run: (run / "evaluation.json").write_text('{"per_class": {}}'), ["lacks", "evaluate the run again"]),
    (lambda run: (run / "evaluation.json").write_text(json.dumps(result(confusion=[[1]]))), ["confusion matrix"]),
]


@pytest.mark.parametrize("spoil, expected", BROKEN)
def test_broken_runs_are_refused_in_one_line(tmp_path, capsys, spoil, expected):
    run = write_run(tmp_path / "a")
    spoil(run)
    line = failure(capsys, report.main, [run, "--output", tmp_path / "r.html"])
    assert all(text in line for text in expected), line
    assert not (tmp_path / "r.html").exists()


def test_a_missing_package_is_one_line(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in failure(capsys, report.main, [run, "--output", tmp_path / "r.html"])

"""The report: its figures are the run's, it needs nothing beside it, a browser draws it on a desk and on a phone."""

import base64
import html
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from dataset.splits import Split
from helpers import copy_of, evaluate, failure, read_log
from utils import report
from utils.metrics import HEADLINES

SPLIT = Split.voc(1)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def make(runs, output, *flags):
    """Writes the report; returns the page and the Markdown."""
    assert report.main([*map(str, runs), "--output", str(output), *flags]) == 0
    return output.read_text(encoding="utf-8"), output.with_suffix(".md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def both(finished, tmp_path_factory):
    """Page and Markdown of both stages."""
    return make([finished.stage1, finished.stage2], tmp_path_factory.mktemp("report") / "report.html")


def record(**changes):
    """What a run of three classes says of itself, as evaluation.json has it."""
    figures = dict.fromkeys((key for _, key in HEADLINES), 0.5)
    return {
        "step": 7, **figures, "seen": ["cat", "dog"], "unseen": ["cow"],
        "per_class": {"cat": 1.0, "dog": 0.25, "cow": None},
        "confusion": [[90, 10, 0], [0, 0, 50], [0, 0, 0]],
        "per_picture": {"a": [0.9, 0.95], "b": [0.1, 0.2], "c": [None, None], "d": [0.5, 0.5], "e": [0.6, 0.7]},
    } | changes  # fmt: skip


def write_run(folder, log=(), arguments=None, **changes):
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(record(**changes)))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (folder / "args.json").write_text(json.dumps({"arguments": arguments or {}, "versions": {}, "commit": "abc"}))
    return folder


def cells(page):
    """The texts of all table rows."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    texts = ([re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows)
    return [[html.unescape(text) for text in row] for row in texts]


def test_figures_are_those_of_the_last_evaluation(finished, both):
    page, markdown = both
    for stage in (1, 2):
        last = read_log(getattr(finished, f"stage{stage}"))[-1]
        wanted = ["3", *("-" if last[key] is None else f"{100 * last[key]:.1f}" for _, key in HEADLINES)]
        assert [f"stage{stage}", *wanted] in cells(page)
        line = next(line for line in markdown.splitlines() if line.startswith(f"| stage{stage}"))
        assert [cell.strip() for cell in line.strip("|").split("|")] == [f"stage{stage}", *wanted]


def test_page_needs_nothing_beside_it(both):
    page = re.sub(r'"data:[^"]*"', '""', both[0])
    assert not re.search(r"https?:|<script|<link rel=\"style|@import|url\(|src=\"[^\"]", page)
    assert 'name="viewport"' in page and page.startswith("<!doctype html>")


def test_arguments_that_differ_are_told_from_those_shared(both):
    page, shared = both[0].split("What all runs share")
    assert ["--restore-from-where", "pretrained", "saved"] in cells(page)
    assert ["--lambda", "0.2", "-"] in cells(page) and ["--st-lambda", "-", "0.4"] in cells(page)
    assert ["--learning-rate", "0.01"] in cells(shared) and not any("--learning-rate" in row for row in cells(page))
    assert "| --st-lambda" in both[1] and "--learning-rate" not in both[1]


def test_oracle_is_marked(tmp_path):
    runs = [write_run(tmp_path / "a", protocol="x ORACLE: y"), write_run(tmp_path / "b", protocol="honest")]
    page, _ = make(runs, tmp_path / "r.html")
    rows = [row[0] for row in cells(page)[1:3]]
    assert "oracle" in rows[0] and "oracle" not in rows[1]


def test_curves_go_through_the_logged_points(tmp_path):
    figures = [dict.fromkeys((key for _, key in HEADLINES), value) for value in (0.1, 0.2, 0.4)]
    log = [{"step": step, **each} for step, each in zip((10, 20, 40), figures)] + [{"step": 50}]
    page, _ = make([write_run(tmp_path / "a", log)], tmp_path / "r.html")
    lines = [[tuple(map(float, p.split(","))) for p in line.split()] for line in re.findall(r'points="(.*?)"', page)]
    assert len(lines) == 5
    for (x0, y0), (x1, y1), (x2, y2) in lines:
        assert (x1 - x0) * 2 == pytest.approx(x2 - x1, abs=0.5) and x0 < x1 < x2
        assert (y0 - y1) * 2 == pytest.approx(y1 - y2, abs=0.5) and y0 > y1 > y2  # upwards
    assert "step 20: 20.0" in page


@pytest.mark.parametrize("highest, ticks", [(0, [0, 0.5]), (7.2, [0, 2, 4, 6, 8]), (100, [0, 25, 50, 75, 100])])
def test_ticks_are_round_and_reach_the_highest(highest, ticks):
    assert report.nice_ticks(highest) == ticks


def test_confusion_matrix_is_a_picture_of_the_shares(tmp_path):
    page, _ = make([write_run(tmp_path / "a")], tmp_path / "r.html")
    data = re.search(r'href="data:image/png;base64,(.*?)"', page)[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L")).astype(int)
    assert pixels.shape == (3, 3)
    assert pixels[1, 2] < pixels[0, 0] < pixels[0, 1] < 255  # all, 90 %, 10 % of a row
    assert (pixels[2] == 255).all() and pixels[0, 2] == 255  # no pixel of the class; none given
    assert "dog given cow*: 100.0%" in page and "cat given dog: 10.0%" in page


def test_bars_show_each_class(tmp_path):
    page, _ = make([write_run(tmp_path / "a")], tmp_path / "r.html")
    bars = re.findall(r"<div>([\w*]+)</div><div><div class=\"bar\"><i style=\"width:([\d.]+)%.*?</i>(.*?)</div>", page)
    assert bars == [("cat", "75.0", "100.0"), ("dog", "18.8", "25.0"), ("cow*", "0.0", "-")]


def test_worst_and_best_pictures_in_order(tmp_path):
    run = write_run(tmp_path / "a", drawn={"b": "pictures/worst.png", "a": "pictures/gone.png"})
    (run / "pictures").mkdir()
    Image.new("RGB", (3000, 20), "red").save(run / "pictures" / "worst.png")
    page, _ = make([run], tmp_path / "r.html")
    worst, best = page.split("Worst and best")[1].split("best</h3>")
    assert re.findall(r"<figcaption>(\w):", worst) == ["b", "d"] and re.findall(r"<figcaption>(\w):", best) == [
        "a",
        "e",
    ]
    images = re.findall(r'src="data:image/jpeg;base64,(.*?)"', page)
    with Image.open(io.BytesIO(base64.b64decode(images[0]))) as picture:
        assert len(images) == 1 and picture.width == report.PICTURE_SIDE


def test_run_draws_its_worst_and_best(finished):
    last = json.loads((finished.stage1 / "evaluation.json").read_text())
    scores = {name: score for name, (score, _) in last["per_picture"].items() if score is not None}
    order = sorted(scores, key=lambda name: (scores[name], name))
    assert len(last["per_picture"]) == 8 and len(last["drawn"]) == 6 and set(last["drawn"]) == {*order[:3], *order[-3:]}
    assert last["drawn"][order[0]] == "pictures/worst_1.jpg"
    for path in last["drawn"].values():
        with Image.open(finished.stage1 / path) as picture:
            assert picture.width > 300
    assert np.sum(last["confusion"]) > 0 and np.shape(last["confusion"]) == (20, 20)


def test_names_are_shown_and_never_read_as_html(tmp_path):
    name = '<b>"bold" & | co'
    classes = {"seen": ["<i>cat", "dog"], "per_class": {"<i>cat": 0.5, "dog": 0.5, "cow": 0.5}}
    runs = [write_run(tmp_path / name, **classes), write_run(tmp_path / "plain", arguments={"x": "<u>"})]
    page, markdown = make(runs, tmp_path / "r.html", "--title", "<em>title")
    assert "<b>&quot;" not in page and not re.search(r'<b>"|<i>cat|<em>|<u>', page)
    assert html.escape(name) in page and "&lt;i&gt;cat" in page and "&lt;em&gt;title" in page
    assert '<b>"bold" & \\| co' in markdown


def test_result_of_eval_is_a_run_too(finished, tmp_path):
    flags = ["--json", tmp_path / "result.json", "--save-dir", tmp_path / "pictures"]
    evaluate(finished.stage1 / "latest.pth", finished.data, *flags)
    page, markdown = make([tmp_path / "result.json"], tmp_path / "r.html")
    assert "image/jpeg" in page and "aeroplane*" in page and "| 3 " in markdown
    written = json.loads((tmp_path / "result.json").read_text())
    kept = json.loads((finished.stage1 / "evaluation.json").read_text())
    assert all(written[key] == kept[key] for key in ("confusion", "per_picture", "per_class", "hiou"))


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    runs = [write_run(tmp_path / name / "split1" / "stage2") for name in ("one", "two")]
    assert report.name_runs(runs) == ["one/split1/stage2", "two/split1/stage2"]
    assert report.name_runs(runs[:1]) == [str(runs[0])]


BROKEN = [
    (lambda run: (run / "evaluation.json").unlink(), ["evaluation.json is missing", "has been evaluated"]),
    (lambda run: (run / "evaluation.json").write_text("{"), ["evaluation.json can't be read as JSON"]),
    (lambda run: (run / "evaluation.json").write_text("[]"), ["no JSON object"]),
    (lambda run: (run / "evaluation.json").write_text('{"seen": []}'), ["lacks"]),
    (lambda run: (run / "evaluation.json").write_text(json.dumps(record(confusion=[[1]]))), ["confusion matrix"]),
    (lambda run: (run / "args.json").unlink(), ["args.json is missing"]),
]


@pytest.mark.parametrize("spoil, expected", BROKEN)
def test_broken_runs_are_refused_in_one_line(tmp_path, capsys, spoil, expected):
    run = write_run(tmp_path / "a")
    spoil(run)
    line = failure(capsys, report.main, [run, "--output", tmp_path / "r.html"])
    assert all(words in line for words in expected), line
    assert not (tmp_path / "r.html").exists()


def test_bad_flags_are_refused_in_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    assert "ends in .html" in failure(capsys, report.main, [run, "--output", tmp_path / "r.pdf"])
    assert "named twice" in failure(capsys, report.main, [run, run, "--output", tmp_path / "r.html"])
    assert "can't be written" in failure(capsys, report.main, [run, "--output", run / "args.json" / "r.html"])
    assert "did you mean --title" in failure(capsys, report.main, [run, "--titel", "x"])


def test_log_that_was_cut_off_is_read_up_to_there(finished, tmp_path):
    run = copy_of(finished.stage1, tmp_path / "run")
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "hio')
    page, _ = make([run], tmp_path / "r.html")
    assert "step 3:" in page and "step 9" not in page


# --- in a browser ---------------------------------------------------------------------------------------

MEASURE = """<body style="margin:0">
<iframe id="f" style="border:0" width="{width}" height="3000" srcdoc="{page}"></iframe>
<script>
const frame = document.getElementById("f");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const outside = [...page.querySelectorAll("h1, h2, h3, p, figure, svg, .bar, summary")].filter(e =>
    !e.closest(".wide") && e.getBoundingClientRect().right > root.clientWidth + 1);
  const size = e => parseFloat(frame.contentWindow.getComputedStyle(e).fontSize);
  document.title = JSON.stringify({{
    wide: root.scrollWidth - root.clientWidth, outside: outside.length,
    images: [...page.images].filter(i => i.naturalWidth > 0).length, all: page.images.length,
    charts: [...page.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height > 100).length,
    smallest: Math.min(...[...page.querySelectorAll("p, td")].map(size))
  }});
}};
</script>"""


def browse(path, *flags):
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags, path.as_uri()]
    return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_browser_draws_it_on_a_desk_and_on_a_phone(both, tmp_path, width):
    """Nothing wider than the screen, every picture there, all charts drawn, no text too small to read."""
    (tmp_path / "wrap.html").write_text(MEASURE.format(width=width, page=html.escape(both[0])), encoding="utf-8")
    flags = ["--window-size=1300,3000", "--virtual-time-budget=5000"]
    found = json.loads(
        html.unescape(re.search(r"<title>(.*?)</title>", browse(tmp_path / "wrap.html", *flags, "--dump-dom"))[1])
    )
    assert found["wide"] <= 0 and found["outside"] == 0, found
    assert found["images"] == found["all"] == 12 and found["charts"] == 7 and found["smallest"] >= 13, found


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_screenshot_is_a_page_with_colours(both, tmp_path):
    (tmp_path / "r.html").write_text(both[0], encoding="utf-8")
    browse(tmp_path / "r.html", "--window-size=1280,2400", f"--screenshot={tmp_path / 'shot.png'}")
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).reshape(-1, 3)
    assert 0.5 < (pixels == 255).all(axis=1).mean() < 0.99
    for number in (0, 1):  # both runs' colours are on it
        colour = [int(report.colour(number)[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == colour).all(axis=1).sum() > 100

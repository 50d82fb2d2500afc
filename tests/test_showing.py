"""Training shows itself: one bar, sheets of the same pictures, a dry run that keeps nothing, TensorBoard by flag."""

import importlib.util
import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from utils.records import duration

from dataset.splits import Split
from helpers import STAGES, arguments, copy_of, failure, same_bits, train, weights

SPLIT = Split.voc(1)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def listing(folder):
    """Every file below a folder with its content."""
    return (
        {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        if folder.exists()
        else {}
    )


# --- the bar --------------------------------------------------------------------------------------------


def test_bar_shows_losses_rate_speed_and_time_left(data, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    train(1, data, tmp_path, log_every=1, max_steps=4)
    last = [line for line in re.split(r"[\r\n]", terminal.getvalue()) if "stage 1" in line][-1]
    for words in ("4/4 steps", "total ", "ce ", "bias_source ", "bias_target ", "lr ", "pictures/s", "100%"):
        assert words in last, last
    assert re.search(r"\d\d:\d\d<\d\d:\d\d", last)  # time gone and time left


def test_nothing_moves_where_the_output_is_no_terminal(data, tmp_path, capfd):
    train(1, data, tmp_path)
    captured = capfd.readouterr()
    assert captured.err == "" and "\r" not in captured.out and "hIoU" in captured.out


# --- the sheets -----------------------------------------------------------------------------------------


def test_an_evaluation_leaves_a_sheet_of_the_same_pictures(finished):
    names = sorted(path.name for path in (finished.stage1 / "pictures").glob("evaluation_*"))
    assert names == ["evaluation_000002.jpg", "evaluation_000003.jpg"]
    sheets = [np.asarray(Image.open(finished.stage1 / "pictures" / name)).astype(int) for name in names]
    photos = [sheet[60 : sheet.shape[0] - 120, 20:270] for sheet in sheets]  # the first column, below the headings
    rows = min(map(len, photos))
    assert np.abs(photos[0][:rows] - photos[1][:rows]).mean() < 1 and photos[0].std() > 20
    assert not (finished.stage1 / "pictures" / "pseudo_labels_000003.jpg").exists()


def test_stage_2_draws_where_pseudo_labels_were_laid_and_kept(data, finished, tmp_path):
    """All is laid; --keep decides what is kept: all at 1, where the last two columns are the same, nothing at 0."""
    columns = {}
    for keep in (0, 1):
        start = {"restore_from_where": "saved", "stage1_checkpoint": finished.stage1 / "latest.pth"}
        run = train(2, data, tmp_path / str(keep), keep=keep, max_steps=1, pictures=True, **start)
        sheet = np.asarray(Image.open(run / "pictures" / "pseudo_labels_000001.jpg")).astype(int)
        width = 256
        cut = slice(100, 300)
        columns[keep] = [sheet[cut, 20 + n * (width + 10) : 20 + n * (width + 10) + width] for n in range(3)]
    photo, laid, kept = columns[1]
    assert np.abs(laid - kept).mean() < 3 < 20 < np.abs(laid - photo).mean()
    photo, laid, kept = columns[0]
    assert np.abs(kept - photo).mean() < 3 < 20 < np.abs(laid - photo).mean()


# --- the dry run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_dry_run_says_what_to_expect_and_keeps_nothing(finished, tmp_path, capsys, stage):
    output = tmp_path / "runs"
    if stage == 2:
        shutil.copytree(finished.stage1, output / "split1" / "stage1")
    before = listing(output)
    changes = {"max_steps": 500, "evaluate_every": 300} | ({"restore_from_where": "saved"} if stage == 2 else {})
    train(stage, finished.data, output, "--dry-run", **changes)
    said = capsys.readouterr().out
    assert listing(output) == before and (stage == 2 or not output.exists())
    assert "4 steps are in order" in said and "500 steps: " in said and "8 pictures, " in said and "2 of them: " in said
    assert re.search(r"memory, at most: \d+\.\d GB of this process", said)
    assert re.search(r"a step: \d+\.\d\d s, \d+\.\d pictures a second", said)
    assert re.search(r"altogether about (\d+ (s|min)|\d+ h \d+ min) on cpu", said)


def test_dry_run_of_a_run_that_goes_on_leaves_it_alone(finished, tmp_path, capsys):
    run = copy_of(finished.stage1, tmp_path / "split1" / "stage1")
    (run / "latest.pth").unlink()
    shutil.copy(finished.stage1 / "best.pth", run / "latest.pth")
    before = listing(run)
    train(1, finished.data, tmp_path, "--dry-run", restore_from_where="continue")
    assert listing(run) == before and "altogether about" in capsys.readouterr().out


def test_dry_run_of_a_finished_run_says_so(finished, tmp_path, capsys):
    copy_of(finished.stage1, tmp_path / "split1" / "stage1")
    train(1, finished.data, tmp_path, "--dry-run", restore_from_where="continue")
    assert "has all 3 steps: nothing to do" in capsys.readouterr().out


def test_memory_that_runs_out_is_one_line(data, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity")

    monkeypatch.setattr(STAGES[1], "train_step", full)
    line = failure(capsys, STAGES[1].main, arguments(data, tmp_path, "--dry-run"))
    assert line == ("error: CUDA out of memory: lower --batch-size or --input-size (--longest-side of your own images)")


def test_dry_run_finds_what_is_wrong(data, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("missing\n")
    argv = arguments(data, tmp_path / "runs", "--dry-run", train_list=tmp_path / "list.txt")
    assert "missing.jpg is missing" in failure(capsys, STAGES[1].main, argv)
    argv = arguments(data, tmp_path / "runs", "--dry-run", restore_from_where="saved")
    assert "run stage 1 first" in failure(capsys, STAGES[2].main, argv)
    argv = arguments(data, tmp_path / "runs", "--dry-run", learning_rate="1e30")
    assert "lower --learning-rate" in failure(capsys, STAGES[1].main, argv)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("seconds, words", [(3, "3 s"), (89, "89 s"), (200, "3 min"), (7300, "2 h 2 min")])
def test_durations_as_people_say_them(seconds, words):
    assert duration(seconds) == words


# --- TensorBoard ----------------------------------------------------------------------------------------


def test_tensorboard_that_is_missing_is_one_line(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    argv = arguments(data, tmp_path, "--tensorboard")
    assert "pip install tensorboard" in failure(capsys, STAGES[1].main, argv)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_gets_losses_figures_and_sheets(data, finished, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(1, data, tmp_path, "--tensorboard", log_every=1, evaluate_every=2, pictures=True)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert {"loss/total", "loss/ce", "learning rate", "evaluation/hIoU", "evaluation/bias"} <= set(tags["scalars"])
    assert [event.step for event in board.Scalars("loss/ce")] == [1, 2, 3] and tags["images"] == ["evaluation"]
    assert same_bits(weights(run), weights(finished.stage1))


def test_evaluation_json_agrees_with_the_log(finished):
    last = json.loads((finished.stage2 / "evaluation.json").read_text())
    logged = json.loads((finished.stage2 / "log.jsonl").read_text().splitlines()[-1])
    assert logged.items() <= last.items() and (last["seen"], last["unseen"]) == (list(SPLIT.seen), list(SPLIT.unseen))
    assert "confusion" not in logged and "per_image" not in logged

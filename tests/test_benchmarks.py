"""The ablation and the demo: tables worked out by hand, runs that are done once, and all of it in one step a stage."""

import contextlib
import json
import re
import types
import warnings

import pytest

from benchmarks import ablation, demo, pseudo_labels, runs, waits
from dataset.drawn import write_dataset
from dataset.splits import Split
from helpers import ROOT, STAGES, failure
from utils.errors import UserError


def figures(seen, unseen):
    return {"miou_seen": seen, "miou_unseen": unseen, "hiou": 0.0, "miou_zsl": None, "bias": 1.0}


def test_results_are_means_and_standard_deviations_in_percent():
    table = runs.format_results({"a": [figures(0.1, 0.2), figures(0.2, 0.2)], "b": [figures(0.5, 0.0)]})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["", "seen", "unseen", "hIoU", "ZSL", "bias", "seeds"] and rows[1] == ["---", *["---:"] * 6]
    assert rows[2] == ["a", "15.0 ± 7.1", "20.0 ± 0.0", "0.0 ± 0.0", "-", "100.0 ± 0.0", "2"]
    assert rows[3] == ["b", "50.0", "0.0", "0.0", "-", "100.0", "1"]


@pytest.fixture
def commands(monkeypatch):
    """Records commands instead of running them; "fail" among a command's flags interrupts it."""
    recorded = []

    def record(arguments, log):
        recorded.append(list(map(str, arguments)))
        if "fail" in recorded[-1]:
            raise SystemExit(1)

    monkeypatch.setattr(runs, "command", record)
    return recorded


def test_a_finished_run_is_repeated_only_with_other_flags_or_another_config(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    config, flags = tmp_path / "own.toml", ["--config", "own.toml", "--seed", 1]
    config.write_text("flip = 0.5")
    for _ in range(2):
        runs.train("stage.py", flags, tmp_path / "run")
    assert commands == [["stage.py", "--config", "own.toml", "--seed", "1"]]
    runs.train("stage.py", ["--seed", 2], tmp_path / "run")
    runs.train("stage.py", flags, tmp_path / "run")  # its checkpoint is now that of other flags
    config.write_text("flip = 0.0")
    runs.train("stage.py", flags, tmp_path / "run")
    assert len(commands) == 4


def test_an_interrupted_run_resumes_and_other_flags_start_again(commands, tmp_path):
    for flags in (["fail"], ["fail"], ["fail", "--seed", "2"]):
        with pytest.raises(SystemExit):
            runs.train("stage.py", flags, tmp_path)
        (tmp_path / "latest.pth").touch()
    assert commands[1] == ["stage.py", "fail", "--restore-from-where", "continue"]
    assert commands[2] == ["stage.py", "fail", "--seed", "2"]


def test_a_failing_command_ends_the_study(tmp_path):
    with pytest.raises(UserError, match=r"ended with exit code 2; see .*log\.txt"):
        runs.command(["eval.py", "--checkpoint", tmp_path / "none.pth"], tmp_path / "log.txt")
    assert "none.pth" in (tmp_path / "log.txt").read_text()


def tiny_config(path, config, monkeypatch):
    """The settings file of `config` with a network of random weights, small images and one step a stage."""
    text = (ROOT / config).read_text().split("[stage1]")[0]
    for old, new in (('"efficientnet_lite0"', '"small"'), ('["word2vec", "fasttext"]', '["glove"]')):
        text = text.replace(old, new)
    lines = [line for line in text.splitlines() if line.split(" = ")[0] not in ("input_size", "num_workers")]
    lines += ['backbone_weights = "none"', "max_steps = 1", "batch_size = 2", "input_size = 32", "num_workers = 0"]
    lines += ["[stage1]", "lambda = 0.0", "[stage2]", 'pseudo_labels = "episodes"']
    path.write_text("\n".join(lines))
    # In this process, since the start of a command takes seconds.
    scripts = {f"{module.__name__}.py": module for module in STAGES.values()}
    monkeypatch.setattr(runs, "command", lambda line, log: scripts[line[0]].main(list(map(str, line[1:]))))
    return str(path)


def times_of_checkpoints(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("latest.pth")}


def test_the_ablation_trains_every_row_under_its_own_protocol(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "CONFIG", tiny_config(tmp_path / "tiny.toml", ablation.CONFIG, monkeypatch))
    write_dataset(tmp_path / "data", 40, 20, size=(48, 48))
    argv = ["--data-path", tmp_path / "data", "--output-dir", tmp_path / "runs", "--seeds", 1]
    ablation.main([*map(str, argv)])
    printed = capsys.readouterr().out
    assert all(f"| {row.name}" in printed for row in ablation.ROWS)
    logs = {log.parts[-5]: json.loads(log.read_text()) for log in tmp_path.rglob("split4/*/log.jsonl")}
    oracle = {name for name, line in logs.items() if line["target_pixels"] == "oracle"}
    assert oracle == {"oracle", "paper__oracle__stage_2"}
    checkpoints = times_of_checkpoints(tmp_path)
    ablation.main([*map(str, argv), "--only-table"])
    assert capsys.readouterr().out.strip() in printed and times_of_checkpoints(tmp_path) == checkpoints

    argv = ["--checkpoint", tmp_path / "runs/best/seed1/split4/stage2/latest.pth", "--data-path", tmp_path / "data"]
    assert pseudo_labels.main(list(map(str, argv))) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name}" in printed for name in Split.named(4).unseen)


def test_an_unknown_row_is_one_line_with_the_rows_that_there_are(tmp_path, capsys):
    line = failure(capsys, ablation.main, ["--data-path", tmp_path, "--rows", "no such row"])
    assert "'source only'" in line


def test_the_demo_gives_a_table_and_a_sheet_and_repeats_no_training(tmp_path, monkeypatch, capsys):
    changes = {"NUM_TRAIN": 40, "NUM_EVALUATION": 20, "SIDE": 48, "PROCESSES": 1, "PHOTOS": tmp_path / "none"}
    for name, value in changes.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "CONFIG", tiny_config(tmp_path / "tiny.toml", demo.CONFIG, monkeypatch))
    pool = types.SimpleNamespace(map=map)  # trainings in this process catch signals, which needs its main thread
    monkeypatch.setattr(demo, "ThreadPoolExecutor", lambda _: contextlib.nullcontext(pool))
    argv = ["--data-path", str(tmp_path / "data"), "--output-dir", str(tmp_path), "--seeds", "1"]
    demo.main(argv)
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {row.name}" in table for row in demo.ROWS) and table in capsys.readouterr().out
    assert (tmp_path / "predictions.png").is_file()
    checkpoints = times_of_checkpoints(tmp_path)
    assert len(checkpoints) == 4
    demo.main(argv)
    assert times_of_checkpoints(tmp_path) == checkpoints


def test_lines_that_wait_for_the_gpu_are_counted(monkeypatch, capsys):
    def script(argv):
        for _ in argv:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return 0

    monkeypatch.setattr(waits.importlib, "import_module", lambda name: types.SimpleNamespace(main=script))
    assert waits.main(["train.py", "--split", "1"]) == 0
    assert re.fullmatch(r"waits: test_benchmarks\.py:\d+ x 2\n", capsys.readouterr().out)

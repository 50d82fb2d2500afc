"""The demo, tiny: the scripts run in this process, one step each, on the network without ImageNet weights."""

import pytest

import predict
import train_split_lambda
import train_st_split
from benchmarks import demo, runs

SCRIPTS = {"train_split_lambda.py": train_split_lambda, "train_st_split.py": train_st_split, "predict.py": predict}
TINY = """
backbone = "small"
backbone_weights = "none"
freeze_backbone = true
embedding = ["glove"]
background = "score"
input_size = 32
scale = [1.0, 1.0]
rotation = 0.0
flip = 0.0
max_steps = 1
batch_size = 2
num_workers = 0
evaluate_every = 0
[stage1]
lambda = 0.0
[stage2]
pseudo_labels = "episodes"
"""


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """The demo's `main` with a tiny settings file."""
    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.setattr(demo, "CONFIG", str(tmp_path / "tiny.toml"))
    monkeypatch.setattr(demo, "NUM_TRAIN", 40)
    monkeypatch.setattr(demo, "NUM_EVALUATION", 20)
    monkeypatch.setattr(demo, "SIDE", 48)
    monkeypatch.setattr(demo, "PROCESSES", 1)
    monkeypatch.setattr(demo, "PHOTOS", tmp_path / "none")
    monkeypatch.setattr(runs, "command", lambda line, log: SCRIPTS[line[0]].main(list(map(str, line[1:]))))
    return lambda: demo.main(["--data-path", str(tmp_path / "data"), "--output-dir", str(tmp_path), "--seeds", "1"])


def test_demo_gives_a_table_and_a_sheet_and_repeats_no_training(small_demo, tmp_path, capsys):
    small_demo()
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {method}" in table for method in demo.METHODS) and table in capsys.readouterr().out
    assert (tmp_path / "predictions.png").is_file()
    checkpoints = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("latest.pth")}
    assert len(checkpoints) == 4
    small_demo()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("latest.pth")} == checkpoints

"""What a run writes and prints: log lines, args.json, losses without waiting."""

import json

import pytest
import torch

from utils.errors import UserError
from utils.logging import LossMeter, append_log, open_run_folder, peak_memory, read_log


def test_opening_a_run_folder_drops_later_lines_and_what_a_killed_process_left(tmp_path):
    for step in (2, 4, 6):
        append_log(tmp_path, {"step": step})
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'{"stage": 1, "st\xff')  # cut off as the process died
    (tmp_path / ".latest.pth.123.tmp").write_bytes(b"half")
    (tmp_path / "best.pth").touch()
    assert read_log(tmp_path) == [{"step": 2}, {"step": 4}, {"step": 6}] and read_log(tmp_path / "none") == []
    open_run_folder(tmp_path, 4, {"seed": 1}, metadata={"split": "1"})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 2}\n{"step": 4}\n'
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "args.json", "best.pth"}
    open_run_folder(tmp_path, 0, {"seed": 1})
    assert (tmp_path / "log.jsonl").read_text() == "" and not (tmp_path / "best.pth").exists()


def test_args_json_has_settings_versions_and_commit(tmp_path):
    open_run_folder(tmp_path, 0, {"learning_rate": 0.01}, metadata={"split": "1"})
    content = json.loads((tmp_path / "args.json").read_text())
    assert content["arguments"] == {"learning_rate": 0.01} and content["metadata"] == {"split": "1"}
    assert content["versions"]["torch"] == torch.__version__ and {"python", "torchvision"} <= set(content["versions"])
    assert content["commit"] is None or len(content["commit"]) >= 40


def test_losses_are_means_since_the_last_look():
    meter = LossMeter()
    for step, loss in enumerate([1.0, 3.0], start=1):
        meter.add(step, {"total": torch.tensor(loss), "ce": torch.tensor(2 * loss)})
    assert meter.means() == {"total": 2.0, "ce": 4.0} == meter.means() == meter.last
    meter.add(3, {"total": torch.tensor(5.0), "ce": torch.tensor(float("inf"))})
    with pytest.raises(UserError, match="loss ce is inf at step 3"):
        meter.means()


def test_memory_is_that_of_this_process():
    assert 0.05 < peak_memory(torch.device("cpu")) < 50

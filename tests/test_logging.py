"""What a run writes and prints: log lines, losses without waiting, a warning where a loader is slow."""

import json
import sys
import threading
import time

import pytest
import torch

from dataset.voc import EvaluationDataset, SourceDataset
from helpers import train
from utils import logging
from utils.errors import UserError
from utils.logging import LossMeter, append_log, duration, has_log_line, open_run_folder, warn_if_loader_slow


class Warnings:
    """Takes the place of what writes the lines; the first sets `event`."""

    def __init__(self, monkeypatch):
        self.lines, self.event = [], threading.Event()
        monkeypatch.setattr(logging.tqdm, "write", self.write)

    def write(self, line, file):
        assert file is sys.stderr
        self.lines.append(line)
        self.event.set()


class Batches(list):
    """A loader with three workers; `ready` is called before each batch."""

    num_workers = 3

    def __init__(self, items, ready):
        super().__init__(items)
        self.ready = ready

    def __iter__(self):
        for item in super().__iter__():
            self.ready(item)
            yield item


@pytest.fixture
def warnings(monkeypatch):
    return Warnings(monkeypatch)


def test_a_batch_that_does_not_come_is_one_line(warnings, monkeypatch):
    """The second batch takes an hour, and comes after the warning; the others take no time."""
    clock = [0.0]
    monkeypatch.setattr(logging, "monotonic", lambda: clock[0])

    def ready(item):
        if item == 1:
            clock[0] += 1800
            assert warnings.event.wait(60)
            clock[0] += 1800
            time.sleep(0.05)  # several looks, enough to print it again

    assert list(warn_if_loader_slow(Batches(range(4), ready), seconds=0.01)) == [0, 1, 2, 3]
    assert len(warnings.lines) == 1 and "\n" not in warnings.lines[0]
    assert "disk" in warnings.lines[0] and "--num-workers 3" in warnings.lines[0]


def test_each_long_wait_has_its_line(warnings):
    def ready(item):
        assert warnings.event.wait(60)
        warnings.event.clear()

    assert list(warn_if_loader_slow(Batches(range(3), ready), seconds=0.01)) == [0, 1, 2]
    assert len(warnings.lines) == 3


def test_time_spent_on_a_batch_is_no_waiting(warnings, monkeypatch):
    """An hour a batch, by a clock that stands still while the loader works."""
    clock = [0.0]
    monkeypatch.setattr(logging, "monotonic", lambda: clock[0])
    for _ in warn_if_loader_slow(Batches(range(3), lambda item: None), seconds=0.01):
        clock[0] += 3600
        time.sleep(0.02)  # several looks
    assert warnings.lines == []


def test_its_thread_ends_with_it(warnings):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name.endswith("(watch)")]

    before = set(threads())
    batches = warn_if_loader_slow(Batches(range(5), lambda item: None), seconds=0.01)
    assert next(batches) == 0
    (own,) = set(threads()) - before
    batches.close()
    own.join(60)
    assert not own.is_alive()


def test_an_error_of_the_loader_comes_through(warnings):
    def ready(item):
        raise RuntimeError("worker died")

    with pytest.raises(RuntimeError, match="worker died"):
        list(warn_if_loader_slow(Batches(range(3), ready)))


@pytest.mark.parametrize("dataset", [SourceDataset, EvaluationDataset])
def test_a_script_warns_where_a_loader_is_slow(warnings, data, tmp_path, monkeypatch, dataset):
    read = dataset.__getitem__

    def slow(self, key):
        assert warnings.event.wait(60)
        return read(self, key)

    monkeypatch.setattr(dataset, "__getitem__", slow)
    monkeypatch.setattr(warn_if_loader_slow, "__defaults__", (0.05,))
    train(1, data, tmp_path, max_steps=1)
    assert warnings.lines and all("--num-workers 0" in line for line in warnings.lines)


# --- the log --------------------------------------------------------------------------------------------


def test_opening_a_run_folder_drops_later_lines_and_what_a_killed_process_left(tmp_path):
    for step in (2, 4, 6):
        append_log(tmp_path, {"step": step})
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'{"stage": 1, "st\xff')  # cut off as the process died
    (tmp_path / ".latest.pth.123.tmp").write_bytes(b"half")
    (tmp_path / "best.pth").touch()
    open_run_folder(tmp_path, 4, {"seed": 1}, metadata={"split": "1"})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 2}\n{"step": 4}\n'
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "args.json", "best.pth"}
    assert has_log_line(tmp_path, 4) and not has_log_line(tmp_path, 6) and not has_log_line(tmp_path / "none", 4)
    open_run_folder(tmp_path, 0, {"seed": 1})
    assert (tmp_path / "log.jsonl").read_text() == "" and not (tmp_path / "best.pth").exists()


def test_args_json_has_settings_versions_and_commit(tmp_path):
    open_run_folder(tmp_path, 0, {"learning_rate": 0.01}, metadata={"split": "1"})
    content = json.loads((tmp_path / "args.json").read_text())
    assert content["arguments"] == {"learning_rate": 0.01} and content["metadata"] == {"split": "1"}
    assert content["versions"]["torch"] == torch.__version__ and {"python", "torchvision"} <= set(content["versions"])
    assert content["commit"] is None or len(content["commit"]) >= 40


def test_losses_are_means_since_the_last_look():
    meter = LossMeter(lambda rows: rows)
    for step, loss in enumerate([1.0, 3.0], start=1):
        meter.add(step, {"total": torch.tensor(loss), "ce": torch.tensor(2 * loss)})
    assert meter.means() == {"total": 2.0, "ce": 4.0} == meter.means() == meter.last
    meter.add(3, {"total": torch.tensor(5.0), "ce": torch.tensor(float("inf"))})
    with pytest.raises(UserError, match="loss ce is inf at step 3"):
        meter.means()


@pytest.mark.parametrize("seconds, text", [(3, "3 s"), (89, "89 s"), (200, "3 min"), (7300, "2 h 2 min")])
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text

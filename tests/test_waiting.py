"""Slow disks and dead workers: one line each, and the run is as it was."""

import os
import signal
import sys
import threading
import time

import pytest
from utils.waiting import watched

import train_split_lambda
from dataset.voc import EvaluationDataset, SourceDataset
from helpers import arguments, failure, load, same_run, train
from utils import waiting
from utils.errors import one_line


class Told:
    """Takes the place of what writes the lines; `event` is set by the first."""

    def __init__(self, monkeypatch):
        self.lines, self.event = [], threading.Event()
        monkeypatch.setattr(waiting.tqdm, "write", self.write)

    def write(self, line, file):
        assert file is sys.stderr
        self.lines.append(line)
        self.event.set()


class Batches(list):
    """A loader of so many workers whose batches come when `ready` says so."""

    num_workers = 3

    def __init__(self, items, ready):
        super().__init__(items)
        self.ready = ready

    def __iter__(self):
        for item in super().__iter__():
            self.ready(item)
            yield item


@pytest.fixture
def told(monkeypatch):
    return Told(monkeypatch)


def test_a_batch_that_does_not_come_is_one_line(told, monkeypatch):
    """The second batch takes an hour, and comes no sooner than that was said; the others take no time."""
    clock = [0.0]
    monkeypatch.setattr(waiting, "monotonic", lambda: clock[0])

    def ready(item):
        if item == 1:
            clock[0] += 1800
            assert told.event.wait(60)
            clock[0] += 1800
            time.sleep(0.05)  # several looks, enough to say it again

    assert list(watched(Batches(range(4), ready), seconds=0.01)) == [0, 1, 2, 3]
    assert len(told.lines) == 1 and "\n" not in told.lines[0]
    assert "disk" in told.lines[0] and "--num-workers 3" in told.lines[0]


def test_each_long_wait_has_its_line(told):
    def ready(item):
        assert told.event.wait(60)
        told.event.clear()

    assert list(watched(Batches(range(3), ready), seconds=0.01)) == [0, 1, 2]
    assert len(told.lines) == 3


def test_time_spent_on_a_batch_is_no_waiting(told, monkeypatch):
    """An hour a batch, by a clock that stands still while the loader works."""
    clock = [0.0]
    monkeypatch.setattr(waiting, "monotonic", lambda: clock[0])
    for _ in watched(Batches(range(3), lambda item: None), seconds=0.01):
        clock[0] += 3600
        time.sleep(0.02)  # several looks
    assert told.lines == []


def test_its_thread_ends_with_it(told):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name.endswith("(watch)")]

    before = set(threads())
    batches = watched(Batches(range(5), lambda item: None), seconds=0.01)
    assert next(batches) == 0
    (mine,) = set(threads()) - before
    batches.close()
    mine.join(60)
    assert not mine.is_alive()


def test_an_error_of_the_loader_comes_through(told):
    def ready(item):
        raise RuntimeError("worker died")

    with pytest.raises(RuntimeError, match="worker died"):
        list(watched(Batches(range(3), ready)))


@pytest.mark.parametrize("script_waits", ["training", "evaluation"])
def test_scripts_say_that_they_wait(told, data, tmp_path, monkeypatch, script_waits):
    """Whichever loader it is: the first picture comes when that was said."""
    kind = {"training": SourceDataset, "evaluation": EvaluationDataset}[script_waits]
    read = kind.__getitem__

    def slow(self, key):
        assert told.event.wait(60)
        return read(self, key)

    monkeypatch.setattr(kind, "__getitem__", slow)
    monkeypatch.setattr(waiting.watched, "__defaults__", (0.05,))
    train(1, data, tmp_path, max_steps=1)
    assert told.lines and all("--num-workers 0" in line for line in told.lines)


def test_a_killed_worker_is_one_line_and_the_run_goes_on(data, tmp_path, monkeypatch, capsys):
    """As the system kills one where memory runs out. It dies once there is a checkpoint to go on from."""
    flags = {"max_steps": 12, "save_every": 2, "num_workers": 1}
    whole = train(1, data, tmp_path / "whole", **flags)
    folder, read = tmp_path / "runs" / "split1" / "stage1", SourceDataset.__getitem__

    def die(self, key):
        if (folder / "latest.pth").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(SourceDataset, "__getitem__", die)
        line = failure(capsys, train_split_lambda.main, arguments(data, tmp_path / "runs", **flags))
    assert "DataLoader worker" in line and "lower --num-workers" in line
    assert 2 <= load(folder / "latest.pth")["step"] < 12
    train(1, data, tmp_path / "runs", restore_from_where="continue", **flags)
    assert same_run(folder, whole)


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "unable to allocate shared memory(shm) for file </torch_7_8_9>: No space left on device (28)",
    ],
)
def test_too_little_shared_memory_is_one_line(text):
    line = one_line(RuntimeError(text), ())
    assert "--num-workers" in line and "--shm-size" in line and "\n" not in line

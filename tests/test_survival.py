"""Training that is killed, stopped or has no room: no torn file, no step lost, the same bits in the end."""

import json
import random
import signal
import time

import pytest
import torch

import eval as evaluation_script
import warm
from helpers import load, read_log, same_run, train
from warm import Life, run

NUM_STEPS = 110
LONG = {"max_steps": NUM_STEPS, "save_every": 1, "evaluate_every": 40}
KILLS = 30
FAR = 100_000
"""Steps that no machine does before it is told to stop."""


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run that nobody stops."""
    return run(tmp_path_factory.mktemp("whole"), 1, data, prepare=warm.note_saves, **LONG)


def leftovers(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".tmp"))


def kill_somewhere(draw: random.Random, folder, data, number: int, flags: dict) -> Life:
    """One life that SIGKILL ends: at any moment, or in every third case within the writing of a checkpoint.

    It stands still before its fourth save, so that no machine is fast enough to end before it is killed.
    """
    if number % 3 == 0:
        share = draw.choice([0, draw.random(), draw.random(), 1, 2])
        life = Life(folder, 1, data, prepare=warm.die_in_save, told=(draw.randint(1, 3), share), **flags)
    else:
        life = Life(folder, 1, data, prepare=warm.stand_still, told=(4,), **flags)
        saves = len(life.notes()) + draw.choice([0, 1, 2, 3])
        life.wait_for(lambda: len(life.notes()) >= saves)
        time.sleep(draw.uniform(0, 0.03))
        life.process.kill()
    assert life.end() == -signal.SIGKILL, life.output()
    return life


def test_killed_at_thirty_moments_it_ends_with_the_same_bits(whole, data, tmp_path):
    draw, steps, torn = random.Random(7), [], 0
    for number in range(KILLS):
        latest = tmp_path / "runs/split1/stage1/latest.pth"
        where = {"restore_from_where": "continue"} if latest.exists() else {}
        life = kill_somewhere(draw, tmp_path, data, number, LONG | where)
        torn += bool(life.folder.exists() and leftovers(life.folder))
        if latest.exists():
            step = load(latest)["step"]  # it is whole
            noted = int(life.notes()[-1]) if life.notes() else 0
            assert noted <= step <= max([noted, *steps]) + 1 and step >= max(steps, default=0)  # one save is unnoted
            steps.append(step)
    assert torn >= 5 and len(set(steps)) >= 10 and steps[-1] < NUM_STEPS, (torn, steps)
    last = run(tmp_path, 1, data, restore_from_where="continue", **LONG)
    assert same_run(last.folder, whole.folder) and leftovers(last.folder) == []
    assert [record["step"] for record in read_log(last.folder)] == [40, 80, 110]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("stage, num_workers", [(1, 0), (1, 2), (2, 2)])
def test_a_signal_lets_the_step_finish_and_saves(data, tmp_path, number, code, stage, num_workers):
    """To the process and its workers; nothing but the signal has it saved."""
    flags = {"max_steps": FAR, "num_epochs": FAR, "save_every": 0, "num_workers": num_workers}
    life = Life(tmp_path, stage, data, prepare=warm.note_steps, **flags)
    life.wait_for(lambda: len(life.notes()) >= 5)
    life.signal_all(number)
    assert life.end() == code, life.output()
    latest, notes = load(life.folder / "latest.pth"), life.notes()
    assert notes[-1] == f"done {latest['step']}" and 0 < latest["step"] < FAR
    printed = [line for line in life.output().splitlines() if line.strip()]
    assert [line.split(":")[0] for line in printed[1:]] == ["stopping", "stopped"], printed
    assert f"step {latest['step']} of {FAR}" in printed[-1] and "--restore-from-where continue" in printed[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_a_signal_stopped_goes_on_to_the_same_bits(whole, data, tmp_path, number):
    flags = LONG | {"save_every": 0}
    life = run(tmp_path, 1, data, prepare=warm.die_in_step, told=(50, number), code=128 + number, **flags)
    assert load(life.folder / "latest.pth")["step"] == 50
    last = run(tmp_path, 1, data, restore_from_where="continue", **flags)
    a, b = (load(folder / "latest.pth") for folder in (last.folder, whole.folder))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


@pytest.mark.parametrize("prepare, told, note", [(warm.note_steps, (3,), "begun 3"), (warm.slow_save, (3,), "half")])
def test_a_second_ctrl_c_leaves_at_once_and_harms_no_file(data, tmp_path, prepare, told, note):
    """In the middle of a step, and of the writing of a checkpoint."""
    flags = {"max_steps": 5, "save_every": 1}
    life = Life(tmp_path, 1, data, prepare=prepare, told=told, **flags)
    life.wait_for(lambda: note in life.notes())
    life.signal_all(signal.SIGINT)
    life.wait_for(lambda: "Ctrl-C leaves at once" in life.output())
    begun = time.monotonic()
    life.signal_all(signal.SIGINT)
    assert life.end() == -signal.SIGINT and time.monotonic() - begun < 20  # the step and the save take a minute
    assert "Traceback" not in life.output()
    assert load(life.folder / "latest.pth")["step"] == 2
    last = run(tmp_path, 1, data, restore_from_where="continue", **flags)
    assert load(last.folder / "latest.pth")["step"] == 5 and leftovers(last.folder) == []


def test_ctrl_c_outside_the_steps_is_one_line(finished, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation_script, "predictions", stop)
    with pytest.raises(SystemExit, match="130"):
        evaluation_script.main(["--checkpoint", str(finished.stage1 / "latest.pth"), "--data-path", str(finished.data)])
    assert capsys.readouterr().err == "stopped\n"


def test_handlers_of_signals_are_put_back(data, tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    train(1, data, tmp_path)
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(data, tmp_path):
    """A limit on the size of files is met by the same error, at any byte, as the end of the disk."""
    flags = {"max_steps": 6, "save_every": 1}
    life = run(tmp_path, 1, data, prepare=warm.full_disk, told=(4, 10_000), code=2, **flags)
    latest = life.folder / "latest.pth"
    printed = life.output().splitlines()[1:]
    assert len(printed) == 1 and printed[0].startswith(f"error: {latest} could not be written ("), printed
    assert "the last checkpoint is kept" in printed[0] and load(latest)["step"] == 3
    assert leftovers(life.folder) == []
    undisturbed = run(tmp_path / "other", 1, data, **flags)
    assert same_run(run(tmp_path, 1, data, restore_from_where="continue", **flags).folder, undisturbed.folder)


@pytest.mark.skipif(not warm.open_files(), reason="needs /proc")
def test_two_thousand_steps_take_no_more_memory_than_two_hundred(data, tmp_path):
    flags = {"max_steps": 2000, "num_epochs": 100, "num_workers": 0, "batch_size": 1, "evaluate_every": 500}
    life = run(tmp_path, 1, data, prepare=warm.note_memory, told=(200, 2000), **flags)
    (_, early, early_files), (_, late, late_files) = (map(int, line.split()) for line in life.notes())
    assert late <= 1.02 * early, f"{early / 2**20:.1f} MiB at step 200, {late / 2**20:.1f} MiB at step 2000"
    assert late_files == early_files
    report = json.loads(life.report.read_text())
    assert report["files"][0] == report["files"][1] and report["workers"] == 0

"""Training that is stopped, killed or out of disk loses no step and ends with the same bits; and what a run shows."""

import io
import itertools
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import utils.checkpoint
import utils.trainer
from dataset.voc import EvaluationDataset, SourceDataset
from helpers import (
    SHORT,
    STAGES,
    arguments,
    contents,
    failure,
    load,
    read_log,
    same_run,
    tiny_network,
    train,
    use_network,
)
from processes import ScriptProcess, append, open_files, run_script
from utils.errors import UserError
from utils.logging import LossMeter

# --- resuming -------------------------------------------------------------------------------------------

EPOCHS = SHORT | {"max_steps": 8, "batch_size": 9, "evaluate_every": 3, "save_every": 1}
"""33 source images in batches of 9: an epoch ends within the fourth step, another within the eighth."""
RUNS = {
    "stage 1": (1, {}),
    "stage 2, episodes, AdamW": (2, {"optimizer": "adamw", "pseudo_labels": "episodes"}),
    "stage 2, bf16": (2, {"amp": "bf16"}),
}


@pytest.fixture(scope="module", params=RUNS.values(), ids=RUNS)
def whole(request, data, tmp_path_factory):
    """A run that nobody stops, and a copy of its folder after each of its steps."""
    stage, changes = request.param
    folder, save = tmp_path_factory.mktemp("whole"), utils.checkpoint.save_checkpoint
    flags = EPOCHS | changes

    def keep(path, **content):
        save(path, **content)
        copy = folder / f"after{content['step']}" / "split1" / f"stage{stage}"
        if path.name == "latest.pth" and not copy.exists():
            shutil.copytree(path.parent, copy)

    with pytest.MonkeyPatch.context() as patch:
        use_network(tiny_network, patch)
        patch.setattr(utils.checkpoint, "save_checkpoint", keep)
        return stage, flags, folder, train(stage, data, folder / "end", **flags)


@pytest.mark.parametrize("step", range(1, 8))
def test_a_run_resumed_after_any_step_ends_with_the_same_bits(whole, data, tmp_path, tiny, step):
    """Copies of step 3 and 6 were made before the evaluation that belongs to them, which is then repeated."""
    stage, flags, folder, end = whole
    shutil.copytree(folder / f"after{step}", tmp_path, dirs_exist_ok=True)
    torch.manual_seed(step)  # the process that resumes has another random state
    workers = {"num_workers": 2} if step in (2, 5) else {}
    resumed = train(stage, data, tmp_path, **flags | workers, restore_from_where="continue")
    assert same_run(resumed, end, losses=False)


@pytest.fixture
def after_two_steps(finished, tmp_path):
    """The finished stage 1 as it was after the second of its three steps."""
    run = shutil.copytree(finished.stage1, tmp_path / "split1" / "stage1")
    shutil.copy(run / "best.pth", run / "latest.pth")
    assert load(run / "latest.pth")["step"] == 2


def test_another_learning_rate_scales_the_rates_of_the_steps_that_are_left(
    after_two_steps, finished, tmp_path, capsys, monkeypatch
):
    used, step = [], utils.trainer.optimizer_step

    def recording(loss, optimizer):
        used.append([group["lr"] for group in optimizer.param_groups])
        step(loss, optimizer)

    monkeypatch.setattr(STAGES[1], "optimizer_step", recording)
    changed = {"learning_rate": 0.002, "restore_from_where": "continue", "evaluate_every": 2}
    folder = train(1, finished.data, tmp_path, **changed)
    assert "learning_rate 0.002, was 0.01" in capsys.readouterr().err
    assert used == [pytest.approx([(1 / 3) ** 0.9 * rate for rate in (0.002, 0.02)])]
    assert load(folder / "latest.pth")["settings"]["learning_rate"] == 0.002


def test_continue_at_the_end_does_nothing(finished, tmp_path, capsys):
    shutil.copytree(finished.output, tmp_path / "runs")
    before = (tmp_path / "runs/split1/stage1/latest.pth").read_bytes()
    train(1, finished.data, tmp_path / "runs", restore_from_where="continue", evaluate_every=2)
    assert (tmp_path / "runs/split1/stage1/latest.pth").read_bytes() == before
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("stage, where", [(1, "pretrained"), (2, "pretrained"), (2, "saved")])
def test_a_new_run_does_not_replace_one_that_is_there(data, tmp_path, tiny, capsys, stage, where):
    train(1, data, tmp_path, **SHORT)
    folder = train(stage, data, tmp_path, **SHORT)
    before = contents(folder)
    argv = arguments(data, tmp_path, **SHORT | {"restore_from_where": where, "learning_rate": 0.5})
    line = failure(capsys, STAGES[stage].main, argv)
    assert all(words in line for words in (str(folder / "latest.pth"), "continue", "--output-dir", "delete"))
    assert contents(folder) == before


def test_a_new_run_starts_with_nothing_of_an_old_one(data, tmp_path, tiny):
    """Once its latest.pth is deleted: the log and the best checkpoint are of other steps."""
    folder = train(1, data, tmp_path, **EPOCHS)
    (folder / "best.pth").write_bytes(b"of another run")
    (folder / ".latest.pth.123.tmp").write_bytes(b"half")
    assert same_run(train(1, data, tmp_path, **EPOCHS), train(1, data, tmp_path / "other", **EPOCHS))
    names = {path.name for path in folder.iterdir()}
    assert names == {"latest.pth", "best.pth", "log.jsonl", "args.json", "evaluation.json"}


def disk_fails():
    raise OSError(5, "Input/output error", "broken.jpg")


def worker_dies():
    os.kill(os.getpid(), signal.SIGKILL)  # as the system does where memory runs out


FAULTS = {
    "an evaluation image": (EvaluationDataset, 2, disk_fails, "broken.jpg"),
    "an evaluation image after the last step": (EvaluationDataset, 12, disk_fails, "broken.jpg"),
    "a worker": (SourceDataset, 2, worker_dies, "a process that reads images died: lower --num-workers"),
}


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_after_a_checkpoint_is_one_line_and_loses_no_training(data, tmp_path, tiny, capsys, monkeypatch, fault):
    """It resumes with the evaluation that failed, also where no step is left."""
    dataset, step, fail, words = fault
    flags = SHORT | {"max_steps": 12, "evaluate_every": 2, "num_workers": int(fail is worker_dies)}
    whole, read = train(1, data, tmp_path / "whole", **flags), dataset.__getitem__
    latest = tmp_path / "runs/split1/stage1/latest.pth"

    def failing(dataset, key):
        if latest.exists() and load(latest)["step"] >= step:
            fail()
        return read(dataset, key)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "__getitem__", failing)
        assert words in failure(capsys, STAGES[1].main, arguments(data, tmp_path / "runs", **flags))
    assert step <= load(latest)["step"] <= max(step, 11)
    assert same_run(train(1, data, tmp_path / "runs", **flags, restore_from_where="continue"), whole, losses=False)


# --- kills, signals, a full disk ------------------------------------------------------------------------

NUM_STEPS, KILLS = 110, 30
LONG = {"max_steps": NUM_STEPS, "save_every": 1, "evaluate_every": 40}
ENDLESS = 100_000
"""Steps that no machine does before it is asked to stop."""


def record_saves(record: Path, waiting: int = 0) -> None:
    """Writes the step of each `latest.pth` once it is saved; its save `waiting` does not start for an hour."""
    save, saves = utils.checkpoint.save_checkpoint, itertools.count(1)

    def recording(path, **content):
        if path.name == "latest.pth" and next(saves) == waiting:
            time.sleep(3600)
        save(path, **content)
        if path.name == "latest.pth":
            append(record, str(content["step"]))

    utils.checkpoint.save_checkpoint = recording


def die_in_save(record: Path, number: int, share: float) -> None:
    """As `record_saves`; SIGKILL in save `number` after `share` of the bytes."""
    record_saves(record)
    write, saves = torch.save, itertools.count(1)

    def dying(content, file):
        if next(saves) == number:
            buffer = io.BytesIO()
            write(content, buffer)
            file.write(buffer.getvalue()[: int(share * buffer.tell())])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(content, file)

    torch.save = dying


def record_steps(record: Path, slow: int) -> None:
    """Writes the number of each step as it starts to end; step `slow` takes a minute."""
    end_step = utils.trainer.Trainer.end_step

    def recording(trainer, losses):
        append(record, str(trainer.step + 1))
        if trainer.step + 1 == slow:
            time.sleep(60)
        end_step(trainer, losses)

    utils.trainer.Trainer.end_step = recording


def fill_disk(record: Path, save: int, room: int) -> None:
    """From save `save` on no file can grow beyond `room` bytes: the same error as that of a full disk."""
    write, saves = torch.save, itertools.count(1)

    def limited(content, file):
        if next(saves) == save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        write(content, file)

    torch.save = limited


def leftovers(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".tmp"))


def kill_somewhere(draw: random.Random, folder, data, number: int, flags: dict) -> ScriptProcess:
    """A process that SIGKILL ends: at any moment, or in every third case within the writing of a checkpoint.

    It waits before its fourth save, so that no machine is fast enough to end before it is killed.
    """
    if number % 3 == 0:
        share = draw.choice([0, draw.random(), draw.random(), 1])
        process = ScriptProcess(folder, 1, data, prepare=die_in_save, args=(draw.randint(1, 3), share), **flags)
    else:
        process = ScriptProcess(folder, 1, data, prepare=record_saves, args=(4,), **flags)
        saves = len(process.records()) + draw.choice([0, 1, 2, 3])
        process.wait_for(lambda: len(process.records()) >= saves)
        time.sleep(draw.uniform(0, 0.03))
        process.process.kill()
    assert process.end() == -signal.SIGKILL, process.output()
    return process


def test_a_run_killed_at_thirty_moments_ends_with_the_same_bits(data, tmp_path):
    draw, steps, torn = random.Random(7), [], 0
    undisturbed = run_script(tmp_path / "undisturbed", 1, data, **LONG).folder
    latest = tmp_path / "runs/split1/stage1/latest.pth"
    for number in range(KILLS):
        where = {"restore_from_where": "continue"} if latest.exists() else {}
        process = kill_somewhere(draw, tmp_path, data, number, LONG | where)
        torn += bool(process.folder.exists() and leftovers(process.folder))
        if latest.exists():
            step = load(latest)["step"]  # the file is whole
            recorded = int(process.records()[-1]) if process.records() else 0
            assert max([recorded, *steps]) <= step <= max([recorded, *steps]) + 1  # at most one save is not recorded
            steps.append(step)
    assert torn >= 5 and len(set(steps)) >= 10 and steps[-1] < NUM_STEPS, (torn, steps)
    last = run_script(tmp_path, 1, data, restore_from_where="continue", **LONG)
    assert same_run(last.folder, undisturbed, losses=False) and leftovers(last.folder) == []
    assert [entry["step"] for entry in read_log(last.folder)] == [40, 80, 110]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("stage, num_workers", [(1, 0), (2, 2)])
def test_after_a_signal_the_step_ends_and_is_saved(data, tmp_path, number, code, stage, num_workers):
    flags = {"max_steps": ENDLESS, "num_epochs": ENDLESS, "save_every": 0, "num_workers": num_workers}
    process = ScriptProcess(tmp_path, stage, data, prepare=record_steps, args=(0,), **flags)
    process.wait_for(lambda: len(process.records()) >= 3)
    process.signal_all(number)
    assert process.end() == code, process.output()
    latest = load(process.folder / "latest.pth")
    assert process.records()[-1] == str(latest["step"]) and 0 < latest["step"] < ENDLESS
    printed = [line for line in process.output().splitlines() if line.strip()]
    assert [line.split(":")[0] for line in printed[-2:]] == ["stopping", "stopped"], printed
    assert f"step {latest['step']} of {ENDLESS}" in printed[-1] and "--restore-from-where continue" in printed[-1]


def test_a_second_ctrl_c_ends_at_once_and_harms_no_file(data, tmp_path):
    """In the middle of a step that takes a minute."""
    flags = {"max_steps": 5, "save_every": 1}
    process = ScriptProcess(tmp_path, 1, data, prepare=record_steps, args=(3,), **flags)
    process.wait_for(lambda: "3" in process.records())
    process.signal_all(signal.SIGINT)
    process.wait_for(lambda: "Ctrl-C leaves at once" in process.output())
    start = time.monotonic()
    process.signal_all(signal.SIGINT)
    assert process.end() == -signal.SIGINT and time.monotonic() - start < 20
    assert "Traceback" not in process.output() and load(process.folder / "latest.pth")["step"] == 2
    last = run_script(tmp_path, 1, data, restore_from_where="continue", **flags)
    assert load(last.folder / "latest.pth")["step"] == 5 and leftovers(last.folder) == []


def test_a_full_disk_keeps_the_last_checkpoint_and_ends_in_one_line(data, tmp_path):
    flags = {"max_steps": 6, "save_every": 1}
    process = run_script(tmp_path, 1, data, prepare=fill_disk, args=(4, 10_000), code=2, **flags)
    latest, printed = process.folder / "latest.pth", process.output().splitlines()[1:]
    assert len(printed) == 1 and printed[0].startswith(f"error: {latest} can't be written ("), printed
    assert "before is kept" in printed[0] and load(latest)["step"] == 3
    assert leftovers(process.folder) == []
    other = run_script(tmp_path / "other", 1, data, **flags)
    assert same_run(run_script(tmp_path, 1, data, restore_from_where="continue", **flags).folder, other.folder)


def test_losses_are_means_since_the_last_look():
    meter = LossMeter()
    for loss in (1.0, 3.0):
        meter.add({"total": torch.tensor(loss), "ce": torch.tensor(2 * loss)})
    assert meter.means(2) == {"total": 2.0, "ce": 4.0} == meter.means(2) == meter.last
    for loss in (float("inf"), 5.0):
        meter.add({"total": torch.tensor(5.0), "ce": torch.tensor(loss)})
    with pytest.raises(UserError, match="loss ce is inf at step 3"):
        meter.means(4)


NOT_FINITE = {
    "a loss of stage 1": (1, {"save_every": 2}, ["step 4", "loss", "nan"]),
    "a loss of stage 2": (2, {"save_every": 2}, ["step 4", "loss", "nan"]),
    # the loss of the last step can be finite though the step itself was too long
    "weights, saved": (1, {"save_every": 1}, ["not finite"]),
    "weights, evaluated": (1, {"save_every": 1, "evaluate_every": 1}, ["not finite"]),
}


@pytest.mark.parametrize("stage, flags, words", NOT_FINITE.values(), ids=NOT_FINITE)
def test_numbers_that_are_not_finite_end_in_one_line_and_are_not_saved(
    data, tmp_path, tiny, capsys, monkeypatch, stage, flags, words
):
    """A weight is NaN after step 3, which is seen as it is saved or as the next loss is shown."""
    train_step, steps = STAGES[stage].train_step, itertools.count(1)

    def spoiling(model, *rest):
        losses = train_step(model, *rest)
        if next(steps) == 3:
            next(p for name, p in model.named_parameters() if name.endswith("project.bias")).data.fill_(float("nan"))
        return losses

    monkeypatch.setattr(STAGES[stage], "train_step", spoiling)
    line = failure(capsys, STAGES[stage].main, arguments(data, tmp_path, **SHORT | {"max_steps": 6} | flags))
    assert all(word in line for word in ["--learning-rate", *words]), line
    latest = load(tmp_path / "split1" / f"stage{stage}" / "latest.pth")
    assert latest["step"] == 2 and all(tensor.isfinite().all() for tensor in latest["model"].values())


def record_memory(record: Path, *steps: int) -> None:
    """Writes the process's memory in bytes after each of `steps`, and its open files."""
    end_step = utils.trainer.Trainer.end_step

    def recording(trainer, losses):
        end_step(trainer, losses)
        if trainer.step in steps:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            append(record, f"{trainer.step} {pages * resource.getpagesize()} {open_files()}")

    utils.trainer.Trainer.end_step = recording


@pytest.mark.skipif(not open_files(), reason="needs /proc")
def test_two_thousand_steps_take_no_more_memory_than_two_hundred(data, tmp_path):
    flags = {"max_steps": 2000, "num_epochs": 100, "num_workers": 0, "batch_size": 1, "evaluate_every": 500}
    process = run_script(tmp_path, 1, data, prepare=record_memory, args=(200, 2000), **flags)
    (_, early, early_files), (_, late, late_files) = (map(int, line.split()) for line in process.records())
    assert late <= 1.02 * early, f"{early / 2**20:.1f} MiB at step 200, {late / 2**20:.1f} MiB at step 2000"
    assert late_files == early_files
    report = process.report()
    assert report["files"][0] == report["files"][1] and report["workers"] == 0


# --- what a run shows -----------------------------------------------------------------------------------


def test_the_bar_shows_losses_rate_and_time_left(data, tmp_path, tiny, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    train(1, data, tmp_path, "--set", "log_every=1", **SHORT | {"max_steps": 4})
    last = [line for line in re.split(r"[\r\n]", terminal.getvalue()) if "stage 1" in line][-1]
    for words in ("4/4", "total ", "ce ", "bias_source ", "bias_target ", "lr ", "s for images", " steps/s", "100%"):
        assert words in last, last
    assert re.search(r"\d\d:\d\d<\d\d:\d\d", last)  # time gone and time left


def test_a_run_is_quiet_where_the_output_is_no_terminal_and_puts_handlers_back(data, tmp_path, tiny, capfd):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(1, data, tmp_path, **SHORT)
    captured = capfd.readouterr()
    assert captured.err == "" and "\r" not in captured.out and "hIoU" in captured.out
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("stage, where", [(1, "pretrained"), (2, "saved")])
def test_a_dry_run_prints_time_and_memory_and_keeps_nothing(finished, tmp_path, capsys, stage, where):
    if stage == 2:
        shutil.copytree(finished.stage1, tmp_path / "split1" / "stage1")
    before = contents(tmp_path)
    changes = {"max_steps": 500, "evaluate_every": 300, "restore_from_where": where}
    train(stage, finished.data, tmp_path, "--dry-run", **changes)
    printed = capsys.readouterr().out
    assert contents(tmp_path) == before
    assert "4 steps are in order" in printed and "2 evaluations of 8 images, " in printed
    assert re.search(r"500 steps of \d+\.\d\d s: \d+:\d\d:\d\d", printed)
    assert re.search(r"memory, at most: \d+\.\d GB of this process", printed)
    assert re.search(r"altogether about \d+:\d\d:\d\d on cpu", printed)


def test_a_dry_run_leaves_a_run_that_is_there_alone(after_two_steps, finished, tmp_path, capsys):
    before = contents(tmp_path)
    train(1, finished.data, tmp_path, "--dry-run", restore_from_where="continue")
    assert contents(tmp_path) == before and "altogether about" in capsys.readouterr().out


def test_a_dry_run_finds_a_rate_that_is_too_high(data, tmp_path, tiny, capsys):
    argv = arguments(data, tmp_path / "runs", "--dry-run", **SHORT | {"learning_rate": "1e30"})
    assert "lower --learning-rate" in failure(capsys, STAGES[1].main, argv) and not (tmp_path / "runs").exists()

"""Several processes are one: the losses, weights, figures and files of a process that has the whole batch for itself.

The processes are real ones, that speak through Gloo on this machine.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import warm
from dataset.splits import Split
from helpers import ROOT, arguments, copy_of, evaluation_arguments, load, mask_path, read_log, target_only
from utils.distributed import JoinedBatchNorm
from warm import lives, run, run_several

STEPS = 4
FLAGS = {"batch_size": 5, "target_batch_size": 3, "max_steps": STEPS, "evaluate_every": 2, "learning_rate": 0.05}
"""Shares that differ, and more pictures than an epoch's end leaves."""

CASES = {
    "stage 1": (1, "plain", []),
    "stage 1, batch norm": (1, "normed", []),
    "stage 1, source only": (1, "plain", ["--lambda", 0]),
    "stage 1, losses at fewer pixels": (1, "plain", ["--loss-stride", 2]),
    "stage 1, frozen": (1, "normed", ["--freeze-backbone", "--auxiliary-background"]),
    "stage 2": (2, "plain", []),
    "stage 2, batch norm": (2, "normed", []),
    "stage 2, class by class": (2, "plain", ["--balance-classes", "--keep", 0.3]),
    "stage 2, clusters": (2, "normed", [
        "--teacher", "frozen", "--rounds", 2, "--num-clusters", 4, "--keep-known", 0.3, "--rare-power", 0.5,
    ]),
    "stage 2, in parts": (2, "plain", ["--accumulate", 2]),
}  # fmt: skip


def close(a: dict, b: dict, tolerance: float) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k].double(), b[k].double(), atol=tolerance) for k in a)


@pytest.mark.parametrize("stage, network, flags", CASES.values(), ids=CASES)
def test_two_processes_have_the_losses_of_one(data, tmp_path, stage, network, flags):
    told = {"prepare": warm.note_losses, "told": (network,)}
    one = run(tmp_path / "one", stage, data, *flags, **told, **FLAGS)
    two = run_several(2, tmp_path / "two", stage, data, *flags, **told, **FLAGS)
    assert len(one.losses()) == len(two.losses()) == STEPS
    for mine, theirs in zip(one.losses(), two.losses()):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert one.losses()[0] != pytest.approx(one.losses()[-1], abs=1e-3)  # the control: steps do change them
    a, b = (load(life.folder / "latest.pth") for life in (one, two))
    assert close(a["model"], b["model"], 1e-5) and close(a["teacher"], b["teacher"], 1e-5)


def test_batch_norm_over_processes_is_batch_norm():
    """In one process: outputs, gradients, statistics, and the names under which a checkpoint keeps them."""
    torch.manual_seed(0)
    image = torch.randn(5, 3, 4, 6, dtype=torch.float32) * 3 + 2
    plain, own = nn.BatchNorm2d(3, momentum=0.2), JoinedBatchNorm(3, momentum=0.2)
    found = []
    for norm in (plain, own):
        norm.weight.data, x = torch.tensor([0.5, 2.0, -1.0]), image.clone().requires_grad_()
        y = norm(x)
        y.square().mul(torch.linspace(0, 1, 6)).sum().backward()
        found.append([y, x.grad, norm.weight.grad, norm.bias.grad, *norm.state_dict().values(), norm.eval()(image)])
    assert plain.state_dict().keys() == own.state_dict().keys()
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-5) for a, b in zip(*found))


def figures(folder) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith("loss")} for line in read_log(folder)]


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_evaluation_is_that_of_one_process(mixed, tmp_path, at_once):
    """Counts and each picture's figures, in order; here of the same weights, which a rate of next to nothing keeps.

    The processes have three, three and two batches, or two, one and one with pictures in the order of their sizes.
    """
    told = {"prepare": warm.note_losses, "told": ("plain",)}
    flags = FLAGS | {"learning_rate": 1e-12, "weight_decay": 0}
    one = run(tmp_path / "one", 1, mixed, **told, **flags).folder
    many = run_several(3, tmp_path / "many", 1, mixed, **told, **flags, evaluation_batch_size=at_once).folder
    assert figures(one) == figures(many) and len(figures(one)) == 2
    a, b = (json.loads((folder / "evaluation.json").read_text()) for folder in (one, many))
    assert all(a[key] == b[key] for key in ("confusion", "per_image", "per_class", "seen", "unseen"))


def test_one_process_speaks_and_writes(data, tmp_path):
    main, other = lives(2, tmp_path, 1, data, **FLAGS)
    assert (main.end(), other.end()) == (0, 0)
    assert other.output() == "" and "stage 1, step 4" in main.output()
    assert main.output().count("source and") == 1
    assert {path.name for path in main.folder.iterdir()} == {
        "latest.pth", "best.pth", "log.jsonl", "args.json", "evaluation.json",
    }  # fmt: skip
    assert [line["step"] for line in read_log(main.folder)] == [2, 4]


def test_a_dry_run_is_told_once_and_leaves_nothing(data, tmp_path):
    started = lives(2, tmp_path, 2, data, "--dry-run", **FLAGS | {"max_steps": 9})
    assert [life.end() for life in started] == [0, 0]
    said = "".join(life.output() for life in started)
    assert said.count("dry run: data, words, weights and 4 steps") == 1 and not started[0].folder.exists()


def test_masks_are_listed_once(data, tmp_path):
    """By the main process, while the others wait for it."""
    own = copy_of(data, tmp_path / "data")
    mask = str(mask_path(own, target_only(own, Split.voc(1))[0]))
    for index in own.glob("class_index_*.json"):
        index.unlink()
    started = lives(2, tmp_path, 1, own, prepare=warm.note_opened, **FLAGS)
    assert [life.end() for life in started] == [0, 0]
    opened = [sum(note.endswith(f"open {mask}") for note in life.notes()) for life in started]
    assert opened == [1, 0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("stage, network", [(1, "plain"), (1, "normed"), (2, "plain")])
def test_two_gpus_have_the_losses_of_one(data, tmp_path, stage, network):
    flags = FLAGS | {"prepare": warm.note_losses, "told": (network,), "device": "cuda"}
    one, two = run(tmp_path / "one", stage, data, **flags), run_several(2, tmp_path / "two", stage, data, **flags)
    for mine, theirs in zip(one.losses(), two.losses(), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)  # sums of a GPU have no fixed order


@pytest.mark.parametrize("stage, flags", [(1, []), (2, []), (2, ["--teacher", "frozen"])])
@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_it_goes_on_with_another_number_of_processes(data, tmp_path, stage, flags, first, then):
    told = {"prepare": warm.note_losses, "told": ("normed",)}
    whole = run(tmp_path / "whole", stage, data, *flags, **told, **FLAGS)
    stopped = lives(
        first, tmp_path / "parts", stage, data, *flags, prepare=warm.stop_in_step, told=(2, "normed"), **FLAGS
    )
    assert [life.end() for life in stopped] == [143] * first, stopped[0].output()
    assert load(stopped[0].folder / "latest.pth")["step"] == 2
    end = run_several(
        then, tmp_path / "parts", stage, data, *flags, **told, **FLAGS, restore_from_where="continue"
    ).folder
    a, b = (load(folder / "latest.pth") for folder in (end, whole.folder))
    assert a["step"] == b["step"] == STEPS and close(a["model"], b["model"], 1e-5)
    assert [line["step"] for line in read_log(end)] == [2, 4]


def test_a_signal_to_one_process_stops_all_at_the_same_step(data, tmp_path):
    """And is saved once, by the main one, though it never heard of it."""
    flags = FLAGS | {"max_steps": 50, "evaluate_every": 0, "save_every": 0}
    main, other = lives(2, tmp_path, 1, data, prepare=warm.die_in_step, told={1: (3, signal.SIGTERM)}, **flags)
    assert (main.end(), other.end()) == (143, 143), main.output()
    assert load(main.folder / "latest.pth")["step"] == 3
    assert "step 3 of 50" in main.output() and other.output() == ""


@pytest.mark.parametrize("dying", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, "the disk is gone"])
def test_a_process_that_dies_ends_the_others_with_one_line(data, tmp_path, dying, how):
    flags = FLAGS | {"max_steps": 50, "evaluate_every": 0, "save_every": 1}
    started = lives(2, tmp_path, 1, data, prepare=warm.die_in_step, told={dying: (3, how)}, **flags)
    codes = [life.end(120) for life in started]
    spoken = [line for life in started for line in life.output().splitlines() if line.startswith("error: ")]
    said = "".join(life.output() for life in started)
    assert "Traceback" not in said and len(spoken) == 1, said
    if how == signal.SIGKILL:
        assert codes[dying] == -signal.SIGKILL and codes[1 - dying] == 2
        assert "another process of this run has ended" in spoken[0] and "continue" in spoken[0]
    else:
        assert codes == [2, 2] and how in spoken[0]
    assert load(started[0].folder / "latest.pth")["step"] == 2


def test_no_process_opens_a_target_mask(data, tmp_path):
    own = copy_of(data, tmp_path / "data")
    hidden = [str(mask_path(own, picture)) for picture in target_only(own, Split.voc(1))]  # and the index is made
    flags = FLAGS | {"num_workers": 1}
    started = lives(2, tmp_path, 1, own, prepare=warm.note_opened, **flags)
    assert [life.end() for life in started] == [0, 0]
    for life in started:
        paths = [note.split(" ", 2)[2] for note in life.notes() if note.split(" ", 2)[1] == "open"]
        assert hidden and not set(hidden) & set(paths)
        assert any("JPEGImages" in path for path in paths)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"batch_size": 1}, ["--batch-size", "1", "2 processes"]),
        ({"target_batch_size": 1}, ["--target-batch-size", "1", "2 processes"]),
        ({"accumulate": 9}, ["--accumulate 9", "pictures"]),
        ({"split": 99}, ["--split"]),
        ({"data_path": "nowhere"}, ["nowhere"]),
    ],
)
def test_bad_flags_are_one_line(data, tmp_path, flags, words):
    started = lives(2, tmp_path, 1, data, **FLAGS | flags)
    assert [life.end(120) for life in started] == [2, 2]
    said = "".join(life.output() for life in started)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said and all(word in errors[0] for word in words), said


def test_torchrun_trains_and_stops(data, tmp_path):
    """The command of the README, stopped by SIGTERM."""
    endless = {"max_steps": 100_000, "num_epochs": 100_000, "evaluate_every": 0, "save_every": 2}
    argv = arguments(data, tmp_path / "runs", **FLAGS | endless)
    folder = tmp_path / "runs" / "split1" / "stage1"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    process = subprocess.Popen(
        [*command, "train_split_lambda.py", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not (folder / "latest.pth").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    step = load(folder / "latest.pth")["step"]
    assert output.count("stopped: ") == 1 and f"has step {step} of " in output, output


@pytest.mark.parametrize("flags", [[], ["--evaluation-batch-size", 3, "--flip"], ["--calibration", 0, 0.3]])
def test_the_evaluation_script_gives_the_figures_of_one_process(mixed, tmp_path, flags):
    checkpoint = run(tmp_path / "trained", 1, mixed, **FLAGS).folder / "latest.pth"
    one, two = (
        {"prepare": warm.evaluate_instead, "told": evaluation_arguments(checkpoint, mixed, "--json", path, *flags)}
        for path in (tmp_path / "one.json", tmp_path / "two.json")
    )
    run(tmp_path / "one", 1, mixed, **one)
    main, other = lives(2, tmp_path / "two", 1, mixed, **two)
    assert (main.end(), other.end()) == (0, 0), main.output()
    assert main.output().count("hIoU") >= 1 and other.output() == ""
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()

"""Devices; and several processes are as one: the losses, weights, figures and files of a process with the whole batch.

The processes are real ones that communicate through Gloo on this machine.
"""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation_script
from dataset.splits import Split
from helpers import ROOT, STAGES, arguments, evaluation_arguments, load, normed_network, plain_network, read_log
from masks import mask_path, target_only
from processes import fail_in_step, record_losses, record_opened, run_script, run_several, start_several
from utils.distributed import choose_amp, choose_device

STEPS = 4
FLAGS = {"batch_size": 5, "target_batch_size": 3, "max_steps": STEPS, "evaluate_every": 2, "learning_rate": 0.05}
"""Parts that differ in size, and more images than are left at the end of an epoch."""

CASES = {
    "stage 1": (1, plain_network, []),
    "stage 1, source only": (1, plain_network, ["--lambda", 0]),
    "stage 1, frozen": (1, normed_network, ["--freeze-backbone", "--background=auxiliary", "--set", "loss_stride=2"]),
    "stage 2": (2, plain_network, []),
    "stage 2, class by class": (2, plain_network, ["--balance-classes", "--keep", 0.3, "--checkpoint-activations"]),
    "stage 2, episodes": (2, normed_network, ["--freeze-backbone", "--pseudo-labels", "episodes"]),
}  # fmt: skip


def close(a: dict, b: dict, tolerance: float) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k].double(), b[k].double(), atol=tolerance) for k in a)


@pytest.mark.parametrize("stage, network, flags", CASES.values(), ids=CASES)
def test_two_processes_have_the_losses_weights_and_files_of_one(data, tmp_path, stage, network, flags):
    changes = {"prepare": record_losses, "args": (network,)} | FLAGS
    one = run_script(tmp_path / "one", stage, data, *flags, **changes)
    two, other = run_several(2, tmp_path / "two", stage, data, *flags, **changes)
    assert len(one.losses()) == len(two.losses()) == STEPS
    for expected, found in zip(one.losses(), two.losses()):
        assert found == pytest.approx(expected, abs=1e-5)
    assert one.losses()[0] != pytest.approx(one.losses()[-1], abs=1e-3)  # the control: steps do change them
    a, b = (load(process.folder / "latest.pth") for process in (one, two))
    assert close(a["model"], b["model"], 1e-5) and close(a["pseudo_labeler"], b["pseudo_labeler"], 1e-5)
    # Rank 0 alone prints and writes.
    assert other.output() == "" and f"stage {stage}, step 4" in two.output()
    assert two.output().count("source and") == 1 and [line["step"] for line in read_log(two.folder)] == [2, 4]
    assert {path.name for path in two.folder.iterdir()} == {path.name for path in one.folder.iterdir()}


def evaluate_instead(record, *argv: str) -> None:
    """Runs eval.py with these flags in place of stage 1."""
    STAGES[1] = SimpleNamespace(main=lambda _: evaluation_script.main(list(argv)))


def test_the_evaluation_script_gives_the_figures_of_one_process(mixed, tmp_path):
    checkpoint = run_script(tmp_path / "trained", 1, mixed, **FLAGS).folder / "latest.pth"
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    flags = ["--evaluation-batch-size", 3, "--flip", "--calibration", 0.3]
    args = [tuple(evaluation_arguments(checkpoint, mixed, "--json", path, *flags)) for path in paths]
    run_script(tmp_path / "one", 1, mixed, prepare=evaluate_instead, args=args[0])
    first, second = run_several(2, tmp_path / "two", 1, mixed, prepare=evaluate_instead, args=args[1])
    assert "hIoU" in first.output() and second.output() == ""
    assert paths[0].read_text() == paths[1].read_text()


def test_masks_are_indexed_once_and_no_process_opens_a_target_mask(own_data, tmp_path):
    """Rank 0 makes the index while the others wait for it."""
    targets = {str(mask_path(own_data, image)) for image in target_only(own_data, Split.named(1))}
    for index in own_data.glob("class_index_*.json"):
        index.unlink()
    for folder, first in (("first", targets), ("second", set())):
        processes = run_several(2, tmp_path / folder, 1, own_data, prepare=record_opened, **FLAGS | {"num_workers": 1})
        opened = [[record.split(" ", 2)[2] for record in process.records()] for process in processes]
        assert targets and [set(paths) & targets for paths in opened] == [first, set()]
        assert all(any("JPEGImages" in path for path in paths) for paths in opened)


@pytest.mark.parametrize("stage, flags", [(1, []), (2, ["--pseudo-labels", "episodes"])])
@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_a_run_resumes_with_another_number_of_processes(data, tmp_path, stage, flags, first, then):
    whole = run_script(tmp_path / "whole", stage, data, *flags, prepare=record_losses, args=(plain_network,), **FLAGS)
    stop = {"prepare": fail_in_step, "args": (2, signal.SIGTERM, plain_network), "code": 143}
    stopped = run_several(first, tmp_path / "parts", stage, data, *flags, **stop, **FLAGS)
    assert load(stopped[0].folder / "latest.pth")["step"] == 2
    rest = {"prepare": record_losses, "args": (plain_network,), "restore_from_where": "continue"}
    end = run_several(then, tmp_path / "parts", stage, data, *flags, **rest, **FLAGS)[0].folder
    a, b = (load(folder / "latest.pth") for folder in (end, whole.folder))
    assert a["step"] == b["step"] == STEPS and close(a["model"], b["model"], 1e-5)
    assert [line["step"] for line in read_log(end)] == [2, 4]


def test_a_signal_to_one_process_stops_all_at_the_same_step(data, tmp_path):
    flags = FLAGS | {"max_steps": 50, "evaluate_every": 0, "save_every": 0}
    args = {1: (3, signal.SIGTERM)}
    first, second = run_several(2, tmp_path, 1, data, prepare=fail_in_step, args=args, code=143, **flags)
    assert load(first.folder / "latest.pth")["step"] == 3
    assert "step 3 of 50" in first.output() and second.output() == ""


def only_error(processes) -> str:
    """The one line of an error that the processes printed together."""
    printed = "".join(process.output() for process in processes)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in printed and len(errors) == 1, printed
    return errors[0]


@pytest.mark.parametrize("dying", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, "the disk is gone"])
def test_a_process_that_dies_ends_the_others_with_one_line(data, tmp_path, dying, how):
    flags = FLAGS | {"max_steps": 50, "evaluate_every": 0, "save_every": 1}
    processes = start_several(2, tmp_path, 1, data, prepare=fail_in_step, args={dying: (3, how)}, **flags)
    codes = [process.end(120) for process in processes]
    line = only_error(processes)
    if how == signal.SIGKILL:
        assert codes[dying] == -signal.SIGKILL and codes[1 - dying] == 2
        assert "another process of this run has ended" in line and "continue" in line
    else:
        assert codes == [2, 2] and how in line
    assert load(processes[0].folder / "latest.pth")["step"] == 2


MISTAKES = [({"batch_size": 1}, ["--batch-size", "1", "2 processes"]), ({"data_path": "nowhere"}, ["nowhere"])]


@pytest.mark.parametrize("flags, words", MISTAKES)
def test_a_mistake_is_one_line_of_one_process(data, tmp_path, flags, words):
    line = only_error(run_several(2, tmp_path, 1, data, code=2, **FLAGS | flags))
    assert all(word in line for word in words), line


def test_torchrun_trains_and_stops(data, tmp_path):
    """The command of the README, stopped by SIGTERM."""
    endless = {"max_steps": 100_000, "num_epochs": 100_000, "evaluate_every": 0, "save_every": 2}
    argv = arguments(data, tmp_path / "runs", **FLAGS | endless)
    latest = tmp_path / "runs" / "split1" / "stage1" / "latest.pth"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    process = subprocess.Popen(
        [*command, "train_split_lambda.py", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not latest.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert output.count("stopped: ") == 1 and f"has step {load(latest)['step']} of " in output, output


@pytest.mark.parametrize(
    "device, has_bf16, chosen", [("cpu", True, "off"), ("cuda", True, "bf16"), ("cuda", False, "off")]
)
def test_auto_is_bf16_on_a_gpu_that_has_it(device, has_bf16, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert choose_amp("auto", torch.device(device)) == chosen
    assert choose_amp("off", torch.device(device)) == "off"


def test_deterministic_is_asked_of_torch_until_the_next_run():
    for asked in (True, False):
        choose_device("cpu", deterministic=asked)
        assert torch.are_deterministic_algorithms_enabled() is asked

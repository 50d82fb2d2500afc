"""A run that is stopped after any step goes on to the same bits; two runs with the same flags are the same run."""

import shutil

import pytest
import torch
import utils.run

import warm
from helpers import STAGES, load, same, same_run, train
from model import backbone

PLAN = warm.PLAN | {"max_steps": 8, "batch_size": 9, "evaluate_every": 3, "save_every": 1, "log_every": 2}
"""33 source pictures in batches of 9: an epoch ends within the fourth step, another within the eighth."""


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    monkeypatch.setitem(backbone.ARCHITECTURES, "small", backbone.Architecture(warm.tiny))


@pytest.fixture(
    scope="module", params=[(1, "sgd"), (2, "sgd"), (2, "adamw")], ids=lambda value: f"{value[0]}-{value[1]}"
)
def whole(request, data, tmp_path_factory):
    """A run that nobody stops, and a copy of its folder after each of its steps."""
    stage, optimizer = request.param
    folder, save = tmp_path_factory.mktemp("whole"), utils.run.save_checkpoint
    flags = PLAN | {"optimizer": optimizer}

    def keeping(path, **content):
        save(path, **content)
        if path.name == "latest.pth":
            shutil.copytree(path.parent, folder / f"after{content['step']}" / "split1" / f"stage{stage}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbone.ARCHITECTURES, "small", backbone.Architecture(warm.tiny))
        patch.setattr(utils.run, "save_checkpoint", keeping)
        return stage, flags, folder, train(stage, data, folder / "end", **flags)


@pytest.mark.parametrize("step", range(1, 8))
def test_stopped_after_any_step_it_goes_on_to_the_same_bits(whole, data, tmp_path, step):
    stage, flags, folder, end = whole
    shutil.copytree(folder / f"after{step}", tmp_path, dirs_exist_ok=True)
    torch.manual_seed(step)  # the process that goes on has another random state
    assert same_run(train(stage, data, tmp_path, **flags, restore_from_where="continue"), end)


@pytest.mark.parametrize("step", [2, 5])
def test_it_goes_on_with_workers_to_the_same_bits(whole, data, tmp_path, step):
    stage, flags, folder, end = whole
    shutil.copytree(folder / f"after{step}", tmp_path, dirs_exist_ok=True)
    flags |= {"num_workers": 2, "restore_from_where": "continue"}
    assert same_run(train(stage, data, tmp_path, **flags), end)


def test_what_is_compared_differs_from_step_to_step(whole):
    """The control: weights, optimiser and schedule do change in the last step."""
    stage, _, folder, end = whole
    before, after = load(folder / "after7" / "split1" / f"stage{stage}" / "latest.pth"), load(end / "latest.pth")
    assert not any(same(before[part], after[part]) for part in ("model", "optimizer", "scheduler", "step"))


@pytest.mark.parametrize("stage", STAGES)
def test_deterministic_runs_are_equal_and_only_take_algorithms_that_are(data, tmp_path, stage, monkeypatch):
    asked = []
    monkeypatch.setattr(utils.run.Run, "note", _noting(utils.run.Run.note, asked))
    first, second = (train(stage, data, tmp_path / name, "--deterministic", **PLAN) for name in "ab")
    assert same_run(first, second) and set(asked) == {True}
    train(stage, data, tmp_path / "c", **PLAN | {"max_steps": 1})
    assert asked[-1] is False  # another run in the same process is free again


def _noting(note, asked):
    def noting(run, losses):
        asked.append(torch.are_deterministic_algorithms_enabled())
        note(run, losses)

    return noting


# --- a run is not lost to another -----------------------------------------------------------------------


@pytest.mark.parametrize("stage, where", [(1, "pretrained"), (2, "pretrained"), (2, "saved")])
def test_a_new_run_does_not_replace_one_that_is_there(data, tmp_path, capsys, stage, where):
    train(1, data, tmp_path, **PLAN)
    folder = train(stage, data, tmp_path, **PLAN)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    flags = PLAN | {"restore_from_where": where, "learning_rate": 0.5}
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        STAGES[stage].main(warm.arguments(data, tmp_path, **flags))
    line = capsys.readouterr().err
    assert str(folder / "latest.pth") in line and "continue" in line and "--output-dir" in line and "delete" in line
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_new_run_begins_with_nothing_of_an_old_one(data, tmp_path):
    """Once its latest.pth is deleted: the log and the best checkpoint are of other steps."""
    folder = train(1, data, tmp_path, **PLAN)
    (folder / "best.pth").write_bytes(b"of another run")
    (folder / ".latest.pth.123.tmp").write_bytes(b"half")
    assert same_run(train(1, data, tmp_path, **PLAN), train(1, data, tmp_path / "other", **PLAN))
    assert {path.name for path in folder.iterdir()} == {
        "latest.pth",
        "best.pth",
        "log.jsonl",
        "args.json",
        "evaluation.json",
    }

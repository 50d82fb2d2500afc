"""The real scripts on drawn pictures: what they leave, that they go on exactly, that no mask leaks."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import helpers
from dataset.splits import VOC_SPLITS, VOID, Split
from helpers import (
    STAGES,
    classes_shown,
    evaluate,
    load,
    mask_path,
    read_log,
    read_values,
    same_bits,
    source_and_target,
    target_only,
    train,
    weights,
    write_values,
)

FIGURES = {"miou_seen", "miou_unseen", "hiou", "miou_zsl", "bias", "pixel_accuracy", "mean_accuracy", "fwiou"}
SPLIT = Split.voc(1)


def start(stage, finished, data, output, *flags, **changes):
    """A run of either stage from its natural beginning: stage 2 from the finished stage 1."""
    if stage == 2:
        changes = {
            "restore_from_where": "saved",
            "stage1_checkpoint": finished.stage1 / "latest.pth",
        } | changes
    return train(stage, data, output, *flags, **changes)


# --- what a run leaves behind ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_leaves_its_files(finished, stage):
    folder = getattr(finished, f"stage{stage}")
    files = {path.name for path in folder.iterdir()}
    assert files == {"latest.pth", "best.pth", "log.jsonl", "args.json", "evaluation.json", "pictures"}
    latest, best = load(folder / "latest.pth"), load(folder / "best.pth")
    assert (latest["stage"], latest["step"], latest["selection"]) == (stage, 3, "last")
    assert "miou_unseen" in best["selection"]  # a choice by evaluation pictures is marked as such
    assert latest["setting"]["seen"] == list(SPLIT.seen) and latest["setting"]["unseen"] == list(SPLIT.unseen)


def test_best_is_the_best_of_the_log(finished):
    scores = {record["step"]: record["miou_unseen"] for record in read_log(finished.stage1)}
    assert load(finished.stage1 / "best.pth")["step"] == max(scores, key=scores.get)


@pytest.mark.parametrize("stage, losses", [(1, {"ce", "bias_source", "bias_target"}), (2, {"ce", "self_training"})])
def test_log_has_a_line_an_evaluation(finished, stage, losses):
    records = read_log(getattr(finished, f"stage{stage}"))
    assert [record["step"] for record in records] == ([2, 3] if stage == 1 else [3])
    for record in records:
        assert {f"loss_{name}" for name in losses | {"total"}} | FIGURES | {"per_class"} <= set(record)
        assert (record["target_pixels"], record["target_images"]) == ("all", "unseen")
        assert record["background"] is False and tuple(record["per_class"]) == SPLIT.names


@pytest.mark.parametrize("stage", [1, 2])
def test_args_say_flags_versions_and_commit(finished, stage):
    record = json.loads((getattr(finished, f"stage{stage}") / "args.json").read_text())
    assert record["arguments"]["learning_rate"] == 0.01 and record["arguments"]["max_steps"] == 3
    assert record["versions"]["torch"] == torch.__version__ and {"python", "torchvision"} <= set(record["versions"])
    assert "commit" in record and (record["commit"] is None or len(record["commit"]) >= 40)


def test_logged_losses_are_what_training_minimises(finished):
    """total = CE + lambda [(1 - w) B(source) + w B(target)] also holds for the logged means."""
    record = read_log(finished.stage1)[-1]
    bias = 0.8 * record["loss_bias_source"] + 0.2 * record["loss_bias_target"]
    assert record["loss_total"] == pytest.approx(record["loss_ce"] + 0.2 * bias, rel=1e-4)


def test_stage_2_starts_from_the_checkpoint_of_stage_1(finished, tmp_path):
    """By default it looks where stage 1 of the same split wrote; a rate near 0 shows how it began."""
    shutil.copytree(finished.stage1, tmp_path / "split1" / "stage1")
    same = {"max_steps": 1, "learning_rate": 1e-30, "weight_decay": 0, "restore_from_where": "saved"}
    begun, ended = weights(finished.stage1), weights(train(2, finished.data, tmp_path, **same))
    trained = [name for name in begun if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(begun[name], ended[name]) for name in trained)
    other = train(2, finished.data, tmp_path / "other", **same | {"restore_from_where": "pretrained"})
    assert not torch.equal(weights(other)["projection.project.weight"], ended["projection.project.weight"])


def test_training_learns(data, tmp_path):
    """CE falls well below chance within a few dozen steps."""
    log = {"evaluate_every": 10, "max_steps": 40, "learning_rate": 0.02, "log_every": 10, "batch_size": 6}
    records = read_log(train(1, data, tmp_path, **log | {"target_batch_size": 2}))
    losses = [record["loss_ce"] for record in records]
    assert losses[-1] < 0.9 * losses[0] and losses[-1] < math.log(len(SPLIT.names))


# --- evaluation -----------------------------------------------------------------------------------------


def test_eval_prints_a_table_with_protocol(finished, capsys):
    assert evaluate(finished.stage2 / "latest.pth", finished.data) == 0
    text = capsys.readouterr().out
    for words in (
        "hIoU",
        "ZSL",
        "bias",
        "stage 2",
        "split 1",
        "target pixels all",
        "no target mask",
        "glove",
    ):
        assert words in text
    assert all(name in text for name in SPLIT.names)


def test_eval_writes_json(finished, tmp_path, capsys):
    assert evaluate(finished.stage1 / "latest.pth", finished.data, "--json", tmp_path / "result.json") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert FIGURES | {"per_class"} <= set(result) and list(result["per_class"]) == list(SPLIT.names)
    figures = [result[name] for name in FIGURES] + list(result["per_class"].values())
    assert all(value is None or 0 <= value <= 1 for value in figures)
    assert "hIoU" in capsys.readouterr().out  # the table comes too


def test_eval_json_on_stdout_is_only_json(finished, capsys):
    assert evaluate(finished.stage1 / "latest.pth", finished.data, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert "target pixels all" in result["protocol"] and result["selection"] == "last"


def test_eval_repeats_what_training_logged(finished, capsys):
    """The network rebuilt from the checkpoint alone gives the figures of the network in training."""
    evaluate(finished.stage1 / "latest.pth", finished.data, "--json")
    result, record = json.loads(capsys.readouterr().out), read_log(finished.stage1)[-1]
    for name in FIGURES:
        assert result[name] == pytest.approx(record[name], abs=1e-6), name


def recount(masks, data, split):
    """Per-class IoU (None without pixels) from the written masks and the true ones."""
    hits, unions = dict.fromkeys(split.mask_values, 0), dict.fromkeys(split.mask_values, 0)
    for path in masks:
        truth, prediction = read_values(mask_path(data, path.stem)), read_values(path)
        counted = np.isin(truth, split.mask_values)
        for value in split.mask_values:
            hits[value] += int(((truth == value) & (prediction == value) & counted).sum())
            unions[value] += int((((truth == value) | (prediction == value)) & counted).sum())
    pairs = zip(split.names, split.mask_values)
    return {name: hits[v] / unions[v] if unions[v] else None for name, v in pairs}


def test_eval_saves_masks_and_overlays(finished, tmp_path):
    """The written masks hold VOC's values: counted again by hand they give the table's IoU."""
    flags = ["--save-dir", tmp_path, "--json", tmp_path / "result.json"]
    evaluate(finished.stage1 / "latest.pth", finished.data, *flags)
    masks, ids = sorted((tmp_path / "masks").iterdir()), sorted(classes_shown(finished.data, "val"))
    assert [path.name for path in masks] == [f"{picture}.png" for picture in ids]
    for path in masks:
        with Image.open(path) as image:
            assert image.mode == "P" and image.size == (48, 40)
            assert set(np.unique(np.array(image)).tolist()) <= set(SPLIT.mask_values)
        with Image.open(tmp_path / "overlays" / path.name) as page:
            assert page.mode == "RGB" and page.width > 3 * 48
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["per_class"] == pytest.approx(recount(masks, finished.data, SPLIT))


def test_eval_of_a_list(finished, tmp_path, capsys):
    picture = next(iter(classes_shown(finished.data, "val")))
    (tmp_path / "one.txt").write_text(picture + "\n")
    evaluate(finished.stage1 / "latest.pth", finished.data, "--list", tmp_path / "one.txt", "--json")
    assert json.loads(capsys.readouterr().out)["pictures"] == 1


def test_eval_needs_nothing_but_checkpoint_and_data(finished, tmp_path):
    """As a command, from another folder: the words, classes and network travel in the checkpoint."""
    script = helpers.ROOT / "eval.py"
    command = [
        sys.executable,
        script,
        "--checkpoint",
        finished.stage1 / "latest.pth",
        "--data-path",
        finished.data,
    ]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "hIoU" in done.stdout, done.stderr


# --- the same bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_seed_decides_every_bit(finished, tmp_path, stage):
    first, again, other = (
        start(stage, finished, finished.data, tmp_path / name, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert same_bits(weights(first), weights(again)) and not same_bits(weights(first), weights(other))
    assert read_log(first) == read_log(again)


@pytest.mark.parametrize("seed", [0, 2**31, 2**63 - 1])
def test_every_seed_that_is_taken_works(data, tmp_path, seed):
    train(1, data, tmp_path, max_steps=1, seed=seed)


@pytest.mark.parametrize("stage", [1, 2])
def test_workers_change_no_bit(finished, tmp_path, stage):
    none, two = (
        start(stage, finished, finished.data, tmp_path / str(n), num_workers=n, evaluate_every=2) for n in (0, 2)
    )
    assert same_bits(weights(none), weights(two)) and read_log(none) == read_log(two)


def interrupt_at(monkeypatch, module, step):
    """Makes the script die in the given step."""
    train_step, calls = module.train_step, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return train_step(*arguments)

    monkeypatch.setattr(module, "train_step", stopping)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("stop_at", [4, 6])
def test_continue_gives_the_bits_of_an_uninterrupted_run(finished, tmp_path, monkeypatch, stage, stop_at):
    """Stopped in the step after a checkpoint, or some steps later: those steps are done again."""
    plan = {"max_steps": 7, "save_every": 3, "evaluate_every": 2}
    whole = start(stage, finished, finished.data, tmp_path / "whole", **plan)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        interrupt_at(patch, STAGES[stage], stop_at)
        start(stage, finished, finished.data, tmp_path / "parts", **plan)
    folder = tmp_path / "parts" / "split1" / f"stage{stage}"
    assert load(folder / "latest.pth")["step"] == 3
    start(stage, finished, finished.data, tmp_path / "parts", **plan | {"restore_from_where": "continue"})
    for name in ("latest.pth", "best.pth"):
        a, b = load(whole / name), load(folder / name)
        assert same_bits(a["model"], b["model"]) and (a["step"], a["best"]) == (b["step"], b["best"])
        assert a["scheduler"] == b["scheduler"]
    assert [record["step"] for record in read_log(folder)] == [2, 4, 6, 7]
    # A mean of losses that begins before the checkpoint is cut there; all else is the same.
    figures = [[{k: r[k] for k in FIGURES} for r in read_log(f)] for f in (whole, folder)]
    assert figures[0] == figures[1]


def test_continue_at_the_end_does_nothing(finished, tmp_path, capsys):
    shutil.copytree(finished.output, tmp_path / "runs")
    before = (tmp_path / "runs/split1/stage1/latest.pth").read_bytes()
    train(1, finished.data, tmp_path / "runs", restore_from_where="continue", evaluate_every=2)
    assert (tmp_path / "runs/split1/stage1/latest.pth").read_bytes() == before
    assert "nothing to do" in capsys.readouterr().out


def test_continue_survives_a_log_line_that_was_cut_off(finished, tmp_path, monkeypatch):
    plan = {"save_every": 1, "evaluate_every": 1}
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        interrupt_at(patch, STAGES[1], 3)
        train(1, finished.data, tmp_path, **plan)
    log = tmp_path / "split1/stage1/log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"stage": 1, "st\xff')
    train(1, finished.data, tmp_path, **plan, restore_from_where="continue")
    assert [record["step"] for record in read_log(log.parent)] == [1, 2, 3]


# --- no mask leaks --------------------------------------------------------------------------------------

# One step that takes every target picture (there are fewer than 30), and one more.
EVERY_TARGET = {"max_steps": 2, "target_batch_size": 30}


def test_the_drawn_set_can_show_a_leak(data):
    assert len(target_only(data, SPLIT)) >= 3 and len(source_and_target(data, SPLIT)) >= 3


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("images", ["unseen", "all"])
def test_training_gives_the_same_bits_without_the_masks_of_target_pictures(finished, own_data, tmp_path, stage, images):
    plan = EVERY_TARGET | {"target_images": images}
    before = start(stage, finished, own_data, tmp_path / "before", **plan)  # this indexes the masks
    for picture in target_only(own_data, SPLIT):
        mask_path(own_data, picture).unlink()
    after = start(stage, finished, own_data, tmp_path / "after", **plan)
    assert same_bits(weights(before), weights(after))


def scramble(data, split, erase):
    """Changes the unseen pixels of source masks: erased, or all but a few, which are mixed up."""
    for picture in source_and_target(data, split):
        path = mask_path(data, picture)
        mask = read_values(path)
        unseen = np.isin(mask, list(split.unseen_values))
        values = np.unique(mask[unseen])
        scrambled = np.full(unseen.sum(), VOID, np.uint8)
        if not erase:
            scrambled[: len(values)] = values[::-1]  # the picture still shows the same classes
        mask[unseen] = scrambled
        write_values(path, mask)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("images", ["unseen", "all"])
def test_unseen_pixels_of_source_masks_change_no_bit(finished, own_data, tmp_path, stage, images):
    plan = EVERY_TARGET | {"target_images": images, "batch_size": 30}
    before = start(stage, finished, own_data, tmp_path / "before", **plan)
    scramble(own_data, SPLIT, erase=images == "all")
    after = start(stage, finished, own_data, tmp_path / "after", **plan)
    assert same_bits(weights(before), weights(after))


def test_seen_pixels_of_source_masks_do_change_bits(finished, own_data, tmp_path):
    """The control of the tests above: these runs do look at the source masks."""
    plan = EVERY_TARGET | {"batch_size": 30}
    before = start(1, finished, own_data, tmp_path / "before", **plan)
    for picture, values in classes_shown(own_data).items():
        seen = sorted(values & SPLIT.seen_values)
        mask = read_values(mask_path(own_data, picture))
        if len(seen) == 2:
            swapped = np.where(mask == seen[0], seen[1], np.where(mask == seen[1], seen[0], mask))
            write_values(mask_path(own_data, picture), swapped)
    after = start(1, finished, own_data, tmp_path / "after", **plan)
    assert not same_bits(weights(before), weights(after))


_OPENED: list[str] | None = None


def _note_open(event, arguments):
    if _OPENED is not None and event == "open" and isinstance(arguments[0], str):
        _OPENED.append(arguments[0])


sys.addaudithook(_note_open)  # can't be taken off again, so it is switched by _OPENED


@pytest.fixture
def opened():
    """Calls a function; gives the paths of all files that this process opened meanwhile."""

    def watch(function, *arguments, **changes):
        global _OPENED
        _OPENED = []
        try:
            function(*arguments, **changes)
            return set(_OPENED)
        finally:
            _OPENED = None

    return watch


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("pixels", ["all", "oracle"])
def test_only_the_oracle_opens_masks_of_target_pictures(finished, opened, tmp_path, stage, pixels):
    data, split = finished.data, SPLIT
    classes_shown(data)  # the index is there
    paths = opened(start, stage, finished, data, tmp_path, **EVERY_TARGET, target_pixels=pixels)
    targets = {str(mask_path(data, picture)) for picture in target_only(data, split)}
    assert paths & targets == (targets if pixels == "oracle" else set())
    assert any(str(data / "SegmentationClassAug") in path for path in paths)  # source masks were: the hook works


def test_lambda_0_opens_no_target_picture(finished, opened, tmp_path):
    data = finished.data
    pictures = {str(data / "JPEGImages" / f"{picture}.jpg") for picture in target_only(data, SPLIT)}
    plan = EVERY_TARGET | {"batch_size": 30}
    assert not pictures & opened(train, 1, data, tmp_path / "zero", **plan, lambda_="0")
    assert pictures <= opened(train, 1, data, tmp_path / "some", **plan, lambda_="0.2")


@pytest.mark.parametrize("stage", [1, 2])
def test_oracle_trains_another_network_and_says_so(finished, tmp_path, capsys, stage):
    honest = start(stage, finished, finished.data, tmp_path / "all", **EVERY_TARGET)
    oracle = start(stage, finished, finished.data, tmp_path / "oracle", **EVERY_TARGET, target_pixels="oracle")
    assert not same_bits(weights(honest), weights(oracle))
    assert load(oracle / "latest.pth")["setting"]["target_pixels"] == "oracle"
    assert read_log(oracle)[-1]["target_pixels"] == "oracle"
    capsys.readouterr()
    evaluate(oracle / "latest.pth", finished.data)
    assert "ORACLE" in capsys.readouterr().out
    evaluate(oracle / "latest.pth", finished.data, "--json")
    assert "ORACLE" in json.loads(capsys.readouterr().out)["protocol"]


def test_target_images_all_takes_other_pictures(finished, tmp_path):
    few, many = (train(1, finished.data, tmp_path / images, target_images=images) for images in ("unseen", "all"))
    assert not same_bits(weights(few), weights(many))
    assert load(many / "latest.pth")["setting"]["target_images"] == "all"


# --- splits and background ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", VOC_SPLITS)
def test_every_split_runs_through_both_stages(data, tmp_path, capsys, number):
    train(1, data, tmp_path, split=number, max_steps=1)
    stage2 = train(2, data, tmp_path, split=number, max_steps=1, restore_from_where="saved")
    capsys.readouterr()
    evaluate(stage2 / "latest.pth", data, "--json")
    assert list(json.loads(capsys.readouterr().out)["per_class"]) == list(Split.voc(number).names)


def test_background_is_a_seen_class_on_request(data, tmp_path, capsys):
    train(1, data, tmp_path, "--background", max_steps=1)
    stage2 = train(2, data, tmp_path, "--background", max_steps=1, restore_from_where="saved")
    assert load(stage2 / "latest.pth")["model"]["projection.class_embeddings"].shape[0] == 21
    capsys.readouterr()
    evaluate(stage2 / "latest.pth", data, "--json")
    result = json.loads(capsys.readouterr().out)
    assert next(iter(result["per_class"])) == "background" and len(result["per_class"]) == 21
    assert "background a seen class" in result["protocol"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_both_stages_run_on_a_gpu(data, tmp_path):
    train(1, data, tmp_path, device="cuda")
    assert train(2, data, tmp_path, device="cuda", restore_from_where="saved").is_dir()

"""No unseen label is read in training: which files are opened, and that what they say of unseen classes counts nowhere.

The one use of target masks is the class index: made once for a data set, it says which classes a picture shows, which
is what `--target-images unseen` and the choice of source pictures mean. It says nothing of pixels, and its making is
the only time that masks of pictures that are target only are opened.
"""

import numpy as np
import pytest
import torch

import warm
from dataset.splits import VOID, Split
from dataset.voc import SourceDataset, VOCFolder
from helpers import (
    classes_shown,
    copy_of,
    evaluate,
    load,
    mask_path,
    read_log,
    read_values,
    same,
    source_and_target,
    target_only,
    weights,
    write_values,
)
from warm import run

SPLIT = Split.voc(1)

EVERY = {"max_steps": 4, "batch_size": 12, "target_batch_size": 10, "evaluate_every": 2, "save_every": 2}
"""Four steps that take every source and target picture."""

INDEX = "class_index_SegmentationClassAug.json"


def start(stage, data, folder, stage1=None, **changes):
    """A run of either stage in a process of its own, that writes down what it opens; stage 2 from a checkpoint."""
    where = {} if stage == 1 else {"restore_from_where": "saved", "stage1_checkpoint": stage1}
    return run(folder, stage, data, prepare=warm.note_opened, **EVERY | where | changes)


@pytest.fixture(scope="module")
def stage1(data, tmp_path_factory):
    """A checkpoint of stage 1 with the network of these runs."""
    return start(1, data, tmp_path_factory.mktemp("stage1")).folder / "latest.pth"


def opened(life, who=("main", "worker")) -> list[str]:
    """The paths of the files that were opened, in order."""
    notes = [note.split(" ", 2) for note in life.notes()]
    return [path for process, event, path in notes if event == "open" and process in who]


def masks(data, ids) -> set[str]:
    return {str(mask_path(data, picture)) for picture in ids}


# --- every file that is opened --------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["unseen", "all"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_mask_of_a_target_only_picture_is_opened(data, stage1, tmp_path, stage, images, num_workers):
    classes_shown(data)  # the index is there
    life = start(stage, data, tmp_path, stage1, target_images=images, num_workers=num_workers)
    paths, shown = set(opened(life)), classes_shown(data)
    assert not paths & masks(data, target_only(data, SPLIT))
    # The control: masks of source and evaluation pictures, and all pictures, were opened, by whom they ought.
    source = [picture for picture, values in shown.items() if values & SPLIT.seen_values]
    reader = set(opened(life, ("worker",) if num_workers else ("main",)))
    assert masks(data, source) | masks(data, classes_shown(data, "val")) <= reader
    assert {str(data / "JPEGImages" / f"{picture}.jpg") for picture in target_only(data, SPLIT)} <= reader
    within = {path for path in paths if path.startswith(str(data / "SegmentationClassAug"))}
    assert within == masks(data, source) | masks(data, classes_shown(data, "val"))


def test_the_hook_sees_a_leak(data, tmp_path):
    """The oracle opens every one of those masks, in its workers."""
    life = start(1, data, tmp_path, target_pixels="oracle", num_workers=2)
    assert masks(data, target_only(data, SPLIT)) <= set(opened(life, ("worker",)))


def test_a_new_data_set_is_indexed_before_training_and_said_so(own_data, tmp_path):
    """Without an index each mask is opened once, by the main process, before the index is kept; never afterwards."""
    (own_data / INDEX).unlink(missing_ok=True)
    life = start(1, own_data, tmp_path, num_workers=2)
    shut, notes = masks(own_data, target_only(own_data, SPLIT)), life.notes()
    kept = notes.index(f"main os.rename {own_data / INDEX}")
    before = [note.split(" ", 2) for note in notes[:kept]]
    after = {note.split(" ", 2)[2] for note in notes[kept:]}
    assert sorted(path for who, event, path in before if path in shut) == sorted(shut)
    assert {who for who, _, _ in before} == {"main"} and not after & shut
    assert f"{len(classes_shown(own_data))} masks were opened once" in life.output()
    assert "masks were opened" not in start(1, own_data, tmp_path / "again").output()


# --- what masks say of unseen classes -------------------------------------------------------------------


def scramble(data, ids, split, seed=0):
    """Puts random unseen classes at every unseen pixel, and the index in order."""
    draw = np.random.default_rng(seed)
    for picture in ids:
        path = mask_path(data, picture)
        mask = read_values(path)
        unseen = np.isin(mask, list(split.unseen_values))
        mask[unseen] = draw.choice(list(split.unseen_values), unseen.sum())
        write_values(path, mask)
    classes_shown(data)


@pytest.mark.parametrize("images", ["unseen", "all"])
@pytest.mark.parametrize("stage", [1, 2])
def test_random_unseen_labels_in_source_masks_change_no_bit(data, stage1, tmp_path, stage, images):
    changed = copy_of(data, tmp_path / "data")
    scramble(changed, source_and_target(changed, SPLIT), SPLIT)
    before, after = (
        load(start(stage, place, tmp_path / name, stage1, target_images=images).folder / "latest.pth")
        for name, place in (("before", data), ("after", changed))
    )
    assert all(same(before[part], after[part]) for part in ("model", "optimizer", "scheduler"))


@pytest.mark.parametrize("background", ["ignore", "score", "auxiliary"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_source_label_knows_no_unseen_class_whatever_the_mask(own_data, number, background):
    """Pixel by pixel: any unseen class gives the label that void gives."""
    split, folder = Split.voc(number, background), VOCFolder.open(own_data)
    draw = np.random.default_rng(number)
    values = np.array([*split.known_values, VOID])
    picture = next(iter(classes_shown(own_data)))
    mask = draw.choice(values, read_values(folder.mask_path(picture)).shape)
    unseen = np.isin(mask, list(split.unseen_values))
    labels = []
    for filling in (VOID, *split.unseen_values):
        write_values(folder.mask_path(picture), np.where(unseen, filling, mask))
        labels.append(SourceDataset(folder, [picture], split, lambda image, label: (image, label))[0, 0][1])
    assert unseen.any() and all(torch.equal(label, labels[0]) for label in labels)
    assert set(labels[0].unique().tolist()) <= {*range(split.num_trained_seen), VOID}


# --- choices of checkpoints -----------------------------------------------------------------------------


def test_evaluation_masks_decide_nothing_but_the_best_checkpoint_which_says_so(data, tmp_path):
    """`latest.pth` is the checkpoint to report, and where stage 2 starts; `best.pth` names what chose it."""
    changed = copy_of(data, tmp_path / "data")
    scramble(changed, classes_shown(changed, "val"), SPLIT, seed=1)
    folders = [start(1, place, tmp_path / name).folder for name, place in (("before", data), ("after", changed))]
    latest = [load(folder / "latest.pth") for folder in folders]
    assert all(same(latest[0][part], latest[1][part]) for part in ("model", "optimizer", "scheduler", "selection"))
    assert latest[0]["selection"] == "last"
    assert read_log(folders[0]) != read_log(folders[1])  # the control: the masks were looked at
    assert "miou_unseen on the evaluation pictures" in load(folders[0] / "best.pth")["selection"]
    continued = run(tmp_path / "before", 2, data, prepare=warm.note_opened, **EVERY, restore_from_where="saved")
    assert str(folders[0] / "latest.pth") in opened(continued) and str(folders[0] / "best.pth") not in opened(continued)


@pytest.mark.parametrize("pixels, words", [("all", "no target mask opened"), ("oracle", "ORACLE")])
def test_eval_prints_the_protocol_of_training(data, tmp_path, capsys, monkeypatch, pixels, words):
    monkeypatch.setitem(warm.backbone.ARCHITECTURES, "small", warm.backbone.Architecture(warm.tiny))
    life = start(1, data, tmp_path, target_pixels=pixels, target_images="all")
    evaluate(life.folder / "latest.pth", data)
    line = capsys.readouterr().out
    assert words in line and f"target pixels {pixels}" in line and "target images all" in line and "split 1" in line
    assert weights(life.folder)["projection.class_embeddings"].shape == (20, 100)

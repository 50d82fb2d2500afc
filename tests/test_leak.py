"""No label of an unseen class is read in training: which masks are opened, and that their unseen pixels change no bit.

The one use of target masks is the class index: made once for a data set, it says which classes an image shows, which
is what `--target-images unseen` and the choice of source images mean. It says nothing about pixels, and only its making
opens masks of images that are target only.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.splits import VOID, Split
from dataset.voc import SourceDataset, VOCFolder
from helpers import evaluate, load, read_log, same
from masks import classes_shown, mask_path, read_values, source_and_target, target_only, write_values
from processes import record_opened, run_script

SPLIT = Split.named(1)
EVERY = {"max_steps": 4, "batch_size": 12, "target_batch_size": 10, "evaluate_every": 2, "save_every": 2}
"""Four steps that take every source and target image."""
INDEX = "class_index_SegmentationClassAug.json"
TRAINED = ("model", "optimizer", "scheduler", "pseudo_labeler")


def start(stage, data, folder, stage1=None, **changes):
    """A run of either stage that records what it opens; stage 2 with episodes, from a checkpoint."""
    if stage == 2:
        changes |= {"restore_from_where": "saved", "stage1_checkpoint": stage1}
        if changes.get("target_images") != "all":  # episodes need images without an unseen class
            changes["pseudo_labels"] = "episodes"
    return run_script(folder, stage, data, prepare=record_opened, **EVERY | changes)


@pytest.fixture(scope="module")
def stage1(data, tmp_path_factory):
    """A checkpoint of stage 1."""
    classes_shown(data)  # the index is there
    return start(1, data, tmp_path_factory.mktemp("stage1")).folder / "latest.pth"


def opened(process, who=("main", "worker")) -> list[str]:
    """The paths of the files that were opened, in order."""
    records = [record.split(" ", 2) for record in process.records()]
    return [path for reader, event, path in records if event == "open" and reader in who]


def masks(data, ids) -> set[str]:
    return {str(mask_path(data, image)) for image in ids}


def scramble(data, ids, seed=0):
    """Puts random unseen classes at every unseen pixel, and the index in order."""
    draw = np.random.default_rng(seed)
    for image in ids:
        path = mask_path(data, image)
        mask = read_values(path)
        unseen = np.isin(mask, list(SPLIT.unseen_values))
        mask[unseen] = draw.choice(list(SPLIT.unseen_values), unseen.sum())
        write_values(path, mask)
    classes_shown(data)


@pytest.mark.parametrize(
    "stage, images, num_workers", [(1, "all", 0), (1, "unseen", 2), (2, "unseen", 0), (2, "all", 2)]
)
def test_no_target_mask_is_opened_and_without_them_the_bits_are_the_same(
    data, own_data, stage1, tmp_path, stage, images, num_workers
):
    """The same with the target masks deleted, and with other unseen labels in the source masks."""
    process = start(stage, data, tmp_path / "own", stage1, target_images=images, num_workers=num_workers)
    paths, shown, targets = set(opened(process)), classes_shown(data), target_only(data, SPLIT)
    assert len(targets) >= 3 and not paths & masks(data, targets)
    # The control: masks of source and evaluation images, and all images, were opened, by the process that reads.
    source = [image for image, values in shown.items() if values & SPLIT.seen_values]
    allowed = masks(data, source) | masks(data, classes_shown(data, "val"))
    reader = set(opened(process, ("worker",) if num_workers else ("main",)))
    assert allowed | {str(data / "JPEGImages" / f"{image}.jpg") for image in targets} <= reader
    assert {path for path in paths if path.startswith(str(data / "SegmentationClassAug"))} == allowed

    scramble(own_data, source_and_target(own_data, SPLIT))
    for path in masks(own_data, targets):
        Path(path).unlink()
    again = start(stage, own_data, tmp_path / "changed", stage1, target_images=images)
    before, after = (load(run.folder / "latest.pth") for run in (process, again))
    assert all(same(before[part], after[part]) for part in TRAINED)


def test_the_oracle_opens_target_masks_and_seen_pixels_change_bits(data, own_data, stage1, tmp_path):
    """The controls: the hook sees a leak, and the runs do look at source masks."""
    process = start(1, data, tmp_path / "oracle", target_pixels="oracle", num_workers=2)
    assert masks(data, target_only(data, SPLIT)) <= set(opened(process, ("worker",)))
    for image in source_and_target(own_data, SPLIT):
        mask = read_values(mask_path(own_data, image))
        write_values(mask_path(own_data, image), np.where(np.isin(mask, list(SPLIT.seen_values)), VOID, mask))
    other = start(1, own_data, tmp_path / "other")
    assert not same(load(other.folder / "latest.pth")["model"], load(stage1)["model"])


def test_lambda_0_opens_no_target_image(data, stage1, tmp_path):
    images = {str(data / "JPEGImages" / f"{image}.jpg") for image in target_only(data, SPLIT)}
    assert not images & set(opened(start(1, data, tmp_path, lambda_=0)))


def test_a_new_data_set_is_indexed_before_training_with_a_message(own_data, tmp_path):
    """Without an index the masks are opened by the main process, before the index is kept; never afterwards."""
    (own_data / INDEX).unlink(missing_ok=True)
    process = start(1, own_data, tmp_path, num_workers=2)
    targets, records = masks(own_data, target_only(own_data, SPLIT)), process.records()
    kept = records.index(f"main os.rename {own_data / INDEX}")
    before = [record.split(" ", 2) for record in records[:kept]]
    after = {record.split(" ", 2)[2] for record in records[kept:]}
    assert {path for _, _, path in before if path in targets} == targets
    assert {who for who, _, _ in before} == {"main"} and not after & targets
    assert f"{len(classes_shown(own_data))} masks were opened once" in process.output()
    assert "masks were opened" not in start(1, own_data, tmp_path / "again").output()


@pytest.mark.parametrize("background", ["ignore", "score", "auxiliary"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_source_label_holds_no_unseen_class_whatever_the_mask(own_data, number, background):
    """Pixel by pixel: any unseen class gives the label that void gives."""
    split, folder = Split.named(number, background), VOCFolder.open(own_data)
    draw = np.random.default_rng(number)
    values = np.array([*split.known_values, VOID])
    image = next(iter(classes_shown(own_data)))
    mask = draw.choice(values, read_values(folder.mask_path(image)).shape)
    unseen = np.isin(mask, list(split.unseen_values))
    labels = []
    for filling in (VOID, *split.unseen_values):
        write_values(folder.mask_path(image), np.where(unseen, filling, mask))
        labels.append(SourceDataset(folder, [image], split, lambda image, label: (image, label))[0, 0][1])
    assert unseen.any() and all(torch.equal(label, labels[0]) for label in labels)
    assert set(labels[0].unique().tolist()) <= {*range(split.trained.num_seen), VOID}


def test_evaluation_masks_choose_the_best_checkpoint_alone_which_says_so(data, own_data, stage1, tmp_path):
    """`latest.pth` is the checkpoint to report, and where stage 2 starts; `best.pth` names what chose it."""
    scramble(own_data, classes_shown(own_data, "val"), seed=1)
    folders = [stage1.parent, start(1, own_data, tmp_path / "after").folder]
    latest = [load(folder / "latest.pth") for folder in folders]
    assert all(same(latest[0][part], latest[1][part]) for part in (*TRAINED, "selection"))
    assert latest[0]["selection"] == "last"
    assert read_log(folders[0]) != read_log(folders[1])  # the control: the masks were looked at
    assert "miou_unseen on the evaluation images" in load(folders[0] / "best.pth")["selection"]
    second = run_script(tmp_path / "after", 2, data, prepare=record_opened, **EVERY, restore_from_where="saved")
    assert str(folders[1] / "latest.pth") in opened(second) and str(folders[1] / "best.pth") not in opened(second)


@pytest.mark.parametrize("pixels, words", [("all", "no target mask opened"), ("oracle", "ORACLE")])
def test_log_checkpoint_and_eval_have_the_protocol_of_training(data, tmp_path, tiny, capsys, pixels, words):
    folder = start(1, data, tmp_path, target_pixels=pixels, target_images="all").folder
    evaluate(folder / "latest.pth", data)
    line = capsys.readouterr().out
    assert words in line and f"target pixels {pixels}" in line and "target images all" in line and "split 1" in line
    metadata, entry = load(folder / "latest.pth")["metadata"], read_log(folder)[-1]
    assert all(about["target_pixels"] == pixels and about["target_images"] == "all" for about in (metadata, entry))

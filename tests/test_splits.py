"""Splits: which classes are unseen, in what order they are scored, and relabelling there and back."""

import json

import numpy as np
import pytest

from dataset.splits import BACKGROUND, NAMED_SPLITS, NAMES, SPLITS, VOC_CLASSES, VOID, Split, read_classes
from utils.errors import UserError

UNSEEN = {
    1: ("aeroplane", "bicycle", "bird", "boat", "bottle"),
    2: ("bus", "car", "cat", "chair", "cow"),
    3: ("diningtable", "dog", "horse", "motorbike", "person"),
    4: ("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
}


@pytest.mark.parametrize("number", UNSEEN)
@pytest.mark.parametrize("background", ["ignore", "score", "auxiliary"])
def test_labels_are_those_of_the_protocol_and_map_back(number, background):
    split, mask = Split.named(number, background), np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert split.unseen == UNSEEN[number] and split.num_seen == len(split.seen) == 15 + (background == "score")
    assert set(split.names) == set(VOC_CLASSES) | ({BACKGROUND} if background == "score" else set())
    labels, seen, unseen = (split.to_labels(mask, side) for side in ("all", "seen", "unseen"))
    assert labels.dtype == seen.dtype == unseen.dtype == np.uint8
    assert set(seen.flat) - {VOID} == set(range(split.num_seen))
    assert set(unseen.flat) - {VOID} == set(range(split.num_seen, len(split.names)))
    np.testing.assert_array_equal(np.minimum(seen, unseen), labels)
    known = np.isin(mask, split.mask_values)
    np.testing.assert_array_equal(split.to_mask(labels), np.where(known, mask, VOID))


@pytest.mark.parametrize("number", range(1, 5))
def test_an_auxiliary_background_is_trained_on_before_the_scored_classes(number):
    split, scored = Split.named(number, "auxiliary"), Split.named(number)
    assert (split.names, split.num_seen, split.mask_values) == (scored.names, scored.num_seen, scored.mask_values)
    assert (split.num_auxiliary, split.trained.num_seen, split.background) == (1, 16, "auxiliary")
    assert split.trained == Split.named(number, "score") and scored.trained == scored
    mask = np.arange(21, dtype=np.uint8)
    np.testing.assert_array_equal(split.to_labels(mask), scored.to_labels(mask))  # evaluation ignores it
    labels = split.trained.to_labels(mask)
    assert labels[0] == 0 and (labels[1:] == scored.to_labels(mask)[1:] + 1).all()
    np.testing.assert_array_equal(split.trained.to_mask(labels), mask)
    assert Split.named("zs3-2", "auxiliary").background == "score"


# Seen classes, the background among them where it counts: SPNet's splits.ipynb ("12+3", "155+12" of which 11 have no
# mask), CaGNet's README.md ("29 seen / 4 unseen"), ZS3Net's *_unseen_classes.txt (n of 21 and of 60 are unseen)
NUM_SEEN = {"spnet": 15, "spnet-val": 12, "coco-stuff": 156, "coco-stuff-val": 144, "context-33": 29}
NUM_SEEN |= {f"zs3-{n}": 21 - n for n in (2, 4, 6, 8, 10)} | {f"context-zs3-{n}": 60 - n for n in (2, 4, 6, 8, 10)}


def facts_of(name) -> dict:
    return json.loads((NAMED_SPLITS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", SPLITS)
def test_named_splits_are_of_their_data_set(name):
    """Which classes are unseen stands in tests/golden.json too."""
    facts, split = facts_of(name), Split.named(name)
    classes = read_classes(NAMES / f"{facts['dataset']}.txt")
    assert set(split.unseen) == set(facts["unseen"]) and split.num_seen == NUM_SEEN.get(str(name), split.num_seen)
    assert (BACKGROUND in split.seen) is ("zs3" in str(name))
    assert all(classes[class_name] == value for class_name, value in zip(split.names, split.mask_values))
    assert set(split.known_values) == set(classes.values())  # a mask may show what the split leaves out


def test_the_folds_of_split_4_hold_out_its_seen_classes_once():
    held_out = [name for fold in ("4-val", "4-val-b", "4-val-c", "4-val-d") for name in Split.named(fold).unseen]
    assert len(held_out) == len(set(held_out)) == 12 and set(held_out) <= set(Split.named(4).seen)
    for fold in "bcd":
        assert set(facts_of(f"4-val-{fold}")["left_out"]) == set(Split.named(4).unseen)


@pytest.mark.parametrize("number", range(1, 5))
def test_validation_classes_are_seen_ones_and_the_unseen_are_void(number):
    """So that settings can be chosen without a look at an unseen class."""
    real, held_out = Split.named(number), Split.named(f"{number}-val")
    assert held_out.unseen == real.seen[-3:] and held_out.seen == real.seen[:-3]
    assert (held_out.to_labels(np.array(sorted(real.unseen_values), np.uint8)) == VOID).all()


def test_the_classes_of_the_data_sets_are_the_published_ones():
    voc, context, coco = (read_classes(NAMES / f"{name}.txt") for name in ("voc", "pascal_context", "coco_stuff"))
    assert list(voc) == [BACKGROUND, *VOC_CLASSES] and list(voc.values()) == list(range(21))
    assert list(context.values()) == list(range(60)) and context[BACKGROUND] == 0
    assert [*context][1:21] == [name.replace("diningtable", "table") for name in VOC_CLASSES]
    # COCO-Stuff, README.md: 91 things and 91 stuff classes, of which 11 things have no masks; a value is an id less 1.
    gaps = set(range(182)) - set(coco.values())
    assert len(coco) == 171 and BACKGROUND not in coco and max(coco.values()) == 181
    assert gaps == {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
    assert (coco["person"], coco["toothbrush"], coco["banner"], coco["wood"]) == (0, 89, 91, 181)


def test_background_counts_where_there_is_one():
    assert Split.named("context-33", background="score").seen[0] == BACKGROUND
    with pytest.raises(UserError, match="no class 'background'"):
        Split.named("coco-stuff", background="score")


@pytest.mark.parametrize(
    "text, classes",
    [
        ("\ufeff7: a b\n\n3: c:d\n", {"a b": 7, "c:d": 3}),
        ("background\ntraffic light\n", {"background": 0, "traffic light": 1}),
        ("_background_\ncat\n", {"background": 0, "cat": 1}),
        (" Background\r\nCat\r\n", {"background": 0, "Cat": 1}),
        ("cat\n5: BG\n", {"cat": 0, "background": 5}),
        ("0, background\n1,cat\n", {"background": 0, "cat": 1}),
        ("__ignore__\n_background_\ncat\n", {"background": 0, "cat": 1}),
    ],
)
def test_class_files_as_tools_and_people_write_them(tmp_path, text, classes):
    path = tmp_path / "classes.txt"
    path.write_bytes(text.encode())
    assert read_classes(path) == classes


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "empty"), ("a\na\n", "'a'"), ("traffic light\nTraffic_Light\n", "Traffic_Light"), ("2:\n", "'2:'"),
        ("255: a\n", "'255: a'"), ("1: a\n1: b\n", "'1: b'"), ("cat\n__ignore__\n", "__ignore__"),
        ("0: Unlabeled\ncat\n", "leave the line out"), ("background\nvoid\ncat\n", "'void'"),
        ("none\ncat\n", "'none'"),
    ],
)  # fmt: skip
def test_class_files_that_make_no_sense_are_refused(tmp_path, text, words):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=r"classes\.txt") as caught:
        read_classes(path)
    assert words in str(caught.value)
    with pytest.raises(UserError, match="can't be read"):
        read_classes(tmp_path / "none.txt")


def test_unseen_classes_are_found_however_they_are_spelt():
    classes = {"background": 0, "Traffic light": 1, "cat": 2, "sofa": 3}
    split = Split.of(classes, ["traffic_light", "Sofa"], "auxiliary")
    assert split.unseen == ("Traffic light", "sofa") and split.seen == ("cat",) and split.num_auxiliary == 1
    assert Split.of({"TV_Monitor": 1, "ox": 2}, ["tvmonitor"]).unseen == ("TV_Monitor",)
    with pytest.raises(UserError, match="no class 'dog' among background, Traffic light"):
        Split.of(classes, ["dog"])

"""Splits: which classes are unseen, in what order they are scored, and relabelling there and back."""

import numpy as np
import pytest

from dataset.splits import BACKGROUND, VOC_CLASSES, VOC_SPLITS, VOID, Split

UNSEEN = {
    1: ("aeroplane", "bicycle", "bird", "boat", "bottle"),
    2: ("bus", "car", "cat", "chair", "cow"),
    3: ("diningtable", "dog", "horse", "motorbike", "person"),
    4: ("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
}


def each_split(test):
    test = pytest.mark.parametrize("number", [1, 2, 3, 4])(test)
    return pytest.mark.parametrize("background", [False, True])(test)


@each_split
def test_unseen_classes_are_those_of_the_protocol(number, background):
    split = Split.voc(number, background)
    assert split.unseen == UNSEEN[number]
    assert len(split.seen) == 15 + background and not set(split.seen) & set(split.unseen)
    assert set(split.names) == set(VOC_CLASSES) | ({BACKGROUND} if background else set())
    assert split.num_seen == len(split.seen)


def test_every_class_is_unseen_once():
    assert sorted(name for k in VOC_SPLITS for name in Split.voc(k).unseen) == sorted(VOC_CLASSES)


def test_class_order_is_seen_then_unseen_by_mask_value():
    split = Split.voc(2)
    assert split.names == split.seen + split.unseen
    assert split.mask_values == (1, 2, 3, 4, 5, *range(11, 21), 6, 7, 8, 9, 10)
    assert Split.voc(2, background=True).mask_values[:2] == (0, 1)


@each_split
def test_relabelling_there_and_back(number, background):
    split = Split.voc(number, background)
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    labels = split.to_labels(mask)
    known = np.isin(mask, split.mask_values)
    assert labels.dtype == np.uint8 and labels.shape == mask.shape
    assert set(labels[known].tolist()) == set(range(len(split.names)))
    np.testing.assert_array_equal(split.to_mask(labels), np.where(known, mask, VOID))


@each_split
def test_labels_name_the_class_of_the_mask(number, background):
    """Written from the names alone: a mask value's label is the place of its class in `names`."""
    split = Split.voc(number, background)
    for value, name in enumerate((BACKGROUND, *VOC_CLASSES)):
        label = int(split.to_labels(np.array([value], np.uint8))[0])
        assert label == (split.names.index(name) if name in split.names else VOID)


def test_void_stays_void():
    split = Split.voc(1, background=True)
    void = np.full((2, 2), VOID, np.uint8)
    for change in (split.to_labels, split.to_seen_labels, split.to_unseen_labels, split.to_mask):
        assert (change(void) == VOID).all()


@each_split
def test_seen_and_unseen_labels_divide_the_labels(number, background):
    split = Split.voc(number, background)
    mask = np.arange(21, dtype=np.uint8)
    labels, seen, unseen = split.to_labels(mask), split.to_seen_labels(mask), split.to_unseen_labels(mask)
    assert set(seen.tolist()) - {VOID} == set(range(split.num_seen))
    assert set(unseen.tolist()) - {VOID} == set(range(split.num_seen, len(split.names)))
    np.testing.assert_array_equal(np.minimum(seen, unseen), labels)
    assert seen.dtype == unseen.dtype == np.uint8


def test_background_is_no_thing_that_a_picture_shows():
    """Else every picture would be a source picture."""
    assert 0 not in Split.voc(1, background=True).seen_values
    assert Split.voc(1, background=True).seen_values == Split.voc(1).seen_values == frozenset(range(6, 21))
    assert Split.voc(1).unseen_values == frozenset(range(1, 6))


def test_without_background_it_is_void():
    assert Split.voc(3).to_labels(np.zeros(1, np.uint8))[0] == VOID
    assert Split.voc(3, background=True).to_labels(np.zeros(1, np.uint8))[0] == 0


@each_split
def test_plain_types_there_and_back(number, background):
    split = Split.voc(number, background)
    plain = split.as_dict()
    assert all(type(value) is list for value in plain.values())
    assert Split.from_dict(plain | {"backbone": "small"}) == split


@pytest.mark.parametrize("number", [0, 5, -1])
def test_there_are_four_splits(number):
    with pytest.raises(ValueError, match="1, 2, 3, 4"):
        Split.voc(number)


@pytest.mark.parametrize(
    "seen, unseen, values",
    [
        ((), ("a",), (1,)),
        (("a",), (), (1,)),
        (("a",), ("a",), (1, 2)),
        (("a",), ("b",), (1, 1)),
        (("a",), ("b",), (1,)),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(seen, unseen, values):
    with pytest.raises(ValueError, match="split"):
        Split(seen, unseen, values, (0, 1, 2))


def test_any_classes_make_a_split():
    """Nothing counts on VOC's numbers."""
    split = Split(("x", "y"), ("z",), (7, 3, 9), (0, 3, 7, 9))
    np.testing.assert_array_equal(split.to_labels(np.array([3, 7, 9, 0], np.uint8)), [1, 0, 2, VOID])
    np.testing.assert_array_equal(split.to_mask(np.array([0, 1, 2, VOID])), [7, 3, 9, VOID])

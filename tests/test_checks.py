"""The class index, and what is known of images and masks before the first step."""

import json
import os
import time
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest

from dataset import checks
from dataset.checks import ClassIndex, describe_lists, overlap
from dataset.voc import VOCFolder
from masks import read_values, write_values
from utils.errors import UserError

IDS = ["seen", "unseen", "both"]
INDEX = "class_index_SegmentationClass.json"


@pytest.fixture
def opened(monkeypatch):
    """The images and masks that were read, by name."""
    names = []

    def recording(read, path, *options):
        names.append(path.name)
        return read(path, *options)

    for name in ("read_mask", "read_image"):
        monkeypatch.setattr(checks, name, partial(recording, getattr(checks, name)))
    return names


def classes(folder, ids=IDS):
    return ClassIndex(VOCFolder.open(folder.root)).classes(ids)


def test_a_mask_is_opened_again_only_when_it_changes(folder, opened, capsys):
    first = classes(folder)
    assert sorted(opened) == ["both.png", "seen.png", "unseen.png"] and (folder.root / INDEX).is_file()
    assert "3 masks were opened once" in capsys.readouterr().out
    opened.clear()
    assert classes(folder) == first and opened == []
    path = folder.mask_path("seen")
    mask, before = read_values(path), path.stat()
    mask[5] = 3
    write_values(path, mask)
    os.utime(path, ns=(time.time_ns(), before.st_mtime_ns + 1_000_000_000))
    assert classes(folder)["seen"] == {0, 3, 7} and opened == ["seen.png"]


def test_an_image_is_read_again_only_when_it_or_its_mask_changes(folder, opened):
    assert ClassIndex(folder).check(IDS, IDS) == [] and len(opened) == 6
    opened.clear()
    assert ClassIndex(folder).check(IDS, ["seen"]) == [] and opened == []
    write_values(folder.mask_path("seen"), np.zeros((9, 12)))
    (problem,) = ClassIndex(folder).check(IDS, IDS)
    assert "seen.jpg has the size (12, 8) but its mask (12, 9)" in problem and opened == ["seen.png", "seen.jpg"]
    folder.image_path("both").write_bytes(b"x")
    assert "both.jpg can't be read as an image" in ClassIndex(folder).check(["both"], [])[0]


def test_an_image_whose_mask_is_gone_keeps_its_entry(folder, opened):
    classes(folder, ["seen", "unseen"])
    for image in ("unseen", "both"):
        folder.mask_path(image).unlink()
    opened.clear()
    shown = classes(folder)
    assert shown["unseen"] == {0, 2} and shown["both"] is None and opened == []
    assert "unseen" in json.loads((folder.root / INDEX).read_text())


@pytest.mark.parametrize("content", ["", "{", "\x00"])
def test_a_broken_index_is_only_a_slower_start(folder, content):
    expected = classes(folder)
    (folder.root / INDEX).write_text(content)
    assert classes(folder) == expected
    assert set(json.loads((folder.root / INDEX).read_text())) == set(IDS)


def test_a_folder_that_can_not_be_written_is_no_error(folder, monkeypatch, capsys):
    """The folder of a shared data set is often read only."""
    monkeypatch.setattr(os, "replace", Mock(side_effect=PermissionError(13, "Permission denied")))
    assert classes(folder)["seen"] == {0, 7}
    assert "index can't be kept" in capsys.readouterr().err
    assert {path.name for path in folder.root.iterdir() if path.is_file()} == set()  # and nothing is left behind


def test_all_bad_masks_are_counted_and_the_others_are_kept(folder):
    ids = [f"{number:03}" for number in range(100)]
    for number, image in enumerate(ids):
        write_values(folder.masks / f"{image}.png", np.full((2, 2), 99 if 50 <= number < 55 else number % 21))
    with pytest.raises(UserError, match=r"050\.png holds the value 99.*and 4 more problems"):
        classes(folder, ids)
    kept = json.loads((folder.root / INDEX).read_text())
    assert {image for image in kept if kept[image]} == {*ids[:50], *ids[55:]}


def test_odd_lists_are_described(folder):
    index = ClassIndex(folder)
    index.check(IDS, IDS)
    assert [*overlap("ab", "c")] == [] and "overlap: 2 evaluation images" in next(overlap("ab", "ba"))
    assert [*describe_lists(index, ["both", "seen"], ["unseen"])] == []
    (note,) = describe_lists(index, ["seen"], ["both"])
    assert "no training image shows bicycle, tvmonitor" in note
    (note,) = describe_lists(index, ["seen", "new"], ["both"])
    assert "1 of 2 training images have no mask, new first" in note

"""The class index, and what is known of images and masks before the first step."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.checks import CHUNK, ClassIndex, describe_lists, overlap
from dataset.voc import VOCFolder
from helpers import read_values, write_values
from utils.errors import UserError

IDS = ["seen", "unseen", "both"]
INDEX = "class_index_SegmentationClass.json"


@pytest.fixture
def opened(monkeypatch):
    """The masks that were read, by name."""
    names, read = [], __import__("dataset.images", fromlist=["read_mask"]).read_mask

    def noting(path, colours):
        names.append(path.stem)
        return read(path, colours)

    monkeypatch.setattr("dataset.checks.read_mask", noting)
    return names


def classes(folder, ids=IDS):
    return ClassIndex(VOCFolder.open(folder.root)).classes(ids)


def rewrite(path: Path, change, keep_time=False) -> None:
    """Changes a mask in place, with a time of change that differs, or with that of before."""
    before, mask = path.stat(), read_values(path)
    change(mask)
    write_values(path, mask)
    os.utime(path, ns=(time.time_ns(), before.st_mtime_ns + (0 if keep_time else 1_000_000_000)))


def test_a_mask_is_opened_again_only_when_it_changes(folder, opened, capsys):
    first = classes(folder)
    assert opened == IDS and (folder.root / INDEX).is_file() and "3 masks were opened once" in capsys.readouterr().out
    assert classes(folder) == first and opened == IDS
    rewrite(folder.mask_path("seen"), lambda mask: mask.__setitem__(5, 3))
    assert classes(folder)["seen"] == {0, 3, 7} and opened == [*IDS, "seen"]
    assert classes(folder, ["both"])["both"] == {0, 2, 7, 20} and opened == [*IDS, "seen"]


def test_a_replaced_mask_of_the_same_size_and_time_is_noticed_where_masks_are_opened(folder):
    classes(folder)
    path = folder.mask_path("seen")
    size, before = path.stat().st_size, read_values(path)
    for value in range(3, 21):  # until one has the same length in bytes
        rewrite(path, lambda mask: mask.__setitem__(before == 7, value), keep_time=True)  # noqa: B023
        if value != 7 and path.stat().st_size == size:
            break
    assert path.stat().st_size == size and classes(folder)["seen"] == {0, 7}
    index = ClassIndex(folder)
    assert index.check([], ["unseen"]) == [] and index.classes(IDS)["seen"] == {0, 7}
    assert index.check([], ["seen"]) == [] and index.classes(IDS)["seen"] == {0, value}


def test_an_image_whose_mask_is_gone_keeps_its_entry(folder, opened):
    classes(folder, ["seen", "unseen"])
    for image in ("unseen", "both"):
        folder.mask_path(image).unlink()
    opened.clear()
    shown = classes(folder)
    assert shown["unseen"] == {0, 2} and shown["both"] is None and opened == []
    assert "unseen" in json.loads((folder.root / INDEX).read_text())


BROKEN = ["", "{", "[]", "null", '{"seen": 3}', '{"seen": {"more": 1}}', '{"seen": {"values": [[1], {}]}}', "\x00"]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_index_is_only_a_slower_start(folder, content):
    expected = classes(folder)
    (folder.root / INDEX).write_text(content)
    assert classes(folder) == expected
    assert set(json.loads((folder.root / INDEX).read_text())) == set(IDS)


def test_a_folder_that_can_not_be_written_is_no_error(folder, monkeypatch, capsys):
    """The folder of a shared data set is often read only."""

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert classes(folder)["seen"] == {0, 7}
    assert "index can't be kept" in capsys.readouterr().err
    assert {path.name for path in folder.root.iterdir() if path.is_file()} == set()  # and nothing is left behind


@pytest.fixture
def many(folder) -> list[str]:
    """Enough masks that several processes share them, each with values of its own."""
    ids = [f"{number:04}" for number in range(3 * CHUNK)]
    for number, image in enumerate(ids):
        write_values(folder.masks / f"{image}.png", np.full((2, 2), number % 21))
    return ids


def test_all_bad_masks_are_counted_and_the_others_are_kept(folder, many):
    for image in many[CHUNK : CHUNK + 5]:
        write_values(folder.masks / f"{image}.png", np.full((2, 2), 99))
    with pytest.raises(UserError, match=rf"{many[CHUNK]}\.png holds the value 99.*4 more files are like it"):
        classes(folder, many)
    kept = json.loads((folder.root / INDEX).read_text())
    assert {image for image in kept if kept[image]} == {*many[:CHUNK], *many[CHUNK + 5 :]}


def test_an_image_broken_in_the_middle_is_found(folder):
    """Its header and its end are whole."""
    path = folder.images / "middle.png"
    Image.open(folder.images / "seen.jpg").save(path)
    content = bytearray(path.read_bytes())
    content[-30] ^= 255
    path.write_bytes(content)
    index = ClassIndex(VOCFolder.open(folder.root))
    (problem,) = index.check(["middle", "seen"], ["seen"])
    assert "middle.png can't be read as an image" in problem
    assert index.check(IDS, IDS) == index.check(IDS, IDS, decode=True) == []


def test_an_image_once_checked_is_remembered(folder, monkeypatch):
    assert ClassIndex(folder).check(IDS, IDS) == []
    monkeypatch.setattr("dataset.checks.opened", None)
    monkeypatch.setattr("dataset.checks.read_mask", None)
    assert ClassIndex(folder).check(IDS, IDS) == []
    (folder.images / "seen.jpg").write_bytes(b"x")
    with pytest.raises(TypeError):  # it is looked at again
        ClassIndex(folder).check(IDS, IDS)


def test_odd_lists_are_described(folder):
    index = ClassIndex(folder)
    index.check(IDS, IDS)
    voc = folder.classes
    assert overlap(["a", "b"], ["c"]) is None and "overlap: 2 evaluation images" in overlap(["a", "b"], ["b", "a"])
    assert describe_lists(index, voc, IDS, ["both"]) == []
    (note,) = describe_lists(index, voc, ["seen"], ["both"])
    assert "no training image shows bicycle, tvmonitor" in note
    (note,) = describe_lists(index, voc, ["seen", "new"], ["seen"])
    assert "1 of 2 training images have no mask, new first" in note


def test_a_turn_that_no_size_confirms_is_told(folder):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(folder.images / "both.jpg").save(folder.images / "both.jpg", exif=exif)
    index = ClassIndex(folder)
    assert index.check(IDS, IDS) == []
    (note,) = describe_lists(index, folder.classes, IDS, [])
    assert "1 images with a mask are turned" in note and "both" in note

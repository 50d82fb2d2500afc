"""VOC's folder and lists; which images are source and target; and what each dataset opens."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from dataset.splits import NAMES, VOID, Split
from dataset.transforms import training_transform
from dataset.voc import (
    MIN_SIDE,
    EvaluationDataset,
    TargetDataset,
    VOCFolder,
    evaluation_dataset,
    showing,
    training_datasets,
)
from masks import read_values, write_values
from utils.errors import UserError

SPLIT = Split.named(1)  # 1-5 are unseen, 6-20 seen
IDS = ["seen", "unseen", "both"]


def nothing(image, label):
    return image, label


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_the_layout_is_found_below_what_is_given(tmp_path, below):
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / below / name).mkdir(parents=True)
    found = VOCFolder.open(str(tmp_path))
    assert found.root == tmp_path / below and found.masks == tmp_path / below / "SegmentationClass"


def write_list(folder, content: bytes, name="train"):
    (folder.root / "ImageSets/Segmentation" / f"{name}.txt").write_bytes(content)


def test_the_first_default_list_that_exists_is_taken(folder):
    assert folder.read_list() == IDS
    write_list(folder, b"both\n", "train_aug")
    assert folder.read_list() == ["both"] and folder.read_list("train") == IDS  # a name given decides
    (folder.root / "mine.list").write_text("unseen\n")
    assert folder.read_list(str(folder.root / "mine.list")) == ["unseen"]


PUBLISHED = {
    "ids": "{0}\n{1}\n",
    "names of files": "{0}.jpg\n{1}.JPG\n",
    "DeepLab's": "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n/JPEGImages/{1}.jpg /S/{1}.png\n",
    "UniMatch's": "JPEGImages/{0}.jpg SegmentationClass/{0}.png\nJPEGImages/{1}.jpg SegmentationClass/{1}.png\n",
    "the paper's": "0 1 2 3 4\n/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n/JPEGImages/{1}.jpg /S/{1}.png\n",
    "absolute": "/home/a b/VOC2012/JPEGImages/{0}.jpg\n/home/a b/VOC2012/JPEGImages/{1}.jpg\n",
    "of Windows": "C:\\VOC\\JPEGImages\\{0}.jpg\r\nJPEGImages\\{1}.JPG\r\n",
    "quoted": '"{0}"\n"{1}.jpg"\n',
    "CSV": "images/{0}.jpg,masks/{0}_mask.png\nimages/{1}.jpg, masks/{1}_mask.png\n",
    "with blanks": "\n  {0} \n\n\t{1}\n\n",
}


@pytest.mark.parametrize("text", PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize("names, encoding", [(("seen", "both"), "utf-16"), (("a photo (1)", "b.c"), "utf-8")])
def test_lists_are_read_as_they_are_published(folder, text, names, encoding):
    for old, new in zip(("seen", "both"), names):
        folder.image_path(old).rename(folder.images / f"{new}.jpg")
    write_list(folder, text.format(*names).encode(encoding))
    assert VOCFolder.open(folder.root).read_list() == list(names)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"seen\n/etc/passwd\n", "'/etc/passwd' names no image in"), (b"seen\nboth\nseen\n", "lists seen twice"),
        (b"\xff\xfe\xff", "can't be read"), (b"\n", "is empty"),
    ],
)  # fmt: skip
def test_a_bad_list_is_named(folder, content, words):
    write_list(folder, content)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        folder.read_list()
    assert "train.txt" in str(caught.value)


@pytest.mark.parametrize("images", ["images", "Images", "JPEGImages", "img"])
def test_files_may_have_any_ending_and_masks_a_suffix(tmp_path, images):
    for name in (images, "masks"):
        (tmp_path / name).mkdir()
    for name in ("a.png", "a.jpg", "b.JPG", "c.d.jpeg", "e.WEBP", "f.jfif", "._a.jpg", ".DS_Store", "notes.txt"):
        (tmp_path / images / name).write_bytes(b"")
    for name in ("a.png", "b_mask.PNG", "e.tif"):
        (tmp_path / "masks" / name).write_bytes(b"")
    own = VOCFolder.open(tmp_path)
    names = [own.image_path(image).name for image in ("a", "b", "c.d", "none")]
    assert names == ["a.jpg", "b.JPG", "c.d.jpeg", "none.jpg"] and set(own.image_files) == {"a", "b", "c.d", "e", "f"}
    names = [own.mask_path(image).name for image in ("a", "b", "e", "none")]
    assert names == ["a.png", "b_mask.PNG", "e.tif", "none.png"]
    assert own.lists == tmp_path and own.masks == tmp_path / "masks"
    with pytest.raises(UserError, match=r"dataset\.prepare own"):
        own.read_list()


def test_the_only_folder_with_images_below_is_taken(tmp_path):
    (tmp_path / "ds0/img").mkdir(parents=True)
    with pytest.raises(UserError, match=r"needs .*one of SegmentationClassAug, .*masks.*, and it holds img"):
        VOCFolder.open(tmp_path)
    (tmp_path / "ds0/masks_machine").mkdir()
    assert VOCFolder.open(tmp_path).root == tmp_path / "ds0"
    (tmp_path / "ds1/img").mkdir(parents=True)
    with pytest.raises(UserError, match=r"one of JPEGImages, images, img.*, and it holds ds0, ds1"):
        VOCFolder.open(tmp_path)


def test_the_folder_of_masks_is_one_that_holds_images(tmp_path):
    """labelme writes arrays to SegmentationClass, and the masks beside it."""
    for name in ("JPEGImages", "SegmentationClass", "SegmentationClassPNG"):
        (tmp_path / name).mkdir()
    (tmp_path / "SegmentationClass/a.npy").write_bytes(b"")
    (tmp_path / "SegmentationClassPNG/a.png").write_bytes(b"")
    assert VOCFolder.open(tmp_path).masks.name == "SegmentationClassPNG"


def test_colours_are_voc_s_or_those_of_a_labelmap(folder):
    assert folder.colours == dict.fromkeys(range(21))
    (folder.root / "labelmap.txt").write_text("# label:color\n_background_:9,9,9::\ncat:1,2,3::\n")
    assert VOCFolder.open(folder.root).classes == {"background": 0, "cat": 1}  # it is no VOC
    shutil.copy(NAMES / "voc.txt", folder.root / "classes.txt")
    colours = VOCFolder.open(folder.root).colours
    assert (colours[0], colours[8], colours[1]) == ((9, 9, 9), (1, 2, 3), None)


SHOWN = {"s": {0, 7}, "u": {0, 2}, "su": {2, 7}, "nothing": {0}, "void": set(), "?": None}


def test_images_are_chosen_by_what_they_show():
    assert showing(SHOWN, SPLIT.seen_values, "a seen") == ["s", "su"]
    assert showing(SHOWN, SPLIT.unseen_values, "an unseen") == ["u", "su"]
    with pytest.raises(UserError, match="no training image shows an unseen class"):
        showing({"s": frozenset({7}), "?": None}, SPLIT.unseen_values, "an unseen")


def test_source_images_show_a_seen_class_and_target_images_an_unseen_one(folder):
    for background in ("ignore", "score", "auxiliary"):  # which all three show
        source, target = training_datasets(folder.root, Split.named(1, background), nothing, "unseen", "all")
        assert source.ids == ["seen", "both"] and target.ids == ["unseen", "both"]
    shutil.copy(folder.image_path("seen"), folder.images / "new.jpg")
    write_list(folder, b"seen\nunseen\nnew\n")
    assert training_datasets(folder.root, SPLIT, nothing, "all", "all")[1].ids == ["seen", "unseen", "new"]
    with pytest.raises(UserError, match=r"1 of 3 training images have no mask, new first.*another protocol"):
        training_datasets(folder.root, SPLIT, nothing, "unseen", "all")


def test_target_pixels_are_those_of_the_image_and_of_the_oracle_the_unseen_ones(folder):
    _, valid, _ = TargetDataset(folder, ["both"], SPLIT, training_transform(32, (1, 1), 0, 0), "all")[0, 3]
    assert valid.sum() == 8 * 12  # void ones too, but no padding
    _, valid, _ = TargetDataset(folder, ["both"], SPLIT, nothing, "oracle")[0, 0]
    np.testing.assert_array_equal(valid.numpy(), read_values(folder.mask_path("both")) == 2)


def test_an_image_without_source_labels_shows_no_seen_class_where_labels_are_complete(folder):
    dataset = TargetDataset(folder, ["both", "unseen"], SPLIT, nothing, "all", labelled=["both"])
    assert [bool(dataset[n, 0][2]) for n in range(2)] == [True, False]
    anything = TargetDataset(folder, ["both", "unseen"], SPLIT, nothing, "all")
    assert all(anything[n, 0][2] for n in range(2))


@pytest.mark.parametrize("width, height", [(1, 40), (12, 3), (33, 31), (32, 32), (64, 48)])
def test_narrow_evaluation_images_are_padded_and_the_padding_is_void(folder, width, height):
    Image.new("RGB", (width, height), "red").save(folder.image_path("both"))
    write_values(folder.mask_path("both"), np.full((height, width), 7))
    dataset = EvaluationDataset(folder, ["both"], SPLIT)
    image, label, _ = dataset[0]
    padded = (max(height, MIN_SIDE), max(width, MIN_SIDE))
    assert image.shape == (3, *padded) and label.shape == padded and dataset.sizes() == [padded[::-1]]
    assert (label[:height, :width] == SPLIT.names.index("car")).all() and (label != VOID).sum() == width * height


def test_files_are_checked_and_odd_lists_are_told(folder, capsys):
    training_datasets(folder.root, SPLIT, nothing, "unseen", "all")
    evaluation_dataset(folder.root, SPLIT, training=IDS)
    assert "note: the lists overlap: 1 evaluation images" in capsys.readouterr().err
    folder.mask_path("unseen").unlink()  # no mask of a target image is looked at
    folder.image_path("unseen").write_bytes(b"x")
    folder.image_path("seen").write_bytes(b"x")
    with pytest.raises(UserError, match=r"seen\.jpg can't be read as an image .*and 1 more problems"):
        training_datasets(folder.root, SPLIT, nothing, "unseen", "all")
    folder.mask_path("both").unlink()
    with pytest.raises(UserError, match=r"both\.png is missing"):
        evaluation_dataset(folder.root, SPLIT)

"""VOC's folder, lists and class index; which pictures teach what; and what each dataset opens."""

import io
import json
import os
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.parallel import CHUNK, spread
from dataset.splits import VOID, Split
from dataset.transforms import training_transform
from dataset.voc import (
    MASK_FOLDERS,
    EvaluationDataset,
    SourceDataset,
    TargetDataset,
    VOCFolder,
    choose_source,
    choose_split,
    choose_target,
    evaluation_dataset,
    index_classes,
    read_image,
    read_mask,
    read_mask_values,
    training_datasets,
)
from helpers import mask_path, read_values, source_and_target, target_only, write_values
from utils.errors import UserError

SPLIT = Split.voc(1)  # 1-5 are unseen, 6-20 seen
KNOWN = SPLIT.known_values
INDEX = "class_index_SegmentationClass.json"


@pytest.fixture
def folder(tmp_path) -> VOCFolder:
    """Three pictures of 12 x 8: a seen class, an unseen one, and both (with background and void)."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / name).mkdir(parents=True)
    shown = {"seen": [7], "unseen": [2], "both": [2, 7, 20]}
    for number, (picture, values) in enumerate(shown.items()):
        grey = np.full((8, 12, 3), 40 + 60 * number, np.uint8)
        Image.fromarray(grey).save(tmp_path / "JPEGImages" / f"{picture}.jpg")
        mask = np.zeros((8, 12), np.uint8)
        mask[0] = VOID
        for row, value in enumerate(values, start=2):
            mask[row] = value
        write_values(tmp_path / "SegmentationClass" / f"{picture}.png", mask)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("seen\nunseen\nboth\n")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("both\n")
    return VOCFolder.open(tmp_path)


IDS = ["seen", "unseen", "both"]


def rewrite(folder, picture, change):
    """Changes a mask in place, with a time of change that differs."""
    path = folder.mask_path(picture)
    mask = read_values(path)
    change(mask)
    write_values(path, mask)
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 1_000_000_000))


def nothing(image, label):
    return image, label


# --- the folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_the_layout_is_found_below_what_is_given(tmp_path, below):
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / below / name).mkdir(parents=True)
    found = VOCFolder.open(str(tmp_path))
    assert found.root == tmp_path / below and found.masks == tmp_path / below / "SegmentationClass"


def test_augmented_masks_come_first(folder):
    (folder.root / "SegmentationClassAug").mkdir()
    assert VOCFolder.open(folder.root).masks.name == "SegmentationClassAug" == MASK_FOLDERS[0]


# --- lists ----------------------------------------------------------------------------------------------


def write_list(folder, content: bytes, name="train"):
    (folder.root / "ImageSets/Segmentation" / f"{name}.txt").write_bytes(content)


@pytest.mark.parametrize(
    "content",
    [b"seen\nboth", b"seen\r\nboth\r\n", b"\xef\xbb\xbfseen\nboth\n", b"\n  seen \n\n\tboth\n\n"],
    ids=["no last newline", "CRLF", "BOM", "blanks"],
)
def test_lists_are_read_as_people_write_them(folder, content):
    write_list(folder, content)
    assert folder.read_list(None, ("train",)) == ["seen", "both"]


def test_the_first_default_list_that_exists_is_taken(folder):
    write_list(folder, b"both\n", "train_aug")
    assert folder.read_list(None, ("train_aug", "train")) == ["both"]
    assert folder.read_list(None, ("nothing", "train")) == IDS
    assert folder.read_list("train", ("train_aug",)) == IDS  # a name given decides


def test_a_list_can_be_any_text_file(folder, tmp_path):
    (tmp_path / "mine.list").write_text("unseen\n")
    assert folder.read_list(str(tmp_path / "mine.list"), ()) == ["unseen"]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"seen\nboth\nseen\n", "lists seen twice"),
        (b"../x\n", "'../x' is no picture id"),
        (b"seen\n/etc/passwd\n", "entry 2"),
        (b"..\n", "no picture id"),
        (b"seen\nother\n", "other.jpg is missing"),
        (b"\n\n", "is empty"),
        (b"\xff\xfe\xff", "can't be read"),
    ],
)
def test_a_bad_list_is_named(folder, content, words):
    write_list(folder, content)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        folder.read_list(None, ("train",))
    assert "train.txt" in str(caught.value)


# --- pictures and masks ---------------------------------------------------------------------------------


def picture_bytes(mode, kind):
    data = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 20, (32, 40), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize("kind, read", [("JPEG", read_image), ("PNG", lambda path: read_mask(path, KNOWN))])
def test_a_spoilt_file_is_a_dataset_error_wherever_it_is_spoilt(tmp_path, kind, read):
    """Cut off anywhere or with changed bytes: it reads, or it ends in our error; never in another."""
    whole, path = picture_bytes("L", kind), tmp_path / "file"
    rng, errors = np.random.default_rng(1), 0
    cuts = [whole[:n] for n in range(0, len(whole), 7)]
    changed = []
    for _ in range(150):
        spoilt = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            spoilt[at] = rng.integers(0, 256)
        changed.append(bytes(spoilt))
    for content in cuts + changed:
        path.write_bytes(content)
        try:
            read(path)
        except UserError as error:
            errors += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert errors > len(cuts) / 2


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_any_picture_becomes_rgb(tmp_path, mode):
    path = tmp_path / "picture"
    Image.new(mode, (5, 4)).save(path, "TIFF")
    assert read_image(path).shape == (4, 5, 3) and read_image(path).dtype == np.uint8


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "I;16"])
def test_a_mask_that_is_no_index_mask_is_refused(tmp_path, mode):
    Image.new(mode, (5, 4)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="not an index mask"):
        read_mask(tmp_path / "mask.png", KNOWN)


@pytest.mark.parametrize("value, fine", [(0, True), (20, True), (255, True), (21, False), (254, False)])
def test_mask_values_are_checked(tmp_path, value, fine):
    write_values(tmp_path / "mask.png", np.full((3, 3), value))
    if fine:
        assert (read_mask(tmp_path / "mask.png", KNOWN) == value).all()
    else:
        with pytest.raises(UserError, match=f"value {value}"):
            read_mask(tmp_path / "mask.png", KNOWN)


def test_a_palette_mask_is_read_as_indices(tmp_path):
    image = Image.fromarray(np.array([[0, 7, 255]], np.uint8), mode="P")
    image.putpalette([200] * 768)
    image.save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", KNOWN).tolist() == [[0, 7, 255]]


# --- the class index ------------------------------------------------------------------------------------


@pytest.fixture
def read_masks(monkeypatch):
    """The masks that were read, by name."""
    names = []

    def noting(path, known_values):
        names.append(path.stem)
        return read_mask_values(path, known_values)

    monkeypatch.setattr("dataset.voc.read_mask_values", noting)
    return names


def test_the_index_tells_classes_without_void(folder):
    shown = index_classes(folder, IDS, KNOWN)
    assert shown == {"seen": {0, 7}, "unseen": {0, 2}, "both": {0, 2, 7, 20}}
    assert list(shown) == IDS


def test_the_index_is_built_once(folder, read_masks):
    first = index_classes(folder, IDS, KNOWN)
    assert read_masks == IDS and (folder.root / INDEX).is_file()
    assert index_classes(folder, IDS, KNOWN) == first and read_masks == IDS


def test_only_a_changed_mask_is_read_again(folder, read_masks):
    index_classes(folder, IDS, KNOWN)
    read_masks.clear()
    rewrite(folder, "seen", lambda mask: mask.__setitem__(5, 3))
    assert index_classes(folder, IDS, KNOWN)["seen"] == {0, 3, 7}
    assert read_masks == ["seen"]


def test_a_change_of_size_is_enough(folder):
    """A copy tool that keeps times does not hide another file."""
    index_classes(folder, IDS, KNOWN)
    path = folder.mask_path("seen")
    before = path.stat()
    write_values(path, np.arange(20).reshape(4, 5))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert index_classes(folder, IDS, KNOWN)["seen"] == set(range(20))


def test_a_picture_whose_mask_is_gone_keeps_its_entry(folder, read_masks):
    index_classes(folder, IDS, KNOWN)
    folder.mask_path("unseen").unlink()
    read_masks.clear()
    assert index_classes(folder, IDS, KNOWN)["unseen"] == {0, 2} and read_masks == []
    assert "unseen" in json.loads((folder.root / INDEX).read_text())


def test_a_picture_that_never_had_a_mask_is_unknown(folder):
    folder.mask_path("unseen").unlink()
    assert index_classes(folder, IDS, KNOWN)["unseen"] is None


def test_entries_of_other_lists_stay(folder, read_masks):
    index_classes(folder, ["seen"], KNOWN)
    index_classes(folder, ["both"], KNOWN)
    read_masks.clear()
    index_classes(folder, ["seen", "both"], KNOWN)
    assert read_masks == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"seen": 3}',
        '{"seen": {"stamp": [1, 2]}}',
        '{"seen": {"values": [[1], {}]}}',
        "\x00",
    ],
)
def test_a_broken_index_is_only_a_slower_start(folder, content):
    expected = index_classes(folder, IDS, KNOWN)
    (folder.root / INDEX).write_text(content)
    assert index_classes(folder, IDS, KNOWN) == expected
    assert set(json.loads((folder.root / INDEX).read_text())) == set(IDS)


def test_a_broken_entry_of_a_picture_without_mask_is_no_entry(folder):
    folder.mask_path("seen").unlink()
    (folder.root / INDEX).write_text('{"seen": {"stamp": [1, 2], "values": [[1], {}]}}')
    assert index_classes(folder, IDS, KNOWN)["seen"] is None


def test_a_folder_that_can_not_be_written_is_no_error(folder, monkeypatch, capsys):
    """The folder of a shared data set is often read only."""

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert index_classes(folder, IDS, KNOWN)["seen"] == {0, 7}
    assert "index can't be kept" in capsys.readouterr().err
    assert {path.name for path in folder.root.iterdir() if path.is_file()} == set()  # and nothing is left behind


def test_the_index_can_be_read_by_others(folder):
    """Its rights are those of any new file, for a data set that several people use."""
    index_classes(folder, IDS, KNOWN)
    (folder.root / "ordinary").write_text("")
    assert (folder.root / INDEX).stat().st_mode == (folder.root / "ordinary").stat().st_mode


def test_a_wrong_mask_value_is_found_while_indexing(folder):
    rewrite(folder, "both", lambda mask: mask.__setitem__((7, 7), 99))
    with pytest.raises(UserError, match=r"both\.png holds the value 99"):
        index_classes(folder, IDS, KNOWN)


@pytest.fixture
def many(folder) -> list[str]:
    """Enough masks that several processes share them, each with values of its own."""
    ids = [f"{number:04}" for number in range(3 * CHUNK)]
    for number, picture in enumerate(ids):
        write_values(folder.mask_path(picture), np.full((2, 2), number % 21))
    return ids


def test_several_processes_find_what_one_finds(folder, many):
    pids = list(spread(_pid, many, "", "", workers=2))
    assert len(pids) == len(many) and os.getpid() not in pids  # others have read them
    assert set(spread(_pid, many, "", "", workers=1)) == {os.getpid()}
    shown = index_classes(folder, many, KNOWN)
    assert list(shown) == many and all(shown[p] == {n % 21} for n, p in enumerate(many))


def _pid(_) -> int:
    return os.getpid()


def test_what_was_indexed_before_a_bad_mask_is_kept(folder, many):
    bad = many[CHUNK + 5]
    write_values(folder.mask_path(bad), np.full((2, 2), 99))
    with pytest.raises(UserError, match=rf"{bad}\.png holds the value 99"):
        index_classes(folder, many, KNOWN)
    kept = json.loads((folder.root / INDEX).read_text())
    assert set(many[:CHUNK]) <= set(kept) and bad not in kept


# --- anyone's own layout and classes ----------------------------------------------------------------------


def test_own_pictures_may_have_any_ending(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for name in ("a.png", "b.JPG", "c.d.jpeg"):
        (tmp_path / "images" / name).write_bytes(b"")
    own = VOCFolder.open(tmp_path)
    assert [own.image_path(p).name for p in ("a", "b", "c.d", "none")] == ["a.png", "b.JPG", "c.d.jpeg", "none.jpg"]
    assert own.lists == tmp_path and own.masks == tmp_path / "masks"
    with pytest.raises(UserError, match=r"dataset\.prepare own"):
        own.read_list(None, ("train",))


def test_a_folder_says_what_its_values_mean(folder):
    folder.check_split(SPLIT)
    with pytest.raises(UserError, match=r"without classes\.txt is taken for"):
        folder.check_split(Split.named("coco-stuff"))
    (folder.root / "classes.txt").write_text("background\nperson\naeroplane\n")
    with pytest.raises(UserError, match=r"'bus' has no mask value 6"):
        folder.check_split(SPLIT)
    for make in (lambda: training_datasets(folder.root, SPLIT, nothing, "unseen", "all"),
                 lambda: evaluation_dataset(folder.root, SPLIT)):  # fmt: skip
        with pytest.raises(UserError, match=r"--split of the same data set"):
            make()


def test_unseen_classes_of_a_folder_make_a_split(folder):
    assert choose_split(folder.root, 4, None) == Split.named(4)
    assert choose_split(folder.root, "zs3-2", None).background == "score"
    split = choose_split(folder.root, 1, ["sofa", "sheep"])
    assert split.unseen == ("sheep", "sofa") and len(split.seen) == 18
    assert (split.name, split.background) == ("unseen-sheep-sofa", "ignore")


# --- source and target ----------------------------------------------------------------------------------


SHOWN = {"s": {0, 7}, "u": {0, 2}, "su": {2, 7}, "nothing": {0}, "void": set()}


@pytest.mark.parametrize("background", ["ignore", "score", "auxiliary"])
def test_source_pictures_show_a_seen_class(background):
    assert choose_source(SHOWN | {"?": None}, Split.voc(1, background)) == ["s", "su"]


def test_target_pictures_are_those_known_to_show_an_unseen_class():
    assert choose_target(SHOWN, SPLIT, "unseen") == ["u", "su"]


def test_target_pictures_can_be_all():
    assert choose_target(SHOWN | {"?": None}, SPLIT, "all") == [*SHOWN, "?"]


def test_other_splits_choose_other_pictures():
    assert choose_source(SHOWN, Split.voc(2)) == ["u", "su"]
    assert choose_target(SHOWN, Split.voc(2), "unseen") == ["s", "su"]


def test_choices_that_can_not_be_made_say_why():
    with pytest.raises(UserError, match=r"picture \? .*--target-images all"):
        choose_target(SHOWN | {"?": None}, SPLIT, "unseen")
    with pytest.raises(UserError, match="no training picture shows an unseen class"):
        choose_target({"s": frozenset({7})}, SPLIT, "unseen")
    with pytest.raises(UserError, match="no training picture shows a seen class"):
        choose_source({"u": frozenset({2}), "?": None}, SPLIT)


def test_source_labels_hide_unseen_classes(folder):
    """Unseen and background pixels are void; seen ones have their class index."""
    image, label = SourceDataset(folder, ["both"], SPLIT, nothing)[0, 0]
    mask = read_values(folder.mask_path("both"))
    assert image.dtype == label.dtype == torch.uint8 and image.shape == (3, 8, 12)
    assert (label[torch.tensor(mask == 2)] == VOID).all() and (label[torch.tensor(mask == 0)] == VOID).all()
    assert (label[torch.tensor(mask == 7)] == SPLIT.names.index("car")).all()
    assert (label[torch.tensor(mask == 20)] == SPLIT.names.index("tvmonitor")).all()


def test_background_pixels_teach_where_it_is_a_class(folder):
    _, label = SourceDataset(folder, ["both"], Split.voc(1, background="score"), nothing)[0, 0]
    assert (label[torch.tensor(read_values(folder.mask_path("both")) == 0)] == 0).all()


def test_target_pixels_of_all_need_no_mask(folder):
    dataset = TargetDataset(folder, ["unseen"], SPLIT, training_transform(16), "all")
    before = dataset[0, 5]
    folder.mask_path("unseen").unlink()
    after = dataset[0, 5]
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert before[1].dtype == torch.bool and before[1].any()


def test_target_pixels_of_all_are_those_of_the_picture(folder):
    """Padding is not valid; every pixel of the picture is, void ones too."""
    _, valid = TargetDataset(folder, ["both"], SPLIT, training_transform(32, (1, 1), 0, 0), "all")[0, 3]
    assert valid.sum() == 8 * 12


def test_target_pixels_of_the_oracle_are_the_unseen_ones(folder):
    _, valid = TargetDataset(folder, ["both"], SPLIT, nothing, "oracle")[0, 0]
    np.testing.assert_array_equal(valid.numpy(), read_values(folder.mask_path("both")) == 2)


def test_the_oracle_needs_the_mask(folder):
    folder.mask_path("unseen").unlink()
    with pytest.raises(UserError, match=r"unseen\.png is missing"):
        TargetDataset(folder, ["unseen"], SPLIT, nothing, "oracle")[0, 0]


def test_target_pixels_have_two_names(folder):
    with pytest.raises(ValueError, match=r"all.*oracle"):
        TargetDataset(folder, ["unseen"], SPLIT, nothing, "some")


def test_evaluation_keeps_seen_and_unseen_labels(folder):
    image, label, index = EvaluationDataset(folder, IDS, SPLIT)[2]
    assert index == 2 and image.shape == (3, 8, 12)
    np.testing.assert_array_equal(label.numpy(), SPLIT.to_labels(read_values(folder.mask_path("both"))))
    assert SPLIT.names.index("bicycle") in label.unique().tolist()


def test_sizes_must_agree(folder):
    write_values(folder.mask_path("both"), np.zeros((8, 11)))
    for dataset in (
        EvaluationDataset(folder, ["both"], SPLIT),
        SourceDataset(folder, ["both"], SPLIT, nothing),
    ):
        with pytest.raises(UserError, match=r"11 x 8 but .* is 12 x 8"):
            dataset[0] if isinstance(dataset, EvaluationDataset) else dataset[0, 0]


@pytest.mark.parametrize("pixels", ["all", "oracle"])
def test_an_item_depends_on_its_key_alone(folder, pixels):
    source, target = training_datasets(folder.root, SPLIT, training_transform(16), "unseen", pixels)
    for dataset in (source, target):
        torch.manual_seed(1)
        first, state = dataset[0, 9], torch.get_rng_state()
        torch.rand(3)
        again, other = dataset[0, 9], dataset[0, 10]
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from the run's own numbers
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert not torch.equal(first[0], other[0]) or not torch.equal(first[1], other[1])


def test_training_datasets_hold_the_chosen_pictures(folder):
    source, target = training_datasets(folder.root, SPLIT, nothing, "unseen", "all")
    assert (source.ids, target.ids) == (["seen", "both"], ["unseen", "both"])
    assert training_datasets(folder.root, SPLIT, nothing, "all", "all")[1].ids == IDS
    assert evaluation_dataset(folder.root, SPLIT).ids == ["both"]
    assert evaluation_dataset(folder.root, SPLIT, "train").ids == IDS


def test_drawn_pictures_read_as_voc(data):
    """The offline set goes through the same code: unseen pixels of source pictures never teach."""
    source, target = training_datasets(data, SPLIT, nothing, "unseen", "all")
    assert not set(target_only(data, SPLIT)) & set(source.ids) and len(target.ids) > 5
    for picture in source_and_target(data, SPLIT)[:3]:
        _, label = source[source.ids.index(picture), 0]
        unseen = np.isin(read_values(mask_path(data, picture)), list(SPLIT.unseen_values))
        assert unseen.any() and (label.numpy()[unseen] == VOID).all()

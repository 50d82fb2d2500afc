"""The drawn images: reproducible, in the layout of VOC, and never written over images of another origin."""

import numpy as np
import pytest
from PIL import Image

from dataset import drawn
from dataset.splits import VOC_CLASSES, VOID
from helpers import contents
from utils.errors import UserError

SMALL = {"num_train": 6, "num_val": 3, "size": (64, 48)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "set"
    drawn.write_dataset(folder, **SMALL)
    return folder


@pytest.mark.parametrize("name", VOC_CLASSES)
def test_every_form_of_a_class_is_drawn_and_labelled(name, monkeypatch):
    value = VOC_CLASSES.index(name) + 1
    for form in drawn.OBJECTS[name]["forms"]:
        monkeypatch.setitem(drawn.OBJECTS[name], "forms", [form])
        image, mask = drawn.draw_scene(np.random.default_rng(7), [name], (96, 80))
        assert (image.mode, image.size, mask.mode, mask.size) == ("RGB", (96, 80), "P", (96, 80))
        labels, pixels = np.asarray(mask), np.asarray(image, float)
        assert set(np.unique(labels)) == {0, value, VOID}
        assert (labels == value).mean() >= 0.08  # the main object is large
        assert np.abs(pixels[labels == value].mean(0) - pixels[labels == 0].mean(0)).max() > 2


def test_shapes_name_all_classes_settings_props_and_materials():
    assert set(drawn.OBJECTS) == set(VOC_CLASSES)
    for habit in drawn.OBJECTS.values():
        assert set(habit["company"]) <= set(VOC_CLASSES) and set(habit["settings"]) <= set(drawn.SETTINGS)
    for thing in [*drawn.OBJECTS.values(), *drawn.PROPS.values()]:
        for form in thing["forms"]:
            drawn.sketch(np.random.default_rng(0), thing | {"forms": [form]})
    for setting in drawn.SETTINGS.values():
        drawn.draw_layers(drawn.Canvas(np.random.default_rng(0), (32, 32)), setting["backdrop"] + setting["front"], 0.5)


def test_all_requested_classes_stay_visible(monkeypatch):
    monkeypatch.setattr(drawn, "MIN_VISIBLE", 0.06)  # stricter than usual, so that some layouts fail
    rng = np.random.default_rng(3)
    for _ in range(8):
        classes = rng.choice(VOC_CLASSES, 3, replace=False).tolist()
        labels = np.asarray(drawn.draw_scene(rng, classes, (64, 64))[1])
        assert min((labels == VOC_CLASSES.index(name) + 1).mean() for name in classes) >= 0.06
    monkeypatch.setattr(drawn, "MIN_VISIBLE", 0.9)
    with pytest.raises(UserError, match="visible"):
        drawn.draw_scene(rng, ["cat", "dog"], (32, 32))


def test_void_lies_between_all_neighbours():
    _, mask = drawn.draw_scene(np.random.default_rng(0), ["horse", "person", "sheep"])
    labels = np.asarray(mask)
    for one, other in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        assert ((one == other) | (one == VOID) | (other == VOID)).all()


def test_layout_is_that_of_voc(dataset):
    lists = {s: (dataset / f"ImageSets/Segmentation/{s}.txt").read_text().split() for s in ("train", "val")}
    assert (len(lists["train"]), len(lists["val"])) == (6, 3)
    names = lists["train"] + lists["val"]
    assert sorted(p.name for p in (dataset / "JPEGImages").iterdir()) == sorted(f"{n}.jpg" for n in names)
    for name in names:
        mask = Image.open(dataset / f"SegmentationClassAug/{name}.png")
        assert (mask.mode, mask.size, mask.getpalette()[3:6]) == ("P", (64, 48), [128, 0, 0])
        assert set(np.unique(mask)) <= {*range(len(VOC_CLASSES) + 1), VOID}


def test_images_depend_on_seed_subset_and_index_alone(dataset, tmp_path):
    drawn.write_dataset(tmp_path / "long", 8, 3, (64, 48))
    drawn.write_dataset(tmp_path / "other", **SMALL, seed=1)
    short, long, other = contents(dataset), contents(tmp_path / "long"), contents(tmp_path / "other")
    images = [name for name in short if name.endswith((".jpg", ".png"))]
    assert len(long) == len(short) + 4 and all(long[name] == short[name] for name in images)
    assert all(other[name] != short[name] for name in images if name.endswith(".jpg"))


def test_complete_set_is_kept_and_changed_or_interrupted_one_is_redrawn(tmp_path, monkeypatch):
    drawn.write_dataset(tmp_path, 3, 2, (48, 48))
    with monkeypatch.context() as patch:
        patch.setattr(drawn, "draw_scene", None)  # not called
        drawn.write_dataset(tmp_path, 3, 2, (48, 48))
        with pytest.raises(TypeError):
            drawn.write_dataset(tmp_path, 2, 1, (48, 48))
    drawn.write_dataset(tmp_path, 2, 1, (48, 48))
    assert sorted(p.stem for p in (tmp_path / "JPEGImages").iterdir()) == ["train_00000", "train_00001", "val_00000"]


def test_images_of_another_origin_are_refused_and_untouched(tmp_path):
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "JPEGImages" / "2007_000032.jpg").write_bytes(b"an image")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        drawn.write_dataset(tmp_path, 1, 1)
    assert contents(tmp_path) == before

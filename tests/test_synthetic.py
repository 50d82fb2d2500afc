"""The demo pictures: reproducible, legal in the layout of VOC, and never drawn over real data."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import synthetic
from dataset.splits import VOC_CLASSES, VOID

SMALL = {"num_train": 6, "num_val": 3, "size": (64, 48)}
ROOT = Path(__file__).resolve().parents[1]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under the folder: relative path -> bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    synthetic.write_dataset(folder, **SMALL, workers=1)
    return folder


def values_of(mask: Image.Image) -> set[int]:
    return set(np.unique(np.asarray(mask)).tolist())


# --- scenes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VOC_CLASSES)
def test_every_class_is_drawn_and_labelled(name):
    rng = np.random.default_rng(7)
    for _ in range(3):
        picture, mask = synthetic.draw_scene(rng, [name], (96, 80))
        assert (picture.mode, picture.size, mask.mode, mask.size) == ("RGB", (96, 80), "P", (96, 80))
        labels = np.asarray(mask)
        value = VOC_CLASSES.index(name) + 1
        assert values_of(mask) == {0, value, VOID}
        assert (labels == value).mean() >= 0.08  # the main object is large
        # The picture shows something there: the object differs from its surroundings.
        pixels = np.asarray(picture, float)
        assert np.abs(pixels[labels == value].mean(0) - pixels[labels == 0].mean(0)).max() > 2


def test_the_tables_name_every_class():
    assert tuple(synthetic.DRAWERS) == VOC_CLASSES
    assert set(synthetic.HABITS) == set(VOC_CLASSES)
    for habit in synthetic.HABITS.values():
        assert set(habit.company) <= set(VOC_CLASSES)
        assert set(habit.settings) <= set(synthetic.BACKDROPS)


def test_all_requested_classes_stay_visible(monkeypatch):
    monkeypatch.setattr(synthetic, "MIN_VISIBLE", 0.06)  # stricter than usual, so that layouts do fail
    rng = np.random.default_rng(3)
    for _ in range(8):
        classes = rng.choice(VOC_CLASSES, 3, replace=False).tolist()
        _, mask = synthetic.draw_scene(rng, classes, (64, 64))
        for name in classes:
            share = (np.asarray(mask) == VOC_CLASSES.index(name) + 1).mean()
            assert share >= 0.06, name


def test_a_scene_without_a_layout_is_refused(monkeypatch):
    monkeypatch.setattr(synthetic, "MIN_VISIBLE", 0.9)
    with pytest.raises(ValueError, match="visible"):
        synthetic.draw_scene(np.random.default_rng(0), ["cat", "dog"], (32, 32))


def test_scenes_depend_on_the_generator_alone():
    first, second, other = (synthetic.draw_scene(np.random.default_rng(s), ["cow", "dog"]) for s in (1, 1, 2))
    assert first[0].tobytes() == second[0].tobytes() and first[1].tobytes() == second[1].tobytes()
    assert first[0].tobytes() != other[0].tobytes()


def neighbours_of(labels: np.ndarray) -> np.ndarray:
    """The pixels above, below, left and right of every pixel: (4, height, width)."""
    padded = np.pad(labels, 1, mode="edge")
    return np.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])


def test_void_is_a_line_of_one_pixel_around_an_object():
    _, mask = synthetic.draw_scene(np.random.default_rng(0), ["horse"])
    labels = np.asarray(mask)
    near_horse = (neighbours_of(labels) == VOC_CLASSES.index("horse") + 1).any(0)
    assert near_horse[labels == VOID].all()
    assert not near_horse[labels == 0].any()


def test_void_parts_all_neighbours():
    _, mask = synthetic.draw_scene(np.random.default_rng(0), ["horse", "person", "sheep"])
    labels = np.asarray(mask)
    neighbours = neighbours_of(labels)
    assert ((neighbours == labels) | (neighbours == VOID) | (labels == VOID)).all()


@pytest.mark.parametrize(
    ("classes", "size", "message"),
    [(["unicorn"], (64, 64), "unicorn"), ([], (64, 64), "without classes"), (["cat"], (16, 64), "16 x 64")],
)
def test_impossible_scenes_are_refused(classes, size, message):
    with pytest.raises(ValueError, match=message):
        synthetic.draw_scene(np.random.default_rng(0), classes, size)


def test_palette_is_that_of_voc():
    palette = np.array(synthetic.voc_palette()).reshape(256, 3)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 8: (64, 0, 0),
             15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}  # fmt: skip
    for value, colour in known.items():
        assert tuple(palette[value]) == colour
    _, mask = synthetic.draw_scene(np.random.default_rng(0), ["aeroplane"], (64, 64))
    assert set(map(tuple, np.asarray(mask.convert("RGB")).reshape(-1, 3).tolist())) == {
        (0, 0, 0), (128, 0, 0), (224, 224, 192)}  # fmt: skip


def test_companions_vary():
    rng = np.random.default_rng(0)
    for name in VOC_CLASSES:
        scenes = [synthetic.choose_classes(rng, name) for _ in range(200)]
        assert all(scene[0] == name and len(scene) <= 3 for scene in scenes)
        assert 0.35 < np.mean([len(scene) == 1 for scene in scenes]) < 0.65
        assert len({other for scene in scenes for other in scene[1:]}) >= 4


# --- the set on disk --------------------------------------------------------------------------------------


def test_layout_sizes_and_values(dataset):
    lists = {s: (dataset / f"ImageSets/Segmentation/{s}.txt").read_text().split() for s in ("train", "val")}
    assert (len(lists["train"]), len(lists["val"])) == (6, 3)
    assert not set(lists["train"]) & set(lists["val"])
    names = lists["train"] + lists["val"]
    assert sorted(p.name for p in (dataset / "JPEGImages").iterdir()) == sorted(f"{n}.jpg" for n in names)
    assert sorted(p.name for p in (dataset / "SegmentationClassAug").iterdir()) == sorted(f"{n}.png" for n in names)
    for name in names:
        with Image.open(dataset / f"JPEGImages/{name}.jpg") as picture:
            assert (picture.mode, picture.size) == ("RGB", (64, 48))
        with Image.open(dataset / f"SegmentationClassAug/{name}.png") as mask:
            assert (mask.mode, mask.size) == ("P", (64, 48))
            assert mask.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
            assert values_of(mask) <= {*range(len(VOC_CLASSES) + 1), VOID}


def test_every_class_is_the_main_one_equally_often(tmp_path, monkeypatch):
    mains = []

    def record(rng, classes, size):
        mains.append(classes[0])
        return Image.new("RGB", size), Image.new("P", size)

    monkeypatch.setattr(synthetic, "draw_scene", record)
    synthetic.write_dataset(tmp_path / "set", 40, 20, (64, 48), workers=1)
    assert {name: mains.count(name) for name in VOC_CLASSES} == dict.fromkeys(VOC_CLASSES, 3)


def test_same_seed_same_bytes_for_any_number_of_workers(dataset, tmp_path):
    synthetic.write_dataset(tmp_path / "two", **SMALL, workers=2)
    assert contents(tmp_path / "two") == contents(dataset)


def test_other_seed_other_pictures(dataset, tmp_path):
    synthetic.write_dataset(tmp_path / "other", **SMALL, seed=1, workers=1)
    ours, others = contents(dataset), contents(tmp_path / "other")
    assert ours.keys() == others.keys()
    assert all(ours[name] != others[name] for name in ours if name.endswith(".jpg"))


def test_a_longer_set_begins_with_the_shorter_one(dataset, tmp_path):
    synthetic.write_dataset(tmp_path / "long", 8, 3, (64, 48), workers=1)
    longer = contents(tmp_path / "long")
    pictures = {k: v for k, v in contents(dataset).items() if k.endswith((".jpg", ".png"))}
    assert len(longer) == len(contents(dataset)) + 4
    assert all(longer[name] == data for name, data in pictures.items())


def test_a_complete_set_is_not_drawn_again_and_a_changed_one_is(tmp_path, monkeypatch):
    folder, drawn = tmp_path / "set", []
    real = synthetic.write_picture
    monkeypatch.setattr(synthetic, "write_picture", lambda job: (drawn.append(job), real(job)))
    synthetic.write_dataset(folder, 3, 2, (48, 48), workers=1)
    assert len(drawn) == 5
    synthetic.write_dataset(folder, 3, 2, (48, 48), workers=1)
    assert len(drawn) == 5
    synthetic.write_dataset(folder, 2, 1, (48, 48), workers=1)  # fewer: the surplus goes
    assert len(drawn) == 8
    assert sorted(p.stem for p in (folder / "JPEGImages").iterdir()) == [
        "train_00000",
        "train_00001",
        "val_00000",
    ]
    assert len(list((folder / "SegmentationClassAug").iterdir())) == 3
    monkeypatch.setattr(synthetic, "DRAWING_VERSION", synthetic.DRAWING_VERSION + 1)
    synthetic.write_dataset(folder, 2, 1, (48, 48), workers=1)
    assert len(drawn) == 11


def test_an_interrupted_set_is_drawn_anew(tmp_path, monkeypatch):
    folder = tmp_path / "set"

    def fail(job):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(synthetic, "write_picture", fail)
        synthetic.write_dataset(folder, 2, 1, (48, 48), workers=1)
    assert json.loads((folder / "synthetic.json").read_text())["complete"] is False
    synthetic.write_dataset(folder, 2, 1, (48, 48), workers=1)
    assert json.loads((folder / "synthetic.json").read_text())["complete"] is True
    assert len(list((folder / "JPEGImages").iterdir())) == 3


def test_real_pictures_are_refused_and_untouched(tmp_path):
    real = tmp_path / "VOC2012"
    (real / "JPEGImages").mkdir(parents=True)
    (real / "JPEGImages" / "2007_000032.jpg").write_bytes(b"someone's picture")
    before = contents(real)
    with pytest.raises(ValueError, match="VOC2012"):
        synthetic.write_dataset(real, 1, 1, (48, 48))
    assert contents(real) == before


@pytest.mark.parametrize("text", ["[1", "[1]", '{"version": 1}'])
def test_a_foreign_marker_is_refused(text, tmp_path):
    (tmp_path / "synthetic.json").write_text(text)
    with pytest.raises(ValueError, match=r"synthetic\.json"):
        synthetic.write_dataset(tmp_path, 1, 1, (48, 48))


# --- command line -----------------------------------------------------------------------------------------


def test_command_writes_a_set_quietly(tmp_path):
    folder = tmp_path / "data"
    command = [sys.executable, "-m", "dataset.synthetic", "--data-path", str(folder), "--train", "3",
               "--val", "2", "--size", "48", "40", "--seed", "5", "--workers", "1"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    marker = json.loads((folder / "synthetic.json").read_text())
    assert marker == {"version": synthetic.DRAWING_VERSION, "seed": 5, "size": [48, 40], "train": 3, "val": 2,
                      "complete": True}  # fmt: skip
    assert len(list((folder / "JPEGImages").iterdir())) == 5


def test_preview_shows_every_class_and_writes_no_set(tmp_path):
    sheet, folder = tmp_path / "classes.png", tmp_path / "data"
    synthetic.main(["--preview", str(sheet), "--data-path", str(folder), "--size", "48", "48"])
    with Image.open(sheet) as image:
        colours = set(map(tuple, np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()))
    palette = np.array(synthetic.voc_palette()).reshape(256, 3)[: len(VOC_CLASSES) + 1]
    assert set(map(tuple, palette.tolist())) <= colours
    assert not folder.exists()


@pytest.mark.parametrize(
    "argv",
    [["--train", "0"], ["--size", "8", "8"], ["--seed", "-1"], ["--train", "many"], ["--unknown"],
     ["--preview", "no/such/folder/sheet.png", "--size", "48", "48"], ["--preview", "sheet.nonsense"]],
)  # fmt: skip
def test_errors_are_one_line_and_exit_2(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        synthetic.main(argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "error: " in message
    assert not list(tmp_path.iterdir())


def test_command_refuses_real_pictures(tmp_path, capsys):
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(SystemExit) as stop:
        synthetic.main(["--data-path", str(tmp_path), "--train", "1", "--val", "1"])
    assert stop.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err

"""Bad input, a row each: what is broken, which command, what the message holds. Nothing is written."""

import os
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation_script
from dataset.drawn import write_dataset
from dataset.splits import VOC_CLASSES, VOID, Split
from helpers import ROOT, SHORT, STAGES, arguments, failure, load, same, stored, tiny_network, train, use_network
from masks import classes_shown, mask_path, read_values, source_and_target, target_only, write_values
from utils.errors import UserError, check_writable

SPLIT = Split.named(1)
PLAN = SHORT | {"batch_size": 12, "target_batch_size": 12, "max_steps": 1}
"""One step that sees every image."""

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A drawn set of 12 training and 2 evaluation images, its index, and runs of both stages."""
    root = tmp_path_factory.mktemp("intact")
    write_dataset(root / "data", num_train=12, num_val=2, size=(48, 40), seed=3)
    with pytest.MonkeyPatch.context() as patch:
        use_network(tiny_network, patch)
        flags = PLAN | {"batch_size": 2, "target_batch_size": 2, "max_steps": 2}
        train(1, root / "data", root / "runs", **flags)
        train(2, root / "data", root / "runs", **flags, restore_from_where="saved")
    classes_shown(root / "data", "val")
    return root


@pytest.fixture
def place(intact, tmp_path):
    """A copy of it to spoil: a source image, an image of val and a target image among others."""
    root = shutil.copytree(intact, tmp_path / "place")
    data = root / "data"
    source, evaluated = source_and_target(data, SPLIT)[0], next(iter(classes_shown(data, "val")))
    images, lists = data / "JPEGImages", data / "ImageSets" / "Segmentation"
    return SimpleNamespace(
        root=root, data=data, runs=root / "runs", list=lists / "train.txt", lists=lists, source=source,
        image=images / f"{source}.jpg", mask=mask_path(data, source),
        val_image=images / f"{evaluated}.jpg", val_mask=mask_path(data, evaluated),
        latest=root / "runs/split1/stage1/latest.pth",
        target=target_only(data, SPLIT)[0],
    )  # fmt: skip


def stage1(place, flags):
    return STAGES[1].main, [*arguments(place.data, place.root / "new", **PLAN), *flags]


def stage2(place, flags):
    where = {"restore_from_where": "saved", "stage1_checkpoint": place.latest}
    return STAGES[2].main, [*arguments(place.data, place.root / "new", **PLAN | where), *flags]


def go_on(place, flags):
    """Stage 1, from a checkpoint that is made to be one of its middle."""
    plan = PLAN | {"batch_size": 2, "target_batch_size": 2, "max_steps": 2, "restore_from_where": "continue"}
    return STAGES[1].main, [*arguments(place.data, place.runs, **plan), *flags]


def evaluation(place, flags):
    command = ["--checkpoint", place.latest, "--data-path", place.data, "--num-workers", 0, "--device", "cpu"]
    return evaluation_script.main, [*command, *flags]


# --- ways to break things: each takes the place, and gives the flags that it needs ------------------------


def write(name, content):
    """Writes bytes, or what a function makes of the bytes that are there, to the place's file `name`."""

    def spoil(place):
        path = getattr(place, name)
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return spoil


def other_image(name, mode, kind, **options):
    """Puts an image of the same size, but of another mode and format, at the place's file `name`."""

    def spoil(place):
        with Image.open(getattr(place, name)) as image:
            other = Image.new(mode, image.size, (1, 2, 3) if mode == "RGB" else 0)
        other.save(getattr(place, name), kind, **options)

    return spoil


def fill(path, value):
    """A mask that holds nothing but this value."""
    write_values(path, np.full_like(read_values(path), value))


def mask_folder(place):
    place.val_mask.unlink()
    place.val_mask.mkdir()


def flags(*values):
    return lambda place: [value(place) if callable(value) else value for value in values]


def vector_with_nan(place):
    vectors = [f"{word} {'nan' if word == 'car' else 1} 0 0\n" for word in VOC_CLASSES]
    (place.root / "w.txt").write_text("".join(vectors))
    return ["--embedding", place.root / "w.txt"]


class Trap:
    """Its pickle makes a folder as it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def trap(place):
    torch.save(Trap(place.root / "it ran"), place.latest)


def trapped_weights(place):
    trap(place)
    return ["--backbone", "vgg16", "--backbone-weights", place.latest]


def checkpoint(change):
    """The checkpoint after `change` of its dict, made to be one of step 1 of 2 so that it can go on."""

    def spoil(place):
        content = load(place.latest)
        content["step"] = content["scheduler"]["last_epoch"] = 1
        change(content)
        torch.save(content, place.latest)

    return spoil


def put(*keys_and_value):
    """The checkpoint with another value, or what a function makes of the value, below these keys."""
    *above, last, value = keys_and_value

    def change(content):
        for key in above:
            content = content[key]
        content[last] = value(content[last]) if callable(value) else value

    return checkpoint(change)


metadata, weight = partial(put, "metadata"), partial(put, "model")


def never_indexed(place):
    (place.data / "class_index_SegmentationClassAug.json").unlink()
    mask_path(place.data, place.target).unlink()


def oracle_without_mask(place):
    mask_path(place.data, place.target).unlink()
    return ["--target-pixels", "oracle"]


def only_seen(place):
    shown = classes_shown(place.data)
    place.list.write_text("\n".join(image for image, values in shown.items() if not values & SPLIT.unseen_values))


def no_folder(name):
    return lambda place: shutil.rmtree(place.data / name)


BOMB = stored(lambda stream: Image.new("1", (20_000, 20_000)).save(stream, "PNG"))  # 400 million pixels in kilobytes
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (48, 40), "blue")]}
MOMENTUM = ("optimizer", "state", 0, "momentum_buffer")
WEIGHT = "projection.project.weight"
BEST = ROOT / "configs/best_cpu.toml"

HOSTILE = [
    # what is broken, the command, how, what the message holds
    ("image cut short", stage1, write("image", lambda b: b[:400]), ["{image}", "can't be read as an image"]),
    ("image that is a bomb", stage1, write("image", BOMB), ["{image}", "can't be read as an image", "bomb"]),
    ("image of 16 bits", stage1, other_image("image", "I;16", "PNG"), ["{image}", "more than 8 bits"]),
    ("animated image", stage1, other_image("image", "RGB", "GIF", **FRAMES), ["{image}", "animated"]),
    ("image not there", stage1, lambda p: p.image.unlink(), ["{list}", "'{source}' names no image", "shorten"]),
    ("mask cut short", stage1, write("mask", lambda b: b[:-30]), ["{mask}", "can't be read as a mask"]),
    ("mask of colours", stage1, other_image("mask", "RGB", "PNG"), ["{mask}", "a colour mask", "labelmap.txt"]),
    ("mask that is a JPEG", stage1, other_image("mask", "RGB", "JPEG"), ["{mask}", "is a JPEG", "as PNG"]),
    ("mask of 16 bits", stage1, other_image("mask", "I;16", "PNG"), ["{mask}", "mode I;16", "8-bit"]),
    ("mask with an unknown value", stage1, lambda p: fill(p.mask, 21), ["{mask}", "21", "0-20", "255"]),
    ("mask not there", stage1, lambda p: p.mask.unlink(), ["{mask}", "missing", "copy it there"]),
    ("mask that is a folder", evaluation, mask_folder, ["{val_mask}", "can't be read as a mask"]),
    ("list with a image not there", stage1, write("list", lambda b: b + b"other\n"), ["{list}", "'other'", "shorten"]),
    ("list of unseen classes alone", stage1, lambda p: p.list.write_text("\n".join(target_only(p.data, SPLIT))),
     ["shows a seen class", "--split"]),
    ("list by flag not there", stage1, flags("--train-list", "nowhere"), ["nowhere.txt", "{lists}"]),
    ("vector with NaN", stage1, vector_with_nan, ["w.txt", "'car'", "NaN"]),
    ("vectors not there", stage1, flags("--embedding", "nothing"), ["no 'nothing' vectors", "glove"]),
    ("flag that is no number", stage2, flags("--keep", "nan"), ["--keep", "number"]),
    ("device unknown", evaluation, flags("--device", "banana"), ["--device banana", "cpu"]),
    ("cache without a frozen backbone", stage1, flags("--cache-features", "x"), ["--cache-features", "--freeze"]),
    ("cache below a file", stage1, flags("--freeze-backbone", "--cache-features", lambda p: p.list / "x"), ["{list}"]),
    ("weights that run code", stage1, trapped_weights, ["{latest}", "can't be read"]),
    ("data not there", stage1, flags("--data-path", "nowhere"), ["--data-path nowhere", "DATA_PATH.md"]),
    ("output below a file", stage1, flags("--output-dir", lambda p: p.list / "runs"), ["--output-dir", "{list}"]),
    ("figures below a file", evaluation, flags("--json", lambda p: p.list / "x.json"), ["--json", "{list}"]),
    ("checkpoint that runs code", evaluation, trap, ["{latest}", "no readable checkpoint"]),
    ("checkpoint of zero bytes", stage2, write("latest", b""), ["{latest}", "no readable checkpoint"]),
    ("checkpoint cut short", go_on, write("latest", lambda b: b[:-99]), ["{latest}", "no readable checkpoint"]),
    ("checkpoint not there", stage2, lambda p: p.latest.unlink(), ["no checkpoint at {latest}", "run stage 1 first"]),
    ("checkpoint of other keys", evaluation, checkpoint(lambda c: c.pop("model")), ["{latest}", "not a checkpoint"]),
    ("checkpoint with a step of text", go_on, put("step", "1"), ["{latest}", "(step)"]),
    ("checkpoint with nested settings", stage2, metadata("split", {"a": 1}), ["{latest}", "--split"]),
    ("checkpoint without classes", evaluation, checkpoint(lambda c: c["metadata"].pop("seen")), ["{latest}", "'seen'"]),
    ("checkpoint of other classes", evaluation, metadata("unseen", lambda v: v[:-1]), ["{latest}", "split"]),
    ("checkpoint of an unknown network", evaluation, metadata("backbone", "resnet18"), ["{latest}", "resnet18"]),
    ("checkpoint of an unknown protocol", evaluation, metadata("target_pixels", "x"), ["{latest}", "'x'"]),
    ("checkpoint without a tensor", evaluation, checkpoint(lambda c: c["model"].pop(WEIGHT)), ["{latest}", WEIGHT]),
    ("checkpoint with one tensor more", go_on, weight("more", torch.ones(1)), ["{latest}", "more"]),
    ("checkpoint of other shapes", stage2, weight(WEIGHT, torch.ones(100, 3, 1, 1)), ["{latest}", WEIGHT, "[100, 4"]),
    ("checkpoint of other numbers", evaluation, weight(WEIGHT, torch.ones(1).double()), ["{latest}", WEIGHT]),
    ("checkpoint with NaN", evaluation, weight(WEIGHT, torch.full((100, 4, 1, 1), torch.nan)), ["not finite"]),
    ("checkpoint with another momentum", go_on, put(*MOMENTUM, torch.zeros(2, 3)), ["{latest}", "fit the optimiser"]),
    ("image that the index does not have", stage1, never_indexed, ["{target}", "--target-images all"]),
    ("mask not there, oracle", stage1, oracle_without_mask, ["{target}", "missing"]),
    ("images without an unseen class", stage1, only_seen, ["unseen class", "--split"]),
    ("images folder not there", stage1, no_folder("JPEGImages"), ["--data-path {data}", "JPEGImages"]),
    ("mask folder not there", stage1, no_folder("SegmentationClassAug"), ["{data}", "SegmentationClass"]),
    ("lists not there", stage1, no_folder("ImageSets"), ["{data}", "train.txt"]),
    ("checkpoint of another split", evaluation, flags("--split", 2), ["{latest}", "--split 1"]),
    ("checkpoint of another split", stage2, metadata("split", 4), ["{latest}", "--split 4", "give the same"]),
    ("checkpoint of another network", go_on, metadata("backbone", "vgg16"), ["{latest}", "--backbone vgg16"]),
    ("checkpoint of other words", stage2, metadata("embedding", ["fasttext"]), ["{latest}", "--embedding fasttext"]),
    ("checkpoint with an oracle", stage2, metadata("target_pixels", "oracle"), ["{latest}", "--target-pixels oracle"]),
    ("checkpoint that is no zero-shot", stage2, metadata("supervised", True), ["{latest}", "--supervised"]),
    ("checkpoint of format 2", go_on, put("format", 2), ["{latest}", "format 2", "reads 3", "train again"]),
    ("run under another protocol", go_on, flags("--target-images", "all"), ["{latest}", "--target-images"]),
    ("run of another length", go_on, flags("--max-steps", 9), ["{latest}", "--max-steps"]),
    ("run not there", go_on, flags("--output-dir", "none"), ["none/split1/stage1/latest.pth", "pretrained"]),
    ("no weights of ImageNet", stage1, flags("--backbone-weights", "imagenet"), ["--backbone small"]),
    ("backbone that stage 2 can't use", stage1, flags("--config", BEST, "--backbone", "vgg16"), ["labels episodes"]),
    ("record that is a folder", stage1, lambda p: (p.root / "new/split1/stage1/log.jsonl").mkdir(parents=True),
     ["{root}/new/split1/stage1"]),
]  # fmt: skip


def contents(place) -> dict:
    """All files and folders, but the class index, which is brought up to date at any time."""
    paths = [path for path in place.root.rglob("*") if not path.name.startswith("class_index")]
    return {str(path): path.is_file() and path.read_bytes() for path in paths}


NAMES = [f"{what}-{command.__name__}" for what, command, *_ in HOSTILE]


@pytest.mark.parametrize("command, spoil, words", [row[1:] for row in HOSTILE], ids=NAMES)
def test_bad_input_is_one_line_and_writes_nothing(place, capsys, monkeypatch, command, spoil, words):
    monkeypatch.chdir(place.root)
    more = spoil(place)
    before = contents(place)
    main, argv = command(place, more if isinstance(more, list) else [])
    line = failure(capsys, main, argv)
    for word in words:
        assert word.format(**vars(place)) in line, (word, line)
    after = contents(place)
    assert after == before, sorted(set(after) ^ set(before))


def test_an_output_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with pytest.raises(UserError, match=r"--output-dir x can't be written .*or no permission"):
        check_writable(tmp_path / "x", "--output-dir x")


def other_letters(place):
    """A path and an image with spaces and letters of several scripts."""
    name = "sheep in Ærøskøbing 羊"
    for path in (place.image, place.mask):
        path.rename(path.with_name(name + path.suffix))
    place.list.write_text(place.list.read_text().replace(place.source, name), encoding="utf-8")
    place.root = place.root.rename(place.root.with_name("Bilder von Ömer, 写真 (2)"))
    place.data, place.runs = place.root / "data", place.root / "runs"
    place.latest = place.runs / "split1/stage1/latest.pth"


ODD = {
    "grey image": other_image("image", "L", "JPEG"),
    "image with alpha": other_image("image", "RGBA", "PNG"),
    "one mask all void": lambda p: fill(p.mask, VOID),
    "list with a BOM, CRLF and blanks": write("list", lambda b: b"\xef\xbb\xbf" + b.replace(b"\n", b" \r\n\r\n\t\r\n")),
    "spaces and other letters": other_letters,
}


@pytest.mark.parametrize("spoil", ODD.values(), ids=ODD)
def test_odd_input_is_taken(place, capsys, spoil):
    spoil(place)
    for command, flags in ((stage1, []), (evaluation, ["--json", place.root / "ö 1.json"])):
        main, argv = command(place, flags)
        assert main(list(map(str, argv))) == 0
        place.latest = place.root / "new/split1/stage1/latest.pth"
    assert "Traceback" not in capsys.readouterr().err


def test_a_damaged_cache_of_features_is_made_again(place):
    command = [*arguments(place.data, place.root / "a", **PLAN), "--freeze-backbone", "--cache-features"]
    command += [str(place.root / "cache"), "--set", "scale=1,1", "rotation=0", "flip=0"]
    assert STAGES[1].main(command) == 0
    files = sorted((place.root / "cache").rglob("*.npy"))
    for number, path in enumerate(files):
        path.write_bytes([b"", path.read_bytes()[:-7], b"\x93NUMPY junk"][number % 3])
    command[command.index("--output-dir") + 1] = str(place.root / "b")
    assert files and STAGES[1].main(command) == 0
    first, second = (load(place.root / name / "split1/stage1/latest.pth") for name in "ab")
    assert same(first["model"], second["model"])

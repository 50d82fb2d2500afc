"""predict.py on images of every kind, with the checkpoint's classes and with other words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from dataset.images import read_image
from dataset.splits import Split
from helpers import ROOT, failure, load
from model.predictor import load_segmenter

SPLIT = Split.named(1)


def random_image(height=40, width=60, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photo(tmp_path):
    random_image().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def command(finished, output, images, *flags):
    start = ["--checkpoint", finished.stage2 / "latest.pth", "--output-dir", output, "--device", "cpu", "--no-flip"]
    images = images if isinstance(images, list) else [images]
    return [str(part) for part in [*start, "--no-edges", "--scales", 1, "--images", *images, *flags]]


def run(finished, output, images, *flags):
    """Predicts; returns what predictions.json says."""
    assert predict.main(command(finished, output, images, *flags)) == 0
    return json.loads((output / "predictions.json").read_text())


def read_mask(path):
    with Image.open(path) as mask:
        assert mask.mode == "P"
        return np.array(mask)


def network_prediction(finished, photo, classes=range(20)):
    """The mask that the checkpoint's network gives at the photo's own size, where only some classes compete."""
    model, split, _ = load_segmenter(finished.stage2 / "latest.pth")
    image, classes = torch.from_numpy(read_image(photo)).permute(2, 0, 1)[None], list(classes)
    with torch.inference_mode():
        best = model.eval()(image)[0, classes].argmax(dim=0).numpy()
    return split.to_mask(np.array(classes)[best])


def test_own_photo_with_the_checkpoints_classes(finished, photo, tmp_path, capsys):
    report = run(finished, tmp_path / "out", photo)
    mask = read_mask(tmp_path / "out" / "masks" / "photo.png")
    assert mask.shape == (40, 60) and (mask == network_prediction(finished, photo)).all()
    value = {name: entry["value"] for name, entry in report["classes"].items()}
    assert value == dict(zip(SPLIT.names, SPLIT.mask_values))
    shares = report["images"]["photo"]["shares"]
    assert shares == pytest.approx({name: (mask == value[name]).mean() for name in shares})
    assert sum(shares.values()) == 1
    with Image.open(tmp_path / "out" / "overlays" / "photo.png") as overlay:
        assert overlay.width > 2 * 60
    printed = capsys.readouterr().out
    assert "photo, " in printed and "no target mask opened" in printed
    assert "unseen (shown without labels)   aeroplane, bicycle, bird, boat, bottle" in printed
    assert not (tmp_path / "out" / "confidence").exists()


def test_own_words_keep_known_values_and_get_new_ones(finished, photo, tmp_path, capsys):
    report = run(finished, tmp_path / "out", photo, "--classes", "Dog,", "zebra, boat,", "traffic  light")
    assert report["classes"] == {
        "dog": {"value": 12, "kind": "seen"}, "zebra": {"value": 21, "kind": "new"},
        "boat": {"value": 4, "kind": "unseen"}, "traffic light": {"value": 22, "kind": "new"},
    }  # fmt: skip
    assert set(np.unique(read_mask(tmp_path / "out" / "masks" / "photo.png"))) <= {12, 21, 4, 22}
    assert "new (never shown, only words)   zebra, traffic light" in capsys.readouterr().out


def test_fewer_known_classes_only_take_part(finished, photo, tmp_path):
    """Among classes of the checkpoint, the logits that are left decide as they are."""
    report = run(finished, tmp_path / "out", photo, "--classes", "cat, boat, sofa")
    chosen = [SPLIT.names.index(name) for name in ("cat", "boat", "sofa")]
    mask = read_mask(tmp_path / "out" / "masks" / "photo.png")
    assert (mask == network_prediction(finished, photo, chosen)).all()
    assert {entry["kind"] for entry in report["classes"].values()} == {"seen", "unseen"}


def test_confidence_maps_and_a_lowest_confidence(finished, photo, tmp_path):
    run(finished, tmp_path / "all", photo, "--confidence", "--classes", "cat, boat")
    with Image.open(tmp_path / "all" / "confidence" / "photo.png") as grey:
        assert grey.mode == "L"
        confidence = np.array(grey) / 255
    assert confidence.shape == (40, 60) and confidence.min() >= 0.5 - 1e-2  # of two classes, the better
    cut = float(np.median(confidence))
    run(finished, tmp_path / "sure", photo, "--min-confidence", cut, "--classes", "cat, boat")
    before, after = (read_mask(tmp_path / name / "masks" / "photo.png") for name in ("all", "sure"))
    left = after == 255
    assert 0 < left.mean() < 1 and (before[~left] == after[~left]).all()
    assert confidence[left].max() <= cut + 3e-3 and confidence[~left].min() >= cut - 3e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (7, 5), (33, 500), (700, 900)])
def test_any_size(finished, tmp_path, size):
    random_image(*size).save(tmp_path / "p.png")
    run(finished, tmp_path / "out", tmp_path / "p.png", "--scale-to", 64, "--classes", "cat, boat")
    assert read_mask(tmp_path / "out" / "masks" / "p.png").shape == size


def test_folder_of_many_kinds(finished, tmp_path):
    """Grey, transparent, palette, CMYK, one turned by EXIF; the text is left out."""
    folder = tmp_path / "photos"
    folder.mkdir()
    plain, exif = random_image(), Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    plain.convert("L").save(folder / "grey.png")
    plain.convert("RGBA").save(folder / "clear.webp")
    plain.convert("P").save(folder / "palette.png", transparency=0)
    plain.convert("CMYK").save(folder / "print.jpg")
    plain.save(folder / "turned.jpg", exif=exif)
    plain.save(folder / "grey.bmp")
    (folder / "notes.txt").write_text("no image")
    report = run(finished, tmp_path / "out", folder, "--classes", "cat, boat")
    names = {"clear", "grey", "grey_2", "palette", "print", "turned"}
    assert set(report["images"]) == names == {p.stem for p in (tmp_path / "out" / "masks").iterdir()}
    shapes = {name: read_mask(tmp_path / "out" / "masks" / f"{name}.png").shape for name in names}
    assert shapes == {name: (60, 40) if name == "turned" else (40, 60) for name in names}


def test_images_of_one_name_have_results_of_their_own():
    paths = [Path("a/p.png"), Path("b/p.png"), Path("b/P.bmp"), Path("b/p_2.png")]
    assert predict.result_names(paths) == ["p", "p_2", "P_3", "p_2_2"]


@pytest.mark.parametrize("name", ["żółw 🐢.png", "caf\udce9.png"])
def test_name_that_the_terminal_cannot_print(finished, tmp_path, name):
    """The second name is not UTF-8, as from an old archive."""
    folder = tmp_path / "images"
    folder.mkdir()
    random_image().save(folder / name)
    random_image().save(folder / "z.png")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    argv = [sys.executable, "predict.py", *command(finished, tmp_path / "out", folder)]
    subprocess.run(argv, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 2


def test_what_no_class_fits_is_background(finished, photo, tmp_path):
    """Where the checkpoint knows the background, it competes with any classes."""
    checkpoint = load(finished.stage2 / "latest.pth")
    split = Split.named(1, "score")
    checkpoint["metadata"] |= split.as_dict() | {"embedding": ["no such source"]}  # its own classes need no files
    own = checkpoint["model"]["projection.class_embeddings"]
    checkpoint["model"]["projection.class_embeddings"] = torch.cat([own[-1:], own])
    torch.save(checkpoint, tmp_path / "scored.pth")
    flags = ["--classes", "cat", "--checkpoint", tmp_path / "scored.pth"]
    assert list(run(finished, tmp_path / "out", photo, *flags)["classes"]) == ["background", "cat"]


def test_broken_image_does_not_stop_the_others(finished, photo, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    argv = command(finished, tmp_path / "out", [tmp_path / "broken.jpg", photo])
    line = failure(capsys, predict.main, argv)
    assert "broken.jpg" in line and "1 of 2" in line
    assert (tmp_path / "out" / "masks" / "photo.png").is_file()


BAD = [
    (["--classes", "cat"], ["--classes cat:", "separated by commas"]),
    (["--classes", "cat, dog, Cat"], ["--classes cat, dog, cat:", "each once"]),
    (["--classes", "cat, zebbra"], ["no vector for 'zebbra'", "--vocabulary"]),
    (["--classes", "cat, zebra", "--vocabulary", "missing.txt"], ["missing.txt", "No such file"]),
    (["--classes", "cat, zebra", "--vocabulary", "a.txt", "b.txt"], ["--vocabulary: 2 files for glove"]),
    (["--images", "missing.jpg"], ["--images", "missing.jpg"]),
    (["--images", "."], ["--images", "holds no images"]),
    (["--checkpoint", "missing.pth"], ["no checkpoint at missing.pth"]),
    (["--scale-to", "8"], ["--scale-to", "at least 32"]),
    (["--min-confidence", "2"], ["--min-confidence", "at most 1"]),
]


@pytest.mark.parametrize("flags, expected", BAD, ids=lambda value: " ".join(value))
def test_bad_input_is_one_line(finished, photo, tmp_path, monkeypatch, capsys, flags, expected):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    line = failure(capsys, predict.main, [*command(finished, tmp_path / "out", photo), *flags])
    assert all(words in line for words in expected), line
    assert not (tmp_path / "out").exists()

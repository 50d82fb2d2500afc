"""eval.py: batches of one size, several views, calibration, and what it writes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation_script
from dataset.splits import Split
from dataset.voc import evaluation_dataset
from helpers import evaluate, failure, load, mask_path, read_values
from model.segmenter import calibrate

SPLIT = Split.named(1)
SEEN = 4


@pytest.fixture
def varied(finished, tmp_path):
    """A checkpoint whose network predicts many classes: large features, and a random projection."""
    checkpoint = load(finished.stage1 / "latest.pth")
    for key, tensor in checkpoint["model"].items():
        if key.startswith("projection.") and tensor.dim() == 4:
            checkpoint["model"][key] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        if key.endswith("running_var"):
            tensor.mul_(0.02)
    torch.save(checkpoint, tmp_path / "varied.pth")
    return tmp_path / "varied.pth"


def figures(checkpoint, data, folder, *flags):
    """What eval.py writes with --json."""
    path = folder / "result.json"
    assert evaluate(checkpoint, data, "--json", path, *flags) == 0
    return json.loads(path.read_text())


def difference(a, b):
    """Pixels that two results count differently."""
    return np.abs(np.subtract(a["confusion"], b["confusion"])).sum()


def test_images_of_one_size_are_evaluated_together(varied, mixed, tmp_path):
    alone = figures(varied, mixed, tmp_path)
    together = figures(varied, mixed, tmp_path, "--evaluation-batch-size", 3)
    assert list(together["per_image"]) == list(alone["per_image"])
    assert (np.sum(alone["confusion"], axis=0) > 0).sum() > 3
    # The network sums in another order for several images, so a pixel between two classes may change.
    assert difference(alone, together) <= 4 and np.sum(alone["confusion"]) == np.sum(together["confusion"])


def test_views_are_averaged(varied, data, tmp_path, capsys):
    plain, flipped, several = (
        figures(varied, data, tmp_path, *flags) for flags in ([], ["--flip"], ["--scales", 0.75, 1, 1.25, "--flip"])
    )
    assert plain["confusion"] != flipped["confusion"] != several["confusion"] != plain["confusion"]
    assert (plain["scales"], plain["flip"]) == ([1.0], False) and several["scales"] == [0.75, 1.0, 1.25]
    printed = capsys.readouterr().out
    assert "8 images\n" in printed and "8 images at scales 0.75 1 1.25 with flips\n" in printed


def test_mean_over_flips_is_the_same_for_mirrored_images(varied, own_data, tmp_path):
    dataset = evaluation_dataset(own_data, SPLIT)
    images = [dataset.folder.image_path(name) for name in dataset.ids]
    for path in images:  # as PNG data, so that a flip is exact
        with Image.open(path) as image:
            image.convert("RGB").save(path, format="PNG")
    before = figures(varied, own_data, tmp_path, "--flip")
    for path in (*images, *(mask_path(own_data, name) for name in dataset.ids)):
        with Image.open(path) as image:
            mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mirrored.save(path, format="PNG")
    assert difference(before, figures(varied, own_data, tmp_path, "--flip")) <= 4


# --- calibration ----------------------------------------------------------------------------------------


def random_logits():
    return torch.randn(2, 7, 9, 8, generator=torch.Generator().manual_seed(0))


def test_gamma_is_subtracted_from_the_probability_of_the_seen_classes():
    logits = random_logits()
    scores, probability = calibrate(logits, SEEN, 0.3), logits.softmax(dim=1)
    assert torch.allclose(scores[:, :SEEN], probability[:, :SEEN] - 0.3)
    assert torch.allclose(scores[:, SEEN:], probability[:, SEEN:])
    assert torch.equal(logits, random_logits()) and calibrate(logits, SEEN, 0.0) is logits


def test_a_higher_gamma_moves_pixels_to_the_unseen_classes_only():
    logits = random_logits()
    before, some, every = (calibrate(logits, SEEN, gamma).argmax(dim=1) for gamma in (0.0, 0.2, 1.0))
    assert (before >= SEEN).sum() < (some >= SEEN).sum() < some.numel()
    assert torch.equal(every, logits[:, SEEN:].argmax(dim=1) + SEEN)
    assert torch.equal(some[some < SEEN], before[some < SEEN])


def test_saved_masks_are_the_calibrated_prediction(finished, tmp_path, capsys):
    """With gamma 1 the masks show unseen classes alone; the overlays lie beside them."""
    flags = ["--calibration", 1, "--save-dir", tmp_path / "out"]
    result = figures(finished.stage2 / "latest.pth", finished.data, tmp_path, *flags)
    assert result["calibration"] == 1 and result["bias"] == result["miou_seen"] == 0.0
    assert "1 subtracted from the softmax" in capsys.readouterr().out
    setting = load(finished.stage2 / "latest.pth")["metadata"]
    shown = {int(v) for path in (tmp_path / "out" / "masks").iterdir() for v in np.unique(read_values(path))}
    assert shown and shown <= set(setting["mask_values"][len(setting["seen"]) :])
    assert len(result["drawn"]) == 8 and all(Image.open(path).width > 300 for path in result["drawn"].values())


def test_json_without_a_path_is_printed_instead_of_the_table(finished, capsys):
    assert evaluate(finished.stage2 / "latest.pth", finished.data, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    kept = json.loads((finished.stage2 / "evaluation.json").read_text())
    assert all(printed[key] == kept[key] for key in ("per_class", "hiou", "bias", "miou_zsl"))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--calibration", "1.5"], ["--calibration", "at most 1"]),
        (["--scales", "0"], ["--scales"]),
    ],
)
def test_bad_flags_are_refused(capsys, flags, words):
    line = failure(capsys, evaluation_script.main, ["--checkpoint", "x", *flags])
    assert all(word in line for word in words), line

"""eval.py: batches of one size, several views, calibration, and what it writes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.splits import Split
from helpers import evaluate, load
from masks import read_values

SPLIT = Split.named(1)


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


def test_images_of_one_size_are_evaluated_together(varied, mixed, tmp_path):
    alone = figures(varied, mixed, tmp_path)
    together = figures(varied, mixed, tmp_path, "--evaluation-batch-size", 3)
    assert (np.sum(alone["confusion"], axis=0) > 0).sum() > 2
    # The network sums in another order for several images, so a pixel between two classes may change.
    counts = np.array([alone["confusion"], together["confusion"]])
    assert np.abs(counts[0] - counts[1]).sum() <= 4 and counts[0].sum() == counts[1].sum()


def test_views_are_averaged(varied, data, tmp_path, capsys):
    plain, flipped, several = (
        figures(varied, data, tmp_path, *flags) for flags in ([], ["--flip"], ["--scales", 0.75, 1, 1.25, "--flip"])
    )
    assert plain["confusion"] != flipped["confusion"] != several["confusion"] != plain["confusion"]
    assert (plain["scales"], plain["flip"]) == ([1.0], False) and several["scales"] == [0.75, 1.0, 1.25]
    printed = capsys.readouterr().out
    assert "flip: False" in printed and "scales: [0.75, 1.0, 1.25]\nflip: True" in printed


def test_saved_masks_are_the_calibrated_prediction(finished, tmp_path, capsys):
    """With gamma 1 the masks show unseen classes alone; the overlays lie beside them."""
    flags = ["--calibration", 1, "--save-dir", tmp_path / "out"]
    result = figures(finished.stage2 / "latest.pth", finished.data, tmp_path, *flags)
    assert result["calibration"] == 1 and result["bias"] == result["miou_seen"] == 0.0
    assert "calibration: 1" in capsys.readouterr().out
    setting = load(finished.stage2 / "latest.pth")["metadata"]
    shown = {int(v) for path in (tmp_path / "out" / "masks").iterdir() for v in np.unique(read_values(path))}
    assert shown and shown <= set(setting["mask_values"][len(setting["seen"]) :])
    overlays = list((tmp_path / "out" / "overlays").iterdir())
    assert len(overlays) == 8 and all(Image.open(path).width > 300 for path in overlays)

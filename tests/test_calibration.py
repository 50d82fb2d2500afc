"""Calibration of seen against unseen classes: the function, and eval.py with one gamma and with several."""

import json

import numpy as np
import pytest
import torch

import eval as evaluation_script
from helpers import evaluate, failure, load, read_values
from model.calibration import calibrate

SEEN, CLASSES = 3, 5


def random_logits():
    return 3 * torch.randn(2, CLASSES, 6, 7, generator=torch.Generator().manual_seed(0))


def test_gamma_is_taken_from_the_probability_of_the_seen_classes():
    logits = random_logits()
    change = calibrate(logits, SEEN, 0.25) - logits.softmax(dim=1)
    torch.testing.assert_close(change[:, :SEEN], torch.full_like(change[:, :SEEN], -0.25))
    assert (change[:, SEEN:] == 0).all()


def test_gamma_0_leaves_every_bit():
    logits = random_logits()
    assert torch.equal(calibrate(logits, SEEN, 0.0), logits)


def test_gamma_moves_pixels_to_the_unseen_classes_only():
    """Where an unseen class won it still does; with gamma 1 one wins everywhere, and it is the best of them."""
    logits = random_logits()
    before, some, every = (calibrate(logits, SEEN, gamma).argmax(dim=1) for gamma in (0.0, 0.5, 1.0))
    assert torch.equal(some[before >= SEEN], before[before >= SEEN])
    assert (before >= SEEN).sum() < (some >= SEEN).sum() < some.numel()
    assert torch.equal(every, logits[:, SEEN:].argmax(dim=1) + SEEN)
    assert torch.equal(some[some < SEEN], before[some < SEEN])


def test_the_logits_themselves_are_not_changed():
    logits = random_logits()
    calibrate(logits, SEEN, 0.5)
    assert torch.equal(logits, random_logits())


# --- eval.py --------------------------------------------------------------------------------------------


def figures(capsys, finished, *flags) -> dict:
    capsys.readouterr()
    assert evaluate(finished.stage2 / "latest.pth", finished.data, "--json", *flags) == 0
    return json.loads(capsys.readouterr().out)


def test_eval_is_calibrated_on_request_only(finished, capsys):
    plain, off, half, full = (
        figures(capsys, finished, *flags)
        for flags in ([], ["--calibration", 0], ["--calibration", 0.3], ["--calibration", 1])
    )
    assert plain == off and plain["calibration"] == 0.0
    assert half["calibration"] == 0.3 and full["calibration"] == 1.0
    assert plain["bias"] >= half["bias"] >= full["bias"] == 0.0 and full["miou_seen"] == 0.0
    assert plain["bias"] > 0
    assert half["miou_zsl"] == pytest.approx(plain["miou_zsl"], abs=1e-6)


def test_eval_of_several_gammas_is_that_of_each(finished, capsys):
    several = figures(capsys, finished, "--calibration", 0, 0.3, 1, 0.3)
    rows = several.pop("calibrations")
    assert [row["calibration"] for row in rows] == [0.0, 0.3, 1.0]
    for row in rows:
        alone = figures(capsys, finished, "--calibration", row["calibration"])
        assert row == {key: alone[key] for key in row}
    assert several["best_calibration"] == max(rows, key=lambda row: row["hiou"])["calibration"]


def test_eval_says_how_it_was_calibrated(finished, capsys):
    checkpoint = finished.stage2 / "latest.pth"
    for flags, words in (
        ([], ["calibration: off"]),
        (["--calibration", 0.3], ["calibration: 0.3 taken"]),
        (["--calibration", 0, 0.3], ["gamma 0 ", "gamma 0.3 ", "best hIoU: --calibration", "validation split"]),
    ):
        capsys.readouterr()
        evaluate(checkpoint, finished.data, *flags)
        text = capsys.readouterr().out
        assert all(word in text for word in words), text


def test_eval_draws_what_calibration_chose(finished, tmp_path):
    """With gamma 1 the masks show unseen classes alone."""
    checkpoint = finished.stage2 / "latest.pth"
    evaluate(checkpoint, finished.data, "--calibration", 1, "--save-dir", tmp_path)
    setting = load(checkpoint)["setting"]
    unseen = setting["mask_values"][len(setting["seen"]) :]
    shown = set(np.concatenate([read_values(path).ravel() for path in (tmp_path / "masks").iterdir()]).tolist())
    assert shown and shown <= set(unseen)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--calibration", "1.5"], ["--calibration", "at most 1"]),
        (["--calibration"], ["--calibration", "at least one"]),
        (["--calibration", "0", "0.5", "--save-dir", "x"], ["--save-dir", "--calibration"]),
    ],
)
def test_bad_calibration_is_refused(capsys, flags, words):
    line = failure(capsys, evaluation_script.main, ["--checkpoint", "x", *flags])
    assert all(word in line for word in words), line

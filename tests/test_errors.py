"""Whatever is wrong with the input: one line that names the file or flag and the mend, and exit code 2."""

import contextlib
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation_script
import train_split_lambda
import train_st_split
from dataset.splits import VOID, Split
from helpers import (
    ROOT,
    STAGES,
    arguments,
    classes_shown,
    copy_of,
    failure,
    load,
    mask_path,
    read_values,
    source_and_target,
    target_only,
    train,
    write_values,
)

SPLIT = Split.voc(1)


@pytest.fixture
def place(finished, tmp_path):
    """A drawn set and the runs on it, to spoil; `picture` is a source picture, `evaluated` one of val."""
    data = copy_of(finished.data, tmp_path / "data")
    runs = copy_of(finished.output, tmp_path / "runs")
    return SimpleNamespace(
        data=data, output=runs, checkpoint=runs / "split1" / "stage1" / "latest.pth",
        picture=source_and_target(data, SPLIT)[0], evaluated=next(iter(classes_shown(data, "val"))),
    )  # fmt: skip


def fail_training(capsys, place, stage=1, **changes):
    """The error line of a run that sees every source picture, in place of the one that is there."""
    plan = {"batch_size": 40, "max_steps": 1} | changes
    if plan.get("restore_from_where") != "continue":
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (place.output / "split1" / f"stage{stage}" / "latest.pth").unlink()
    return failure(capsys, STAGES[stage].main, arguments(place.data, place.output, **plan))


def fail_evaluation(capsys, place, *flags, checkpoint=None):
    command = [
        "--checkpoint",
        checkpoint or place.checkpoint,
        "--data-path",
        place.data,
        "--num-workers",
        0,
        *flags,
    ]
    return failure(capsys, evaluation_script.main, command)


def image_path(place, picture=None):
    return place.data / "JPEGImages" / f"{picture or place.picture}.jpg"


# --- the folder and its lists ---------------------------------------------------------------------------


def no_folder(place):
    shutil.rmtree(place.data)
    return ["--data-path", str(place.data), "is not a folder", "DATA_PATH.md"]


def folder_is_a_file(place):
    shutil.rmtree(place.data)
    place.data.write_text("")
    return ["--data-path", str(place.data), "is not a folder"]


def no_pictures(place):
    shutil.rmtree(place.data / "JPEGImages")
    return ["--data-path", str(place.data), "JPEGImages"]


def no_mask_folder(place):
    shutil.rmtree(place.data / "SegmentationClassAug")
    return [str(place.data), "SegmentationClassAug", "SegmentationClass"]


def no_lists(place):
    shutil.rmtree(place.data / "ImageSets")
    return [str(place.data / "ImageSets" / "Segmentation"), "train.txt"]


def no_train_list(place):
    (place.data / "ImageSets/Segmentation/train.txt").unlink()
    return ["train_aug.txt", "train.txt", str(place.data / "ImageSets/Segmentation")]


def no_val_list(place):
    (place.data / "ImageSets/Segmentation/val.txt").unlink()
    return ["val.txt", str(place.data / "ImageSets/Segmentation")]


def empty_list(place):
    (place.data / "ImageSets/Segmentation/train.txt").write_text("\n \n")
    return ["train.txt", "empty", "one picture id a line"]


def binary_list(place):
    (place.data / "ImageSets/Segmentation/train.txt").write_bytes(b"\xff\xfe\x00\x81")
    return ["train.txt", "can't be read"]


def listed_twice(place):
    path = place.data / "ImageSets/Segmentation/train.txt"
    path.write_text(path.read_text() + place.picture + "\n")
    return ["train.txt", place.picture, "twice"]


def list_of_paths(place):
    path = place.data / "ImageSets/Segmentation/train.txt"
    path.write_text("../secret\n" + path.read_text())
    return ["train.txt", "'../secret'", "entry 1"]


# --- pictures and masks ---------------------------------------------------------------------------------


def no_image(place):
    image_path(place).unlink()
    return [str(image_path(place)), "missing"]


def truncated_image(place):
    path = image_path(place)
    path.write_bytes(path.read_bytes()[:400])
    return [str(path), "can't be read as a picture", "replace"]


def empty_image(place):
    image_path(place).write_bytes(b"")
    return [str(image_path(place)), "can't be read as a picture"]


def image_is_text(place):
    image_path(place).write_text("<html>404</html>")
    return [str(image_path(place)), "can't be read as a picture"]


def no_mask(place):
    mask_path(place.data, place.picture).unlink()
    return [str(mask_path(place.data, place.picture)), "missing", "copy the mask"]


def truncated_mask(place):
    path = mask_path(place.data, place.picture)
    path.write_bytes(path.read_bytes()[:-30])
    return [str(path), "can't be read as a mask"]


def sizes_differ(place):
    path = mask_path(place.data, place.picture)
    write_values(path, read_values(path)[:-1])
    return [str(path), "48 x 39", str(image_path(place)), "48 x 40", "same size"]


def unknown_value(place):
    path = mask_path(place.data, place.picture)
    mask = read_values(path)
    mask[0, 0] = 21
    write_values(path, mask)
    return [str(path), "21", "0-20", str(VOID)]


def colour_mask(place):
    path = mask_path(place.data, place.picture)
    Image.open(path).convert("RGB").save(path)
    return [str(path), "colour mask", "index mask"]


def mask_of_16_bits(place):
    path = mask_path(place.data, place.picture)
    Image.fromarray(read_values(path).astype(np.uint16)).save(path)
    return [str(path), "index mask", "8-bit"]


def no_seen_class(place):
    (place.data / "ImageSets/Segmentation/train.txt").write_text("\n".join(target_only(place.data, SPLIT)))
    return ["seen class", "--split"]


def no_unseen_class(place):
    shown = classes_shown(place.data)
    ids = [picture for picture, values in shown.items() if not values & SPLIT.unseen_values]
    (place.data / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids))
    return ["unseen class", "--target-images all"]


def never_indexed(place):
    picture = target_only(place.data, SPLIT)[0]
    (place.data / "class_index_SegmentationClassAug.json").unlink()
    mask_path(place.data, picture).unlink()
    return [picture, "--target-images all"]


BROKEN_DATA = [
    no_folder, folder_is_a_file, no_pictures, no_mask_folder, no_lists,
    no_train_list, no_val_list, empty_list, binary_list, listed_twice,
    list_of_paths, no_image, truncated_image, empty_image, image_is_text,
    no_mask, truncated_mask, sizes_differ, unknown_value, colour_mask,
    mask_of_16_bits, no_seen_class, no_unseen_class, never_indexed,
]  # fmt: skip


@pytest.mark.parametrize("spoil", BROKEN_DATA, ids=lambda spoil: spoil.__name__)
def test_broken_data_stops_training(place, capsys, spoil):
    expected = spoil(place)
    line = fail_training(capsys, place)
    assert all(words in line for words in expected), line


@pytest.mark.parametrize("spoil", [no_folder, truncated_image, no_mask], ids=lambda spoil: spoil.__name__)
def test_broken_data_stops_stage_2_too(place, capsys, spoil):
    expected = spoil(place)
    line = fail_training(capsys, place, stage=2, restore_from_where="saved")
    assert all(words in line for words in expected), line


def test_broken_data_is_named_from_a_worker_too(place):
    """As a command, since what the workers print is caught here too."""
    expected = truncated_image(place)
    flags = arguments(place.data, place.output / "new", batch_size=40, num_workers=2)
    command = [sys.executable, ROOT / "train_split_lambda.py", *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert all(words in lines[0] for words in expected) and "UserError" not in lines[0]


SPOIL_FOR_EVALUATION = [
    no_folder, no_val_list, no_image, truncated_image, no_mask, truncated_mask, sizes_differ, unknown_value,
    colour_mask,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOIL_FOR_EVALUATION, ids=lambda spoil: spoil.__name__)
def test_broken_data_stops_evaluation(place, capsys, spoil):
    place.picture = place.evaluated
    expected = spoil(place)
    line = fail_evaluation(capsys, place)
    assert all(words in line for words in expected), line


def test_oracle_needs_the_masks_of_target_pictures(place, capsys):
    picture = target_only(place.data, SPLIT)[0]
    mask_path(place.data, picture).unlink()
    line = fail_training(capsys, place, target_batch_size=40, target_pixels="oracle")
    assert str(mask_path(place.data, picture)) in line and "missing" in line


def test_a_missing_mask_of_a_target_picture_is_no_error(place):
    mask_path(place.data, target_only(place.data, SPLIT)[0]).unlink()
    train(1, place.data, place.output / "new", max_steps=1, target_batch_size=40)


def test_a_list_given_by_flag_is_named(place, capsys):
    line = fail_training(capsys, place, train_list="nowhere")
    assert "nowhere.txt" in line and str(place.data) in line


# --- words ----------------------------------------------------------------------------------------------


def test_a_word_without_vector_is_named_with_its_class(place, capsys, tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "poor.txt").write_text("car 1 0 0\ncat 0 1 0\n")
    line = fail_training(capsys, place, embedding="poor", embedding_path=tmp_path / "words")
    assert "poor.txt" in line and "no vector for" in line and "'dog'" in line and "--embedding" in line


def test_an_unknown_embedding_is_named(place, capsys):
    line = fail_training(capsys, place, embedding="nothing")
    assert "no 'nothing' vectors" in line and "glove" in line


# --- checkpoints ----------------------------------------------------------------------------------------


def change_setting(path, **changes):
    checkpoint = load(path)
    checkpoint["setting"] |= changes
    torch.save(checkpoint, path)


OTHER_SETTINGS = {
    "split": 4, "backbone": "vgg16", "embedding": ["word2vec", "fasttext"], "background": True,
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER_SETTINGS)
@pytest.mark.parametrize("stage, where", [(2, "saved"), (1, "continue"), (2, "continue")])
def test_a_checkpoint_of_another_network_is_refused(place, capsys, stage, where, key):
    path = place.output / "split1" / f"stage{1 if where == 'saved' else stage}" / "latest.pth"
    change_setting(path, **{key: OTHER_SETTINGS[key]})
    line = fail_training(capsys, place, stage, restore_from_where=where)
    assert str(path) in line and f"--{key}" in line
    shown = " ".join(OTHER_SETTINGS[key]) if key == "embedding" else str(OTHER_SETTINGS[key])
    assert shown in line and "give the same" in line


@pytest.mark.parametrize("flag, value", [("target_pixels", "oracle"), ("target_images", "all")])
def test_a_run_goes_on_under_its_own_protocol_only(place, capsys, flag, value):
    line = fail_training(capsys, place, restore_from_where="continue", **{flag: value})
    assert str(place.checkpoint) in line and "--" + flag.replace("_", "-") in line


def test_stage_2_without_oracle_refuses_a_stage_1_with_one(place, capsys):
    """Else its table would say that no target mask was opened."""
    change_setting(place.checkpoint, target_pixels="oracle")
    line = fail_training(capsys, place, 2, restore_from_where="saved")
    assert str(place.checkpoint) in line and "--target-pixels" in line and "oracle" in line


@pytest.mark.parametrize("flag, value", [("learning_rate", "0.5"), ("momentum", "0.1"), ("max_steps", "9")])
def test_a_run_goes_on_with_its_own_schedule_only(place, capsys, flag, value):
    """The optimiser's state keeps the old rates: another flag would be said, but not done."""
    same = {"batch_size": 3, "max_steps": 3, "restore_from_where": "continue"}
    line = fail_training(capsys, place, **same | {flag: value})
    assert str(place.checkpoint) in line and "--" + flag.replace("_", "-") in line


def test_a_run_goes_on_frozen_or_not_as_it_began(place, capsys):
    command = [*arguments(place.data, place.output, restore_from_where="continue"), "--freeze-backbone"]
    line = failure(capsys, train_split_lambda.main, command)
    assert str(place.checkpoint) in line and "--freeze-backbone" in line


@pytest.mark.parametrize(
    "stage, where, mend",
    [(2, "saved", "stage 1"), (1, "continue", "pretrained"), (2, "continue", "saved")],
)
def test_no_checkpoint_where_one_is_wanted(place, capsys, tmp_path, stage, where, mend):
    place.output = tmp_path / "empty"
    line = fail_training(capsys, place, stage, restore_from_where=where)
    name = place.output / "split1" / f"stage{1 if where == 'saved' else stage}" / "latest.pth"
    assert str(name) in line and mend in line


def test_no_checkpoint_at_the_flag(place, capsys, tmp_path):
    line = fail_training(capsys, place, 2, restore_from_where="saved", stage1_checkpoint=tmp_path / "none.pth")
    assert str(tmp_path / "none.pth") in line and "--stage1-checkpoint" in line


def test_no_checkpoint_to_evaluate(place, capsys, tmp_path):
    assert str(tmp_path / "none.pth") in fail_evaluation(capsys, place, checkpoint=tmp_path / "none.pth")


def test_evaluation_refuses_another_split(place, capsys):
    line = fail_evaluation(capsys, place, "--split", 2)
    assert str(place.checkpoint) in line and "--split 1" in line


def test_garbage_is_no_checkpoint(place, capsys):
    place.checkpoint.write_bytes(b"PK\x03\x04 this was cut off")
    assert str(place.checkpoint) in fail_evaluation(capsys, place)
    assert str(place.checkpoint) in fail_training(capsys, place, 1, restore_from_where="continue")
    assert str(place.checkpoint) in fail_training(capsys, place, 2, restore_from_where="saved")


def test_a_checkpoint_without_a_tensor_does_not_fit(place, capsys):
    checkpoint = load(place.checkpoint)
    checkpoint["model"].pop("projection.project.bias")
    torch.save(checkpoint, place.checkpoint)
    for line in (fail_evaluation(capsys, place), fail_training(capsys, place, 2, restore_from_where="saved")):
        assert str(place.checkpoint) in line and "does not fit" in line


# --- training goes wrong --------------------------------------------------------------------------------


def poison(monkeypatch, module, step, value, after=False):
    """Makes weights of the network `value` before (or after) the given step."""
    train_step, calls = module.train_step, []

    def poisoned(model, *rest):
        calls.append(1)
        if len(calls) == step and not after:
            model.projection.project.bias.data.fill_(value)
        losses = train_step(model, *rest)
        if len(calls) == step and after:
            model.projection.project.bias.data.fill_(value)
        return losses

    monkeypatch.setattr(module, "train_step", poisoned)


@pytest.mark.parametrize("stage, module", [(1, train_split_lambda), (2, train_st_split)])
def test_a_loss_that_is_not_finite_names_its_step(data, tmp_path, capsys, monkeypatch, stage, module):
    poison(monkeypatch, module, 4, float("nan"))
    plan = {"max_steps": 6, "save_every": 3, "evaluate_every": 0}
    line = failure(capsys, module.main, arguments(data, tmp_path, **plan))
    assert "step 4" in line and "loss" in line and "nan" in line and "--learning-rate" in line
    kept = load(tmp_path / "split1" / f"stage{stage}" / "latest.pth")
    assert kept["step"] == 3 and all(tensor.isfinite().all() for tensor in kept["model"].values())


@pytest.mark.parametrize("every", [{"evaluate_every": 1}, {"save_every": 1}, {"log_every": 1}, {}], ids=str)
def test_a_rate_that_is_far_too_high_is_said(data, tmp_path, capsys, every):
    """Wherever the numbers are first looked at, and though the loss of the step before was still finite."""
    plan = {"max_steps": 5, "learning_rate": "1e35", "evaluate_every": 0, "save_every": 0} | every
    line = failure(capsys, train_split_lambda.main, arguments(data, tmp_path, **plan))
    assert "not finite" in line or " is nan " in line or " is inf " in line
    assert "--learning-rate" in line
    latest = tmp_path / "split1" / "stage1" / "latest.pth"
    assert not latest.exists() or all(tensor.isfinite().all() for tensor in load(latest)["model"].values())


@pytest.mark.parametrize("every", [{"evaluate_every": 1}, {"save_every": 1}], ids=str)
def test_weights_that_are_not_finite_are_not_kept(data, tmp_path, capsys, monkeypatch, every):
    """The loss of the last step can be finite though the step itself was too long."""
    poison(monkeypatch, train_split_lambda, 2, float("inf"), after=True)
    plan = {"max_steps": 4, "save_every": 1, "evaluate_every": 0} | every
    line = failure(capsys, train_split_lambda.main, arguments(data, tmp_path, **plan))
    assert "not finite" in line and "--learning-rate" in line
    kept = load(tmp_path / "split1" / "stage1" / "latest.pth")
    assert kept["step"] == 1 and all(tensor.isfinite().all() for tensor in kept["model"].values())


def test_a_network_without_finite_scores_is_not_evaluated(place, capsys):
    checkpoint = load(place.checkpoint)
    checkpoint["model"]["projection.project.bias"].fill_(float("nan"))
    torch.save(checkpoint, place.checkpoint)
    assert "not finite" in fail_evaluation(capsys, place)


# --- where to write -------------------------------------------------------------------------------------


def test_output_below_a_file_is_refused(place, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    place.output = tmp_path / "file" / "runs"
    line = fail_training(capsys, place)
    assert "--output-dir" in line and str(tmp_path / "file") in line


@pytest.mark.parametrize("name", ["args.json", "log.jsonl"])
def test_output_that_can_not_be_written_is_refused(place, capsys, tmp_path, name):
    place.output = tmp_path / "elsewhere"
    (place.output / "split1" / "stage1" / name).mkdir(parents=True)
    line = fail_training(capsys, place)
    assert str(place.output / "split1" / "stage1") in line


@pytest.mark.parametrize("flag", ["--save-dir", "--json"])
def test_evaluation_output_below_a_file_is_refused(place, capsys, tmp_path, flag):
    (tmp_path / "file").write_text("")
    line = fail_evaluation(capsys, place, flag, tmp_path / "file" / "there")
    assert flag in line and str(tmp_path / "file") in line


# --- the rest -------------------------------------------------------------------------------------------


def test_imagenet_weights_that_do_not_exist(place, capsys):
    line = fail_training(capsys, place, backbone_weights="imagenet")
    assert "--backbone small" in line and "--backbone-weights none" in line


@pytest.mark.parametrize("name", ["banana", "cuda:99"])
def test_a_device_that_is_not_there(place, capsys, name):
    line = fail_training(capsys, place, device=name)
    assert f"--device {name}" in line and "cpu" in line
    assert f"--device {name}" in fail_evaluation(capsys, place, "--device", name)


def test_a_failed_run_leaves_no_stray_files(place, capsys):
    sizes_differ(place)
    place.output /= "new"
    fail_training(capsys, place)
    assert not place.output.exists()

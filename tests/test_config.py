"""The settings: TOML file < --set < flags; all explained, all read, each with an effect; mistakes end in one line."""

import argparse
import re
import shlex

import pytest
import torch

import eval as evaluation_script
import predict
import train_split_lambda
import train_st_split
from helpers import ROOT, STAGES, failure, same, train, weights
from utils import report
from utils.config import SETTINGS, Parser, parse_settings

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def parse(stage: int, *argv) -> argparse.Namespace:
    return parse_settings(list(map(str, argv)), stage)


@pytest.mark.parametrize("script", [train_split_lambda, train_st_split, evaluation_script, predict, report])
def test_help_has_the_docstring_and_commands_that_parse(script, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = capsys.readouterr().out
    commands = [line.strip() for line in script.__doc__.splitlines() if line.startswith("    python ")]
    assert len(commands) >= 2 and all(line in text for line in commands)

    parse_args = Parser.parse_args

    def stop(parser, *argv):
        parse_args(parser, *argv)
        raise KeyboardInterrupt

    monkeypatch.setattr(Parser, "parse_args", stop)
    for line in commands:
        argv = shlex.split(line, comments=True)
        with pytest.raises(SystemExit, match="130"):
            script.main(argv[3:] if argv[1] == "-m" else argv[2:])


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_every_setting_of_the_stage_under_its_heading(stage, capsys):
    with pytest.raises(SystemExit, match="0"):
        STAGES[stage].main(["--help"])
    text = capsys.readouterr().out
    groups = {title: group for title, group in SETTINGS.items() if title != f"stage {3 - stage}"}
    assert re.findall(r"^([\w ]+):$", text, re.MULTILINE) == ["options", *(t for t in groups if t != "rare")]
    for title, group in groups.items():
        dashes, joint = ("", "_") if title == "rare" else ("  --", "-")
        assert all(dashes + row[0].strip("_").replace("_", joint) in text and len(row[3]) >= 5 for row in group)
    assert "LAMBDA_" not in text


PUBLISHED = {
    "backbone": "vgg16", "input_size": 512, "learning_rate": 1e-4, "momentum": 0.9, "weight_decay": 5e-4,
    "head_factor": 10.0, "poly_power": 0.9, "num_epochs": 50, "scale": [0.8, 2.5], "rotation": 15.0, "flip": 0.5,
    "seed": 1234, "background": "ignore", "target_pixels": "all", "target_images": "unseen", "weak_proportion": 0.2,
    "backbone_weights": "imagenet", "freeze_backbone": False,
}  # fmt: skip
OF_STAGE = {
    1: {"lambda_": 0.2, "batch_size": 9, "restore_from_where": "pretrained"},
    2: {"self_training_weight": 0.4, "keep": 0.6, "batch_size": 10, "restore_from_where": "saved"},
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("argv", [[], ["--config", ROOT / "configs/paper.toml"]], ids=["defaults", "paper.toml"])
def test_defaults_are_the_published_ones(stage, argv):
    args, expected = vars(parse(stage, *argv)), PUBLISHED | OF_STAGE[stage]
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_for_both_stages_and_begins_with_its_commands(path):
    for stage in STAGES:
        assert parse(stage, "--config", path).config == path
    head = path.read_text().split("\n\n")[0]
    assert all(f"{script} " in head for script in ("train_split_lambda.py", "train_st_split.py"))


def test_flags_override_set_which_overrides_the_file(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('scale = [1, 1]\nmomentum = 0.5\nseed = 1\nbackbone = "small"\n[stage1]\nlambda = 0.7\nseed = 2\n')
    args = parse(1, "--config", path, "--set", "momentum=0.6", "scale=0.5,2", "seed=3", "--seed", "4")
    found = (args.scale, args.momentum, args.seed, args.backbone, args.lambda_)
    assert found == ([0.5, 2.0], 0.6, 4, "small", 0.7)
    assert parse(1, "--config", path).seed == 2 and parse(2, "--config", path).seed == 1


@pytest.mark.parametrize("flag", ["--restore-from-where", "--RESTORE_FROM_WHERE"])
def test_both_spellings_of_restore_from_where(flag):
    assert all(parse(stage, flag, "continue").restore_from_where == "continue" for stage in STAGES)


def test_number_of_epochs_gives_the_steps(data, tmp_path, capsys):
    """33 source images in batches of 20, twice: 66 images in 4 steps."""
    train(1, data, tmp_path, max_steps=None, num_epochs=2, batch_size=20)
    found = re.search(r"(\d+) source and \d+ target images, (\d+) steps", capsys.readouterr().out)
    images, steps = map(int, found.groups())
    assert 20 < images <= 40 and steps == -(-2 * images // 20)


CHANGES = (
    "--train-list val", "--input-size 40", "--set scale=1,1", "--set rotation=0", "--set flip=0", "--background score",
    "--background auxiliary", "--freeze-backbone", "--batch-size 2", "--target-batch-size 1", "--optimizer adamw",
    "--learning-rate 0.02", "--set head_factor=1", "--set momentum=0", "--set weight_decay=0.1", "--set poly_power=0",
    "--set loss_stride=2", "--weak-proportion 0.9", "--target-pixels oracle", "--target-images all", "--amp bf16",
)  # fmt: skip
METHOD = {
    1: ("--lambda 1", "--supervised"),
    2: ("--self-training-weight 1", "--keep 0.1", "--balance-classes", "--pseudo-labels episodes"),
}
CASES = [*((1, flags) for flags in CHANGES + METHOD[1]), *((2, flags) for flags in METHOD[2])]
NO_EFFECT = (
    "--set log_every=1 --save-every 1 --evaluate-every 1",
    "--evaluation-list train --set evaluation_batch_size=3",
    "--checkpoint-activations",
)


@pytest.fixture(scope="module")
def unchanged(data, tmp_path_factory):
    return {stage: weights(train(stage, data, tmp_path_factory.mktemp("base"))) for stage in STAGES}


@pytest.mark.parametrize("stage, flags", CASES)
def test_settings_of_the_method_change_the_network(unchanged, data, tmp_path, stage, flags):
    assert not same(unchanged[stage], weights(train(stage, data, tmp_path, *flags.split())))


@pytest.mark.parametrize("flags", NO_EFFECT)
def test_other_settings_do_not_change_the_network(unchanged, data, tmp_path, flags):
    """Statistics of batch norm, which activations that are computed again update twice, are equal but for rounding."""
    before, after = unchanged[1], weights(train(1, data, tmp_path, *flags.split()))
    learned = [name for name in before if "running" not in name and "num_batches" not in name]
    statistics = [name for name in before if "running" in name]
    assert all(torch.equal(before[name], after[name]) for name in learned) and len(learned) > len(statistics) > 0
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in statistics)


BAD_FLAGS = [
    (["--lamda", "0.1"], ["--lamda", "did you mean --lambda"]),
    (["--qqqq"], ["--qqqq", "--help"]),
    (["--max", "3"], ["--max"]),  # flags are not guessed from their beginning
    (["--split", "5"], ["--split", "1", "2", "3", "4"]),
    (["--split", "2", "--unseen", "cat"], ["--split", "--unseen"]),
    (["--restore-from-where", "saved"], ["pretrained", "continue"]),
    (["--target-pixels", "some"], ["--target-pixels", "all", "oracle"]),
    (["--batch-size", "0"], ["--batch-size", "'0'", "at least 1"]),
    (["--batch-size", "2.5"], ["--batch-size", "whole number"]),
    (["--weak-proportion", "1.5"], ["--weak-proportion", "at most 1"]),
    (["--lambda", "-0.1"], ["--lambda", "at least 0"]),
    (["--learning-rate", "0"], ["--learning-rate", "above 0"]),
    (["--input-size", "8"], ["--input-size", "at least 16"]),
    (["--split"], ["--split", "expected one argument"]),
    (["--rotation", "3"], ["unknown argument --rotation"]),
    (["--set", "rotation"], ["--set rotation", "NAME=VALUE"]),
    (["--set", "rotatoin=3"], ["--set rotatoin=3"]),
    (["--set", "rotation=200"], ["rotation", "at most 180"]),
    (["--set", "scale=2"], ["scale", "expected 2"]),
]


@pytest.mark.parametrize("argv, expected", BAD_FLAGS, ids=lambda value: " ".join(value))
def test_bad_flags_end_in_one_line(capsys, argv, expected):
    line = failure(capsys, STAGES[1].main, argv)
    assert all(words in line for words in expected), line


BAD_FILES = {
    "unknown key": ("lamda = 1", ["--lamda", "did you mean --lambda"]),
    "key of the other stage": ("[stage1]\nkeep = 0.5", ["[stage1]", "--keep"]),
    "what a command says": ('restore_from_where = "continue"', ["--restore-from-where"]),
    "unknown part": ("[stage3]\nkeep = 0.5", ["stage3"]),
    "text for a number": ('learning_rate = "fast"', ["--learning-rate", "fast"]),
    "number for true": ("freeze_backbone = 1", ["--freeze-backbone", "1"]),
    "one number for two": ("scale = 1", ["--scale", "expected 2"]),
    "out of range": ("[stage2]\nkeep = 2", ["[stage2]", "keep", "at most 1"]),
    "unknown backbone": ('backbone = "resnet"', ["backbone", "resnet", "vgg16", "deeplabv3_resnet50"]),
    "value for a table": ("stage1 = 3", ["stage1"]),
    "no TOML": ("backbone: vgg16", ["give a TOML file"]),
    "no file": (None, ["--config", "own.toml can't be read"]),
}


@pytest.mark.parametrize("content, expected", BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_config_ends_in_one_line(capsys, tmp_path, stage, content, expected):
    """Of either stage: what stage 2 could not use is refused before stage 1 runs."""
    path = tmp_path / "own.toml"
    if content is not None:
        path.write_text(content)
    line = failure(capsys, STAGES[stage].main, ["--config", path])
    assert all(words in line for words in expected), line

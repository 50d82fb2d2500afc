"""The flags: all there, all explained, all read, each with an effect, and bad ones refused in one line."""

import argparse
import re
import shlex

import numpy as np
import pytest
from utils.options import Parser

import eval as evaluation_script
import predict
import train_split_lambda
import train_st_split
from dataset.splits import VOC_CLASSES
from helpers import STAGES, arguments, evaluate, failure, same_bits, train, weights
from utils import report
from utils.errors import one_line

SHARED = [
    "--data-path", "--output-dir", "--split", "--restore-from-where", "--backbone",
    "--backbone-weights", "--freeze-backbone", "--embedding", "--embedding-path", "--background",
    "--target-pixels", "--target-images", "--weak-proportion", "--batch-size", "--target-batch-size",
    "--input-size", "--num-epochs", "--max-steps", "--learning-rate", "--save-every",
    "--evaluate-every", "--num-workers", "--device", "--seed", "--dry-run", "--tensorboard",
]  # fmt: skip
EVALUATION = ["--checkpoint", "--data-path", "--list", "--json", "--save-dir", "--device"]
PROMISED = {
    train_split_lambda: [*SHARED, "--lambda", "--RESTORE_FROM_WHERE"],
    train_st_split: [*SHARED, "--stage1-checkpoint", "--st-lambda", "--keep", "--RESTORE_FROM_WHERE"],
    evaluation_script: [*EVALUATION, "--scales", "--flip", "--evaluation-batch-size"],
    predict: ["--checkpoint", "--images", "--classes", "--output-dir", "--confidence", "--vocabulary", "--device"],
    report: ["--output", "--title"],
}
DEFAULTS = {
    1: {
        "lambda_": 0.2,
        "weak_proportion": 0.2,
        "batch_size": 9,
        "backbone": "vgg16",
        "input_size": 512,
    },
    2: {"st_lambda": 0.4, "keep": 0.6, "weak_proportion": 0.2, "batch_size": 10, "target_pixels": "all"},
}
OF_BOTH = {
    "learning_rate": 1e-4, "momentum": 0.9, "weight_decay": 5e-4, "head_factor": 10.0, "poly_power": 0.9,
    "num_epochs": 50, "scale": [0.8, 2.5], "rotation": 15.0, "flip": 0.5, "seed": 1234, "background": False,
    "target_pixels": "all", "target_images": "unseen", "backbone_weights": "imagenet",
    "freeze_backbone": False,
}  # fmt: skip


class Caught(Exception):
    """Carries a script's parser out of `parse_args`."""


def parser_of(script, monkeypatch) -> argparse.ArgumentParser:
    def catch(self, *_):
        raise Caught(self)

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", catch)
        with pytest.raises(Caught) as caught:
            script.parse_arguments([])
    return caught.value.args[0]


@pytest.mark.parametrize("script", PROMISED, ids=lambda script: script.__name__)
def test_promised_flags_exist_and_all_have_help(script, monkeypatch):
    parser = parser_of(script, monkeypatch)
    flags = {flag: action for action in parser._actions for flag in action.option_strings or [action.dest]}
    assert set(PROMISED[script]) <= set(flags)
    assert all(len(action.help or "") >= 5 for action in flags.values())


@pytest.mark.parametrize("script", PROMISED, ids=lambda script: script.__name__)
def test_help_shows_every_flag_and_the_docstring(script, monkeypatch, capsys):
    flags = [(action.option_strings or [action.metavar])[0] for action in parser_of(script, monkeypatch)._actions]
    with pytest.raises(SystemExit) as caught:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and script.__doc__.splitlines()[0] in text
    assert all(flag in text for flag in flags)


@pytest.mark.parametrize("script", PROMISED, ids=lambda script: script.__name__)
def test_help_ends_with_the_commands_of_the_docstring(script, capsys):
    """Commands that can be pasted stand at the end, once, and every one of them is understood."""
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text, examples = capsys.readouterr().out.split("examples:\n")
    assert examples.count("python ") >= 2 and "python " not in text.split("\n\n", 1)[1].replace("python -m", "")
    for line in examples.splitlines():
        argv = shlex.split(line, comments=True)
        argv = argv[3:] if argv[1] == "-m" else argv[2:]
        assert script.parse_arguments(argv)


@pytest.mark.parametrize("stage", [1, 2])
def test_help_is_grouped_by_what_one_decides(stage, capsys):
    with pytest.raises(SystemExit):
        STAGES[stage].main(["--help"])
    text = capsys.readouterr().out
    titles = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert titles == ["options", "data", "words", "model", "method", "optimiser", "running", "examples"]
    method = text.split("\nmethod:\n")[1].split("\noptimiser:\n")[0]
    own = {1: ["--lambda", "--weak-proportion"], 2: ["--st-lambda", "--keep", "--stage1-checkpoint"]}
    assert all(f"  {flag} " in method for flag in ["--target-pixels", "--background", *own[stage]])
    assert "(default: False)" not in text and "LAMBDA_" not in text


@pytest.mark.parametrize("stage", [1, 2])
def test_defaults_are_the_published_ones(stage):
    args = vars(STAGES[stage].parse_arguments([]))
    assert {name: args[name] for name in OF_BOTH | DEFAULTS[stage]} == OF_BOTH | DEFAULTS[stage]


@pytest.mark.parametrize("stage, default", [(1, "pretrained"), (2, "saved")])
def test_both_spellings_of_restore_from_where(stage, default):
    parse = STAGES[stage].parse_arguments
    assert parse([]).restore_from_where == default
    for flag in ("--restore-from-where", "--RESTORE_FROM_WHERE"):
        assert parse([flag, "continue"]).restore_from_where == "continue"


# --- every flag is read ---------------------------------------------------------------------------------


class Recording(argparse.Namespace):
    """A namespace that notes which of its values are asked for by name; `vars` does not count."""

    def __getattribute__(self, name):
        if not name.startswith("_"):
            object.__getattribute__(self, "_asked").add(name)
        return object.__getattribute__(self, name)


def watch(monkeypatch, script, asked: set):
    """Makes the script parse its flags into a `Recording` that adds to `asked`; returns all names."""
    parse, names = script.parse_arguments, set()

    def recording(argv):
        parsed = vars(parse(argv))
        names.update(parsed)
        namespace = Recording()
        namespace.__dict__.update(parsed, _asked=asked)
        names.discard("_asked")
        return namespace

    monkeypatch.setattr(script, "parse_arguments", recording)
    # What the run keeps in its files is not to hold the helper of this test.
    keep = "utils.run.vars"
    monkeypatch.setattr(keep, lambda n: {k: v for k, v in n.__dict__.items() if k != "_asked"}, raising=False)
    return names


@pytest.mark.parametrize("stage", [1, 2])
def test_every_flag_of_training_is_read(finished, tmp_path, monkeypatch, stage):
    asked = set()
    names = watch(monkeypatch, STAGES[stage], asked)
    train(stage, finished.data, tmp_path, max_steps=1)
    if stage == 2:
        saved = {"restore_from_where": "saved", "stage1_checkpoint": finished.stage1 / "latest.pth"}
        train(stage, finished.data, tmp_path, max_steps=1, **saved)
        # What a teacher of its own asks for; the ImageNet names want a backbone with ImageNet's weights.
        taught = {"teacher": "frozen", "rounds": 2, "num_clusters": 3, "max_steps": 4}
        train(stage, finished.data, tmp_path, **taught)
        names.discard("name_similarity")
    names.discard("recipe")  # it sets others before they are parsed
    assert names and names - asked == set()


def test_every_flag_of_evaluation_is_read(finished, monkeypatch):
    asked = set()
    names = watch(monkeypatch, evaluation_script, asked)
    evaluate(finished.stage1 / "latest.pth", finished.data)
    assert names and names - asked == set()


CHANGES = {
    "scale": ["--scale", 1, 1],
    "rotation": ["--rotation", 0],
    "flip": ["--flip", 0],
    "train_list": ["--train-list", "val"],
    "input_size": ["--input-size", 40],
    "background": ["--background"],
    "freeze_backbone": ["--freeze-backbone"],
    "batch_size": ["--batch-size", 2],
    "target_batch_size": ["--target-batch-size", 1],
    "learning_rate": ["--learning-rate", 0.02],
    "head_factor": ["--head-factor", 1],
    "momentum": ["--momentum", 0],
    "weight_decay": ["--weight-decay", 0.1],
    "poly_power": ["--poly-power", 0],
    "weak_proportion": ["--weak-proportion", 0.9],
    "target_pixels": ["--target-pixels", "oracle"],
    "amp": ["--amp", "bf16"],
}
OF_STAGE = {
    1: {
        "lambda": ["--lambda", 1],
    },
    2: {"st_lambda": ["--st-lambda", 1], "keep": ["--keep", 0.1]},
}


@pytest.fixture(scope="module", params=[1, 2])
def base(request, data, tmp_path_factory):
    """Stage and the weights that it ends with under the flags of a quick run."""
    return request.param, weights(train(request.param, data, tmp_path_factory.mktemp("base")))


@pytest.mark.parametrize("name", [*CHANGES, "method"])
def test_every_flag_of_the_method_changes_the_network(base, data, tmp_path, name):
    stage, unchanged = base
    for flags in OF_STAGE[stage].values() if name == "method" else [CHANGES[name]]:
        assert not same_bits(unchanged, weights(train(stage, data, tmp_path, *flags)))


NO_EFFECT = {
    "log_every": ["--log-every", 1],
    "save_every": ["--save-every", 1],
    "evaluate_every": ["--evaluate-every", 1],
    "evaluation_list": ["--evaluation-list", "train"],
    "evaluation_batch_size": ["--evaluation-batch-size", 3],
}


@pytest.mark.parametrize("name", NO_EFFECT)
def test_flags_of_looking_on_do_not_change_the_network(base, data, tmp_path, name):
    stage, unchanged = base
    assert same_bits(unchanged, weights(train(stage, data, tmp_path, *NO_EFFECT[name])))


def test_number_of_epochs_decides_the_steps(data, tmp_path, capsys):
    """33 source pictures in batches of 20, twice: 66 pictures in 4 steps."""
    train(1, data, tmp_path, max_steps=None, num_epochs=2, batch_size=20)
    found = re.search(r"(\d+) source and \d+ target pictures, (\d+) steps", capsys.readouterr().out)
    pictures, steps = map(int, found.groups())
    assert 20 < pictures <= 40 and steps == -(-2 * pictures // 20)


def test_embedding_flags_choose_the_words(data, tmp_path):
    words = tmp_path / "words"
    words.mkdir()
    (words / "classes.txt").write_text("\n".join(VOC_CLASSES) + "\n")
    np.save(words / "mine.npy", np.eye(20, 4, dtype=np.float32) + 1)
    folder = train(1, data, tmp_path / "runs", "--embedding", "mine", "glove", embedding=None, embedding_path=words)
    assert weights(folder)["projection.class_embeddings"].shape == (20, 4 + 100)


# --- bad flags ------------------------------------------------------------------------------------------

BAD = [
    (["--lamda", "0.1"], ["--lamda", "did you mean --lambda"]),
    (["--target-pixel", "all"], ["did you mean --target-pixels"]),
    (["--qqqq"], ["--qqqq", "--help"]),
    (["--split", "5"], ["--split", "1", "2", "3", "4"]),
    (["--backbone", "resnet"], ["--backbone", "vgg16", "deeplabv3_resnet50", "efficientnet_lite0"]),
    (["--restore-from-where", "somewhere"], ["pretrained", "continue"]),
    (["--target-pixels", "some"], ["--target-pixels", "all", "oracle"]),
    (["--target-images", "some"], ["--target-images", "all", "unseen"]),
    (["--batch-size", "0"], ["--batch-size", "'0'", "at least 1"]),
    (["--batch-size", "2.5"], ["--batch-size", "whole number"]),
    (["--max-steps", "-1"], ["--max-steps", "at least 1"]),
    (["--weak-proportion", "1.5"], ["--weak-proportion", "at most 1"]),
    (["--lambda", "-0.1"], ["--lambda", "at least 0"]),
    (["--lambda", "nan"], ["--lambda", "number"]),
    (["--learning-rate", "inf"], ["--learning-rate", "number"]),
    (["--learning-rate", "0"], ["--learning-rate", "above 0"]),
    (["--input-size", "8"], ["--input-size", "at least 16"]),
    (["--seed", "-1"], ["--seed", "at least 0"]),
    (["--scale", "1"], ["--scale", "2"]),
    (["--scale", "2", "1"], ["--scale", "2.0", "1.0", "lower one first"]),
    (["--rotation", "200"], ["--rotation", "at most 180"]),
    (["--split"], ["--split", "expected one argument"]),
]


@pytest.mark.parametrize("argv, expected", BAD, ids=lambda value: " ".join(value))
def test_bad_flags_are_refused_in_one_line(capsys, argv, expected):
    line = failure(capsys, train_split_lambda.main, argv)
    assert all(words in line for words in expected), line


@pytest.mark.parametrize("value", ["-0.1", "1.1", "some"])
def test_bad_share_to_keep_is_refused(capsys, value):
    assert "--keep" in failure(capsys, train_st_split.main, ["--keep", value])


def test_stage_1_knows_no_saved(capsys):
    line = failure(capsys, train_split_lambda.main, ["--restore-from-where", "saved"])
    assert "pretrained" in line and "continue" in line


def test_flags_are_not_guessed_from_their_beginning(capsys):
    assert "--max-steps" in failure(capsys, train_split_lambda.main, ["--max", "3"])


def test_evaluation_needs_a_checkpoint(capsys):
    assert "--checkpoint" in failure(capsys, evaluation_script.main, [])


def test_command_line_of_helpers_is_complete(data, tmp_path):
    """The tests' own quick runs name only flags that exist."""
    for stage in STAGES.values():
        stage.parse_arguments(arguments(data, tmp_path))


# --- the one line ---------------------------------------------------------------------------------------

WRAPPED = """Caught ValueError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "loop.py", line 1, in loop
    data = fetch(index)
some.module.ValueError: the file: is bad ValueError: truly
"""


@pytest.mark.parametrize(
    "text, line",
    [
        ("one line", "one line"),
        ("", "ValueError"),
        ("x is not written (first\n  second\n): free some", "x is not written (first second ): free some"),
        (WRAPPED, "the file: is bad ValueError: truly"),
    ],
)  # fmt: skip
def test_any_error_becomes_one_line(text, line):
    assert one_line(ValueError(text)) == line

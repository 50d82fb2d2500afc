"""Settings of both stages: one table, read from a TOML file, `--set` and flags.

    defaults  <  --config FILE  <  --set NAME=VALUE  <  --flag VALUE

A file in `configs/` is one measured result, whole. Keys at its top are for both stages, those under [stage1] and
[stage2] for one. Frequent settings have a flag of the same name; the rare ones are written with `--set`. A checkpoint
keeps the value of every setting.
"""

import argparse
import contextlib
import difflib
import math
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset.splits import SPLITS, split_name
from model.backbone import BACKBONES, WITH_CLASSIFIER, has_classifier
from utils.errors import UserError


def number(kind: type, low: float, high: float = math.inf, exclusive: bool = False) -> Callable[[str], float]:
    """A type for argparse: a finite number of `kind` from `low` (above it, if `exclusive`) to `high`."""
    bound = f"{'above' if exclusive else 'of at least'} {low}" + (f" and at most {high}" if high < math.inf else "")

    def parse(text: str):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if math.isfinite(value) and low <= value <= high and not (exclusive and value == low):
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: give a {'whole ' if kind is int else ''}number {bound}")

    return parse


count, natural = number(int, 1), number(int, 0)
fraction, weight, positive = number(float, 0.0, 1.0), number(float, 0.0), number(float, 0.0, exclusive=True)


SETTINGS: dict[str, list[tuple]] = {
    # The attribute (the key in a TOML file has no _ at its end, and the flag has - for _); a type for argparse, `bool`,
    # or choices; the default; the help. {1: ..., 2: ...} where the stages differ.
    "data": [
        ("data_path", Path, Path("data/VOCdevkit/VOC2012"), "folder in VOC layout, see DATA_PATH.md"),
        ("split", split_name, 1, "which classes are unseen: 1-4, or a name of dataset/named_splits"),
        ("unseen", lambda text: [name for name in text.split(",") if name.strip()], None, "unseen classes of "
         "your own data, as in sheep,sofa, in place of --split"),
        ("train_list", str, None, "images to train on: a list's name or file (default: train_aug, else train)"),
        ("evaluation_list", str, None, "evaluation images, likewise (default: val)"),
        ("input_size", number(int, 16), 512, "pixels a side of a training image; 256 is enough to try it out"),
        ("embedding", str, None, "word vectors, joined (default: word2vec fasttext if there, else glove)"),
        ("embedding_path", Path, None, "folder with word vectors (default: embeddings/)"),
    ],
    "network": [
        ("backbone", BACKBONES, "vgg16", "the network below the projection; vgg16 is the published one"),
        ("backbone_weights", str, "imagenet", "imagenet (downloaded once), none, or the path of a state dict"),
        ("freeze_backbone", bool, False, "train only what follows the ImageNet weights: faster, less accurate"),
        ("cache_features", Path, None, "folder for a frozen backbone's features, which are then computed once"),
        ("restore_from_where", {1: ("pretrained", "continue"), 2: ("saved", "continue", "pretrained")},
         {1: "pretrained", 2: "saved"}, "pretrained: ImageNet; continue: where it stopped; saved: from stage 1"),
    ],
    "method": [
        ("background", ("ignore", "score", "auxiliary"), "ignore", "ignore: void; score: a seen class, as in "
         "ZS3Net; auxiliary: trained as a seen class and ignored in the evaluation"),
        ("target_pixels", ("all", "oracle"), "all", "all: no target mask is opened; oracle: only the pixels "
         "that the target's own mask calls unseen, as the published code does"),
        ("target_images", ("unseen", "all"), "unseen", "those known to show an unseen class, or every one"),
        ("weak_proportion", fraction, 0.2, "w, the target's share of the loss"),
    ],
    "stage 1": [
        ("lambda_", weight, 0.2, "of the bias term: raise it if unseen classes stay at 0; 0: source alone"),
        ("supervised", bool, False, "NOT zero-shot: train on labels of unseen classes too, for an upper bound"),
    ],
    "stage 2": [
        ("stage1_checkpoint", Path, None, "where `saved` starts (default: latest.pth of stage 1)"),
        ("self_training_weight", weight, 0.4, "of the self-training term; the published code calls it lambdaa"),
        ("keep", fraction, 0.6, "share of the target pixels that get a pseudo-label; published as st_lambda"),
        ("balance_classes", bool, False, "keep that share of each unseen class's pixels, not of all together"),
        ("pseudo_labels", ("network", "episodes"), "network", "network: its own unseen logits, as published; "
         "episodes: a labeller that learns from held-out seen classes what an unseen object looks like"),
        ("complete_labels", bool, False, "every image that shows a seen class is a source image, so "
         "other target images show only background and an unseen class (with --pseudo-labels episodes)"),
    ],
    "optimiser": [
        ("optimizer", ("sgd", "adamw"), "sgd", "sgd as published; adamw learns rare classes in fewer steps"),
        ("learning_rate", positive, 1e-4, "of the backbone; raise it for a frozen or untrained one"),
        ("batch_size", count, {1: 9, 2: 10}, "source images a step, of all processes; lower it to save memory"),
        ("target_batch_size", count, None, "target images a step (default: as --batch-size)"),
        ("num_epochs", count, 50, "passes over the source images"),
        ("max_steps", count, None, "end after so many steps; the schedule ends there too"),
    ],
    "running": [
        ("amp", ("auto", "off", "bf16"), "auto", "of convolutions; auto: bf16 on a GPU that has it, else off"),
        ("checkpoint_activations", bool, False, "compute the backbone twice: less memory, a third more time"),
        ("num_workers", natural, min(4, os.cpu_count() or 1), "processes that read images, for each process of "
         "torchrun; results do not depend on it"),
        ("device", str, "auto", "cpu, cuda, cuda:1, mps, or the first there is; under torchrun cpu or cuda"),
        ("deterministic", bool, False, "the same bits in each run on a GPU too, where it is slower"),
        ("output_dir", Path, Path("runs"), "the run is kept in its folder split<name>/stage<n>"),
        ("save_every", natural, 1000, "steps between checkpoints; 0: at the end"),
        ("evaluate_every", natural, 5000, "steps between evaluations; 0: at the end"),
        ("dry_run", bool, False, "check everything, take a few steps, print time and memory, and keep nothing"),
        ("seed", number(int, 0, 2**63 - 1), 1234, "of everything random"),
    ],
    "rare": [
        ("resize", ("square", "crop"), "square", "whole images, stretched, as published, or a random part"),
        ("scale", positive, [0.8, 2.5], "range of the random scale"),
        ("rotation", number(float, 0.0, 180.0), 15.0, "largest random rotation in degrees"),
        ("flip", fraction, 0.5, "probability of a horizontal flip"),
        ("word_weighting", ("raw", "equal"), "raw", "several kinds of vectors as published, or each normalised"),
        ("select", ("last", "best"), "last", "of the checkpoints; best: by unseen mIoU, as published"),
        ("head_factor", positive, 10.0, "the layers after the trunk learn so many times as fast"),
        ("momentum", fraction, 0.9, "of SGD"),
        ("weight_decay", weight, 5e-4, "of either optimiser"),
        ("poly_power", weight, 0.9, "the rate falls as (1 - step / steps) ** power"),
        ("loss_stride", count, 1, "compute the losses at every N-th row and column"),
        ("calibration", fraction, 0.0, "taken from the softmax of seen classes; choose it on a fold"),
        ("log_every", count, 20, "steps between looks at the losses; each waits for a GPU"),
        ("evaluation_batch_size", count, None, "images at a time (default: 8 on a GPU, 1 on a CPU)"),
    ],
}  # fmt: skip
"""All settings of both stages, by the headings of the help. The rare ones are written with `--set`."""

TABLE = {row[0]: row[1:] for group in SETTINGS.values() for row in group}
SEVERAL = {"embedding": "+", "scale": 2}  # how many values a setting has, as argparse says it; the others have one


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a `UserError`, with the nearest flag for one that is misspelt."""

    def __init__(self, description: str = "", **options):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            self.error(f"unknown argument {name}: {f'did you mean {near[0]}?' if near else 'see --help'}")
        return namespace

    def error(self, message: str):
        raise UserError(message)


def add_settings(parser: Any, names: Iterable[str], stage: int = 1, suppress: bool = False) -> None:
    """Adds the flags of the settings `names` to an argparse parser or group, as `stage` has them.

    suppress: leave no attribute where a flag is not given, instead of the default.
    """
    for name in names:
        kind, default, text = _row(name, stage)
        flags = ["--" + name.strip("_").replace("_", "-")]
        flags += ["--RESTORE_FROM_WHERE"] if name == "restore_from_where" else []
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS if suppress else default}
        options["help"] = text + ("" if default in (None, False) else f" (default: {default})")
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            choices = SPLITS if name == "split" else kind if isinstance(kind, tuple) else None
            metavar = None if choices and len(choices) < 8 else flags[0].split("-")[-1].upper()
            kind = str if isinstance(kind, tuple) else kind
            options |= {"type": kind, "choices": choices, "nargs": SEVERAL.get(name), "metavar": metavar}
        parser.add_argument(*flags, **options)


def parse_settings(argv: Sequence[str] | None, stage: int, description: str = "") -> argparse.Namespace:
    """The settings of a stage as attributes, from flags, `--set`, a TOML file and the defaults.

    The file's part for the other stage is checked too, so that a mistake shows before the first stage runs. `argv` None
    is the command line of the process; `description` is the script's docstring.

    Raises `UserError` for a flag, a file or a bad value.
    """
    parser, names = Parser(description), _names(stage)
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings of both stages, such as "
                        "configs/best_cpu.toml; flags override them")  # fmt: skip
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings without "
                        "a flag of their own: " + ", ".join(row[0] for row in SETTINGS["rare"]))  # fmt: skip
    for title, group in SETTINGS.items():
        if title not in ("rare", f"stage {3 - stage}"):
            add_settings(parser.add_argument_group(title), [row[0] for row in group], stage, suppress=True)
    given = vars(parser.parse_args(argv))
    if "unseen" in given and "split" in given:
        raise UserError("--unseen and --split exclude each other: give one of them")
    config, pairs = given.pop("config"), given.pop("set")
    files = read_config(config) if config else {1: {}, 2: {}}
    parts = (pair.partition("=") for pair in pairs)
    rare = {name: {"true": True, "false": False}.get(text, text.split(",")) for name, _, text in parts}
    found = files[stage] | _read_values(rare, f"--set {' '.join(pairs)} (write NAME=VALUE)", TABLE) | given
    values = {name: found.get(name, _row(name, stage)[1]) for name in names}
    args = argparse.Namespace(**values, config=config)
    episodes = (files[2] | values).get("pseudo_labels") == "episodes"  # in stage 1 too: what stage 2 can't use
    if episodes and not has_classifier(args.backbone, args.backbone_weights):
        needed = f"ImageNet weights and a --backbone among {', '.join(WITH_CLASSIFIER)}"
        raise UserError(f"--pseudo-labels episodes needs {needed}, not {args.backbone} from {args.backbone_weights}")
    return args


def read_config(path: Path) -> dict[int, dict[str, Any]]:
    """The settings of each stage in a TOML file, {1: {...}, 2: {...}}, by attribute name.

    Raises `UserError` if the file is missing or no TOML, or a key or value is none of the table's.
    """
    where = f"--config {path}"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where} can't be read ({error}): give a TOML file like configs/paper.toml") from error
    parts = {n: content.pop(f"stage{n}") for n in (1, 2) if isinstance(content.get(f"stage{n}"), dict)}
    shared = _read_values(content, where, [name for name in TABLE if name != "restore_from_where"])
    return {n: shared | _read_values(parts.get(n, {}), f"{where}, [stage{n}]", _names(n), n) for n in (1, 2)}


def _read_values(values: Mapping[str, Any], where: str, names: Iterable[str], stage: int = 1) -> dict[str, Any]:
    """Values by the name of the setting, as the flags of `names` would give them. Raises `UserError`."""
    argv = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            argv += [f"--{flag}", *map(str, value)] if isinstance(value, list) else [f"--{flag}={value}"]
    parser = Parser()
    add_settings(parser, names, stage, suppress=True)
    try:
        return vars(parser.parse_args(argv))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _names(stage: int) -> list[str]:
    """The settings that a stage has."""
    return [row[0] for title, group in SETTINGS.items() if title != f"stage {3 - stage}" for row in group]


def _row(name: str, stage: int) -> tuple:
    """Kind, default and help of a setting in a stage."""
    return tuple(value[stage] if isinstance(value, dict) else value for value in TABLE[name])

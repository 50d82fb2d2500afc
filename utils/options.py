"""The flags that both stages share, grouped by what one decides with them."""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from utils.distributed import is_main
from utils.heap import CHOICES
from utils.recipes import RECIPES, spelt_out


class Parser(argparse.ArgumentParser):
    """An argument parser for people.

    Errors are one line, with the nearest flag for one that is misspelt. The commands in `description`, its lines that
    begin with "python", are shown at the end of the help, where a reader looks last. Groups of one title are one group.
    """

    def __init__(self, description: str = "", **options):
        lines = description.splitlines()
        examples = [line for line in lines if line.lstrip().startswith("python ")]
        text = "\n".join(line for line in lines if line not in examples)
        options.setdefault("formatter_class", _HelpFormatter)
        options.setdefault("epilog", "\n".join(["examples:", *examples]) if examples else None)
        super().__init__(description=re.sub(r"\n{3,}", "\n\n", text), allow_abbrev=False, **options)

    def add_argument_group(self, title=None, *args, **options):
        same = next((group for group in self._action_groups if group.title == title), None)
        return same or super().add_argument_group(title, *args, **options)

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            self.error(f"unknown argument {flag}" + (f": did you mean {near[0]}?" if near else ": see --help"))
        return namespace

    def error(self, message: str):
        if is_main():  # all processes were given the same
            print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def parse_with_recipe(parser: Parser, argv: Sequence[str] | None, stage: int) -> argparse.Namespace:
    """The flags; what `--recipe` sets stands where nothing else was given."""
    first = Parser(add_help=False)
    first.add_argument("--recipe", choices=RECIPES, default="paper")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default="paper",
        help=f"paper: the defaults; best: what was measured best without an oracle, the same as "
        f"{spelt_out('best', stage)}; flags given besides it come first",
    )
    parser.set_defaults(**RECIPES[first.parse_known_args(argv)[0].recipe][stage])
    return parser.parse_args(argv)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it is written, and each flag's default."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class _Range(argparse.Action):
    """Stores two numbers, the lower one first."""

    def __call__(self, parser, namespace, values, option_string=None):
        if values[0] > values[1]:
            parser.error(f"argument {option_string}: {values[0]} is above {values[1]}: give the lower one first")
        setattr(namespace, self.dest, values)


def number(kind: type, low: float, high: float = math.inf, exclusive: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number of `kind` from `low` (or above it, if `exclusive`) to `high`."""
    bound = f"{'above' if exclusive else 'of at least'} {low}" + (f" and at most {high}" if high < math.inf else "")

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high and not (exclusive and value == low)):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}: give {what} {bound}")
        return value

    return parse


def _names(text: str) -> list[str]:
    """An argparse type: names apart by commas."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r}: give names of classes apart by commas, like sheep,sofa")
    return names


count = number(int, 1)
natural = number(int, 0)
fraction = number(float, 0.0, 1.0)
weight = number(float, 0.0)
positive = number(float, 0.0, exclusive=True)


def shared_options(
    splits: Sequence[int | str],
    backbones: Sequence[str],
    restore: Sequence[str],
    batch_size: int,
) -> Parser:
    """The parser to name in `parents=[...]`.

    Args:
        splits, backbones, restore: the choices of these flags, their default first.
        batch_size: the stage's default.
    """
    parser = Parser(add_help=False)
    _data_options(parser.add_argument_group("data"), splits)
    _word_options(parser.add_argument_group("words"))
    _model_options(parser.add_argument_group("model"), backbones, restore)
    _protocol_options(parser.add_argument_group("method"))
    _optimiser_options(parser.add_argument_group("optimiser"), batch_size)
    _speed_options(parser.add_argument_group("speed and memory"))
    _running_options(parser.add_argument_group("running"))
    return parser


def _data_options(group, splits: Sequence[int | str]) -> None:
    group.add_argument(
        "--data-path",
        type=Path,
        default=Path("data/VOCdevkit/VOC2012"),
        metavar="FOLDER",
        help="folder in VOC layout, see DATA_PATH.md",
    )
    classes = group.add_mutually_exclusive_group()
    classes.add_argument(
        "--split",
        type=lambda text: next((split for split in splits if str(split) == text), text),
        choices=splits,
        default=splits[0],
        metavar="SPLIT",
        help="which classes are unseen: 1-4, or a name that python -m dataset.splits prints",
    )
    classes.add_argument(
        "--unseen",
        type=_names,
        metavar="A,B",
        help="unseen classes of your own pictures, in place of --split; the others in classes.txt are seen",
    )
    group.add_argument(
        "--train-list",
        metavar="LIST",
        help="training pictures: a list of ImageSets/Segmentation or a text file (default: train_aug, else train)",
    )
    group.add_argument("--evaluation-list", metavar="LIST", help="evaluation pictures, likewise (default: val)")
    group.add_argument(
        "--input-size",
        type=number(int, 16),
        default=512,
        metavar="PIXELS",
        help="side of the training crops; memory and time grow with its square, 256 is enough to try things out",
    )
    group.add_argument(
        "--scale",
        type=positive,
        nargs=2,
        default=[0.8, 2.5],
        metavar=("LOW", "HIGH"),
        action=_Range,
        help="range of the random scale; 1 1 keeps pictures as they are",
    )
    group.add_argument(
        "--rotation",
        type=number(float, 0.0, 180.0),
        default=15.0,
        metavar="DEGREES",
        help="largest random rotation either way; 0 is fastest",
    )
    group.add_argument("--flip", type=fraction, default=0.5, metavar="P", help="probability of a horizontal flip")


def _word_options(group) -> None:
    group.add_argument(
        "--embedding",
        nargs="+",
        metavar="NAME",
        help="word vectors, concatenated if several (default: word2vec fasttext where their files exist, "
        "else the shipped glove)",
    )
    group.add_argument(
        "--embedding-path",
        type=Path,
        metavar="FOLDER",
        help="folder with vectors in any form the builder reads (default: embeddings/)",
    )


def _model_options(group, backbones: Sequence[str], restore: Sequence[str]) -> None:
    group.add_argument(
        "--backbone",
        choices=backbones,
        default=backbones[0],
        help="the network below the projection; the first choice is the published one",
    )
    group.add_argument(
        "--backbone-weights",
        default="imagenet",
        metavar="{imagenet,none,PATH}",
        help="where the backbone starts: ImageNet weights (downloaded once), random, or a state dict on disk",
    )
    group.add_argument(
        "--freeze-backbone",
        action="store_true",
        help="train only what follows the ImageNet weights: much faster on a CPU, less accurate",
    )
    group.add_argument(
        "--cache-features",
        type=Path,
        metavar="FOLDER",
        help="keep a frozen backbone's features there, for whole pictures (--scale 1 1 --rotation 0): later epochs and "
        "runs need no forward pass through it (0.7 MB a picture of 320 pixels for efficientnet_lite0)",
    )
    group.add_argument(
        "--restore-from-where",
        "--RESTORE_FROM_WHERE",
        choices=restore,
        default=restore[0],
        help="pretrained: from --backbone-weights; continue: go on with this stage where it stopped"
        + ("; saved: from stage 1's checkpoint" if "saved" in restore else ""),
    )


def _protocol_options(group) -> None:
    group.add_argument(
        "--background",
        action="store_true",
        help="count the background as a seen class (the protocol of ZS3Net) instead of ignoring it",
    )
    group.add_argument(
        "--auxiliary-background",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train on the background as on a seen class, so that unlabelled pixels have somewhere to go, but "
        "ignore it in the evaluation",
    )
    group.add_argument(
        "--target-pixels",
        choices=["all", "oracle"],
        default="all",
        help="all: no target mask is opened; oracle: only the pixels that the target's own mask calls unseen, "
        "as the published code does",
    )
    group.add_argument(
        "--target-images",
        choices=["unseen", "all"],
        default="unseen",
        help="unseen: training pictures known to show an unseen class; all: every training picture",
    )


def _optimiser_options(group, batch_size: int) -> None:
    group.add_argument(
        "--batch-size",
        type=count,
        default=batch_size,
        metavar="N",
        help="source pictures a step, of all processes together; lower it where memory runs out, and --learning-rate "
        "with it",
    )
    group.add_argument(
        "--target-batch-size", type=count, metavar="N", help="target pictures a step (default: as --batch-size)"
    )
    group.add_argument(
        "--num-epochs",
        type=count,
        default=50,
        metavar="N",
        help="times through the source pictures; --max-steps cuts it short",
    )
    group.add_argument(
        "--max-steps",
        type=count,
        metavar="N",
        help="stop after so many steps; the schedule ends there too, a few hundred show what a setting does",
    )
    group.add_argument(
        "--learning-rate",
        type=positive,
        default=1e-4,
        metavar="LR",
        help="of the ImageNet weights; raise it for a frozen or untrained backbone",
    )
    group.add_argument(
        "--head-factor",
        type=positive,
        default=10.0,
        metavar="F",
        help="classifier and projection learn so many times as fast",
    )
    group.add_argument(
        "--optimizer",
        choices=["sgd", "adamw"],
        default="sgd",
        help="sgd as published; adamw learns classes that few pictures show in fewer steps, at a lower rate",
    )
    group.add_argument(
        "--loss-stride",
        type=count,
        default=1,
        metavar="N",
        help="take the losses at every N-th row and column of pixels: with 4 a light backbone trains several times as "
        "fast on a CPU, and neighbours say much the same",
    )
    group.add_argument("--momentum", type=fraction, default=0.9, help="of SGD; AdamW keeps its own 0.9")
    group.add_argument("--weight-decay", type=weight, default=5e-4, help="pulls weights to 0, of either optimiser")
    group.add_argument(
        "--poly-power", type=weight, default=0.9, help="the rate falls as (1 - step / steps) ** power; 0 keeps it"
    )


def self_training_options(group) -> None:
    """What stage 2 may do beyond the paper; the defaults are the paper's."""
    group.add_argument(
        "--teacher",
        choices=["self", "frozen"],
        default="self",
        help="who labels the target: self: the network in the same step, by its unseen logits, as published; frozen: "
        "the network as it was when the round began",
    )
    group.add_argument(
        "--rounds", type=count, default=1, metavar="N", help="equal parts of the run; each begins with a new teacher"
    )
    group.add_argument(
        "--keep-known",
        type=fraction,
        default=0.0,
        metavar="SHARE",
        help="of the target's pixels, those that look least like an unseen class keep the teacher's known one; it "
        "protects the seen classes (not with --teacher self)",
    )
    _labelling_options(group)
    _naming_options(group)


def _labelling_options(group) -> None:
    """Which pixels of the target a teacher of its own may label unseen, and what such a pixel weighs."""
    group.add_argument(
        "--picture-gate",
        type=fraction,
        default=1.0,
        metavar="SHARE",
        help="of each picture's pixels at most so many may be labelled unseen: 0.5 leaves the half that looks least "
        "unseen alone (not with --teacher self)",
    )
    group.add_argument(
        "--one-name",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="label at most one unseen class a picture, that of the pixel that fits best: most pictures show one (not "
        "with --teacher self)",
    )
    group.add_argument(
        "--rare-power",
        type=weight,
        default=0.0,
        metavar="P",
        help="a pixel labelled with an unseen class weighs (mean count / the class's count) ** P, at most 5: 0.5 lets "
        "classes that few pixels show be learnt too (not with --teacher self)",
    )


def _naming_options(group) -> None:
    """How the target's pixels are put into clusters, and what says which unseen class a cluster is."""
    group.add_argument(
        "--num-clusters",
        type=natural,
        default=0,
        metavar="N",
        help="clusters of the target's features over which doubt and names are pooled; 0: none; 100 is a good number",
    )
    group.add_argument(
        "--imagenet-names",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let the names of the classes that the ImageNet classifier sees in a cluster speak too (ConSE); those "
        "that could be an unseen class are left out",
    )
    group.add_argument(
        "--name-similarity",
        type=fraction,
        default=0.6,
        metavar="COSINE",
        help="an ImageNet class nearer to an unseen one than this is left out, as is one that shares a word with it",
    )


def _running_options(group) -> None:
    group.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="the run is kept in FOLDER/split<name>/stage<n>",
    )
    group.add_argument(
        "--save-every",
        type=natural,
        default=1000,
        metavar="STEPS",
        help="steps between latest.pth, which `continue` goes on from; 0: at the end",
    )
    group.add_argument(
        "--evaluate-every",
        type=natural,
        default=5000,
        metavar="STEPS",
        help="steps between evaluations, each a line in log.jsonl and a sheet in pictures/; 0: at the end",
    )
    group.add_argument(
        "--log-every",
        type=count,
        default=20,
        metavar="STEPS",
        help="steps between looks at the losses; each look waits for a GPU",
    )
    group.add_argument(
        "--no-pictures",
        action="store_true",
        help="draw nothing at an evaluation: saves a second or two, and `utils.report` has no worst and best pictures",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="check data, words and weights, take a few steps, say how long the run will take and what memory it "
        "needs, and keep nothing: do this first",
    )
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="losses, rate, figures and sheets for TensorBoard too, in the run's folder (pip install tensorboard)",
    )
    add_running_options(group)
    group.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), default=1234, help="of everything random: the same seed, the same run"
    )


def _speed_options(group) -> None:
    group.add_argument(
        "--accumulate",
        type=count,
        default=1,
        metavar="N",
        help="put a process's pictures of a step through the network in N parts: memory for one part, the losses and "
        "gradients of the whole batch, a third more time; raise it, rather than lower --batch-size, where memory runs "
        "out. Batch norm takes its statistics from a part",
    )
    group.add_argument(
        "--amp",
        choices=["auto", "off", "bf16", "fp16"],
        default="auto",
        help="precision of the convolutions; weights and losses are float32 always. auto: bf16 on a GPU that has it, "
        "else off; fp16 for older GPUs; bf16 on a CPU is quick only where it has instructions for it",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the network first, which takes minutes and a C++ compiler (on a GPU Triton too): worth a try for "
        "long runs on a GPU",
    )
    group.add_argument(
        "--keep-memory",
        choices=CHOICES,
        default="auto",
        help="on a CPU keep the memory that a step frees for the next: VGG16 trains a sixth faster and holds more "
        "memory; auto: where there are 16 GiB (Linux); off where memory runs out",
    )


def add_running_options(group) -> None:
    """What the evaluation needs too."""
    group.add_argument(
        "--num-workers",
        type=natural,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that read pictures, for each of torchrun's; the results do not depend on it",
    )
    group.add_argument(
        "--evaluation-batch-size",
        type=count,
        metavar="N",
        help="evaluate up to N pictures of one size together (default: 8 on a GPU, 1 on a CPU); lower it where memory "
        "runs out",
    )
    add_device_option(group)


def add_device_option(group) -> None:
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, mps, or auto: the first there is; under torchrun cpu or cuda, a GPU a process",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="two runs on one machine give the same bits, on a GPU too, where it is slower; a CPU does so anyway",
    )

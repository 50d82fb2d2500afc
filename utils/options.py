"""The flags that both stages share, grouped by what one decides with them."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest flag for one that is misspelt."""

    def __init__(self, **options):
        options.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            self.error(f"unknown argument {flag}" + (f": did you mean {near[0]}?" if near else ": see --help"))
        return namespace

    def error(self, message: str):
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it is written, and each flag's default."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


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


count = number(int, 1)
natural = number(int, 0)
fraction = number(float, 0.0, 1.0)
weight = number(float, 0.0)
positive = number(float, 0.0, exclusive=True)


def shared_options(splits: Sequence[int], backbones: Sequence[str], restore: Sequence[str], batch_size: int) -> Parser:
    """The parser to name in `parents=[...]`.

    Args:
        splits, backbones, restore: the choices of these flags; `restore` begins with its default.
        batch_size: the stage's default.
    """
    parser = Parser(add_help=False)
    _data_options(parser.add_argument_group("data"), splits)
    _word_options(parser.add_argument_group("words"))
    _model_options(parser.add_argument_group("model"), backbones, restore)
    _protocol_options(parser.add_argument_group("protocol"))
    _optimiser_options(parser.add_argument_group("optimiser"), batch_size)
    _running_options(parser.add_argument_group("running"))
    return parser


def _data_options(group, splits: Sequence[int]) -> None:
    group.add_argument(
        "--data-path",
        type=Path,
        default=Path("data/VOCdevkit/VOC2012"),
        help="folder in VOC layout, see DATA_PATH.md",
    )
    group.add_argument("--split", type=int, choices=splits, default=splits[0], help="which classes are unseen")
    group.add_argument(
        "--train-list",
        metavar="LIST",
        help="training pictures: a list of ImageSets/Segmentation or a text file (default: train_aug, else train)",
    )
    group.add_argument("--evaluation-list", metavar="LIST", help="evaluation pictures, likewise (default: val)")
    group.add_argument(
        "--input-size", type=number(int, 16), default=512, metavar="PIXELS", help="side of the training crops"
    )
    group.add_argument(
        "--scale",
        type=positive,
        nargs=2,
        default=[0.8, 2.5],
        metavar=("LOW", "HIGH"),
        action=_Range,
        help="range of the random scale",
    )
    group.add_argument(
        "--rotation",
        type=number(float, 0.0, 180.0),
        default=15.0,
        metavar="DEGREES",
        help="largest random rotation either way",
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
    group.add_argument("--backbone", choices=backbones, default=backbones[0], help="the network below the projection")
    group.add_argument(
        "--backbone-weights",
        default="imagenet",
        metavar="{imagenet,none,PATH}",
        help="where the backbone starts: torchvision's ImageNet weights, random, or a state dict on disk",
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
    group.add_argument("--batch-size", type=count, default=batch_size, metavar="N", help="source pictures a step")
    group.add_argument(
        "--target-batch-size", type=count, metavar="N", help="target pictures a step (default: as --batch-size)"
    )
    group.add_argument("--num-epochs", type=count, default=50, metavar="N", help="times through the source pictures")
    group.add_argument(
        "--max-steps", type=count, metavar="N", help="stop after so many steps; the schedule ends there too"
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
    group.add_argument("--momentum", type=fraction, default=0.9, help="of SGD; AdamW keeps its own")
    group.add_argument("--weight-decay", type=weight, default=5e-4, help="of either optimiser")
    group.add_argument("--poly-power", type=weight, default=0.9, help="the rate falls as (1 - step / steps) ** power")


def _running_options(group) -> None:
    group.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="the run is kept in FOLDER/split<k>/stage<n>",
    )
    group.add_argument(
        "--save-every", type=natural, default=1000, metavar="STEPS", help="steps between latest.pth; 0: at the end"
    )
    group.add_argument(
        "--evaluate-every",
        type=natural,
        default=5000,
        metavar="STEPS",
        help="steps between evaluations, each kept in log.jsonl; 0: at the end",
    )
    group.add_argument("--log-every", type=count, default=20, metavar="STEPS", help="steps between looks at the losses")
    add_running_options(group)
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=1234, help="of everything random")


def add_running_options(group) -> None:
    """What the evaluation needs too."""
    group.add_argument(
        "--num-workers",
        type=natural,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that read pictures; the results do not depend on it",
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, or auto: the first there is")
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="two runs on one machine give the same bits, on a GPU too, where it is slower; a CPU does so anyway",
    )

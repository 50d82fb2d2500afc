"""Evaluate a checkpoint: one pass over the evaluation pictures, one table with GZSL and ZSL.

    python eval.py --checkpoint runs/split1/stage2/latest.pth --data-path data/VOCdevkit/VOC2012
    python eval.py --checkpoint runs/split1/stage2/latest.pth --json result.json --save-dir pictures

GZSL lets seen and unseen classes compete for every pixel: mIoU of the seen classes, of the unseen ones, and their
harmonic mean hIoU. ZSL scores unseen pixels among the unseen classes alone. The bias is the share of unseen pixels that
were given a seen class. The table is in percent, JSON in [0, 1]; undefined figures are null.
--calibration GAMMA takes GAMMA from the softmax of the seen classes. With several values it prints a row for each:
choose one with a network whose unseen classes were held out for that, never by the classes that are reported.

Classes, words, network and training protocol are read from the checkpoint and printed above the table.
"""

import argparse
import functools
import math
import sys
from pathlib import Path

import torch

from dataset.loaders import evaluation_loader
from dataset.splits import SPLITS, Split, split_name
from dataset.voc import EvaluationDataset, evaluation_dataset
from model.calibration import calibrate
from model.segmenter import Segmenter, mean_over_views
from utils.checkpoint import check_settings, check_weights, describe_protocol, load_checkpoint, load_model
from utils.config import Parser, add_settings, fraction, positive
from utils.distributed import choose_device, connect, is_main, place
from utils.errors import UserError, atomic_write, check_writable, one_line_errors
from utils.evaluation import pictures_at_once, predictions
from utils.logging import json_lines, write_json
from utils.metrics import ZeroShotMetrics, as_json, format_rows, format_table
from utils.pictures import comparison, save_index_png


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    data, model = parser.add_argument_group("data"), parser.add_argument_group("model")
    running = parser.add_argument_group("running")
    model.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="latest.pth or best.pth of a run")
    data.add_argument(
        "--data-path",
        type=Path,
        default=Path("data/VOCdevkit/VOC2012"),
        metavar="FOLDER",
        help="folder in VOC layout, see DATA_PATH.md",
    )
    data.add_argument(
        "--list", metavar="LIST", help="pictures: a list of ImageSets/Segmentation or a text file (default: val)"
    )
    model.add_argument(
        "--split", type=split_name, choices=SPLITS, metavar="SPLIT", help="refuse a checkpoint of another split"
    )
    running.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="PATH",
        help="write the figures as JSON to PATH, with the confusion matrix and each picture's figures for "
        "python -m utils.report; without PATH, figures alone to the standard output instead of the table",
    )
    running.add_argument(
        "--save-dir",
        type=Path,
        metavar="FOLDER",
        help="write masks/<id>.png (palette PNG) and overlays/<id>.png (photo, truth, prediction)",
    )
    model.add_argument(
        "--calibration",
        type=fraction,
        nargs="+",
        default=[0.0],
        metavar="GAMMA",
        help="take GAMMA from the softmax of the seen classes before the best class is chosen; 0 leaves the scores as "
        "they are. Several values give a row each, in one pass: choose on a validation split, then give that one value",
    )
    model.add_argument(
        "--scales",
        type=positive,
        nargs="+",
        default=[1.0],
        metavar="SCALE",
        help="mean of the softmax over the picture at these sizes, as 0.75 1 1.25; each takes its time",
    )
    model.add_argument(
        "--flip", action="store_true", help="mean over the picture and its mirror image too, which doubles the time"
    )
    add_settings(running, ["num_workers", "device", "deterministic"])
    args = parser.parse_args(argv)
    if args.save_dir is not None and len(args.calibration) > 1:
        parser.error("--save-dir draws one prediction: give one value of --calibration")
    return args


def load_segmenter(path: Path) -> tuple[Segmenter, Split, dict]:
    """The network that a checkpoint holds, the split that it is scored by, and the checkpoint without the weights.

    Raises:
        UserError: if the file is no whole checkpoint of this project.
    """
    checkpoint = load_checkpoint(path)
    try:
        split = Split.from_dict(checkpoint["metadata"])
        describe_protocol(checkpoint["metadata"])
        class_embeddings = checkpoint["model"]["projection.class_embeddings"]
        if len(class_embeddings) != len(split.names):
            raise ValueError(f"{len(class_embeddings)} class embeddings for {len(split.names)} classes")
        build = functools.partial(
            Segmenter, checkpoint["metadata"]["backbone"], class_embeddings,
            num_auxiliary=split.num_auxiliary,
        )  # fmt: skip
        with torch.device("meta"):  # a network without numbers: names and shapes are compared before one is built
            check_weights(path, checkpoint["model"], build())
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: it is no whole checkpoint; give a latest.pth or best.pth") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no whole checkpoint ({error}): give a latest.pth or best.pth") from error
    model = build()
    load_model(model, checkpoint, path)
    return model, split, {key: value for key, value in checkpoint.items() if key not in ("model", "optimizer")}


def save_pictures(folder: Path, dataset: EvaluationDataset, batch: tuple, split: Split) -> None:
    """Writes the palette PNG and the comparison of each picture of a batch (image, label, index, logits)."""
    for image, label, index, logits in zip(*batch):
        picture = dataset.ids[int(index)]
        prediction = split.to_mask(logits.argmax(dim=0).cpu().numpy())
        save_index_png(prediction, folder / "masks" / f"{picture}.png")
        page = comparison(
            image.permute(1, 2, 0).cpu().numpy(), split.to_mask(label.cpu().numpy()), prediction,
            title=picture, **split.drawing,
        )  # fmt: skip
        page.save(folder / "overlays" / f"{picture}.png")


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    connect()
    device = choose_device(args.device, args.deterministic)
    model, split, checkpoint = load_segmenter(args.checkpoint)
    setting = checkpoint["metadata"]
    if args.split is not None:
        check_settings(args.checkpoint, setting, {"split": args.split}, ["split"])
    dataset = evaluation_dataset(args.data_path, split, args.list)
    if args.save_dir is not None:
        check_writable(args.save_dir, f"--save-dir {args.save_dir}")
    if args.json not in (None, "-"):
        check_writable(Path(args.json).parent, f"--json {args.json}")

    gammas = list(dict.fromkeys(args.calibration))
    metrics = [ZeroShotMetrics(split.names, split.num_seen) for _ in gammas]
    model.to(device)
    at_once = pictures_at_once(None, device)
    loader = evaluation_loader(dataset, args.num_workers, at_once, place())
    views = args.scales != [1.0] or args.flip
    score = functools.partial(mean_over_views, model, scales=args.scales, flip=args.flip) if views else None
    for image, label, index, logits in predictions(model, loader, device, score):
        for gamma, counts in zip(gammas, metrics):
            scores = calibrate(logits, split.num_seen, gamma)
            counts.update(scores, label, index)
        if args.save_dir is not None:  # then there is one gamma
            make_folders(args.save_dir)
            save_pictures(args.save_dir, dataset, (image, label, index, scores), split)

    for counts in metrics:
        counts.join()
    if not is_main():
        return 0
    about = {
        "checkpoint": str(args.checkpoint), "stage": checkpoint["stage"], "step": checkpoint["step"],
        "selection": checkpoint["selection"], "protocol": describe_protocol(setting), "pictures": len(dataset),
        "scales": args.scales, "flip": args.flip,
    }  # fmt: skip
    results = [
        {**counts.compute(), "per_class_zsl": counts.per_class_zsl(), "calibration": gamma}
        for gamma, counts in zip(gammas, metrics)
    ]
    best = max(results, key=lambda result: -1.0 if math.isnan(result["hiou"]) else result["hiou"])
    several = {"best_calibration": best["calibration"], "calibrations": results}
    report = as_json({**(several if len(results) > 1 else best), **about})
    if args.json == "-":
        print(json_lines(report), end="")
        return 0
    print_results(results, best, about, split)
    if args.json is not None:
        details = metrics[0].details(dataset.ids) if len(metrics) == 1 else {}
        drawn = (
            {name: str((args.save_dir / "overlays" / f"{name}.png").resolve()) for name in dataset.ids}
            if args.save_dir
            else {}
        )
        write_json(Path(args.json), {**report, **details, "drawn": drawn})
    return 0


def print_results(results: list[dict], best: dict, about: dict, split: Split) -> None:
    """The table of one calibration, or a row for each of several."""
    print(f"{about['checkpoint']}: stage {about['stage']}, step {about['step']}, selection: {about['selection']}")
    print(f"{about['protocol']}; {about['pictures']} pictures{describe_views(about['scales'], about['flip'])}")
    if len(results) > 1:
        print("calibration: several\n")
        print(format_rows({f"gamma {result['calibration']:g}": result for result in results}))
        print(f"\nbest hIoU: --calibration {best['calibration']:g}. Choose gamma on a validation split (seen classes")
        print("held out as if unseen), never on the unseen classes that are reported.")
    else:
        gamma = best["calibration"]
        print(f"calibration: {f'{gamma:g} taken from the softmax of the seen classes' if gamma else 'off'}\n")
        print(format_table(best, split.names, split.num_seen))


def describe_views(scales: list[float], flip: bool) -> str:
    several = f" at scale{'s' * (len(scales) > 1)} {' '.join(f'{scale:g}' for scale in scales)}"
    return (several if scales != [1.0] else "") + (" with flips" if flip else "")


def make_folders(folder: Path) -> None:
    try:
        for name in ("masks", "overlays"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save-dir {folder} can't be made ({error.strerror}): choose another folder") from error


def write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path} can't be written ({error.strerror}): choose another path") from error


if __name__ == "__main__":
    sys.exit(main())

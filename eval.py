"""Evaluate a checkpoint: one pass over the evaluation pictures, one table with GZSL and ZSL.

    python eval.py --checkpoint runs/split1/stage2/latest.pth --data-path data/VOCdevkit/VOC2012
    python eval.py --checkpoint runs/split1/stage2/latest.pth --json result.json --save-dir pictures

GZSL lets seen and unseen classes compete for every pixel: mIoU of the seen classes, of the unseen ones, and their
harmonic mean hIoU. ZSL scores unseen pixels among the unseen classes alone. The bias is the share of unseen pixels that
were given a seen class. The table is in percent, JSON in [0, 1]; undefined figures are null.

Classes, words, network and training protocol are read from the checkpoint and printed above the table.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from dataset.errors import DatasetError
from dataset.loaders import evaluation_loader
from dataset.splits import BACKGROUND, VOC_SPLITS, VOID, Split
from dataset.voc import EvaluationDataset, evaluation_dataset
from model.backbone import ModelError
from model.segmenter import Segmenter
from utils.checkpoint import check_setting, check_weights, load_checkpoint, load_model
from utils.errors import InputError, one_line_errors
from utils.evaluation import predictions
from utils.files import check_writable, replacing
from utils.metrics import ZeroShotMetrics, as_json, format_table
from utils.options import Parser, add_running_options
from utils.pictures import comparison, save_index_png
from utils.run import choose_device, describe_protocol


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="PATH", help="latest.pth or best.pth of a run"
    )
    parser.add_argument(
        "--data-path",
        type=Path,
        default=Path("data/VOCdevkit/VOC2012"),
        metavar="FOLDER",
        help="folder in VOC layout, see DATA_PATH.md",
    )
    parser.add_argument(
        "--list", metavar="LIST", help="pictures: a list of ImageSets/Segmentation or a text file (default: val)"
    )
    parser.add_argument("--split", type=int, choices=VOC_SPLITS, help="refuse a checkpoint of another split")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="PATH",
        help="write the figures as JSON to PATH; without PATH, to the standard output instead of the table",
    )
    parser.add_argument(
        "--save-dir",
        type=Path,
        metavar="FOLDER",
        help="write masks/<id>.png (palette PNG) and overlays/<id>.png (photo, truth, prediction)",
    )
    add_running_options(parser)
    return parser.parse_args(argv)


def load_segmenter(path: Path) -> tuple[Segmenter, Split, dict]:
    """The network that a checkpoint holds, its split, and the checkpoint without the network's weights.

    Raises:
        InputError: if the file is no whole checkpoint of this project.
    """
    checkpoint = load_checkpoint(path)
    try:
        split = Split.from_dict(checkpoint["setting"])
        describe_protocol(checkpoint["setting"])
        backbone, class_embeddings = (
            checkpoint["setting"]["backbone"],
            checkpoint["model"]["projection.class_embeddings"],
        )
        with torch.device("meta"):  # a network without numbers: names and shapes are compared before one is built
            check_weights(path, checkpoint["model"], Segmenter(backbone, class_embeddings))
        if len(class_embeddings) != len(split.names):
            raise ValueError(f"{len(class_embeddings)} class embeddings for {len(split.names)} classes")
    except KeyError as error:
        raise InputError(f"{path} lacks {error}: it is no whole checkpoint; give a latest.pth or best.pth") from error
    except ModelError as error:
        raise InputError(f"{path}: {error}") from error
    except (TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no whole checkpoint ({error}): give a latest.pth or best.pth") from error
    model = Segmenter(backbone, class_embeddings)
    load_model(model, checkpoint, path)
    return model, split, {key: value for key, value in checkpoint.items() if key not in ("model", "optimizer")}


def save_pictures(folder: Path, dataset: EvaluationDataset, batch: tuple, split: Split) -> None:
    """Writes the palette PNG and the comparison of each picture of a batch (image, label, index, logits)."""
    values = dict(zip(split.mask_values, split.names))
    for image, label, index, logits in zip(*batch):
        picture = dataset.ids[int(index)]
        prediction = split.to_mask(logits.argmax(dim=0).cpu().numpy())
        save_index_png(prediction, folder / "masks" / f"{picture}.png")
        page = comparison(
            image.permute(1, 2, 0).cpu().numpy(), split.to_mask(label.cpu().numpy()), prediction, values,
            marked=split.unseen_values, title=picture,
            # Background that counts is drawn as it is, background that does not is bleached.
            **({"ignore": (0, VOID), "fade": False} if BACKGROUND in split.names else {"ignore": (VOID,)}),
        )  # fmt: skip
        page.save(folder / "overlays" / f"{picture}.png")


@one_line_errors(DatasetError, ModelError)
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = choose_device(args.device, args.deterministic)
    model, split, checkpoint = load_segmenter(args.checkpoint)
    setting = checkpoint["setting"]
    if args.split is not None:
        check_setting(args.checkpoint, setting, {"split": args.split}, ["split"])
    dataset = evaluation_dataset(args.data_path, split, args.list)
    if args.save_dir is not None:
        check_writable(args.save_dir, f"--save-dir {args.save_dir}")
    if args.json not in (None, "-"):
        check_writable(Path(args.json).parent, f"--json {args.json}")

    metrics = ZeroShotMetrics(split.names, split.num_seen)
    model.to(device)
    for image, label, index, logits in predictions(model, evaluation_loader(dataset, args.num_workers), device):
        metrics.update(logits, label)
        if args.save_dir is not None:
            make_folders(args.save_dir)
            save_pictures(args.save_dir, dataset, (image, label, index, logits), split)
    result = metrics.compute()

    about = {
        "checkpoint": str(args.checkpoint), "stage": checkpoint["stage"], "step": checkpoint["step"],
        "selection": checkpoint["selection"], "protocol": describe_protocol(setting), "pictures": len(dataset),
    }  # fmt: skip
    report = json.dumps({**as_json(result), "per_class_zsl": as_json(metrics.per_class_zsl()), **about}, indent=2)
    if args.json == "-":
        print(report)
        return 0
    print(f"{about['checkpoint']}: stage {about['stage']}, step {about['step']}, selection: {about['selection']}")
    print(f"{about['protocol']}; {about['pictures']} pictures\n")
    print(format_table(result, split.names, split.num_seen))
    if args.json is not None:
        write_text(Path(args.json), report + "\n")
    return 0


def make_folders(folder: Path) -> None:
    try:
        for name in ("masks", "overlays"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--save-dir {folder} can't be made ({error.strerror}): choose another folder") from error


def write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json {path} can't be written ({error.strerror}): choose another path") from error


if __name__ == "__main__":
    sys.exit(main())

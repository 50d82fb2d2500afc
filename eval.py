"""Evaluate a checkpoint: one pass over the evaluation images, one table with GZSL and ZSL.

    python eval.py --checkpoint runs/split1/stage2/latest.pth --data-path data/VOCdevkit/VOC2012
    python eval.py --checkpoint runs/split1/stage2/latest.pth --json result.json --save-dir images

GZSL: seen and unseen classes compete for every pixel; mIoU of the seen classes, of the unseen ones, and their harmonic
mean hIoU. ZSL: unseen pixels among the unseen classes alone. Bias: the share of unseen pixels that were given a seen
class. The table is in percent, JSON in [0, 1]; undefined figures are null.

Classes, word vectors, network and training protocol are read from the checkpoint and printed above the table.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from dataset.loaders import evaluation_loader
from dataset.splits import SPLITS, Split, split_name
from dataset.voc import EvaluationDataset, evaluation_dataset
from model.predictor import load_segmenter
from model.segmenter import LONGEST_SIDE, MIN_SIDE
from utils.checkpoint import check_settings, describe_protocol
from utils.config import Parser, add_settings, fraction, number, positive
from utils.distributed import choose_device, connect, is_main, place
from utils.errors import check_writable, one_line_errors, write_text
from utils.logging import json_lines
from utils.metrics import ZeroShotMetrics, evaluate, format_table, images_at_once
from utils.visualize import contact_sheet, save_image, save_index_png


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    data, model, output, running = map(parser.add_argument_group, ("data", "network", "output", "running"))
    # fmt: off
    add_settings(data, ["data_path"])
    data.add_argument("--list", metavar="LIST", help="evaluation images: a list of ImageSets/Segmentation or a text "
                      "file (default: val)")
    model.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="latest.pth or best.pth of a run")
    model.add_argument("--split", type=split_name, choices=SPLITS, metavar="SPLIT", help="refuse those of other splits")
    model.add_argument("--calibration", type=fraction, metavar="GAMMA", help="subtract GAMMA from the softmax of the "
                       "seen classes (default: as the checkpoint was trained, else 0). Choose it on a validation split "
                       "such as 1-val, where seen classes play the unseen ones, never by what is reported")
    model.add_argument("--longest-side", type=number(int, MIN_SIDE), default=LONGEST_SIDE, metavar="PIXELS",
                       help="larger images are resized to this for the network, and the result back to full size")
    model.add_argument("--scales", type=positive, nargs="+", default=[1.0], metavar="SCALE",
                       help="mean of the softmax over the image at these sizes, such as 0.75 1 1.25")
    model.add_argument("--flip", action="store_true", help="mean of the softmax over the image and its mirror image")
    model.add_argument("--edges", action="store_true", help="let borders between classes follow the edges of the image")
    output.add_argument("--json", type=Path, metavar="PATH", help="write the figures to PATH too, with the confusion "
                        "matrix, for python -m utils.report")
    output.add_argument("--save-dir", type=Path, metavar="FOLDER", help="write masks/<id>.png (palette PNG) and "
                        "overlays/<id>.png (image, label, prediction)")
    # fmt: on
    add_settings(running, ["num_workers", "device", "deterministic", "evaluation_batch_size"])
    return parser.parse_args(argv)


def save_predictions(folder: Path, dataset: EvaluationDataset, split: Split, *batch: torch.Tensor) -> None:
    """Writes the mask and the overlay of each image of a batch: image, label, index, prediction [N, H, W]."""
    for image, label, index, classes in zip(*batch):
        name = f"{dataset.ids[int(index)]}.png"
        prediction = split.to_mask(classes.cpu().numpy())
        save_index_png(prediction, folder / "masks" / name)
        masks = {"label": split.to_mask(label.cpu().numpy()), "prediction": prediction}
        rows = [(image.permute(1, 2, 0).cpu().numpy(), masks)]
        save_image(contact_sheet(rows, title=Path(name).stem, **split.drawing), folder / "overlays" / name)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    connect()
    device = choose_device(args.device, args.deterministic)
    if args.save_dir:
        check_writable(args.save_dir, f"--save-dir {args.save_dir}")
    if args.json:
        check_writable(args.json.parent, f"--json {args.json}")
    model, split, checkpoint = load_segmenter(args.checkpoint)
    if args.split:
        check_settings(args.checkpoint, checkpoint["metadata"], {"split": args.split}, ["split"])
    dataset = evaluation_dataset(args.data_path, split, args.list)
    loader = evaluation_loader(dataset, args.num_workers, images_at_once(args.evaluation_batch_size, device), place())
    model.to(device)
    gamma = checkpoint["settings"]["calibration"] if args.calibration is None else args.calibration
    views = {name: getattr(args, name) for name in ("longest_side", "scales", "flip", "edges")}
    save = partial(save_predictions, args.save_dir, dataset, split) if args.save_dir else None
    metrics = ZeroShotMetrics(split.names, split.num_seen)
    result = evaluate(model, loader, metrics, device, gamma, save, **views)
    if is_main():
        about = {"checkpoint": str(args.checkpoint), **{key: checkpoint[key] for key in ("stage", "step", "selection")}}
        about |= {"protocol": describe_protocol(checkpoint["metadata"]), "images": len(dataset)}
        about |= {**views, "calibration": gamma}
        if args.json:
            write_text(args.json, json_lines({**result, **about}))
        print("\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items()))
        print(f"\n{format_table(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

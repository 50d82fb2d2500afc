"""The method in two minutes on two cores: drawn images, four trainings, one table and one sheet of predictions.

    make demo
    python -m benchmarks.demo --seeds 1 2 3     # mean and standard deviation

A frozen EfficientNet-Lite0 with ImageNet weights and the shipped word vectors; settings: configs/demo.toml. All rows
share them, the images and the number of steps; no target mask is opened. What is done already is not done again. If
the repository has a trained checkpoint, it then segments the photos of docs/photos/.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.runs import ROOT, add_seeds, command, format_results, train
from dataset.drawn import write_dataset
from dataset.splits import Split
from dataset.voc import evaluation_dataset
from model.predictor import SHIPPED, load_segmenter
from utils.errors import one_line_errors, write_text
from utils.trainer import stage_folder
from utils.visualize import contact_sheet, images_showing, prediction_rows, save_image

CONFIG = "configs/demo.toml"
PHOTOS = ROOT / "docs" / "photos"
SPLIT = 4
NUM_TRAIN, NUM_EVALUATION, SIDE = 800, 120, 160
PROCESSES = 2
PAPER = ["--weak-proportion", 0.2]
METHODS = {
    "source only": ("best", 1, []),
    "paper, stage 1": ("paper", 1, [*PAPER, "--lambda", 0.2]),
    "paper, stage 2": ("paper", 2, [*PAPER, "--pseudo-labels", "network", "--no-imagenet-names", "--keep", 0.6,
                                    "--self-training-weight", 0.4]),
    "best": ("best", 2, []),
}  # fmt: skip
"""Row of the table -> (folder of its runs, stage, flags). The best setting starts from the row "source only"."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, default=Path("data/drawn"), help="where the images are drawn")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="runs, table and sheet")
    add_seeds(parser, [1])
    return parser.parse_args(argv)


def run_folder(args: argparse.Namespace, method: str, seed: int) -> Path:
    """Where the stage is kept that a row of the table shows."""
    folder, stage, _ = METHODS[method]
    return stage_folder(args.output_dir / f"seed{seed}" / folder, SPLIT, stage)


def train_stages(args: argparse.Namespace, folder: str, seed: int) -> None:
    """Trains the two stages that share a folder, one after the other, unless they are done."""
    for method, (other, stage, flags) in METHODS.items():
        if other == folder:
            run = run_folder(args, method, seed)
            print(f"{method}, seed {seed}: {run / 'run.log'}", flush=True)
            script = {1: "train_split_lambda.py", 2: "train_st_split.py"}[stage]
            shared = ["--config", CONFIG, "--split", SPLIT, "--seed", seed, "--data-path", args.data_path]
            shared += ["--cache-features", args.output_dir / "features", "--output-dir", run.parents[1]]
            train(script, [*shared, *flags], run, run / "run.log")


def figures(args: argparse.Namespace, method: str, seed: int) -> dict:
    """The evaluation of a run's last step: the figures that eval.py gives."""
    log = run_folder(args, method, seed) / "log.jsonl"
    return json.loads(log.read_text(encoding="utf-8").splitlines()[-1])


def save_sheet(args: argparse.Namespace, path: Path) -> None:
    """Draws image, label and all predictions of the first seed: the first image that shows each unseen class."""
    rows = []
    for method in METHODS:
        model, split, _ = load_segmenter(run_folder(args, method, args.seeds[0]) / "latest.pth")
        dataset = evaluation_dataset(args.data_path, split)
        unseen = images_showing(dataset, range(split.num_seen, len(split.names)))
        found = prediction_rows(model, dataset, split, unseen)
        rows = rows or [(image, {"label": masks["label"]}) for image, masks in found]
        for (_, masks), (_, predicted) in zip(rows, found):
            masks[method] = predicted["prediction"]
    save_image(contact_sheet(rows, **{**split.drawing, "fade": False}), path)


def segment_photos(args: argparse.Namespace) -> None:
    """Segments the photos of docs/photos/ with the checkpoint that the repository ships, if both are there."""
    if SHIPPED.is_file() and PHOTOS.is_dir():
        command(["predict.py", "--images", PHOTOS, "--output-dir", args.output_dir / "photos"], None)
        print(f"Photos: {args.output_dir / 'photos' / 'overlays'}")


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.data_path, args.output_dir = args.data_path.resolve(), args.output_dir.resolve()
    began = time.monotonic()
    write_dataset(args.data_path, NUM_TRAIN, NUM_EVALUATION, (SIDE, SIDE))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the two processes side by side
    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(lambda job: train_stages(args, *job), [(f, s) for s in args.seeds for f in ("best", "paper")]))
    table = format_results({method: [figures(args, method, seed) for seed in args.seeds] for method in METHODS})
    save_sheet(args, args.output_dir / "predictions.png")
    print(f"\nDrawn images, split {SPLIT} (unseen: {', '.join(Split.named(SPLIT).unseen)}), percent; background is a")
    print(f"seen class, no target mask was opened, the last checkpoint counts\n\n{table}\n")
    write_text(args.output_dir / "table.md", table + "\n")
    print(f"Predictions: {args.output_dir / 'predictions.png'}\n{time.monotonic() - began:.0f} s")
    segment_photos(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The whole method in a few minutes on a laptop: drawn pictures, three trainings, one table, one picture a method.

    make demo
    python -m benchmarks.demo --seeds 1234 1235 1236     # mean and spread

A small network learns from nothing: source only (stage 1 with lambda 0), stage 1, and stage 2 from stage 1, all
without a look at a target mask. What is finished is not done again.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.runs import add_seeds, evaluate, format_results, train
from dataset.drawn import write_dataset
from dataset.splits import Split
from dataset.voc import VOCFolder
from utils.visualize import contact_sheet

SPLIT = 4
SHARED = [
    "--split", SPLIT, "--backbone", "small", "--backbone-weights", "none", "--embedding", "glove",
    "--input-size", 96, "--scale", 0.7, 1.4, "--rotation", 10, "--batch-size", 16,
    "--num-workers", 1, "--save-every", 100, "--evaluate-every", 0, "--background",
]  # fmt: skip
# A few hundred steps from nothing are no 50 epochs from ImageNet weights: the target weighs more than published.
STAGE1 = ["--max-steps", 400, "--learning-rate", 0.01, "--weak-proportion", 0.5]
STAGE2 = [
    "--max-steps", 60, "--learning-rate", 0.001, "--weak-proportion", 0.5, "--st-lambda", 1,
    "--keep", 0.1, "--balance-classes",
]  # fmt: skip
LAMBDA = 0.5
TRAIN_PICTURES, EVALUATION_PICTURES = 800, 120
METHODS = ("source only", "stage 1", "stage 2")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, default=Path("data/drawn"), help="where the pictures are drawn")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="runs, table and pictures")
    add_seeds(parser, [1234])
    return parser.parse_args(argv)


def run_seed(seed: int, data_path: Path, output_dir: Path) -> dict[str, dict]:
    """Trains and evaluates the three methods; returns the figures of each."""
    folder = output_dir / f"seed{seed}"
    baseline, ours = folder / "source_only", folder / "ours"
    shared = [*SHARED, "--data-path", data_path, "--seed", seed]
    stage = f"split{SPLIT}/stage"
    runs = {
        "source only": (
            "train_split_lambda.py",
            [*shared, "--output-dir", baseline, *STAGE1, "--lambda", 0],
            baseline / f"{stage}1",
        ),
        "stage 1": (
            "train_split_lambda.py",
            [*shared, "--output-dir", ours, *STAGE1, "--lambda", LAMBDA],
            ours / f"{stage}1",
        ),
        "stage 2": (
            "train_st_split.py",
            [*shared, "--output-dir", ours, *STAGE2],
            ours / f"{stage}2",
        ),
    }
    results = {}
    for name, (script, flags, run_folder) in runs.items():
        print(f"\n== {name}, seed {seed}: {script}", flush=True)
        checkpoint = train(script, flags, run_folder)
        results[name] = evaluate(checkpoint, data_path, ["--num-workers", 1, "--save-dir", run_folder / "pictures"])
        results[name]["masks"] = run_folder / "pictures" / "masks"
    return results


def draw_results(results: dict[str, dict], data_path: Path, output_dir: Path) -> list[Path]:
    """One picture a method, a row for each unseen class: photo, ground truth, prediction; and one with all methods."""
    split, folder = Split.voc(SPLIT), VOCFolder.open(data_path)
    names = Split.voc(SPLIT).drawing["names"]
    truth = {p: np.array(Image.open(folder.mask_path(p))) for p in folder.read_list("val", ())}
    shown = [max(truth, key=lambda p: (truth[p] == value).sum()) for value in sorted(split.unseen_values)]
    photos = {p: np.array(Image.open(folder.image_path(p))) for p in shown}
    masks = {m: {p: np.array(Image.open(r["masks"] / f"{p}.png")) for p in shown} for m, r in results.items()}

    def sheet(name: str, title: str, methods: Sequence[str]) -> Path:
        rows = [(photos[p], truth[p], {method: masks[method][p] for method in methods}) for p in photos]
        path = output_dir / f"{name}.png"
        contact_sheet(rows, names, title, fade=False).save(path)
        return path

    paths = [
        sheet(
            method.replace(" ", "_"),
            f"{method}: seen {r['miou_seen']:.1%}, unseen {r['miou_unseen']:.1%}, hIoU {r['hiou']:.1%}",
            [method],
        )
        for method, r in results.items()
    ]
    return [*paths, sheet("all_methods", "", METHODS)]


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    data_path, output_dir = args.data_path.resolve(), args.output_dir.resolve()
    began = time.monotonic()
    write_dataset(data_path, TRAIN_PICTURES, EVALUATION_PICTURES)
    runs = [run_seed(seed, data_path, output_dir) for seed in args.seeds]
    table = format_results({method: [run[method] for run in runs] for method in METHODS})
    paths = draw_results(runs[0], data_path, output_dir)
    unseen = ", ".join(Split.voc(SPLIT).unseen)
    print(f"\nDrawn pictures, split {SPLIT} (unseen: {unseen}), percent; background is a seen class,")
    print("no target mask was opened, the last checkpoint counts\n")
    print(table)
    (output_dir / "table.md").write_text(table + "\n", encoding="utf-8")
    print(f"\nPictures: {', '.join(str(path) for path in paths)}\n{time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The method in two minutes on two cores: drawn images, four trainings, one table and one sheet of predictions.

    make demo
    python -m benchmarks.demo --seeds 1 2 3     # mean and standard deviation

A frozen EfficientNet-Lite0 with ImageNet weights and the shipped word vectors; settings: configs/demo.toml. All rows
share them, the images and the number of steps; no target mask is opened. What is done already is not done again. If
the repository has a trained checkpoint, it then segments the photos of docs/photos/.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.runs import PAPER, PAPER2, ROOT, Row, command, format_results
from dataset.drawn import write_dataset
from dataset.splits import Split
from dataset.voc import evaluation_dataset
from model.predictor import SHIPPED, load_segmenter
from utils.config import Parser
from utils.errors import one_line_errors, write_text
from utils.visualize import contact_sheet, images_showing, prediction_rows, save_image

CONFIG = "configs/demo.toml"
PHOTOS = ROOT / "docs" / "photos"
SPLIT = 4
NUM_TRAIN, NUM_EVALUATION, SIDE = 800, 120, 160
PROCESSES = 2
ROWS = (
    Row("source only", "best"),
    Row("paper, stage 1", "paper", PAPER),
    Row("paper, stage 2", "paper", PAPER, PAPER2),
    Row("best", "best", (), ()),  # it starts from the row "source only"
)


def save_sheet(root: Path, data: Path, seed: int, path: Path) -> None:
    """Draws image, label and all predictions of a seed: the first image that shows each unseen class."""
    rows = []
    for row in ROWS:
        model, split, _ = load_segmenter(row.folder(root, SPLIT, seed) / "latest.pth")
        dataset = evaluation_dataset(data, split)
        unseen = images_showing(dataset, range(split.num_seen, len(split.names)))
        found = prediction_rows(model, dataset, split, unseen)
        rows = rows or [(image, {"label": masks["label"]}) for image, masks in found]
        for (_, masks), (_, predicted) in zip(rows, found):
            masks[row.name] = predicted["prediction"]
    save_image(contact_sheet(rows, **split.drawing), path)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--data-path", type=Path, default=Path("data/drawn"), help="where the images are drawn")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="runs, table and sheet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="one run of each stage a seed")
    args = parser.parse_args(argv)
    data, root, began = args.data_path.resolve(), args.output_dir.resolve(), time.monotonic()
    write_dataset(data, NUM_TRAIN, NUM_EVALUATION, (SIDE, SIDE))
    shared = ["--config", CONFIG, "--data-path", data, "--cache-features", root / "features"]
    source_only, _, paper, best = ROWS
    for rows in [(source_only, paper), (best,)]:  # the last row takes longest: for one seed it has all cores
        jobs = [(row, seed) for seed in args.seeds for row in rows]
        processes = min(PROCESSES, len(jobs))
        os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // processes))
        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(lambda job: job[0].train(root, SPLIT, job[1], shared), jobs))
    table = format_results({row.name: [row.figures(root, SPLIT, seed) for seed in args.seeds] for row in ROWS})
    save_sheet(root, data, args.seeds[0], root / "predictions.png")
    print(f"\nDrawn images, split {SPLIT} (unseen: {', '.join(Split.named(SPLIT).unseen)}), percent; background is a")
    print(f"seen class, no target mask was opened, the last checkpoint counts\n\n{table}\n")
    write_text(root / "table.md", table + "\n")
    print(f"Predictions: {root / 'predictions.png'}\n{time.monotonic() - began:.0f} s")
    if SHIPPED.is_file() and PHOTOS.is_dir():
        command(["predict.py", "--images", PHOTOS, "--output-dir", root / "photos"], root / "photos.log")
        print(f"Photos: {root / 'photos' / 'overlays'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Golden values: what a short run of each script gives, so that a redesign can be held against the code before it.

    python -m tests.golden        # writes tests/golden.json anew; say in the commit why the values changed

The images are random blobs made here from a seed, so that no change of the drawn images moves a value.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import eval as evaluation
import train_split_lambda
import train_st_split
from dataset.splits import SPLITS, Split

VALUES = Path(__file__).with_name("golden.json")
SPLIT = "4"
SHARED = ["--split", SPLIT, "--embedding", "glove", "--input-size", "64", "--set", "resize=crop", "--batch-size", "4",
          "--num-workers", "0",
          "--max-steps", "3", "--evaluate-every", "1", "--learning-rate", "1e-3"]  # fmt: skip
NETWORKS = {"small": ["--backbone", "small", "--backbone-weights", "none", "--no-freeze-backbone"],
            "efficientnet": ["--backbone", "efficientnet_lite0", "--freeze-backbone"]}  # fmt: skip
PAPER: list[str] = []
BEST = ["--config", "configs/best_cpu.toml", "--optimizer", "sgd", "--target-batch-size", "4",
        "--set", "loss_stride=1", "scale=0.8,2.5", "rotation=15", "flip=0.5"]  # fmt: skip


def write_images(folder: Path) -> Path:
    """A data set in VOC layout: 24 training and 6 evaluation images of 96 x 64 pixels with two blobs each."""
    draw = np.random.default_rng(0)
    for name in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for part, count in (("train", 24), ("val", 6)):
        ids = [f"{part}_{n:02d}" for n in range(count)]
        for n, name in enumerate(ids):
            mask = np.zeros((64, 96), np.uint8)
            pair = (20 - n % 20, 1 + (7 * n + 3) % 15)
            for value in pair:
                y, x = draw.integers(0, 40), draw.integers(0, 60)
                mask[y : y + 24, x : x + 32] = value
            mask[:2] = 255
            image = (mask[..., None].astype(int) * [37, 59, 83] + draw.integers(0, 40, (64, 96, 3))) % 256
            Image.fromarray(image.astype(np.uint8)).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
            Image.fromarray(mask).save(folder / "SegmentationClassAug" / f"{name}.png")
        (folder / "ImageSets/Segmentation" / f"{part}.txt").write_text("\n".join(ids) + "\n")
    return folder


def fingerprint(weights: dict[str, torch.Tensor]) -> list[float]:
    """Three sums over all floating-point weights that a change of any of them moves."""
    flat = torch.cat([w.double().flatten() for name, w in sorted(weights.items()) if w.is_floating_point()])
    place = torch.arange(len(flat), dtype=torch.float64)
    return [float(flat.sum()), float(flat.abs().sum()), float((flat * torch.cos(place)).sum())]


def run_stages(data: Path, folder: Path, network: list[str], settings: list[str]) -> dict:
    """Losses of each step, a fingerprint of the weights and the figures of `eval.py`, of both stages."""
    values = {}
    for stage, script in ((1, train_split_lambda), (2, train_st_split)):
        script.main([*settings, *SHARED, *network, "--data-path", str(data), "--output-dir", str(folder)])
        run = folder / f"split{SPLIT}" / f"stage{stage}"
        steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        losses = [{key: row[key] for key in row if key.startswith("loss_")} for row in steps]
        weights = torch.load(run / "latest.pth", weights_only=True)["model"]
        evaluation.main(["--checkpoint", str(run / "latest.pth"), "--data-path", str(data), "--num-workers", "0",
                         "--json", str(folder / "result.json")])  # fmt: skip
        result = json.loads((folder / "result.json").read_text())
        figures = {key: result[key] for key in result if isinstance(result[key], float)}
        per_class = {name: round(iou, 6) for name, iou in result["per_class"].items() if iou}
        values[f"stage {stage}"] = {"losses": losses, "weights": fingerprint(weights), "figures": figures,
                                    "per_class": per_class}  # fmt: skip
    return values


def compute(folder: Path) -> dict:
    """All golden values."""
    data = write_images(folder / "data")
    values: dict = {"splits": {}, "runs": {}}
    for name in SPLITS:
        split = Split.named(name)
        values["splits"][str(name)] = [len(split.names), split.num_seen, split.unseen[:5], split.names[-1]]
    plan = {"paper": ("small", PAPER), "best, small backbone": ("small", BEST), "best": ("efficientnet", BEST)}
    for name, (network, settings) in plan.items():
        values["runs"][name] = run_stages(data, folder / name.replace(" ", "_"), NETWORKS[network], settings)
    index = next(data.glob("class_index_*.json"))
    shown = json.loads(index.read_text())
    values["class_index"] = {Path(path).stem: entry["values"] for path, entry in sorted(shown.items())[:8]}
    return values


def lines(values: dict) -> str:
    """JSON with a line for each value of the second level."""
    parts = []
    for key, value in values.items():
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
        parts.append(f" {json.dumps(key)}: {{\n{rows}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        VALUES.write_text(lines(compute(Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

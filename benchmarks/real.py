"""The table on real photos: source only, both stages with and without the oracle, three seeds, mean and spread.

    python -m benchmarks.real --data-path data/real --embedding-path path/to/words

Backbone efficientnet_lite0 with ImageNet weights and frozen, split 4 (then stage 1 of splits 1, 2 and 3 once each),
word2vec + fastText, background ignored, last checkpoint. A run that is done is not done again and one that was
interrupted goes on, so the command can be stopped at any time; each run has its own log. Under two hours on two cores.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.runs import add_seeds, format_classes, format_results, train
from dataset.splits import VOC_SPLITS, Split

SHARED = [
    "--backbone", "efficientnet_lite0", "--freeze-backbone", "--embedding", "word2vec", "fasttext",
    "--save-every", 50, "--evaluate-every", 0, "--num-workers", 2,
]  # fmt: skip
# The longest side of the photos is 320 pixels: whole pictures, as they are, so that the frozen features are computed
# once. Flips would double them, and halve how often the few pictures of a rare class are met in so short a training.
CROPS = [
    "--input-size", 320, "--scale", 1, 1, "--rotation", 0, "--flip", 0, "--batch-size", 16, "--target-batch-size", 4,
]  # fmt: skip
# Rates by the seen classes of source-only training alone; AdamW learns the rare ones in these few steps, SGD does not.
STAGE1 = ["--max-steps", 250, "--optimizer", "adamw", "--learning-rate", 5e-5]
STAGE2 = ["--max-steps", 80, "--optimizer", "adamw", "--learning-rate", 2e-5]
OTHER_SPLITS = ["--max-steps", 40]
SPLIT = 4


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="a folder in VOC layout, see DATA_PATH.md")
    parser.add_argument("--embedding-path", type=Path, help="folder with word2vec and fastText vectors")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/real"), help="runs, logs and table")
    parser.add_argument(
        "--other-splits", action=argparse.BooleanOptionalAction, default=True, help="splits 1, 2, 3 too"
    )
    add_seeds(parser, [1, 2, 3])
    return parser.parse_args(argv)


def stage1(args: argparse.Namespace, name: str, seed: int, flags: list, split: int = SPLIT) -> dict:
    """Figures of one training with train_split_lambda.py."""
    return _run(args, "train_split_lambda.py", 1, name, seed, [*STAGE1, *flags], split)


def stage2(args: argparse.Namespace, name: str, seed: int, flags: list) -> dict:
    """Figures of one training with train_st_split.py, from the stage 1 of the same name and seed."""
    return _run(args, "train_st_split.py", 2, name, seed, [*STAGE2, *flags], SPLIT)


def _run(args: argparse.Namespace, script: str, stage: int, name: str, seed: int, flags: list, split: int) -> dict:
    output = args.output_dir.resolve() / name / f"seed{seed}"
    folder = output / f"split{split}" / f"stage{stage}"
    data = ["--data-path", args.data_path.resolve(), "--output-dir", output]
    data += ["--cache-features", args.output_dir.resolve() / "features"]
    words = ["--embedding-path", args.embedding_path.resolve()] if args.embedding_path else []
    print(f"{name}, stage {stage}, split {split}, seed {seed}: {folder / 'run.log'}", file=sys.stderr, flush=True)
    train(
        script, [*SHARED, *CROPS, *data, *words, "--split", split, "--seed", seed, *flags], folder, folder / "run.log"
    )
    last = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return json.loads(last)  # the evaluation of latest.pth: what eval.py says of it too


def study(args: argparse.Namespace) -> dict[str, list[dict]]:
    """All rows of the table on split 4: method -> figures a seed."""
    rows: dict[str, list[dict]] = {}
    for seed in args.seeds:
        rows.setdefault("source only", []).append(stage1(args, "source_only", seed, ["--lambda", 0]))
        for pixels, label in (("oracle", "oracle"), ("all", "no oracle")):
            flags = ["--target-pixels", pixels]
            rows.setdefault(f"stage 1, {label}", []).append(stage1(args, pixels, seed, flags))
            rows.setdefault(f"stage 2, {label}", []).append(stage2(args, pixels, seed, flags))
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    rows = study(args)
    parts = [f"Split {SPLIT}, percent", format_results(rows), format_classes(rows, Split.voc(SPLIT).unseen)]
    if args.other_splits:
        seed, others = args.seeds[0], [split for split in VOC_SPLITS if split != SPLIT]
        results = {
            f"split {k}, stage 1, no oracle, {OTHER_SPLITS[-1]} steps": [stage1(args, "all", seed, OTHER_SPLITS, k)]
            for k in others
        }
        parts += [format_results(results)]
    text = "\n\n".join(parts)
    print(text)
    (args.output_dir / "table.md").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

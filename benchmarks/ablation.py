"""The tables of docs/RESULTS.md: the paper's method, the best one, and the best one with one thing changed.

    python -m benchmarks.ablation --data-path data/real --embedding-path path/to/words

Every row is `configs/best_cpu.toml` with a few flags changed. It trains from ImageNet weights by the two scripts, for
the same steps, and is evaluated at its last checkpoint; mean and standard deviation over seeds. A finished run is not
repeated and an interrupted one resumes, so processes can work side by side (`--seeds 1`, `--seeds 2`, `--rows ...`).
The command without these then prints the table, and `--only-table` prints what there is without training.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runs import add_seeds, evaluate, format_classes, format_results, train
from dataset.splits import SPLITS, Split, split_name
from utils.trainer import stage_folder

CONFIG = "configs/best_cpu.toml"
GAMMAS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        name: its heading.
        start: folder of stage 1; rows that share it share that run.
        stage1: flags of stage 1, besides the settings file.
        stage2: flags of stage 2; None: the figures are those of stage 1.
        evaluation: flags of eval.py; none: the figures that training logged.
        calibrated: eval.py takes the best gamma of `GAMMAS` for the same row on `<split>-val`, where seen classes play
            the unseen ones.
    """

    name: str
    start: str
    stage1: tuple = ()
    stage2: tuple | None = None
    evaluation: tuple = ()
    calibrated: bool = False


def best(name: str, *changes, evaluation: tuple = ()) -> Row:
    """The best setting with some flags of stage 2 changed."""
    return Row(name, "best", (), changes, evaluation)


SOURCE_ONLY = ("--background", "ignore")
PAPER = (*SOURCE_ONLY, "--lambda", 0.2, "--weak-proportion", 0.2)
PAPER2 = (
    *SOURCE_ONLY, "--pseudo-labels", "network", "--no-imagenet-names", "--keep", 0.6, "--self-training-weight", 0.4,
    "--weak-proportion", 0.2,
)  # fmt: skip
ORACLE = ("--target-pixels", "oracle")
MAIN = (
    Row("source only", "source_only", SOURCE_ONLY),
    Row("paper, oracle: stage 1", "oracle", (*PAPER, *ORACLE)),
    Row("paper, oracle: stage 2", "oracle", (*PAPER, *ORACLE), (*PAPER2, *ORACLE)),
    Row("paper: stage 1", "paper", PAPER),
    Row("paper: stage 2", "paper", PAPER, PAPER2),
    best("best"),
    best("best, scales and flip", evaluation=("--scales", 0.75, 1, 1.25, "--flip")),
    Row("supervised, all 20 labels", "supervised", (*SOURCE_ONLY, "--supervised")),
)
"""What the best setting is compared with; these rows make the first two tables."""

CHANGES = (
    best("no ImageNet names", "--no-imagenet-names"),
    Row("source only, calibrated", "source_only", SOURCE_ONLY, calibrated=True),
    Row("background scored", "background", ("--background", "score"), ("--background", "score")),
)
"""The best setting with one thing changed."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="a folder in VOC layout, see DATA_PATH.md")
    parser.add_argument("--embedding-path", type=Path, help="folder with word2vec and fastText vectors")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablation"), help="runs, logs and tables")
    parser.add_argument("--evaluation-list", help="evaluation images, as for the scripts (default: val)")
    parser.add_argument("--splits", nargs="+", type=split_name, default=[4], help="splits to run the rows on")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows (default: all)")
    parser.add_argument("--only-table", action="store_true", help="train nothing; tables of the runs that are done")
    add_seeds(parser, [1, 2, 3])
    args = parser.parse_args(argv)
    known = {row.name: row for row in MAIN + CHANGES}
    unknown = [name for name in args.rows or () if name not in known]
    if unknown:
        parser.error(f"--rows {unknown[0]!r}: choose among {', '.join(map(repr, known))}")
    args.rows = [row for name, row in known.items() if args.rows is None or name in args.rows]
    return args


def run_folder(args: argparse.Namespace, row: Row, split: int | str, seed: int) -> Path:
    """Where the stage is kept that a row's figures are of."""
    changed = row.stage2 is not None
    folder = slug(row.name if changed and row.stage2 else row.start)
    return stage_folder(args.output_dir.resolve() / folder / f"seed{seed}", split, 2 if changed else 1)


def trained(args: argparse.Namespace, row: Row, split: int | str, seed: int) -> Path:
    """Trains what a row needs, unless it is done; returns its last checkpoint."""
    root, run = args.output_dir.resolve(), run_folder(args, row, split, seed)
    start = root / row.start / f"seed{seed}"
    first = stage_folder(start, split, 1)
    shared = ["--config", CONFIG, "--data-path", args.data_path.resolve(), "--split", split, "--seed", seed]
    shared += ["--num-workers", 0, "--cache-features", root / "features"]
    shared += ["--embedding-path", args.embedding_path.resolve()] if args.embedding_path else []
    shared += ["--evaluation-list", args.evaluation_list] if args.evaluation_list else []
    print(f"split {split}, seed {seed}, {row.name}: {run / 'run.log'}", file=sys.stderr, flush=True)
    last = train("train_split_lambda.py", [*shared, "--output-dir", start, *row.stage1], first, first / "run.log")
    if row.stage2 is None:
        return last
    flags = [*shared, "--output-dir", run.parents[1], "--stage1-checkpoint", last, *row.stage2]
    return train("train_st_split.py", flags, run, run / "run.log")


def figures(args: argparse.Namespace, row: Row, split: int | str, seed: int) -> dict | None:
    """The evaluation of a row's last checkpoint; None where it is not there and must not be made, or has no fold."""
    if row.calibrated and f"{split}-val" not in SPLITS:
        return None
    special = row.calibrated or row.evaluation
    path = run_folder(args, row, split, seed) / (f"{slug(row.name)}.json" if special else "result.json")
    if not args.only_table:
        last = trained(args, row, split, seed)
        if row.calibrated:
            fold = trained(args, row, f"{split}-val", seed)
            gamma = evaluated(args, fold, ("--calibration", *GAMMAS), "calibrations.json")["best_calibration"]
            evaluated(args, last, ("--calibration", gamma), path.name)
        elif row.evaluation:
            evaluated(args, last, row.evaluation, path.name)
        else:
            logged = (path.parent / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
            path.write_text(logged, encoding="utf-8")  # the same figures as those of eval.py
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def evaluated(args: argparse.Namespace, checkpoint: Path, flags: tuple, name: str) -> dict:
    """The figures of eval.py with some flags, kept beside the checkpoint as `name`."""
    flags = [*flags, "--num-workers", 0, *(["--list", args.evaluation_list] if args.evaluation_list else [])]
    return evaluate(checkpoint, args.data_path.resolve(), flags, checkpoint.with_name("evaluation.log"), name)


def slug(name: str) -> str:
    """A row's name as a folder's."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    parts = []
    for split in args.splits:
        rows: dict[str, list[dict]] = {}
        for seed in args.seeds:
            for row in args.rows:
                result = figures(args, row, split, seed)
                if result is not None:
                    rows.setdefault(row.name, []).append(result)
        parts += [
            f"Split {split}, percent",
            format_results({row.name: rows[row.name] for row in args.rows if row.name in rows}),
        ]
        main_rows = {row.name: rows[row.name] for row in MAIN if row.name in rows}
        if main_rows:
            parts += [format_classes(main_rows, Split.named(split).unseen)]
    text = "\n\n".join(parts)
    print(text)
    if set(MAIN + CHANGES) <= set(args.rows):
        (args.output_dir / "table.md").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

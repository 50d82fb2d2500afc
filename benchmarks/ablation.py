"""Recipes against each other on real photos: the paper's, the best one, and the best one with one thing changed.

    python -m benchmarks.ablation --data-path data/real --embedding-path path/to/words

Every row trains from ImageNet weights by the two scripts, with nothing but their flags, for the same steps, and is
evaluated at its last checkpoint; mean and standard deviation over seeds. A run that is done is not done again, one that
was interrupted goes on, and lanes can work side by side (`--seeds 1`, `--seeds 2`, `--rows ...`): the command without
them then prints the table, and `--only-table` prints what there is without training anything. `--words FILE` adds the
rows of other words: any file that `--embedding` reads, such as the wheel of a sentence encoder. `--end-to-end` trains
the backbone too, for which a GPU is wanted: give it an `--output-dir` of its own.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runs import add_seeds, evaluate, format_classes, format_results, train
from dataset.splits import SPLITS, Split, split_name
from utils.recipes import spelt_out
from utils.run import stage_folder

# Whole pictures as they are (their longest side is 320 pixels), so that a frozen trunk's features are computed once;
# flips would double them. Rates and steps by the seen classes of source-only training.
SHARED = [
    "--backbone", "efficientnet_lite0", "--freeze-backbone", "--embedding", "word2vec", "fasttext",
    "--input-size", 320, "--scale", 1, 1, "--rotation", 0, "--flip", 0, "--loss-stride", 4, "--optimizer", "adamw",
    "--save-every", 100, "--evaluate-every", 0, "--num-workers", 0,
]  # fmt: skip
STAGE1 = ["--max-steps", 400, "--learning-rate", 2e-4, "--batch-size", 10, "--target-batch-size", 4]
STAGE2 = ["--max-steps", 200, "--learning-rate", 3e-5, "--batch-size", 12, "--target-batch-size", 8]
# End to end the trunk learns too, at a quarter of the rate, and what follows it as before. Nobody has tuned this.
UNFROZEN1 = ["--learning-rate", 5e-5, "--head-factor", 40]
UNFROZEN2 = ["--learning-rate", 7.5e-6, "--head-factor", 40]
SPLIT = 4
GAMMAS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


@dataclass(frozen=True)
class Row:
    """A line of the table: what it is called, its stage 1, and the flags of each stage.

    Args:
        start: the folder of stage 1; rows that share it share that run.
        stage1: its flags.
        stage2: the flags of stage 2; None: the figures are those of stage 1.
        calibrated: they are those of eval.py with the best gamma of `GAMMAS` for the same row on `<split>-val`, where
            seen classes stand in for the unseen ones.
    """

    name: str
    start: str
    stage1: tuple = ()
    stage2: tuple | None = None
    calibrated: bool = False


def best(name: str, *changes) -> Row:
    """The best recipe with some flags of stage 2 changed."""
    return Row(name, "best", ("--recipe", "best"), ("--recipe", "best", *changes))


ORACLE = ("--target-pixels", "oracle")
BACKGROUND = ("--recipe", "best", "--no-auxiliary-background", "--background")
MAIN = (
    Row("source only", "source_only", ("--lambda", 0)),
    Row("paper, oracle: stage 1", "oracle", ORACLE),
    Row("paper, oracle: stage 2", "oracle", ORACLE, ORACLE),
    Row("paper: stage 1", "paper"),
    Row("paper: stage 2", "paper", (), ()),
    Row("best: stage 1", "best", ("--recipe", "best")),
    best("best: stage 2"),
    Row("supervised, all 20 labels", "supervised", ("--supervised",)),
)
"""What the best recipe is measured against; these rows and their classes make the first two tables."""

CHANGES = (
    best("one round", "--rounds", 1),
    best("no ImageNet names", "--no-imagenet-names"),
    best("no clusters", "--num-clusters", 0, "--no-imagenet-names"),
    best("no known labels on the target", "--keep-known", 0),
    best("rare classes weigh no more", "--rare-power", 0),
    best("several names a picture", "--no-one-name"),
    best("no gate in a picture", "--picture-gate", 1),
    best("keep 0.1", "--keep", 0.1),
    best("every picture a target", "--target-images", "all"),
    Row("source only, calibrated", "source_only", ("--lambda", 0), calibrated=True),
    Row("background scored: stage 1", "background", BACKGROUND),
    Row("background scored: stage 2", "background", BACKGROUND, BACKGROUND),
)
"""The best recipe with one thing changed, and single terms of stage 1."""


def with_words(path: Path) -> tuple[Row, ...]:
    """Source only and the best recipe with the words of a file, alone and with those of all other rows."""
    rows = []
    for name, words in ((path.stem, [path]), (f"{path.stem} too", ["word2vec", "fasttext", path])):
        flags = ("--embedding", *words)
        best_with = ("--recipe", "best", *flags)
        rows += [
            Row(f"source only, words {name}", slug(f"source only, {name}"), ("--lambda", 0, *flags)),
            Row(f"best, words {name}", slug(f"best, {name}"), best_with, best_with),
        ]
    return tuple(rows)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="a folder in VOC layout, see DATA_PATH.md")
    parser.add_argument("--embedding-path", type=Path, help="folder with word2vec and fastText vectors")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablation"), help="runs, logs and tables")
    parser.add_argument("--evaluation-list", help="evaluation pictures, as for the scripts (default: val)")
    parser.add_argument("--splits", nargs="+", default=[str(SPLIT)], help="splits to run the rows on")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows (default: all)")
    parser.add_argument("--words", nargs="+", type=Path, default=[], metavar="FILE", help="rows of other words too")
    parser.add_argument("--end-to-end", action="store_true", help="train the backbone too, on a GPU if there is one")
    parser.add_argument("--only-table", action="store_true", help="train nothing; tables of the runs that are done")
    add_seeds(parser, [1, 2, 3])
    args = parser.parse_args(argv)
    missing = [path for path in args.words if not path.is_file()]
    if missing:
        parser.error(f"--words {missing[0]} is no file: give one that --embedding reads")
    known = MAIN + CHANGES + tuple(row for path in args.words for row in with_words(path.resolve()))
    unknown = [name for name in args.rows or () if name not in {row.name for row in known}]
    if unknown:
        parser.error(f"--rows {unknown[0]!r}: choose among {', '.join(repr(row.name) for row in known)}")
    args.rows = [row for row in known if args.rows is None or row.name in args.rows]
    return args


def figures(args: argparse.Namespace, row: Row, split: str, seed: int) -> dict | None:
    """The evaluation of a row's last checkpoint; None where it is not there and must not be made, or has no fold."""
    if row.calibrated and f"{split}-val" not in SPLITS:
        return None
    run = run_folder(args, row, split, seed)
    name = f"{slug(row.name) if row.calibrated else 'result'}.json"
    if not args.only_table:
        last = trained(args, row, split, seed)
        if row.calibrated:
            fold = trained(args, row, f"{split}-val", seed)
            gamma = calibrated(args, fold, GAMMAS, "calibrations.json")["best_calibration"]
            calibrated(args, last, [gamma], name)
        else:
            logged = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
            (run / name).write_text(logged, encoding="utf-8")  # what eval.py says of latest.pth too
    return json.loads((run / name).read_text(encoding="utf-8")) if (run / name).is_file() else None


def calibrated(args: argparse.Namespace, checkpoint: Path, gammas: Sequence[float], name: str) -> dict:
    """What eval.py says of a checkpoint with these values of gamma, kept beside it as `name`."""
    more = ["--calibration", *gammas, "--num-workers", 0]
    more += ["--list", args.evaluation_list] if args.evaluation_list else []
    return evaluate(checkpoint, args.data_path.resolve(), more, checkpoint.with_name("calibration.log"), name)


def run_folder(args: argparse.Namespace, row: Row, split: str, seed: int) -> Path:
    """Where the stage is kept that a row's figures are of."""
    folder, stage = (row.start, 1) if row.stage2 is None else (slug(row.name), 2)
    return stage_folder(args.output_dir.resolve() / folder / f"seed{seed}", split, stage)


def trained(args: argparse.Namespace, row: Row, split: str, seed: int) -> Path:
    """Trains what a row needs, unless it is done; returns its last checkpoint."""
    root, run = args.output_dir.resolve(), run_folder(args, row, split, seed)
    begun = root / row.start / f"seed{seed}"
    first = stage_folder(begun, split, 1)
    frozen = not args.end_to_end
    shared = [flag for flag in SHARED if frozen or flag != "--freeze-backbone"]
    shared += ["--data-path", args.data_path.resolve()]
    shared += ["--cache-features", root / "features"] if frozen else []
    shared += ["--split", split]
    shared += ["--embedding-path", args.embedding_path.resolve()] if args.embedding_path else []
    shared += ["--evaluation-list", args.evaluation_list] if args.evaluation_list else []
    shared += ["--seed", seed]
    stage1, stage2 = (STAGE1, STAGE2) if frozen else (STAGE1 + UNFROZEN1, STAGE2 + UNFROZEN2)
    print(f"split {split}, seed {seed}, {row.name}: {run / 'run.log'}", file=sys.stderr, flush=True)
    flags = [*shared, *stage1, "--output-dir", begun, *row.stage1]
    last = train("train_split_lambda.py", flags, first, first / "run.log")
    if row.stage2 is not None:
        flags = [*shared, *stage2, "--output-dir", run.parents[1], "--stage1-checkpoint", last, *row.stage2]
        if "--recipe" in flags:  # spelt out, for a recipe may change while its name stays, and then runs anew
            at = flags.index("--recipe")
            flags[at : at + 2] = spelt_out(flags[at + 1], 2).split()
        last = train("train_st_split.py", flags, run, run / "run.log")
    return last


def slug(name: str) -> str:
    """A row's name as that of a folder."""
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
        table = {row.name: rows[row.name] for row in args.rows if row.name in rows}
        parts += [f"Split {split}, percent", format_results(table)]
        main_rows = {row.name: rows[row.name] for row in MAIN if row.name in rows}
        if main_rows:
            parts += [format_classes(main_rows, Split.named(split_name(split)).unseen)]
    text = "\n\n".join(parts)
    print(text)
    if set(MAIN + CHANGES) <= set(args.rows):
        (args.output_dir / "table.md").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

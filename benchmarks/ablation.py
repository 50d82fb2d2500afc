"""The table of docs/RESULTS.md: the paper's method, the best one, and the best one with one thing changed.

    python -m benchmarks.ablation --data-path data/real --embedding-path path/to/words

Every row is `configs/best_cpu.toml` with a few flags changed. It trains from ImageNet weights by the two scripts, for
the same steps, and is evaluated at its last checkpoint; mean and standard deviation over seeds. A finished run is not
repeated and an interrupted one resumes, so processes can work side by side (`--seeds 1`, `--seeds 2`, `--rows ...`).
The command without these then prints the tables, and `--only-table` prints what there is without training.
"""

import itertools
import sys
from pathlib import Path

from benchmarks import runs
from benchmarks.runs import Row, format_results
from dataset.splits import split_name
from utils.config import Parser
from utils.errors import one_line_errors

CONFIG = "configs/best_cpu.toml"
SOURCE_ONLY = ("--background", "ignore")
PAPER, PAPER2 = (*SOURCE_ONLY, *runs.PAPER), (*SOURCE_ONLY, *runs.PAPER2)
ORACLE = ("--target-pixels", "oracle")
ROWS = (
    Row("source only", "source_only", SOURCE_ONLY),
    Row("paper, oracle: stage 1", "oracle", (*PAPER, *ORACLE)),
    Row("paper, oracle: stage 2", "oracle", (*PAPER, *ORACLE), (*PAPER2, *ORACLE)),
    Row("paper: stage 1", "paper", PAPER),
    Row("paper: stage 2", "paper", PAPER, PAPER2),
    Row("best", "best", (), ()),
    Row("supervised, all 20 labels", "supervised", (*SOURCE_ONLY, "--supervised")),
    # The best setting with one thing changed:
    Row("labels may be incomplete", "best", (), ("--no-complete-labels",)),
    Row("background scored", "background", ("--background", "score"), ("--background", "score")),
)


def parse_arguments(argv: list[str] | None):
    parser = Parser(description=__doc__)
    parser.add_argument("--data-path", type=Path, required=True, help="a folder in VOC layout, see DATA_PATH.md")
    parser.add_argument("--embedding-path", type=Path, help="folder with word2vec and fastText vectors")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablation"), help="runs and logs")
    parser.add_argument("--evaluation-list", help="evaluation images, as for the scripts (default: val)")
    parser.add_argument("--splits", nargs="+", type=split_name, default=[4], help="splits to run the rows on")
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="+", metavar="NAME", choices=names, default=names, help="only these rows")
    parser.add_argument("--only-table", action="store_true", help="train nothing; the runs that are done")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run of each stage a seed")
    args = parser.parse_args(argv)
    args.rows = [row for row in ROWS if row.name in args.rows]
    args.data_path, args.output_dir = args.data_path.resolve(), args.output_dir.resolve()
    return args


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    shared = ["--config", CONFIG, "--data-path", args.data_path, "--num-workers", 0]
    shared += ["--cache-features", args.output_dir / "features"]
    shared += ["--embedding-path", args.embedding_path.resolve()] if args.embedding_path else []
    shared += ["--evaluation-list", args.evaluation_list] if args.evaluation_list else []
    for split in args.splits:
        for row, seed in itertools.product(() if args.only_table else args.rows, args.seeds):
            row.train(args.output_dir, split, seed, shared)
        results = {row.name: [row.figures(args.output_dir, split, seed) for seed in args.seeds] for row in args.rows}
        done = {name: [result for result in found if result] for name, found in results.items() if any(found)}
        print(f"Split {split}, percent\n\n{format_results(done)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

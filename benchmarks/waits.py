"""Runs a training script on a GPU and prints the lines of code that wait for the GPU, and how often.

python -m benchmarks.waits train_split_lambda.py --split 1 --max-steps 12 --evaluate-every 0
"""

import collections
import importlib
import sys
import warnings
from pathlib import Path

import torch


def main(argv: list[str]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        code = importlib.import_module(Path(argv[0]).stem).main(argv[1:])
    lines = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message)]
    print("waits:", ", ".join(f"{line} x {count}" for line, count in collections.Counter(lines).items()) or "none")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

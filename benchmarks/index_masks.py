"""How fast masks are indexed: one process against all cores, side by side.

    python -m benchmarks.index_masks                                 # 6000 drawn masks of 500 x 375 pixels
    python -m benchmarks.index_masks --data-path data/VOCdevkit/VOC2012

Prints the time on the clock and the time of the processors, the best of some repeats, taken in turn so that a busy
machine harms both alike; and checks that both find the same. `speed-up` is one process's clock over all cores'.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dataset.masks import save_mask
from dataset.parallel import spread
from dataset.splits import VOID
from dataset.voc import VOCFolder, read_mask_values


def draw_masks(folder: Path, number: int, size: tuple[int, int] = (500, 375)) -> list[Path]:
    """Masks of VOC's size with a few objects each, some 7 KB each."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{index:06}.png" for index in range(number)]
    for path in paths:
        image = Image.new("L", size)
        pencil = ImageDraw.Draw(image)
        for value in rng.integers(1, 21, 3):
            corners = [tuple(corner) for corner in rng.uniform(0, size, (12, 2))]
            pencil.polygon(corners, fill=int(value), outline=VOID)
        save_mask(np.array(image), path)
    return paths


def measure(paths: Sequence[Path], known_values: Sequence[int], workers: int) -> tuple[float, float, list]:
    """Seconds on the clock, seconds of all processors, and the values of each mask."""
    read = functools.partial(read_mask_values, known_values=tuple(known_values))
    wall, before = time.perf_counter(), os.times()
    values = list(spread(read, paths, f"{workers} processes", "mask", workers))
    wall, after = time.perf_counter() - wall, os.times()
    return wall, sum(after[:4]) - sum(before[:4]), values  # user and system, of this process and its children


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index_masks", description=__doc__.splitlines()[0])
    parser.add_argument("--data-path", type=Path, metavar="DIR", help="a data set's masks (default: drawn ones)")
    parser.add_argument("--masks", type=int, default=6000, metavar="N", help="how many")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes to compare with one"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="the best of so many counts")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        if args.data_path is None:
            paths, known = draw_masks(Path(scratch), args.masks), range(21)
        else:
            folder = VOCFolder.open(args.data_path)
            paths, known = sorted(folder.masks.glob("*.png"))[: args.masks], folder.read_classes().values()
        best = {}
        for _ in range(args.repeats):
            for workers in (1, args.workers):
                result = measure(paths, known, workers)
                best[workers] = min(best.get(workers, result), result, key=lambda result: result[0])
    for workers, (wall, processor, _) in best.items():
        print(
            f"{workers} process{'es' * (workers > 1):2}  {wall:6.2f} s on the clock  {processor:6.2f} s of processors"
        )
    (one, _, values), (many, _, same) = best[1], best[args.workers]
    print(f"{len(paths)} masks, speed-up {one / many:.2f}, the same values: {'yes' if values == same else 'NO'}")
    return 0 if values == same else 1


if __name__ == "__main__":
    sys.exit(main())

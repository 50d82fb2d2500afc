"""Training steps of both scripts on one GPU, for gpu_check.sh: a JSON line for each measurement.

    python -m benchmarks.gpu_check --results results.jsonl
    python -m benchmarks.gpu_check --tiny                       # small sizes, on a CPU too

On noise: images a second, time until the host is free, peak memory, and the lines of code that wait for the GPU. What
stands against a plain loop is measured by benchmarks.speed.
"""

import argparse
import collections
import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.speed import build_step
from utils.config import Parser, parse_settings
from utils.distributed import choose_device
from utils.errors import one_line_errors


def build(stage: int, backbone: str, flags: list[str], sizes: tuple[int, int], device: torch.device) -> Callable:
    """A training step of a script with these flags; sizes: images of each kind, and their side."""
    settings = parse_settings(["--backbone", backbone, *flags], stage)
    batch_size, input_size = sizes
    return build_step("ours", argparse.Namespace(
        stage=stage, settings=settings, device=device.type, batch_size=batch_size, input_size=input_size
    ))  # fmt: skip


def find_waits(step: Callable, device: torch.device) -> dict[str, int]:
    """Lines of code that wait for the GPU in a step, and how often."""
    if device.type != "cuda":
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    lines = (f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message))
    return dict(collections.Counter(lines))


def measure(build_it: Callable[[], Callable], images: int, device: torch.device, times: int) -> dict:
    """Builds a step of so many images and takes it; the figures, or the error."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    try:
        step = build_it()
        for _ in range(4):
            step()
        wait()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(times):
            step()
        host = (time.perf_counter() - start) / times
        wait()
        seconds = (time.perf_counter() - start) / times
    except Exception as error:  # one failure must not hide the other figures
        torch.cuda.empty_cache()
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    peak = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else 0.0
    return {
        "images_per_second": round(images / seconds, 1), "step_ms": round(1e3 * seconds, 1),
        "host_ms": round(1e3 * host, 1), "reserved_gb": round(peak, 2), "waits": find_waits(step, device),
    }  # fmt: skip


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--results", type=Path, metavar="FILE", help="append the figures there too")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args(argv)
    sizes, times = ((2, 32), 2) if args.tiny else ((9, 512), 12)
    small, large = ("small", "small") if args.tiny else ("vgg16", "deeplabv3_resnet101")
    device = choose_device("auto")
    plan = [(1, small, []), (1, small, ["--amp", "off"]), (1, small, ["--checkpoint-activations"])]
    plan += [(2, small, []), (1, large, [])]
    for stage, backbone, flags in plan:
        figures = measure(partial(build, stage, backbone, flags, sizes, device), 2 * sizes[0], device, times)
        line = json.dumps({"title": " ".join([f"stage {stage}, {backbone}", *flags]), **figures})
        print(line, flush=True)
        if args.results is not None:
            with args.results.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

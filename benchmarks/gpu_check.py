"""Figures of one GPU for gpu_check.sh: a JSON line for each measurement.

    python -m benchmarks.gpu_check training --results results.jsonl
    python -m benchmarks.gpu_check evaluation --tiny            # small sizes, on a CPU too

Training and evaluation steps of the scripts on noise: images a second, time until the host is free, peak memory, and
the lines of code that wait for the GPU. The share is that of the card's bf16 rate, measured with a product of matrices.
"""

import argparse
import collections
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import train_split_lambda
import train_st_split
from benchmarks.speed import EMBEDDING_SIZE, SPLIT, draw_batches
from model.backbone import build_backbone
from model.segmenter import Segmenter
from utils.config import Parser, parse_settings
from utils.distributed import choose_amp, choose_device
from utils.errors import one_line_errors
from utils.metrics import ZeroShotMetrics, best_classes, predictions
from utils.trainer import build_optimizer

SCRIPTS = {1: train_split_lambda, 2: train_st_split}


def find_waits(work: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Lines of code that wait for the GPU in one call of `work`, and how often."""
    if device.type != "cuda":
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        work()
        torch.cuda.set_sync_debug_mode("default")
    lines = (f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message))
    return dict(collections.Counter(lines))


def measure(title: str, build: Callable[[], Callable], images: int, args: argparse.Namespace) -> dict:
    """Builds and calls a function of so many images; the figures, or the error."""
    device, steps = args.device, 2 if args.tiny else 12
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    try:
        work = build()
        for _ in range(2 if args.tiny else 4):
            work()
        wait()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(steps):
            work()
        host = time.perf_counter() - start
        wait()
        seconds = (time.perf_counter() - start) / steps
    except Exception as error:  # one failure must not hide the other figures
        torch.cuda.empty_cache()
        return {"title": title, "error": f"{type(error).__name__}: {error}"[:300]}
    peak = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else 0.0
    return {
        "title": title, "images_per_second": round(images / seconds, 1), "step_ms": round(1e3 * seconds, 1),
        "host_ms": round(1e3 * host / steps, 1), "reserved_gb": round(peak, 2), "waits": find_waits(work, device),
    }  # fmt: skip


def build_step(stage: int, backbone: str, flags: list[str], args: argparse.Namespace) -> Callable:
    """A training step of a script on noise, with its own settings."""
    settings = parse_settings(["--backbone", backbone, *flags], stage, "", SCRIPTS[stage].CHOICES)
    amp, num_seen = choose_amp(settings.amp, args.device), SPLIT.num_seen
    network = build_backbone(backbone)
    network.checkpoint_activations = settings.checkpoint_activations
    network = Segmenter(network, torch.randn(len(SPLIT.names), EMBEDDING_SIZE), amp=amp, compiled=settings.compile)
    network = network.to(args.device).train()
    optimizer = build_optimizer(network.parameter_groups(settings.learning_rate, settings.head_factor), settings)
    batches = draw_batches(args.batch_size, args.input_size, num_seen, pin=False)
    source, target = ([tensor.to(args.device) for tensor in batch] for batch in batches)
    return partial(SCRIPTS[stage].train_step, network, optimizer, source, target, num_seen, settings)


def share_of_bf16_rate(backbone: str, step_ms: float, args: argparse.Namespace) -> float:
    """The rate of a step's convolutions (FLOP counted, not computed) as a share of that of a product of matrices."""
    network = build_backbone(backbone).to("meta")
    image = torch.empty(2 * args.batch_size, 3, args.input_size, args.input_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        network.classifier(network.trunk(image)).sum().backward()
    flop = sum(n for name, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(name))
    side = 256 if args.tiny else 8192
    a, b = (torch.randn(side, side, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    product = measure("product", lambda: partial(torch.matmul, a, b), 1, args)
    return flop / step_ms / (2 * side**3 / product["step_ms"])


def training(args: argparse.Namespace) -> Iterator[dict]:
    small, large = ("small", "small") if args.tiny else ("vgg16", "deeplabv3_resnet101")
    plan = [(1, small, []), (1, small, ["--amp", "off"]), (1, small, ["--checkpoint-activations"]), (2, small, []),
            (1, large, []), (1, small, ["--compile"])]  # fmt: skip
    for stage, backbone, flags in plan[: 5 if args.tiny else 6]:
        title = " ".join([f"stage {stage}, {backbone}", *flags])
        figures = measure(title, partial(build_step, stage, backbone, flags, args), 2 * args.batch_size, args)
        if stage == 1 and not flags and "step_ms" in figures:
            figures["share_of_bf16_rate"] = round(share_of_bf16_rate(backbone, figures["step_ms"], args), 3)
        yield figures


def build_evaluation(backbone: str, num_classes: int, images: int, args: argparse.Namespace) -> Callable:
    height, width, num_seen = *((40, 48) if args.tiny else (375, 500)), num_classes * 3 // 4
    network = Segmenter(build_backbone(backbone), torch.randn(num_classes, EMBEDDING_SIZE)).to(args.device)
    image = torch.randint(256, (images, 3, height, width), dtype=torch.uint8)
    batches = [(image, image[:, 0] % num_classes, torch.arange(images))] * 4

    def once() -> None:
        metrics = ZeroShotMetrics([str(c) for c in range(num_classes)], num_seen)
        for _, label, index, logits in predictions(network, batches, args.device):
            metrics.update(*logits.map_pixels(partial(best_classes, num_seen=num_seen)), label, index)

    return once


def evaluation(args: argparse.Namespace) -> Iterator[dict]:
    backbone, images = ("small", 2) if args.tiny else ("vgg16", 8)
    for number in (20, 171):
        build = partial(build_evaluation, backbone, number, images, args)
        yield measure(f"evaluation, {backbone}, {number} classes", build, 4 * images, args)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parts = {part.__name__: part for part in (training, evaluation)}
    parser = Parser(description=__doc__)
    parser.add_argument("part", choices=parts, help="what to measure")
    parser.add_argument("--results", type=Path, metavar="FILE", help="append the figures there too")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args(argv)
    args.device, (args.batch_size, args.input_size) = choose_device("auto"), (2, 32) if args.tiny else (9, 512)
    for figures in parts[args.part](args):
        print(line := json.dumps(figures), flush=True)
        if args.results is not None:
            with args.results.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

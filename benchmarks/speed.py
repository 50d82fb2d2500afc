"""How fast we are, and how far from the limit: the plain loop against ours, side by side on this machine.

    python -m benchmarks.speed                                   # on a CPU: under 10 minutes on 2 free cores
    python -m benchmarks.speed --device cuda --json speed.json   # on a GPU: 512 pixels, 9 + 9, bf16; under 10 minutes
    python -m benchmarks.speed --parts input eval --quick
    python -m benchmarks.speed --growth                          # how cost grows with classes, sides and processes

Training (stage 1's own `train_step`, batches at hand in the machine's memory), evaluation, input and peak memory. Each
figure is the median of repeats taken in turn, so that a busy machine harms both alike. Ratios come first. The share of
the limit is what a whole training step makes of the rate at which this machine multiplies large matrices.

The pictures are drawn, of VOC's sizes, unless --data-path has some. Weights are random, which takes as long as any.
The plain loop is `benchmarks.plain`: on a GPU in full float32, without the TensorFloat-32 that torch allows
convolutions (--plain-tf32 lets it).
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.measures import (
    measure_evaluation,
    measure_growth,
    measure_input,
    measure_memory,
    measure_training,
    pictures,
)
from model.backbone import BACKBONES
from utils.errors import UserError, one_line_errors
from utils.options import Parser, count, natural, number
from utils.run import choose_device

PARTS = ("train", "eval", "input", "memory")

TARGETS = {
    "cpu": {"train": ">= 1.15", "eval": ">= 2.2", "input": ">= 3", "memory": "<= 0.4", "share": ">= 0.88"},
    "cuda": {"train": ">= 6", "eval": ">= 8", "input": ">= 3", "memory": "<= 0.3", "share": ">= 0.45"},
}
"""What we hold ourselves to: on 2 CPU cores with VGG16 at 256 pixels; on an H200 at 512 pixels, with bf16."""

LABELS = {
    "train": "training, pictures a second, ours / plain",
    "eval": "evaluation, pictures a second, ours / plain",
    "input": "input, pictures a second and core, ours / plain",
    "memory": "peak memory of a step, ours / plain",
    "share": "share of the matrix product's rate, training step",
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--backbone", choices=BACKBONES, default=BACKBONES[0], help="the network of all parts")
    parser.add_argument("--data-path", type=Path, metavar="FOLDER", help="pictures to read (default: draw some)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: the first there is")
    parser.add_argument(
        "--input-size", type=count, metavar="PIXELS", help="side of the crops (default: 512 on a GPU, 256 on a CPU)"
    )
    parser.add_argument(
        "--batch-size", type=count, metavar="N",
        help="source, and as many target pictures a step (default: 9 on a GPU; 3 on a CPU, where 9 take minutes)",
    )  # fmt: skip
    parser.add_argument("--classes", type=number(int, 2), default=20, metavar="K", help="classes of the training part")
    parser.add_argument(
        "--memory-batch-size", type=count, metavar="N", help="of the memory part (default: 8 on a GPU, 4 on a CPU)"
    )
    parser.add_argument("--pictures", type=count, metavar="N", help="to evaluate (default: 64 on a GPU, 3 on a CPU)")
    parser.add_argument(
        "--size", type=count, nargs=2, default=[500, 375], metavar=("WIDTH", "HEIGHT"), help="of drawn pictures"
    )
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="of each figure, in turn")
    parser.add_argument(
        "--num-workers", type=natural, metavar="N",
        help="processes that read pictures in the evaluations of both (default: 8 on a GPU, 0 on a CPU)",
    )  # fmt: skip
    parser.add_argument("--plain-tf32", action="store_true", help="let the plain loop use TensorFloat-32 on a GPU")
    parser.add_argument("--quick", action="store_true", help="one repeat of little: to see that it runs")
    parser.add_argument("--growth", action="store_true", help="only the table of how cost grows")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there too")
    return parser.parse_args(argv)


def fill_in(args: argparse.Namespace, device: torch.device) -> None:
    """Defaults that depend on the machine."""
    gpu = device.type == "cuda"
    if args.quick:
        args.repeats = 1
    args.input_size = args.input_size or (512 if gpu else 256)
    args.batch_size = args.batch_size or ((9 if gpu else 3) if not args.quick else 2)
    args.memory_batch_size = args.memory_batch_size or ((8 if gpu else 4) if not args.quick else 1)
    args.pictures = args.pictures or ((64 if gpu else 3) if not args.quick else 2)
    args.num_workers = (8 if gpu else 0) if args.num_workers is None else args.num_workers


# Report


def machine(device: torch.device) -> dict[str, object]:
    """What ran it, and how busy it was before."""
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type, "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "load_before": busy,
    }  # fmt: skip


def met(value: float, target: str) -> bool:
    sign, limit = target.split()
    return value >= float(limit) if sign == ">=" else value <= float(limit)


def format_report(report: dict) -> str:
    settings, targets = report["settings"], TARGETS[report["machine"]["device"]]
    lines = ["ratio                                                  here   target"]
    for name, value in report["ratios"].items():
        mark = "" if met(value, targets[name]) else "  missed"
        lines.append(f"{LABELS[name]:<52} {value:>6.2f}   {targets[name]}{mark}")
    lines += ["", "raw figures"]
    for name, unit in (("train", "pictures/s"), ("eval", "pictures/s"), ("input", "pictures/s"), ("memory", "GB")):
        figures = report["figures"].get(name)
        if figures is not None:
            lines.append(f"{name:<8} ours {figures['ours']:.3g}, plain {figures['plain']:.3g} {unit}")
    if training := report["figures"].get("train"):
        rates = ", ".join(
            f"{name} {training[f'{name}_gflops']:,.0f}"
            for name in ("float32", "bfloat16")
            if f"{name}_gflops" in training
        )
        lines.append(
            f"limit    matrix product {rates} GFLOP/s; the step's convolutions {training['reached_gflops']:,.0f} "
            f"GFLOP/s, {training['gflop_a_picture']:.0f} GFLOP a picture, forward and backward"
        )
    here = report["machine"]
    lines += [
        "",
        "{backbone}, training {batch_size} + {batch_size} crops of {input_size} pixels and {classes} classes, "
        "evaluation of {pictures} pictures, input crops of {crop_size} pixels; medians of {repeats}".format(**settings),
        f"{here['name']}, {here['cores']} cores, {here['threads']} threads, torch {here['torch']}, "
        f"load before {here['load_before']}; targets: "
        + ("an H200, 512 pixels, 9 + 9" if here["device"] == "cuda" else "2 free cores, VGG16, 256 pixels, 9 + 9"),
    ]
    return "\n".join(lines)


def format_growth(rows: Sequence[dict]) -> str:
    """A table for the README."""
    lines = ["| | pictures a second | time a picture |", "|---|---:|---:|"]
    first: dict[str, float] = {}
    for row in rows:
        rate = row["pictures_a_second"]
        times = first.setdefault(row["what"], rate) / rate
        lines.append(f"| {row['what']} {row['value']} | {rate:.3g} | x {times:.2f} |")
    return "\n".join(lines)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = choose_device(args.device)
    if device.type not in TARGETS:
        raise UserError(f"--device {device.type} has no targets: give cpu or cuda")
    args.crop_size = args.input_size or 512
    fill_in(args, device)
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise UserError(f"--json {args.json} can't be written: make its folder")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report = {"machine": machine(device), "settings": settings, "figures": {}, "ratios": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pictures"
        source, evaluation = pictures(args, folder)
        if args.growth:
            report["growth"] = measure_growth(args, source, args.data_path or folder, device)
            print(format_growth(report["growth"]))
        else:
            measures = {
                "train": partial(measure_training, args, source, device),
                "eval": partial(measure_evaluation, args, evaluation, device),
                "input": partial(measure_input, args, source),
                "memory": partial(measure_memory, args, device),
            }
            for name in (name for name in PARTS if name in args.parts):
                print(f"measuring: {name}", file=sys.stderr)
                report["figures"][name] = measures[name]()
                report["ratios"][name] = report["figures"][name]["ratio"]
            if "train" in report["figures"]:
                report["ratios"]["share"] = report["figures"]["train"]["share"]
            print(format_report(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How fast we are, and how far from the limit: the plain loop against ours, side by side on this machine.

    python -m benchmarks.speed                                   # on a CPU: under 10 minutes on 2 free cores
    python -m benchmarks.speed --device cuda --json speed.json   # on a GPU: 512 pixels, 9 + 9, bf16; under 10 minutes
    python -m benchmarks.speed --parts input evaluation --quick
    python -m benchmarks.speed --growth                          # how cost grows with classes, sides and processes

Training (stage 1's own `train_step`, batches at hand in the machine's memory), evaluation, input and peak memory. Each
figure is the median of repeats taken in turn, so that a busy machine harms both alike. Ratios come first. The share of
the limit is what a whole training step makes of the rate at which this machine multiplies large matrices.

The pictures are drawn, of VOC's sizes, unless --data-path has some. Weights are random, which takes as long as any.
The plain loop is `benchmarks.plain`: on a GPU in full float32, without the TensorFloat-32 that torch allows
convolutions (--plain-tf32 lets it).
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import train_split_lambda
import utils.run
from benchmarks import plain
from benchmarks.runs import ROOT
from dataset.errors import DatasetError
from dataset.loaders import evaluation_loader
from dataset.splits import Split
from dataset.synthetic import write_dataset
from dataset.transforms import training_transform
from dataset.voc import EvaluationDataset, SourceDataset, evaluation_dataset, training_datasets
from model.backbone import BACKBONES, ModelError
from model.segmenter import Segmenter
from utils.errors import InputError, one_line_errors
from utils.evaluation import evaluate, pictures_at_once
from utils.metrics import ZeroShotMetrics
from utils.options import Parser, count, natural

PARTS = ("train", "eval", "input", "memory")
DIMENSIONS = 600  # of word2vec and fastText together
SPLIT = 1

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
    parser.add_argument(
        "--classes", type=positive_classes, default=20, metavar="K", help="classes of the training part"
    )
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
    parser.add_argument("--quick", action="store_true", help="one repeat and small batches: to see that it runs")
    parser.add_argument("--growth", action="store_true", help="only the table of how cost grows")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there too")
    return parser.parse_args(argv)


def positive_classes(text: str) -> int:
    if (value := count(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: one class is seen and one unseen at least")
    return value


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


# Clocks


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    wait_for(device)
    begun = clock()
    work()
    wait_for(device)
    return clock() - begun


def in_turn(
    works: dict[str, Callable], device: torch.device, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The median seconds of each work, after one round that is not counted."""
    rounds = [{name: seconds(work, device, clock) for name, work in works.items()} for _ in range(repeats + 1)]
    return {name: statistics.median(times[name] for times in rounds[1:]) for name in works}


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A product of two large square matrices, and its FLOP."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = 10 if device.type == "cuda" else 1

    def multiply() -> None:
        for _ in range(times):
            a @ b

    return multiply, 2.0 * side**3 * times


@contextlib.contextmanager
def plain_precision(allow_tf32: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allow_tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def plainly(work: Callable, args: argparse.Namespace) -> None:
    """Does `work` of the plain loop: its precision, and what it prints goes nowhere."""
    with plain_precision(args.plain_tf32), contextlib.redirect_stdout(io.StringIO()):
        work()


# What is measured


def pictures(args: argparse.Namespace, folder: Path) -> tuple[SourceDataset, EvaluationDataset]:
    """Source and evaluation pictures of --data-path, or drawn ones in `folder`."""
    path = args.data_path
    if path is None:
        path = folder
        print(f"drawing pictures of {args.size[0]} x {args.size[1]} pixels", file=sys.stderr)
        write_dataset(path, num_train=20, num_val=max(8, args.pictures), size=tuple(args.size), workers=1)
    split = Split.named(SPLIT)
    transform = training_transform(args.input_size)
    with contextlib.redirect_stdout(io.StringIO()):
        source, _ = training_datasets(path, split, transform, "all", "all")
    evaluation = evaluation_dataset(path, split)
    evaluation.ids = evaluation.ids[: args.pictures]
    return source, evaluation


def script_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of stage 1 as its script reads them; what is not said here is its default."""
    flags = ["--backbone", args.backbone, "--input-size", args.input_size, "--batch-size", args.batch_size]
    return train_split_lambda.parse_arguments(list(map(str, flags)))


def network(args: argparse.Namespace, num_classes: int, device: torch.device) -> Segmenter:
    """Stage 1's network with random weights and words, in the precision that the script takes on `device`."""
    stage, precision = script_arguments(args), {}
    if hasattr(stage, "amp"):
        precision = {"amp": utils.run.choose_amp(stage.amp, device), "compiled": stage.compile}
    torch.manual_seed(0)
    return Segmenter(args.backbone, torch.randn(num_classes, DIMENSIONS), **precision).to(device)


def plain_network(args: argparse.Namespace, num_classes: int, device: torch.device) -> Segmenter:
    """The same with the channels outermost, as torch lays them out by default."""
    torch.manual_seed(0)
    model = Segmenter(args.backbone, torch.randn(num_classes, DIMENSIONS)).to(device)
    return model.to(memory_format=torch.contiguous_format)


def training_batches(source: SourceDataset, batch_size: int, size: int, device: torch.device) -> tuple:
    """Source and target batch as the loaders hand them over: uint8, in pinned memory where there is a GPU."""
    source.transform = training_transform(size)
    items = [source[n % len(source), n] for n in range(2 * batch_size)]
    image, label = map(torch.stack, zip(*items))
    if device.type == "cuda":
        image, label = image.pin_memory(), label.pin_memory()
    valid = torch.ones_like(label[batch_size:], dtype=torch.bool)
    return (image[:batch_size], label[:batch_size]), (image[batch_size:], valid)


def our_step(args, batches, num_classes: int, device: torch.device) -> Callable[[], None]:
    """A training step of the script, with the copy of its batch to the device."""
    stage, model = script_arguments(args), network(args, num_classes, device).train()
    groups = model.parameter_groups(stage.learning_rate, stage.head_factor)
    optimizer = utils.run.build_optimizer(groups, stage)
    num_seen = seen_of(num_classes)

    def step() -> None:
        source, target = ([tensor.to(device, non_blocking=True) for tensor in batch] for batch in batches)
        train_split_lambda.train_step(model, optimizer, source, target, num_seen, stage)

    return step


def plain_step(args, batches, num_classes: int, device: torch.device) -> Callable[[], None]:
    model = plain_network(args, num_classes, device).train()
    both, num_seen = plain.optimizers(model), seen_of(num_classes)
    (image, label), (target_image, valid) = batches
    source, target = (plain.normalise(image.float()), label.long()), (plain.normalise(target_image.float()), valid)

    def step() -> None:
        here = ([tensor.to(device) for tensor in batch] for batch in (source, target))
        plain.train_step(model, both, *here, num_seen)

    return partial(plainly, step, args)


def seen_of(num_classes: int) -> int:
    """So many of the classes are seen: three of four, as in VOC's splits."""
    return max(1, num_classes * 3 // 4)


def convolution_flop(step: Callable[[], None]) -> float:
    """FLOP of the convolutions of one step, forward and backward; of anything else a CPU or GPU does next to none."""
    with FlopCounterMode(display=False) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    return float(sum(flop for operation, flop in counts.items() if "convolution" in str(operation)))


def measure_training(args, source: SourceDataset, device: torch.device) -> dict[str, float]:
    batches = training_batches(source, args.batch_size, args.input_size, device)
    step, number = our_step(args, batches, args.classes, device), 10 if device.type == "cuda" else 1
    flop = convolution_flop(step)  # which warms up too
    dtypes = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if device.type == "cuda" else {})
    products = {name: matrix_product(device, dtype) for name, dtype in dtypes.items()}
    plain_one = plain_step(args, batches, args.classes, device)
    times = in_turn(
        {
            **{name: multiply for name, (multiply, _) in products.items()},
            "plain": lambda: [plain_one() for _ in range(number)],
            "ours": lambda: [step() for _ in range(number)],
        },
        device, args.repeats,
    )  # fmt: skip
    rates = {name: product_flop / times[name] for name, (_, product_flop) in products.items()}
    pictures_a_step = 2 * args.batch_size
    amp = getattr(script_arguments(args), "amp", "off")
    bf16 = amp != "off" and hasattr(utils.run, "choose_amp") and utils.run.choose_amp(amp, device) == "bf16"
    limit = "bfloat16" if bf16 and device.type == "cuda" else "float32"
    reached = flop * number / times["ours"]
    return {
        "plain": number * pictures_a_step / times["plain"],
        "ours": number * pictures_a_step / times["ours"],
        "ratio": times["plain"] / times["ours"],
        "gflop_a_picture": flop / pictures_a_step / 1e9,
        **{f"{name}_gflops": rate / 1e9 for name, rate in rates.items()},
        "reached_gflops": reached / 1e9,
        "share_of": limit,
        "share": reached / rates[limit],
    }


def measure_evaluation(args, dataset: EvaluationDataset, device: torch.device) -> dict[str, float]:
    split, number = dataset.split, len(dataset)
    model, other = (build(args, len(split.names), device) for build in (network, plain_network))

    def ours() -> None:
        loader = evaluation_loader(dataset, args.num_workers, pictures_at_once(None, device))
        evaluate(model, loader, ZeroShotMetrics(split.names, split.num_seen), device)

    def plain_one() -> None:
        plainly(partial(plain.evaluate, other, dataset, device, args.num_workers), args)

    times = in_turn({"plain": plain_one, "ours": ours}, device, args.repeats)
    return {**{name: number / t for name, t in times.items()}, "ratio": times["plain"] / times["ours"]}


def measure_input(args, source: SourceDataset) -> dict[str, float]:
    """One process on one core, source pictures with their masks, crops of 512 pixels unless --input-size says else."""
    threads, size = torch.get_num_threads(), args.crop_size
    source.transform = training_transform(size)
    numbers, cpu = range(min(len(source), 20)), torch.device("cpu")
    torch.set_num_threads(1)
    try:
        times = in_turn(
            {
                "plain": lambda: [plain.training_item(source, n, size, (0.8, 2.5), 15.0) for n in numbers],
                "ours": lambda: [source[n, n] for n in numbers],
            },
            cpu, args.repeats, time.process_time,  # a core's time, whoever else wants it
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    return {**{name: len(numbers) / t for name, t in times.items()}, "ratio": times["plain"] / times["ours"]}


def measure_memory(args, device: torch.device) -> dict[str, float] | None:
    """GB at 171 classes, each in a process of its own; None where `benchmarks.memory` is missing."""
    if importlib.util.find_spec("benchmarks.memory") is None:
        return None
    from benchmarks.memory import compare

    classes, size = (6, 64) if args.quick else (171, 512)
    backbone, amp = args.backbone, "bf16" if device.type == "cuda" else "off"
    peaks = compare(backbone, classes, args.memory_batch_size, size, device.type, amp)
    return {"plain": peaks["plain"] / 1e9, "ours": peaks["ours"] / 1e9, "ratio": peaks["ratio"]}


# How cost grows


def measure_growth(args, source: SourceDataset, data_path: Path, device: torch.device) -> list[dict]:
    """Pictures a second of our training step: by classes, by side, and by processes on this machine."""
    batch = args.batch_size if device.type == "cuda" else 1 if BACKBONES[0] == args.backbone else 2
    classes, sides = ((20, 59, 171), (256, 512, 769)) if not args.quick else ((4, 8), (32, 48))
    rows = []

    def row(what: str, value: int, num_classes: int, side: int) -> None:
        step = our_step(args, training_batches(source, batch, side, device), num_classes, device)
        took = in_turn({"step": step}, device, args.repeats)["step"]
        rows.append({"what": what, "value": value, "pictures_a_second": 2 * batch / took, "batch": 2 * batch})

    for num_classes in classes:
        row("classes", num_classes, num_classes, args.input_size)
    for side in sides:
        row("side", side, args.classes, side)
    if (ROOT / "utils" / "distributed.py").exists():
        for processes in (1, 2):
            if device.type != "cuda" or processes <= torch.cuda.device_count():
                rate = rehearsed(args, data_path, processes, device)
                rows.append({"what": "processes", "value": processes, "pictures_a_second": rate, "batch": 4})
    return rows


def rehearsed(args, data_path: Path, processes: int, device: torch.device) -> float:
    """Pictures a second of stage 1 in so many processes, as its --dry-run says it."""
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    flags = [
        "--data-path", data_path, "--split", SPLIT, "--backbone", args.backbone, "--backbone-weights", "none",
        "--embedding", "glove", "--input-size", args.input_size, "--batch-size", 2, "--num-workers", 0,
        "--target-images", "all", "--device", device.type, "--no-pictures", "--dry-run",
    ]  # fmt: skip
    # On a CPU the cores are shared out, as a user would do it: else each process takes all of them.
    threads = max(1, torch.get_num_threads() // processes)
    done = subprocess.run(
        list(map(str, [sys.executable, *launch, "train_split_lambda.py", *flags])), cwd=ROOT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True,
    )  # fmt: skip
    found = re.search(r"a step: ([\d.]+) s", done.stdout)
    if done.returncode or not found:
        raise InputError(f"{processes} processes: stage 1 ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return 4 / max(float(found[1]), 0.005)


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


@one_line_errors(DatasetError, ModelError)
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = utils.run.choose_device(args.device)
    if device.type not in TARGETS:
        raise InputError(f"--device {device.type} has no targets: give cpu or cuda")
    args.crop_size = args.input_size or 512
    fill_in(args, device)
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise InputError(f"--json {args.json} can't be written: make its folder")
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
                figures = measures[name]()
                if figures is not None:
                    report["figures"][name] = figures
                    report["ratios"][name] = figures["ratio"]
            if "train" in report["figures"]:
                report["ratios"]["share"] = report["figures"]["train"]["share"]
            print(format_report(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

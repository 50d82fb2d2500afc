"""What `benchmarks.speed` measures, and how: each figure the median of repeats taken in turn.

`args` are the flags of `benchmarks.speed`, its defaults filled in.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import utils.run
from torch.utils.flop_counter import FlopCounterMode
from utils.heap import keep_memory

import train_split_lambda
from benchmarks import plain
from benchmarks.memory import compare
from benchmarks.runs import ROOT
from dataset.drawn import write_dataset
from dataset.loaders import evaluation_loader
from dataset.splits import VOID, Split
from dataset.transforms import training_transform
from dataset.voc import EvaluationDataset, SourceDataset, evaluation_dataset, training_datasets
from model.backbone import build_backbone
from model.segmenter import Segmenter
from utils.errors import UserError
from utils.metrics import ZeroShotMetrics, evaluate, images_at_once

DIMENSIONS = 600  # of word2vec and fastText together
SPLIT = 1


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


class Apart:
    """Steps in a process of its own, as its user would start it: what one does with the machine is not the other's.

    Args:
        build: makes a step, `our_step` or `plain_step`.
        args: the flags of `benchmarks.speed`.
        source: pictures for its batches.
        device: where it steps.
        number: of steps a call.

    Raises:
        UserError: if the process ends, as it does where memory runs out.
    """

    def __init__(self, build: Callable, args: argparse.Namespace, source: SourceDataset, device, number: int):
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        threads = torch.get_num_threads()
        context.Process(target=_serve, args=(there, build, args, source, device, number, threads), daemon=True).start()
        there.close()
        self._ask()  # until it stands ready

    def __call__(self) -> None:
        self._here.send("go")
        self._ask()

    def _ask(self) -> None:
        try:
            self._here.recv()
        except EOFError as error:
            raise UserError("a measured process ended: lower --batch-size or --input-size") from error

    def close(self) -> None:
        self._here.close()


def _serve(
    there, build: Callable, args, source: SourceDataset, device: torch.device, number: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    batches = training_batches(source, args.batch_size, args.input_size, args.classes, device)
    step = build(args, batches, args.classes, device)
    with contextlib.suppress(EOFError):  # of the other end, which closes when all is measured
        while True:
            there.send("ready")
            there.recv()
            for _ in range(number):
                step()
            wait_for(device)


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
        write_dataset(path, num_train=20, num_val=max(8, args.pictures), size=tuple(args.size))
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
    torch.manual_seed(0)
    amp = utils.run.choose_amp(script_arguments(args).amp, device)
    return Segmenter(build_backbone(args.backbone), torch.randn(num_classes, DIMENSIONS), amp=amp).to(device)


def plain_network(args: argparse.Namespace, num_classes: int, device: torch.device) -> Segmenter:
    """The same with the channels outermost, as torch lays them out by default."""
    torch.manual_seed(0)
    model = Segmenter(build_backbone(args.backbone), torch.randn(num_classes, DIMENSIONS)).to(device)
    plain.keep_activations(model)
    return model.to(memory_format=torch.contiguous_format)


def training_batches(
    source: SourceDataset, batch_size: int, size: int, num_classes: int, device: torch.device
) -> tuple:
    """Source and target batch as the loaders hand them over: uint8, in pinned memory where there is a GPU.

    The labels are those of the pictures, brought below the number of seen classes.
    """
    source.transform = training_transform(size)
    items = [source[n % len(source), n] for n in range(2 * batch_size)]
    image, label = map(torch.stack, zip(*items))
    label = torch.where(label == VOID, VOID, label % seen_of(num_classes))
    if device.type == "cuda":
        image, label = image.pin_memory(), label.pin_memory()
    valid = torch.ones_like(label[batch_size:], dtype=torch.bool)
    return (image[:batch_size], label[:batch_size]), (image[batch_size:], valid)


def our_step(args, batches, num_classes: int, device: torch.device) -> Callable[[], None]:
    """A training step of the script, with the copy of its batch to the device."""
    stage, model = script_arguments(args), network(args, num_classes, device).train()
    keep_memory(stage.keep_memory, device)
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
    batches = training_batches(source, args.batch_size, args.input_size, args.classes, device)
    flop = convolution_flop(plain_step(args, batches, args.classes, device))  # ours would count what it computes again
    number = 10 if device.type == "cuda" else 1
    dtypes = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if device.type == "cuda" else {})
    products = {name: matrix_product(device, dtype) for name, dtype in dtypes.items()}
    works = {"plain": plain_step, "ours": our_step}
    with contextlib.ExitStack() as stack:
        steps = {
            name: stack.enter_context(contextlib.closing(Apart(build, args, source, device, number)))
            for name, build in works.items()
        }
        times = in_turn({name: multiply for name, (multiply, _) in products.items()} | steps, device, args.repeats)
    rates = {name: product_flop / times[name] for name, (_, product_flop) in products.items()}
    pictures_a_step = 2 * args.batch_size
    limit = "bfloat16" if utils.run.choose_amp(script_arguments(args).amp, device) == "bf16" else "float32"
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
        loader = evaluation_loader(dataset, args.num_workers, images_at_once(None, device))
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


def measure_memory(args, device: torch.device) -> dict[str, float]:
    """GB at 171 classes, each in a process of its own."""
    classes, size = 171, 256 if args.quick else 512
    amp = utils.run.choose_amp(script_arguments(args).amp, device)
    peaks = compare(args.backbone, classes, args.memory_batch_size, size, device.type, amp)
    return {"plain": peaks["plain"] / 1e9, "ours": peaks["ours"] / 1e9, "ratio": peaks["ratio"]}


# How cost grows


def measure_growth(args, source: SourceDataset, data_path: Path, device: torch.device) -> list[dict]:
    """Pictures a second of our training step: by classes, by side, and by processes on this machine."""
    batch = args.batch_size if device.type == "cuda" else 2  # batch norm wants two
    classes, sides = ((20, 59, 171), (256, 512, 769)) if not args.quick else ((4, 8), (32, 48))
    rows = []

    def row(what: str, value: int, num_classes: int, side: int) -> None:
        step = our_step(args, training_batches(source, batch, side, num_classes, device), num_classes, device)
        took = in_turn({"step": step}, device, args.repeats if device.type == "cuda" else 1)["step"]
        rows.append({"what": what, "value": value, "pictures_a_second": 2 * batch / took, "batch": 2 * batch})

    for num_classes in classes:
        row("classes", num_classes, num_classes, args.input_size)
    for side in sides:
        row("side", side, args.classes, side)
    if not args.quick:
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
    found = re.search(r"a step: .* ([\d.]+) pictures a second", done.stdout)
    if done.returncode or not found:
        raise UserError(f"{processes} processes: stage 1 ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return float(found[1])

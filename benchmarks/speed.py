"""Speed and memory of this code divided by those of a plain training loop, measured side by side in one run.

    python -m benchmarks.speed                                  # on a CPU: under 10 minutes on two free cores
    python -m benchmarks.speed --device cuda --json speed.json  # on a GPU: 512 pixels, bf16
    python -m benchmarks.speed --quick                          # small sizes, to see that it runs

Four parts: a training step of stage 1 (the script's own `train_step`), an evaluation, the reading of training images,
and the peak memory of a training step with 171 classes. The plain loop stands in this file. It computes the same
method with the same network on the same batches; on a GPU in full float32, without TensorFloat-32. Each side runs in a
process of its own. The two take turns, so that a busy machine slows both, and each figure is the median of the repeats.

Images are drawn, of VOC's size, unless --data-path names a folder. Weights are random, which takes the same time.
"""

import argparse
import contextlib
import io
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

import train_split_lambda
import train_st_split
from dataset.drawn import write_dataset
from dataset.loaders import evaluation_loader
from dataset.splits import VOID, Split
from dataset.transforms import training_transform
from dataset.voc import EvaluationDataset, SourceDataset, evaluation_dataset, training_datasets
from model.backbone import BACKBONES, IMAGENET_MEAN, IMAGENET_STD, Recomputed, build_backbone
from model.segmenter import Segmenter
from utils.config import Parser, parse_settings
from utils.distributed import choose_amp, choose_device, keep_freed_memory
from utils.errors import one_line_errors, write_text
from utils.logging import peak_memory
from utils.metrics import ZeroShotMetrics, evaluate, images_at_once
from utils.trainer import build_optimizer

SCRIPTS = {1: train_split_lambda, 2: train_st_split}
SPLIT = Split.named(1)
EMBEDDING_SIZE = 600  # word2vec and fastText together

PARTS = {
    "train": ("training", "images/s", {"cpu": ">= 1.15", "cuda": ">= 6"}),
    "eval": ("evaluation", "images/s", {"cpu": ">= 2.2", "cuda": ">= 8"}),
    "input": ("reading training images, one core", "images/s", {"cpu": ">= 2.8", "cuda": ">= 2.8"}),
    "memory": ("peak memory of a step, 171 classes", "GB", {"cpu": "<= 0.45", "cuda": "<= 0.3"}),
}
"""Titles, units and the ratios that are wanted: with VGG16 on two CPU cores, and on an H100 with bf16."""

SIZES = {
    "cpu": {"input_size": 256, "steps": 1, "images": 4, "num_workers": 0, "memory_batch_size": 4},
    "cuda": {"input_size": 512, "steps": 10, "images": 64, "num_workers": 8, "memory_batch_size": 8},
}
COMMON = {"batch_size": 9, "crops": 20, "repeats": 3, "memory_input_size": 512, "crop_size": 512}
QUICK = {"batch_size": 2, "crops": 2, "repeats": 1, "memory_input_size": 256, "memory_batch_size": 2, "input_size": 64}

# The plain loop: how such code is commonly written. Images are decoded, scaled and rotated whole, as float arrays. A
# step is two forward passes, two optimisers, logits upsampled to every pixel, and losses printed at once. An evaluation
# goes over the images twice, for GZSL and ZSL, one image at a time with gradients on, and counts in NumPy.


def normalise(image: torch.Tensor) -> torch.Tensor:
    """Float image [..., 3, H, W] in [0, 255] -> what ImageNet weights expect."""
    mean, std = (255 * image.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (image - mean) / std


def read(dataset, index: int, to_labels: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """Image float32 [3, H, W] in [0, 255] and label float32 [H, W]."""
    image = np.asarray(Image.open(dataset.folder.image_path(dataset.ids[index])).convert("RGB"), np.float32)
    mask = np.asarray(Image.open(dataset.folder.mask_path(dataset.ids[index])))
    return torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(to_labels(mask).astype(np.float32))


def plain_item(dataset: SourceDataset, index: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A crop of an image that is scaled and rotated whole: image float32 [3, size, size], label int64 [size, size]."""
    image, label = read(dataset, index, lambda mask: dataset.split.to_labels(mask, "seen"))
    image, label = image[None], label[None, None]  # [1, 3, H, W], [1, 1, H, W]
    factor = 0.8 + (2.5 - 0.8) * float(torch.rand(1))
    scaled = [max(1, round(side * factor)) for side in image.shape[-2:]]
    image = F.interpolate(image, scaled, mode="bilinear", align_corners=False)
    label = F.interpolate(label, scaled, mode="nearest")
    angle = 15.0 * (2 * float(torch.rand(1)) - 1)
    image = transforms.rotate(image, angle, InterpolationMode.BILINEAR, fill=[124.0, 116.0, 104.0])
    label = transforms.rotate(label, angle, InterpolationMode.NEAREST, fill=[float(VOID)])
    below, right = (max(0, size - side) for side in scaled)
    image, label = F.pad(normalise(image), (0, right, 0, below)), F.pad(label, (0, right, 0, below), value=float(VOID))
    top, left = (math.floor(float(torch.rand(1)) * (side - size + 1)) for side in image.shape[-2:])
    image, label = (x[0, :, top : top + size, left : left + size] for x in (image, label))
    if float(torch.rand(1)) < 0.5:
        image, label = image.flip(-1), label.flip(-1)
    return image.contiguous(), label[0].long()


def plain_logits(model: Segmenter, image: torch.Tensor) -> torch.Tensor:
    """Normalised float image [N, 3, H, W] -> logits of every pixel [N, K, H, W]."""
    coarse = model.projection(model.backbone.classifier(model.backbone.trunk(image)))  # [N, K, h, w]
    return F.interpolate(coarse, image.shape[-2:], mode="bilinear", align_corners=True)


def plain_bias_loss(logits: torch.Tensor, num_seen: int, valid: torch.Tensor) -> torch.Tensor:
    unseen = F.softmax(logits, dim=1)[:, num_seen:].sum(dim=1)
    return (-torch.log(unseen + 1e-5) * valid).sum() / valid.sum().clamp(min=1)


def plain_step(model: Segmenter, optimizers: list, source: tuple, target: tuple, num_seen: int) -> None:
    """A step of stage 1. Source: normalised image [N, 3, S, S], label [N, S, S]; target: image, valid [N, S, S]."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    image, label = source
    logits = plain_logits(model, image)
    ce = F.cross_entropy(logits, label, ignore_index=VOID)
    bias_source = plain_bias_loss(logits, num_seen, label < num_seen)
    (ce + 0.2 * 0.8 * bias_source).backward()
    image, valid, *_ = target
    bias_target = plain_bias_loss(plain_logits(model, image), num_seen, valid)
    (0.2 * 0.2 * bias_target).backward()
    for optimizer in optimizers:
        optimizer.step()
    print(f"ce {ce.item():.4f}, source {bias_source.item():.4f}, target {bias_target.item():.4f}")


class PlainEvaluationDataset(EvaluationDataset):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised image float32 [3, H, W] and label float32 [H, W]."""
        image, label = read(self, index, self.split.to_labels)
        return normalise(image), label


def plain_evaluate(model: Segmenter, dataset: PlainEvaluationDataset, device: str, num_workers: int) -> list:
    """Confusion matrices of GZSL, int64 [K, K], and of ZSL, int64 [U, U]: a pass over the images for each."""
    model.eval()
    matrices = []
    for first in (0, dataset.split.num_seen):  # the first class that is scored
        number = len(dataset.split.names) - first
        matrix = np.zeros((number, number), np.int64)
        for image, label in DataLoader(dataset, batch_size=1, num_workers=num_workers):
            logits = plain_logits(model, image.to(device))[:, first:]
            label, prediction = label.numpy(), logits.max(dim=1)[1].cpu().numpy()
            kept = (label >= first) & (label != VOID)
            pairs = (label[kept].astype(np.int64) - first) * number + prediction[kept]
            matrix += np.bincount(pairs, minlength=number**2).reshape(number, number)
        matrices.append(matrix)
    return matrices


# The two sides of each part. A builder runs in the process that is measured and gives the function to be timed.


def build_network(side: str, args: argparse.Namespace, num_classes: int) -> Segmenter:
    """The network with random weights: ours as a script with `args.settings` builds it, plain in torch's layout."""
    torch.manual_seed(0)
    device, settings = choose_device(args.device), args.settings
    backbone = build_backbone(settings.backbone, checkpoint_activations=settings.checkpoint_activations)
    amp = choose_amp(settings.amp, device) if side == "ours" else "off"
    model = Segmenter(backbone, torch.randn(num_classes, EMBEDDING_SIZE), amp=amp).to(device)
    if side == "ours":
        return model
    torch.backends.cudnn.allow_tf32 = False
    for layer in model.modules():
        layer.__class__ = nn.Sequential if isinstance(layer, Recomputed) else layer.__class__
    return model.to(memory_format=torch.contiguous_format)


def draw_batches(n: int, size: int, num_seen: int, pin: bool) -> tuple[tuple, tuple]:
    """Source and target batch of noise, on the CPU as the loaders give them."""
    noise = torch.Generator().manual_seed(0)
    image = torch.randint(256, (2 * n, 3, size, size), generator=noise, dtype=torch.uint8)
    label = torch.randint(num_seen, (n, size, size), generator=noise, dtype=torch.uint8)
    label[:, ::3] = VOID
    valid = torch.ones(n, size, size, dtype=torch.bool)
    batches = (image[:n], label), (image[n:], valid, valid[:, 0, 0])
    return tuple(tuple(tensor.pin_memory() if pin else tensor for tensor in batch) for batch in batches)


def build_step(side: str, args: argparse.Namespace, num_classes: int = 20, kind: str = "") -> Callable[[], object]:
    """A training step of the script of `args.stage` with `args.settings`; `kind` is a prefix of its sizes' names."""
    model, num_seen = build_network(side, args, num_classes).train(), num_classes * 3 // 4  # as in VOC's splits
    sizes = getattr(args, f"{kind}batch_size"), getattr(args, f"{kind}input_size")
    source, target = draw_batches(*sizes, num_seen, pin=args.device == "cuda")
    settings = args.settings
    groups = model.parameter_groups(settings.learning_rate, settings.head_factor)
    if side == "ours":
        if not kind:  # memory is measured without what a process keeps for the next step
            keep_freed_memory(torch.device(args.device))
        step, optimizer = partial(SCRIPTS[args.stage].train_step, args=settings), build_optimizer(groups, settings)
    else:
        step, optimizer = plain_step, [torch.optim.SGD([group], momentum=0.9, weight_decay=5e-4) for group in groups]
        source, target = (normalise(source[0].float()), source[1].long()), (normalise(target[0].float()), target[1])

    def work() -> None:
        batches = ([tensor.to(args.device, non_blocking=side == "ours") for tensor in b] for b in (source, target))
        step(model, optimizer, *batches, num_seen)

    return work


def build_evaluation(side: str, args: argparse.Namespace) -> Callable[[], object]:
    model, dataset = build_network(side, args, len(SPLIT.names)), evaluation_dataset(args.data_path, SPLIT)
    dataset.ids = dataset.ids[: args.images]
    if side == "plain":
        dataset = PlainEvaluationDataset(dataset.folder, dataset.ids, SPLIT)
        return partial(plain_evaluate, model, dataset, args.device, args.num_workers)
    device = torch.device(args.device)
    loader = evaluation_loader(dataset, args.num_workers, images_at_once(None, device))
    return lambda: evaluate(model, loader, ZeroShotMetrics(SPLIT.names, SPLIT.num_seen), device)


def build_input(side: str, args: argparse.Namespace) -> Callable[[], object]:
    torch.set_num_threads(1)
    source, _ = training_datasets(args.data_path, SPLIT, training_transform(args.crop_size), "all", "all")
    item = partial(plain_item, source, size=args.crop_size) if side == "plain" else lambda n: source[n, n]
    return lambda: [item(n % len(source)) for n in range(args.crops)]


def start(build: Callable, side: str, args: argparse.Namespace) -> Callable:
    """A process with what `build(side, args)` gives: neither side changes the other's memory or caches.

    Returns:
        A function that calls a function of this file there, with arguments.
    """
    pool = ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),))
    pool.submit(_build, build, side, args).result()
    return lambda function, *arguments: pool.submit(function, *arguments).result()


def _build(build: Callable, side: str, args: argparse.Namespace) -> None:
    global _work
    _work = build(side, args)


def _seconds(times: int, device: str, clock: str) -> float:
    """Seconds of so many calls, by a clock of the module `time`."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = getattr(time, clock)()
    with contextlib.redirect_stdout(io.StringIO()):  # the plain loop prints its losses
        for _ in range(times):
            _work()
    wait()
    return getattr(time, clock)() - start


def _peak(device: str) -> float:
    """GB by which the process grows in its first call; on a GPU, GB that it reserves in its second."""
    cpu = torch.device("cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        if device == "cuda":
            _work()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = peak_memory(cpu)
        _work()
    return torch.cuda.max_memory_reserved() / 1e9 if device == "cuda" else peak_memory(cpu) - before


def measure(part: str, args: argparse.Namespace) -> dict[str, float]:
    """Both sides in the unit of the part, their ratio, and the spread of the repeats."""
    if part == "memory":
        build = partial(build_step, num_classes=171, kind="memory_")
        ours, plain = (start(build, side, args)(_peak, args.device) for side in ("ours", "plain"))
        return {"ours": ours, "plain": plain, "ratio": ours / plain, "spread": 0.0}
    build, number, times, clock = {
        "train": (build_step, 2 * args.batch_size, args.steps, "perf_counter"),
        "eval": (build_evaluation, args.images, 1, "perf_counter"),
        "input": (build_input, args.crops, 1, "process_time"),  # a core's time, whoever else uses the machine
    }[part]
    workers = [start(build, side, args) for side in ("ours", "plain")]
    rounds = [[worker(_seconds, times, args.device, clock) for worker in workers] for _ in range(args.repeats + 1)]
    columns = list(zip(*rounds[1:]))  # the first round does not count
    ours, plain = (number * times / statistics.median(column) for column in columns)
    spread = max(max(column) / min(column) - 1 for column in columns)
    return {"ours": ours, "plain": plain, "ratio": ours / plain, "spread": spread}


def format_report(report: dict) -> str:
    settings = report["settings"]
    lines = [f"{'ours / plain':<36} {'ratio':>6} {'wanted':>8} {'ours':>8} {'plain':>8}  spread"]
    for part, figures in report["figures"].items():
        title, unit, wanted = PARTS[part]
        row = "{title:<36} {ratio:>6.2f} {wanted:>8} {ours:>8.3g} {plain:>8.3g}  {spread:.0%}, {unit}"
        lines.append(row.format(title=title, unit=unit, wanted=wanted[settings["device"]], **figures))
    how = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in {**settings, **report["machine"]}.items())
    return "\n".join([*lines, textwrap.fill(how, 110)])


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: the first there is")
    parser.add_argument("--data-path", type=Path, metavar="FOLDER", help="images in VOC layout (default: drawn ones)")
    parser.add_argument("--backbone", choices=BACKBONES, default="vgg16", help="the network")
    parser.add_argument("--quick", action="store_true", help="small sizes and one repeat, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    args.device = choose_device(args.device).type
    if args.device not in SIZES:
        parser.error(f"--device {args.device} is not measured here: give cpu or cuda")
    settings = {"stage": 1, "settings": parse_settings(["--backbone", args.backbone], 1)}
    return argparse.Namespace(**vars(args), **settings, **COMMON | SIZES[args.device] | (QUICK if args.quick else {}))


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    machine = {"name": name, "threads": torch.get_num_threads(), "load_before": os.getloadavg()[0]}
    report = {"machine": {**machine, "torch": torch.__version__}}
    with tempfile.TemporaryDirectory() as folder:
        if args.data_path is None:
            args.data_path = Path(folder) / "images"
            write_dataset(args.data_path, num_train=20, num_val=max(8, args.images), size=(500, 375))
        report["figures"] = {part: measure(part, args) for part in args.parts}
    report["settings"] = {name: value for name, value in vars(args).items() if name != "settings"}
    print(format_report(report))
    if args.json is not None:
        write_text(args.json, json.dumps(report, indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

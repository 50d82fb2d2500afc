"""Speed and memory of this code divided by those of a plain training loop, measured side by side in one run.

    python -m benchmarks.speed                                  # on a CPU: about 10 minutes on two free cores
    python -m benchmarks.speed --device cuda --json speed.json  # on a GPU: 512 pixels, bf16
    python -m benchmarks.speed --quick                          # small sizes, to see that it runs

Four parts: a training step of stage 1 (the script's own `train_step`), an evaluation, the reading of training images,
and the peak memory of a step with 171 classes. The plain loop stands in this file: the same method with the same
network, on a GPU in full float32, without TensorFloat-32. Each measurement has a process of its own. The two sides take
turns, so that a busy machine slows both; figures are medians of the repeats. Images are drawn, of VOC's size, unless
--data-path names a folder. Weights are random, which takes the same time.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from dataset.drawn import write_dataset
from dataset.loaders import evaluation_loader
from dataset.splits import VOID, Split
from dataset.transforms import training_transform
from dataset.voc import EvaluationDataset, evaluation_dataset, training_datasets
from model.backbone import BACKBONES, IMAGENET_MEAN, IMAGENET_STD, Recomputed, build_backbone
from model.segmenter import Segmenter
from train_split_lambda import train_step
from utils.config import Parser, parse_settings
from utils.distributed import choose_amp, choose_device, keep_freed_memory
from utils.errors import one_line_errors, write_text
from utils.logging import peak_memory
from utils.metrics import ZeroShotMetrics, evaluate, images_at_once
from utils.trainer import build_optimizer

SPLIT = Split.named(1)
PARTS = {  # titles, and the ratios that are wanted: with VGG16 on two CPU cores, and on an H100 with bf16
    "train": ("training, images/s", {"cpu": ">= 1.15", "cuda": ">= 6"}),
    "eval": ("evaluation, images/s", {"cpu": ">= 2.2", "cuda": ">= 8"}),
    "input": ("reading crops on one core, images/s", {"cpu": ">= 2.8", "cuda": ">= 2.8"}),
    "memory": ("peak memory of a step, 171 classes, GB", {"cpu": "<= 0.45", "cuda": "<= 0.3"}),
}
COMMON = {"batch_size": 9, "crops": 20, "crop_size": 512, "repeats": 3, "num_classes": len(SPLIT.names)}
SIZES = {
    "cpu": {"input_size": 256, "steps": 1, "images": 4, "num_workers": 0, "memory_batch_size": 4},
    "cuda": {"input_size": 512, "steps": 10, "images": 64, "num_workers": 8, "memory_batch_size": 8},
}
QUICK = {"batch_size": 2, "crops": 2, "crop_size": 256, "repeats": 1, "input_size": 64, "memory_batch_size": 2}

# The plain loop: how such code is commonly written. Images are scaled and rotated whole, as float arrays. A step is two
# forward passes, logits upsampled to every pixel, and losses read at once. An evaluation goes over the images twice,
# for GZSL and ZSL, one image at a time with gradients on, and counts in NumPy.

# Float image [..., 3, H, W] in [0, 255] -> what ImageNet weights expect.
normalise = v2.Normalize([255 * value for value in IMAGENET_MEAN], [255 * value for value in IMAGENET_STD])


class PlainDataset(EvaluationDataset):
    """Normalised images float32 [3, H, W] and labels int64 [H, W], after a transform of both."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label, _ = super().__getitem__(index)
        image, label = self.transform(tv_tensors.Image(image.float().contiguous()), tv_tensors.Mask(label.float()))
        return normalise(image.as_subclass(torch.Tensor)), label.as_subclass(torch.Tensor).long()


def plain_logits(model: Segmenter, image: torch.Tensor) -> torch.Tensor:
    """Normalised float image [N, 3, H, W] -> logits of every pixel [N, K, H, W]."""
    coarse = model.projection(model.backbone.classifier(model.backbone.trunk(image)))  # [N, K, h, w]
    return F.interpolate(coarse, image.shape[-2:], mode="bilinear", align_corners=True)


def plain_bias_loss(logits: torch.Tensor, num_seen: int, valid: torch.Tensor) -> torch.Tensor:
    unseen = F.softmax(logits, dim=1)[:, num_seen:].sum(dim=1)
    return (-torch.log(unseen + 1e-5) * valid).sum() / valid.sum().clamp(min=1)


def plain_step(model: Segmenter, optimizer, source: tuple, target: tuple, num_seen: int) -> dict[str, float]:
    """A step of stage 1. Source: normalised image [N, 3, S, S], label [N, S, S]; target: image, valid [N, S, S]."""
    optimizer.zero_grad()
    image, label = source
    logits = plain_logits(model, image)
    ce = F.cross_entropy(logits, label, ignore_index=VOID)
    bias_source = plain_bias_loss(logits, num_seen, label < num_seen)
    (ce + 0.2 * 0.8 * bias_source).backward()
    image, valid = target
    bias_target = plain_bias_loss(plain_logits(model, image), num_seen, valid)
    (0.2 * 0.2 * bias_target).backward()
    optimizer.step()
    return {"ce": ce.item(), "source": bias_source.item(), "target": bias_target.item()}


def plain_evaluate(model: Segmenter, dataset: PlainDataset, num_seen: int, device, num_workers: int) -> list:
    """Confusion matrices of GZSL, int64 [K, K], and of ZSL, int64 [U, U]: a pass over the images for each."""
    model.eval()
    matrices = []
    for first in (0, num_seen):  # the first class that is scored
        matrix = 0
        for image, label in DataLoader(dataset, batch_size=1, num_workers=num_workers):
            logits = plain_logits(model, image.to(device))[:, first:]
            label, prediction = label.numpy(), logits.max(dim=1)[1].cpu().numpy()
            kept, number = (label >= first) & (label != VOID), logits.shape[1]
            pairs = (label[kept] - first) * number + prediction[kept]
            matrix += np.bincount(pairs, minlength=number**2).reshape(number, number)
        matrices.append(matrix)
    return matrices


# The two sides of each part. A builder runs in the process that is measured and gives the function to be timed.


def build_network(side: str, args: argparse.Namespace) -> Segmenter:
    """The network with random weights: ours as a script with `args.settings` builds it, plain in torch's layout."""
    torch.manual_seed(0)
    device, words = choose_device(str(args.device)), torch.randn(args.num_classes, 600)  # as word2vec + fastText
    amp = choose_amp(args.settings.amp, device)  # `plain_logits` knows none
    model = Segmenter(build_backbone(args.settings.backbone), words, amp=amp).to(device)
    if side == "ours":
        return model
    torch.backends.cudnn.allow_tf32 = False
    for layer in model.modules():
        layer.__class__ = nn.Sequential if isinstance(layer, Recomputed) else layer.__class__
    return model.to(memory_format=torch.contiguous_format)


def draw_batches(side: str, n: int, size: int, num_seen: int, device) -> tuple[tuple, tuple]:
    """Source and target batch of noise, as the step of `side` takes them."""
    source, target = torch.randint(256, (2, n, 3, size, size), dtype=torch.uint8, device=device)
    label = torch.randint(num_seen, (n, size, size), dtype=torch.uint8, device=device)
    label[:, ::3] = VOID
    valid = torch.ones(n, size, size, dtype=torch.bool, device=device)
    if side == "ours":
        return (source, label), (target, valid, valid[:, 0, 0])
    return (normalise(source.float()), label.long()), (normalise(target.float()), valid)


def build_step(side: str, args: argparse.Namespace) -> Callable[[], object]:
    settings, num_seen = args.settings, args.num_classes * 3 // 4  # as in VOC's splits
    model = build_network(side, args).train()
    batches = draw_batches(side, args.batch_size, args.input_size, num_seen, args.device)
    groups = model.parameter_groups(settings.learning_rate, settings.head_factor)
    if side == "ours":
        return partial(train_step, model, build_optimizer(groups, settings), *batches, num_seen, settings)
    return partial(plain_step, model, torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4), *batches, num_seen)


def build_evaluation(side: str, args: argparse.Namespace) -> Callable[[], object]:
    model, dataset = build_network(side, args), evaluation_dataset(args.data_path, SPLIT)
    dataset.ids = dataset.ids[: args.images]
    if side == "plain":
        plain = PlainDataset(dataset.folder, dataset.ids, SPLIT, v2.Identity())
        return partial(plain_evaluate, model, plain, SPLIT.num_seen, args.device, args.num_workers)
    loader = evaluation_loader(dataset, args.num_workers, images_at_once(None, args.device))
    return lambda: evaluate(model, loader, ZeroShotMetrics(SPLIT.names, SPLIT.num_seen), args.device)


def build_input(side: str, args: argparse.Namespace) -> Callable[[], object]:
    torch.set_num_threads(1)
    source, _ = training_datasets(args.data_path, SPLIT, training_transform(args.crop_size), "all", "all")
    fill = {tv_tensors.Image: [124.0, 116.0, 104.0], tv_tensors.Mask: float(VOID)}
    plain = PlainDataset(source.folder, source.ids, SPLIT, v2.Compose([
        v2.RandomResize(300, 938, antialias=False),  # 0.8 to 2.5 times the 375 pixels of VOC's shorter sides
        v2.RandomRotation(15, v2.InterpolationMode.BILINEAR, fill=fill),
        v2.RandomCrop(args.crop_size, pad_if_needed=True, fill=fill),
        v2.RandomHorizontalFlip(),
    ]))  # fmt: skip
    item = plain.__getitem__ if side == "plain" else lambda index: source[index, index]
    return lambda: [item(n % len(source)) for n in range(args.crops)]


def run(part: str, side: str, args: argparse.Namespace) -> float:
    """Images a second, or GB by which the process grows in its first step."""
    torch.set_num_threads(args.threads)
    wait = torch.cuda.synchronize if args.device.type == "cuda" else lambda: None
    if part == "memory":
        changes = {"batch_size": args.memory_batch_size, "input_size": args.crop_size, "num_classes": 171}
        work, before = build_step(side, argparse.Namespace(**vars(args) | changes)), peak_memory(args.device)
        work()
        return peak_memory(args.device) - before
    if (part, side) == ("train", "ours"):  # memory is measured without what a process keeps for the next step
        keep_freed_memory(args.device)
    build, images, calls, clock = {
        "train": (build_step, 2 * args.batch_size, args.steps, time.perf_counter),
        "eval": (build_evaluation, args.images, 1, time.perf_counter),
        "input": (build_input, args.crops, 1, time.process_time),  # a core's time, whoever else uses the machine
    }[part]
    work = build(side, args)
    work()
    wait()
    start = clock()
    for _ in range(calls):
        work()
    wait()
    return images * calls / (clock() - start)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: the first there is")
    parser.add_argument("--data-path", type=Path, metavar="FOLDER", help="images in VOC layout (default: drawn ones)")
    parser.add_argument("--backbone", choices=BACKBONES, default="vgg16", help="the network")
    parser.add_argument("--quick", action="store_true", help="small sizes and one repeat, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    args.device = choose_device(args.device)
    if args.device.type not in SIZES:
        parser.error(f"--device {args.device} is not measured here: give cpu or cuda")
    args.settings, args.threads = parse_settings(["--backbone", args.backbone], 1), torch.get_num_threads()
    return argparse.Namespace(**vars(args), **COMMON | SIZES[args.device.type] | (QUICK if args.quick else {}))


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args, figures = parse_arguments(argv), {}
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else platform.processor() or platform.machine()
    machine = {"name": name, "threads": args.threads, "load_before": os.getloadavg()[0], "torch": torch.__version__}
    print(f"{'ours / plain':<40} {'ratio':>6} {'wanted':>8} {'ours':>8} {'plain':>8} {'spread':>7}")
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:  # each task a process
        if args.data_path is None:
            args.data_path = Path(folder) / "images"
            write_dataset(args.data_path, num_train=20, num_val=max(8, args.images), size=(500, 375))
        for part in args.parts:
            turns = range(1 if part == "memory" else args.repeats)
            rounds = [[pool.submit(run, part, side, args).result() for side in ("ours", "plain")] for _ in turns]
            ours, plain = (statistics.median(column) for column in zip(*rounds))
            spread = max(max(column) / min(column) - 1 for column in zip(*rounds))
            figures[part] = {"ours": ours, "plain": plain, "ratio": ours / plain, "spread": spread}
            title, wanted = PARTS[part][0], PARTS[part][1][args.device.type]
            print(f"{title:<40} {ours / plain:>6.2f} {wanted:>8} {ours:>8.3g} {plain:>8.3g} {spread:>7.0%}", flush=True)
    settings = {name: value for name, value in vars(args).items() if name != "settings"}
    print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in {**settings, **machine}.items()))
    if args.json is not None:
        report = {"machine": machine, "figures": figures, "settings": settings}
        write_text(args.json, json.dumps(report, indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

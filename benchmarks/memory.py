"""Peak memory of one training step of stage 1: the plain loop against ours.

    python -m benchmarks.memory                                       # VGG16, 171 classes, 4 + 4 crops of 512 pixels
    python -m benchmarks.memory --backbone deeplabv3_mobilenet_v3_large --batch-size 2
    python -m benchmarks.memory --device cuda --batch-size 8
    python -m benchmarks.memory --keep-memory on                      # what a CPU with room holds for speed

Each is measured in a process of its own: on a CPU by how much the most memory that the process ever held grows over the
step, on a GPU by the most that was allocated. The plain loop is that of `benchmarks.plain`. Ours is measured as with
--keep-memory off, unless that flag says else: it gives what a step needs, not what a process keeps between steps.
"""

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from utils.heap import keep_memory
from utils.options import Parser, count
from utils.records import peak_memory
from utils.run import build_optimizer

from benchmarks import plain
from dataset.splits import VOID
from model.backbone import BACKBONES, build_backbone
from model.segmenter import Segmenter
from train_split_lambda import parse_arguments, train_step

NUM_DIMENSIONS = 300  # of the words


def draw_batches(batch_size: int, size: int, num_seen: int, device) -> tuple:
    """Source and target batch of noise: image and label, image and valid, as the loaders give them."""
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2 * batch_size, 3, size, size), generator=noise, dtype=torch.uint8).to(device)
    label = torch.randint(num_seen, (batch_size, size, size), generator=noise, dtype=torch.uint8).to(device)
    label[:, ::3] = VOID
    valid = torch.ones(batch_size, size, size, dtype=torch.bool, device=device)
    return (images[:batch_size], label), (images[batch_size:], valid)


def measure(
    kind: str, backbone: str, num_classes: int, batch_size: int, size: int, device: str, amp: str, keep: str
) -> int:
    """Bytes that the step of `kind`, "plain" or "ours", needs at most, in this process."""
    num_seen = num_classes - num_classes // 10 - 1
    args = parse_arguments(["--backbone", backbone, "--input-size", str(size)])
    model = Segmenter(build_backbone(backbone), torch.randn(num_classes, NUM_DIMENSIONS), amp=amp).to(device)
    batches = draw_batches(batch_size, size, num_seen, device)
    if kind == "plain":
        model.to(memory_format=torch.contiguous_format)
        plain.keep_activations(model)
        (image, label), (target_image, valid) = batches
        batches = (plain.normalise(image.float()), label.long()), (plain.normalise(target_image.float()), valid)
        step = partial(plain.train_step, model, plain.optimizers(model), *batches, num_seen)
    else:
        keep_memory(keep, torch.device(device))
        optimizer = build_optimizer(model.parameter_groups(args.learning_rate, args.head_factor), args)
        step = partial(train_step, model, optimizer, *batches, num_seen, args)
    with contextlib.redirect_stdout(sys.stderr):  # the plain loop prints its losses
        return peak_of(step, torch.device(device))


def peak_of(step: Callable[[], object], device: torch.device) -> int:
    """Bytes by which memory grows at most while `step` runs, on a GPU those that it holds before among them."""
    before = 0.0
    if device.type == "cuda":
        step()  # the memory of libraries, and of the optimiser
        torch.cuda.reset_peak_memory_stats()
    else:
        before = peak_memory(device)
    step()
    return round((peak_memory(device) - before) * 1e9)


def compare(
    backbone: str = "vgg16", num_classes: int = 171, batch_size: int = 4, size: int = 512, device: str = "cpu",
    amp: str = "off", keep: str = "off",
) -> dict[str, float]:  # fmt: skip
    """{"plain": bytes, "ours": bytes, "ratio": ours / plain}, each measured in a process of its own."""
    peaks = {}
    for kind in ("plain", "ours"):
        flags = ["--backbone", backbone, "--classes", num_classes, "--batch-size", batch_size, "--input-size", size]
        flags += ["--device", device, "--amp", amp, "--keep-memory", keep]
        command = [sys.executable, "-m", "benchmarks.memory", "--one", kind, *flags]
        done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
        peaks[kind] = int(done.stdout)
    return {**peaks, "ratio": peaks["ours"] / peaks["plain"]}


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--backbone", choices=BACKBONES, default="vgg16", help="the network")
    parser.add_argument("--classes", type=count, default=171, metavar="K", help="classes that are scored")
    parser.add_argument("--batch-size", type=count, default=4, metavar="N", help="source, and as many target pictures")
    parser.add_argument("--input-size", type=count, default=512, metavar="PIXELS", help="side of the crops")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--amp", choices=["off", "bf16"], default="off", help="precision of ours, not of the plain loop"
    )
    parser.add_argument("--keep-memory", choices=["on", "off"], default="off", help="as for the scripts, ours alone")
    parser.add_argument("--one", choices=["plain", "ours"], help="print the bytes of this one alone")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_options(argv)
    what = args.backbone, args.classes, args.batch_size, args.input_size, args.device, args.amp, args.keep_memory
    if args.one:
        print(measure(args.one, *what))
        return 0
    peaks = compare(*what)
    if args.json:
        print(json.dumps(peaks))
        return 0
    n = args.batch_size
    print(f"{args.backbone}, {args.classes} classes, {n} + {n} crops of {args.input_size} pixels, {args.device}")
    print(f"ours / plain {peaks['ratio']:.2f}: {peaks['ours'] / 1e9:.2f} GB against {peaks['plain'] / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

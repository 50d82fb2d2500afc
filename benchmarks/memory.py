"""Peak memory of one training step of stage 1: the plain loop against ours.

    python -m benchmarks.memory                                       # VGG16, 171 classes, 4 + 4 crops of 512 pixels
    python -m benchmarks.memory --backbone deeplabv3_mobilenet_v3_large --batch-size 2
    python -m benchmarks.memory --device cuda --batch-size 8

Each is measured in a process of its own: on a CPU by how much the most memory that the process ever held grows over the
step, on a GPU by the most that was allocated. The plain loop is written from the description of the published one:
a forward pass for the source and one for the target, logits upsampled to all pixels, losses of them, two optimisers.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import nn

from dataset.splits import VOID
from model.backbone import BACKBONES
from model.segmenter import Segmenter
from train_split_lambda import parse_arguments, train_step
from utils.options import Parser, count

NUM_DIMENSIONS = 300  # of the words


def plain_step(model, optimizers, source, target, num_seen: int, args) -> None:
    """One step of the plain loop, full precision, on float pictures and everything at full resolution."""
    (source_image, label), (target_image, valid) = source, target
    size = label.shape[-2:]

    def logits_of(image):
        coarse = model.projection(model.backbone(image))
        return F.interpolate(coarse, size=size, mode="bilinear", align_corners=True)

    def bias(logits, valid):
        unseen = F.softmax(logits, dim=1)[:, num_seen:].sum(dim=1)
        return (-torch.log(unseen + 1e-5) * valid).sum() / valid.sum().clamp(min=1)

    source_logits, target_logits = logits_of(source_image.float()), logits_of(target_image.float())
    ce = F.cross_entropy(source_logits, label.long(), ignore_index=VOID)
    w = args.weak_proportion
    loss = ce + args.lambda_ * ((1 - w) * bias(source_logits, label < num_seen) + w * bias(target_logits, valid))
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    print(f"loss {loss.item():.3f}", file=sys.stderr)


def draw_batches(batch_size: int, size: int, num_seen: int, device) -> tuple:
    """Source and target batch of noise: image and label, image and valid, as the loaders give them."""
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2 * batch_size, 3, size, size), generator=noise, dtype=torch.uint8).to(device)
    label = torch.randint(num_seen, (batch_size, size, size), generator=noise, dtype=torch.uint8).to(device)
    label[:, ::3] = VOID
    valid = torch.ones(batch_size, size, size, dtype=torch.bool, device=device)
    return (images[:batch_size], label), (images[batch_size:], valid)


def measure(kind: str, backbone: str, num_classes: int, batch_size: int, size: int, device: str, amp: str) -> int:
    """Bytes that the step of `kind`, "plain" or "ours", needs at most, in this process."""
    num_seen = num_classes - num_classes // 10 - 1
    args = parse_arguments(["--backbone", backbone, "--input-size", str(size)])
    model = Segmenter(backbone, torch.randn(num_classes, NUM_DIMENSIONS), amp=amp).to(device)
    batches = draw_batches(batch_size, size, num_seen, device)
    groups = model.parameter_groups(1e-4)
    if kind == "plain":
        model.to(memory_format=torch.contiguous_format)
        if backbone == "vgg16":
            model.backbone.trunk = nn.Sequential(*model.backbone.trunk)  # which keeps everything
        optimizers = [torch.optim.SGD([group], momentum=0.9, weight_decay=5e-4) for group in groups]
        step = lambda: plain_step(model, optimizers, *batches, num_seen, args)  # noqa: E731
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4)
        step = lambda: train_step(model, optimizer, *batches, num_seen, args)  # noqa: E731
    if device != "cpu":
        step()  # the memory of libraries, and of the optimiser
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def compare(
    backbone: str = "vgg16", num_classes: int = 171, batch_size: int = 4, size: int = 512, device: str = "cpu",
    amp: str = "off",
) -> dict[str, float]:  # fmt: skip
    """{"plain": bytes, "ours": bytes, "ratio": ours / plain}, each measured in a process of its own."""
    peaks = {}
    for kind in ("plain", "ours"):
        flags = ["--backbone", backbone, "--classes", num_classes, "--batch-size", batch_size, "--input-size", size]
        command = [sys.executable, "-m", "benchmarks.memory", *flags, "--device", device, "--amp", amp, "--one", kind]
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
    parser.add_argument("--one", choices=["plain", "ours"], help="print the bytes of this one alone")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_options(argv)
    what = args.backbone, args.classes, args.batch_size, args.input_size, args.device, args.amp
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

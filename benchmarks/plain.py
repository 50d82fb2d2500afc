"""The plain loop that ours is held against: how such code is commonly written, in our own words.

Pictures are decoded, scaled and rotated whole, as float arrays. A training step is two forward passes, two optimisers,
logits upsampled to every pixel, and a look at the losses that waits for the device. An evaluation goes over the
pictures twice, for GZSL and for ZSL, one picture at a time with gradients switched on, and counts in NumPy.

It computes the same method on the same network, and takes the faster of two ways where either is common.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as pictures

from dataset.splits import VOID
from dataset.voc import EvaluationDataset, SourceDataset
from model.backbone import IMAGENET_MEAN, IMAGENET_STD, Recomputed
from model.segmenter import Segmenter

Batch = tuple[torch.Tensor, torch.Tensor]


# Input


def read(dataset: SourceDataset | EvaluationDataset, index: int, to_labels: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Picture float32 [H, W, 3] in [0, 255] and label float32 [H, W]."""
    picture = dataset.ids[index]
    image = np.asarray(Image.open(dataset.folder.image_path(picture)).convert("RGB"), np.float32)
    mask = np.asarray(Image.open(dataset.folder.mask_path(picture)))
    return image, to_labels(mask).astype(np.float32)


def normalise(image: torch.Tensor) -> torch.Tensor:
    """Float [..., 3, H, W] in [0, 255] -> what ImageNet weights were trained on."""
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (image - mean) / std


def training_item(
    dataset: SourceDataset, index: int, size: int, scale: tuple[float, float], degrees: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image float32 [3, size, size], normalised, and label int64 [size, size] of a picture scaled and rotated whole."""
    image, label = read(dataset, index, dataset.to_labels)
    image = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]  # [1, 3, H, W]
    label = torch.from_numpy(label)[None, None]  # [1, 1, H, W]
    low, high = scale
    factor = low + (high - low) * float(torch.rand(1))
    scaled = [max(1, round(side * factor)) for side in image.shape[-2:]]
    image = F.interpolate(image, scaled, mode="bilinear", align_corners=False)
    label = F.interpolate(label, scaled, mode="nearest")
    angle = degrees * (2 * float(torch.rand(1)) - 1)
    image = pictures.rotate(image, angle, InterpolationMode.BILINEAR, fill=[124.0, 116.0, 104.0])
    label = pictures.rotate(label, angle, InterpolationMode.NEAREST, fill=[float(VOID)])
    image = normalise(image)
    down, across = (max(0, size - side) for side in scaled)
    image, label = F.pad(image, (0, across, 0, down)), F.pad(label, (0, across, 0, down), value=float(VOID))
    top, left = (math.floor(float(torch.rand(1)) * (side - size + 1)) for side in image.shape[-2:])
    image, label = (x[0, :, top : top + size, left : left + size] for x in (image, label))
    if float(torch.rand(1)) < 0.5:
        image, label = image.flip(-1), label.flip(-1)
    return image.contiguous(), label[0].long()


# Training


def optimizers(model: Segmenter, learning_rate: float = 1e-4) -> list[torch.optim.Optimizer]:
    """One for the trunk, one for what follows it."""
    groups = model.parameter_groups(learning_rate)
    return [torch.optim.SGD([group], momentum=0.9, weight_decay=5e-4) for group in groups]


def keep_activations(model: Segmenter) -> None:
    """Undoes what the network does to save memory."""
    for module in model.modules():
        if isinstance(module, Recomputed):
            module.__class__ = nn.Sequential


def logits_of(model: Segmenter, image: torch.Tensor) -> torch.Tensor:
    """Normalised float pictures [N, 3, H, W] -> logits of every pixel [N, K, H, W]."""
    coarse = model.projection(model.backbone.classifier(model.backbone.trunk(image)))
    return F.interpolate(coarse, image.shape[-2:], mode="bilinear", align_corners=True)


def bias_loss(logits: torch.Tensor, num_seen: int, valid: torch.Tensor) -> torch.Tensor:
    """Mean over the valid pixels of -log of the probability of all unseen classes."""
    unseen = F.softmax(logits, dim=1)[:, num_seen:].sum(dim=1)
    return (-torch.log(unseen + 1e-5) * valid).sum() / valid.sum().clamp(min=1)


def train_step(
    model: Segmenter, both: Sequence[torch.optim.Optimizer], source: Batch, target: Batch, num_seen: int,
    weight: float = 0.2, proportion: float = 0.2,
) -> None:  # fmt: skip
    """One step of stage 1.

    Args:
        source: normalised image float [N, 3, S, S] and label int64 [N, S, S].
        target: normalised image float [M, 3, S, S] and valid bool [M, S, S].
    """
    for optimizer in both:
        optimizer.zero_grad()
    image, label = source
    logits = logits_of(model, image)
    ce = F.cross_entropy(logits, label, ignore_index=VOID)
    bias_source = bias_loss(logits, num_seen, label < num_seen)
    (ce + weight * (1 - proportion) * bias_source).backward()
    image, valid = target
    bias_target = bias_loss(logits_of(model, image), num_seen, valid)
    (weight * proportion * bias_target).backward()
    for optimizer in both:
        optimizer.step()
    print(f"ce {ce.item():.4f}, source {bias_source.item():.4f}, target {bias_target.item():.4f}")


# Evaluation


class EvaluationItems(Dataset):
    """Image float32 [3, H, W], normalised, and label float32 [H, W] of each picture of `dataset`."""

    def __init__(self, dataset: EvaluationDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, np.ndarray]:
        image, label = read(self.dataset, index, self.dataset.split.to_labels)
        return normalise(torch.from_numpy(image.transpose(2, 0, 1).copy())), label


def evaluate(
    model: Segmenter, dataset: EvaluationDataset, device: torch.device, num_workers: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Confusion matrices of GZSL, int64 [K, K], and of ZSL, int64 [U, U]: a pass over the pictures for each."""
    model.eval()
    split = dataset.split
    matrices = []
    for first in (0, split.num_seen):  # the first class that competes
        count = len(split.names) - first
        matrix = np.zeros((count, count), np.int64)
        for image, label in DataLoader(EvaluationItems(dataset), batch_size=1, num_workers=num_workers):
            logits = logits_of(model, image.to(device))[:, first:]
            label, guess = label.numpy(), logits.max(dim=1)[1].cpu().numpy()
            kept = (label >= first) & (label != VOID)
            pairs = (label[kept].astype(np.int64) - first) * count + guess[kept]
            matrix += np.bincount(pairs, minlength=count**2).reshape(count, count)
        matrices.append(matrix)
    model.train()
    return tuple(matrices)

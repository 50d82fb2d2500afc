"""The masks of a data set: reading and writing them, and which images show which classes."""

from pathlib import Path

import numpy as np
from PIL import Image

from dataset.checks import ClassIndex
from dataset.splits import Split
from dataset.voc import VOCFolder


def classes_shown(data: Path, name: str = "train") -> dict[str, frozenset[int]]:
    """Mask values of each image of a list, read from its mask (and kept in the class index)."""
    folder = VOCFolder.open(data)
    return ClassIndex(folder).classes(folder.read_list(name))


def target_only(data: Path, split: Split) -> list[str]:
    """Training images that show an unseen class and no seen one."""
    shown = classes_shown(data)
    return [image for image, v in shown.items() if v & split.unseen_values and not v & split.seen_values]


def source_and_target(data: Path, split: Split) -> list[str]:
    """Training images that show both seen and unseen classes."""
    shown = classes_shown(data)
    return [image for image, v in shown.items() if v & split.unseen_values and v & split.seen_values]


def mask_path(data: Path, image: str) -> Path:
    return VOCFolder.open(data).mask_path(image)


def read_values(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def write_values(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask.astype(np.uint8), mode="L").save(path)

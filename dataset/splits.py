"""Which classes are seen, which are unseen, and in what order a network scores them.

A mask on disk holds *mask values* (VOC: 0 background, 1-20 classes, 255 void). A network scores *class
indices*: the seen classes first, then the unseen ones. `Split` is the one place that knows both and goes
from one to the other; nothing else in the project counts classes.
"""

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

VOID = 255
"""Mask value, and class index, of a pixel without a label. Losses and metrics ignore it."""

BACKGROUND = "background"

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle",
    "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person",
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The classes of PASCAL VOC in the order of their mask values, which begin at 1 (0 is the background)."""

VOC_SPLITS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Split:
    """A set of classes divided into seen and unseen.

    Args:
        seen: names of the classes that source pictures label, in order.
        unseen: names of the classes that nothing labels, in order.
        mask_values: the mask value of every name in `seen + unseen`; other values become `VOID`.
        known_values: every value that a mask may hold besides `VOID` (a superset of `mask_values`).
    """

    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    mask_values: tuple[int, ...]
    known_values: tuple[int, ...]

    def __post_init__(self):
        if not self.seen or not self.unseen:
            raise ValueError("a split needs at least one seen and one unseen class")
        if len(self.mask_values) != len(self.names) or len(set(self.mask_values)) != len(self.names):
            raise ValueError("a split needs one mask value of its own for each class")
        if len(set(self.names)) != len(self.names):
            raise ValueError("a split names a class twice")
        if not all(isinstance(value, int) and 0 <= value < VOID for value in (*self.mask_values, *self.known_values)):
            raise ValueError(f"mask values are whole numbers from 0 to {VOID - 1}")

    @classmethod
    def voc(cls, number: int, background: bool = False) -> "Split":
        """VOC split `number` (1-4): classes 5k-4 ... 5k of the 20 are unseen.

        Args:
            number: k.
            background: count the background as the first seen class (the protocol of ZS3Net)
                instead of ignoring it.
        """
        if number not in VOC_SPLITS:
            raise ValueError(f"split {number}: choose one of {', '.join(map(str, VOC_SPLITS))}")
        size = len(VOC_CLASSES) // len(VOC_SPLITS)
        unseen = VOC_CLASSES[(number - 1) * size : number * size]
        seen = tuple(name for name in VOC_CLASSES if name not in unseen)
        if background:
            seen = (BACKGROUND, *seen)
        value = {BACKGROUND: 0} | {name: i for i, name in enumerate(VOC_CLASSES, start=1)}
        return cls(seen, unseen, tuple(value[name] for name in seen + unseen), tuple(sorted(value.values())))

    def as_dict(self) -> dict[str, list]:
        """The split in plain types, for a checkpoint."""
        return {field.name: list(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, plain: dict) -> "Split":
        """The split that `as_dict` wrote; other keys of `plain` are passed over."""
        return cls(**{field.name: tuple(plain[field.name]) for field in fields(cls)})

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in the order of the network's scores: seen, then unseen."""
        return self.seen + self.unseen

    @property
    def num_seen(self) -> int:
        return len(self.seen)

    @property
    def seen_values(self) -> frozenset[int]:
        """Mask values of the seen classes that are things in a picture: without the background."""
        return frozenset(v for v, name in zip(self.mask_values, self.seen) if name != BACKGROUND)

    @property
    def unseen_values(self) -> frozenset[int]:
        """Mask values of the unseen classes."""
        return frozenset(self.mask_values[self.num_seen :])

    @cached_property
    def _to_index(self) -> np.ndarray:
        table = np.full(VOID + 1, VOID, np.uint8)
        table[list(self.mask_values)] = np.arange(len(self.names))
        return table

    @cached_property
    def _to_value(self) -> np.ndarray:
        table = np.full(VOID + 1, VOID, np.uint8)
        table[: len(self.names)] = self.mask_values
        return table

    def to_labels(self, mask: np.ndarray) -> np.ndarray:
        """Mask values (uint8, any shape) -> class indices; what is no class of the split becomes `VOID`."""
        return self._to_index[mask]

    def to_seen_labels(self, mask: np.ndarray) -> np.ndarray:
        """As `to_labels`, with the unseen classes `VOID` too: what a source picture may teach."""
        labels = self.to_labels(mask)
        return np.where(labels < self.num_seen, labels, VOID).astype(np.uint8)

    def to_unseen_labels(self, mask: np.ndarray) -> np.ndarray:
        """As `to_labels`, with the seen classes `VOID`: what the oracle protocol knows of a target picture."""
        labels = self.to_labels(mask)
        return np.where(labels >= self.num_seen, labels, VOID).astype(np.uint8)

    def to_mask(self, labels: np.ndarray) -> np.ndarray:
        """Class indices (any integer type, any shape) -> mask values (uint8), as `to_labels` undone."""
        return self._to_value[labels]

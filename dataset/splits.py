"""Which classes are seen, which are unseen, and in what order a network scores them.

A mask on disk holds *mask values* (VOC: 0 background, 1-20 classes, 255 void). A network scores *class indices*: the
seen classes first, then the unseen ones. `Split` knows both and converts between them.
The classes of a data set are the lines of a file in `names/`; a named split is a file in `named_splits/`, with
the publication that it comes from.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from utils.errors import UserError, read_lines

VOID = 255
"""Mask value, and class index, of a pixel without a label. Losses and metrics ignore it."""

BACKGROUND = "background"

VOID_NAMES = r"ignored?|void|unlabell?ed|none|null|nothing|unknown|dontcare"
"""What lists of classes call pixels without a class, as `fold_name` writes it."""

NAMES = Path(__file__).parent / "names"
NAMED_SPLITS = Path(__file__).parent / "named_splits"


def fold_name(name: str) -> str:
    """The form in which class names are compared: 'Traffic_Light' and 'traffic-light' are 'trafficlight'."""
    return re.sub(r"[\s_-]+", "", name).casefold() or name


def class_name(text: str) -> str:
    """A class name as it is used: the background is `BACKGROUND` however it is spelt (Background, _background_, bg)."""
    return BACKGROUND if fold_name(text) in (BACKGROUND, "bg") else text.strip()


def read_classes(path: Path, lines: Sequence[str] | None = None) -> dict[str, int]:
    """Class name -> mask value, from a text file with one class a line, or from `lines` made of what it says.

    A line is `VALUE: NAME`, or only `NAME`: then its mask value is its place, and the first line has 0.
    First lines of labelling tools do not count: labelme's `__ignore__`, which is void, and Roboflow's header.
    Raises `UserError` for a file that can't be read, no class, one given twice or meaning void, and values above 254.
    """
    lines = read_lines(path) if lines is None else lines
    if lines[:1] in (["__ignore__"], ["Pixel Value, Class"]):
        lines = lines[1:]
    classes: dict[str, int] = {}
    for place, line in enumerate(lines):
        number = re.match(r"(\d+)\s*[:,]", line)
        value, name = (int(number[1]), class_name(line[number.end() :])) if number else (place, class_name(line))
        if re.fullmatch(VOID_NAMES, fold_name(name)):
            raise UserError(
                f"{path}, line {line!r}: pixels without a class have the value {VOID} in masks and no line here: leave "
                f"the line out, or call it {BACKGROUND} if masks show it"
            )
        if not name or not value < VOID or value in classes.values() or fold_name(name) in map(fold_name, classes):
            raise UserError(
                f"{path}, line {line!r}: write NAME or VALUE: NAME, each name and value once, values 0 to {VOID - 1}"
            )
        classes[name] = value
    if not classes:
        raise UserError(f"{path} is empty: write one class a line")
    return classes


VOC_CLASSES = tuple(name for name in read_classes(NAMES / "voc.txt") if name != BACKGROUND)
"""The classes of PASCAL VOC in the order of their mask values, which begin at 1 (0 is the background)."""


def split_name(text: str) -> int | str:
    """A split as it is called on the command line: the paper's have a number, 1 to 4, the others a name."""
    return int(text) if text.isdecimal() else text


STEMS = sorted((path.stem for path in NAMED_SPLITS.glob("*.json")), key=lambda stem: (not stem.isdecimal(), stem))
SPLITS = tuple(map(split_name, STEMS))
"""Every named split, those of the paper first."""


@dataclass(frozen=True)
class Split:
    """A set of classes divided into seen and unseen ones. All but `trained` describes the scored classes."""

    seen: tuple[str, ...]  # names of the classes that source images label, in order
    unseen: tuple[str, ...]  # names of the classes that nothing labels, in order
    mask_values: tuple[int, ...]  # of every name in `seen + unseen`; other values become `VOID`
    known_values: tuple[int, ...]  # all that a mask may hold besides `VOID` (a superset of `mask_values`)
    auxiliary_value: int | None = None  # of a background that is trained on and not scored; None: there is none
    name: int | str = field(default="", compare=False)  # what the split is called

    def __post_init__(self):
        values = (*self.mask_values, *([] if self.auxiliary_value is None else [self.auxiliary_value]))
        are_values = all(isinstance(value, int) and 0 <= value < VOID for value in (*values, *self.known_values))
        are_distinct = len({*self.names}) == len(self.names) == len(self.mask_values) and len({*values}) == len(values)
        if not (self.seen and self.unseen and are_values and are_distinct):
            raise UserError("a split needs seen and --unseen classes, each with a mask value of its own from 0 to 254")

    @classmethod
    def named(cls, name: int | str, background: str = "ignore") -> "Split":
        """The split `name`, one of `SPLITS`: k = 1 ... 4 makes VOC's classes 5k-4 ... 5k unseen.

        Its file gives `dataset`, `unseen`, `source`, and where it needs them `left_out` and `background`: that counts
        as seen whatever `background` says. Raises `UserError` for a background in a data set that has none.
        """
        facts = json.loads((NAMED_SPLITS / f"{name}.json").read_text(encoding="utf-8"))
        classes = read_classes(NAMES / f"{facts['dataset']}.txt")
        background = "score" if facts.get("background") else background
        return cls.of(classes, facts["unseen"], background, facts.get("left_out", ()), name)

    @classmethod
    def of(
        cls, classes: Mapping[str, int], unseen: Sequence[str], background: str = "ignore",
        left_out: Sequence[str] = (), name: int | str = "",
    ) -> "Split":  # fmt: skip
        """A split of any `classes`, name -> mask value of all that a mask may show, each side in the order of values.

        Seen is what is neither `unseen` nor `left_out`, whose pixels are void in training and evaluation. `background`:
        "ignore" makes it void, "score" a seen class, "auxiliary" a class that is trained on and not scored. Raises
        `UserError` for a name that is no class, or no seen or unseen class.
        """
        name_of = {fold_name(class_): class_ for class_ in sorted(classes, key=classes.get)}
        for wanted in (*unseen, *left_out, *([BACKGROUND] if background != "ignore" else [])):
            if fold_name(wanted) not in name_of:
                raise UserError(f"there is no class {wanted!r} among {', '.join(classes)}")
        unseen, others = (set(map(fold_name, names)) for names in (unseen, (*unseen, *left_out, BACKGROUND)))
        seen = [BACKGROUND] * (background == "score") + [name_of[one] for one in name_of if one not in others]
        unseen = [name_of[one] for one in name_of if one in unseen - {BACKGROUND}]
        return cls(
            tuple(seen), tuple(unseen), tuple(classes[one] for one in seen + unseen),
            tuple(sorted(classes.values())), classes[BACKGROUND] if background == "auxiliary" else None, name,
        )  # fmt: skip

    @property
    def background(self) -> str:
        """What is done with the background, see `of`."""
        scored = "score" if BACKGROUND in self.names else "ignore"
        return "auxiliary" if self.num_auxiliary else scored

    @property
    def num_auxiliary(self) -> int:
        """Classes that are trained on and not scored: 1 with an auxiliary background, else 0."""
        return int(self.auxiliary_value is not None)

    @cached_property
    def trained(self) -> "Split":
        """The split of the training labels and pseudo-labels: an auxiliary background is its class 0, and seen."""
        if not self.num_auxiliary:
            return self
        seen, values = (BACKGROUND, *self.seen), (self.auxiliary_value, *self.mask_values)
        return Split(seen, self.unseen, values, self.known_values, None, self.name)

    def as_dict(self) -> dict:
        """The split in plain types, for a checkpoint."""
        values = {key: list(getattr(self, key)) for key in ("seen", "unseen", "mask_values", "known_values")}
        return {**values, "auxiliary_value": self.auxiliary_value, "split": self.name, "background": self.background}

    @classmethod
    def from_dict(cls, plain: Mapping) -> "Split":
        """The split that `as_dict` wrote; other keys of `plain` are passed over."""
        values = (tuple(plain[key]) for key in ("seen", "unseen", "mask_values", "known_values"))
        return cls(*values, plain["auxiliary_value"], plain["split"])

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in the order of the network's scores: seen, then unseen."""
        return self.seen + self.unseen

    @property
    def num_seen(self) -> int:
        return len(self.seen)

    @property
    def seen_values(self) -> frozenset[int]:
        """Mask values of the seen classes without the background: what makes an image a source image."""
        return frozenset(value for value, name in zip(self.mask_values, self.seen) if name != BACKGROUND)

    @property
    def unseen_values(self) -> frozenset[int]:
        """Mask values of the unseen classes."""
        return frozenset(self.mask_values[self.num_seen :])

    @property
    def drawing(self) -> dict:
        """Keywords with which `utils` draws masks of this split."""
        names = {v: name + "*" * (name in self.unseen) for v, name in zip(self.mask_values, self.names)}
        return {"names": names, "ignore": (0, VOID) if BACKGROUND in self.names else (VOID,)}

    def to_labels(self, mask: np.ndarray, side: str = "all") -> np.ndarray:
        """Mask values (uint8, any shape) -> class indices; what is no class of the split becomes `VOID`.

        `side` "seen" makes the unseen classes `VOID` too: what labels a source image; "unseen" the seen ones: what the
        oracle protocol knows of a target image.
        """
        kept = {"all": slice(None), "seen": slice(self.num_seen), "unseen": slice(self.num_seen, None)}[side]
        return _table(self.mask_values[kept], range(len(self.names))[kept])[mask]

    def to_mask(self, labels: np.ndarray) -> np.ndarray:
        """Class indices (any integer type, any shape) -> mask values (uint8), the inverse of `to_labels`."""
        return _table(range(len(self.names)), self.mask_values)[labels]


def _table(keys: Sequence[int], values: Sequence[int]) -> np.ndarray:
    """uint8 [256]: the value of each key, `VOID` elsewhere."""
    table = np.full(VOID + 1, VOID, np.uint8)
    table[list(keys)] = values
    return table

"""A folder in the layout of PASCAL VOC, its lists, and the source, target and evaluation datasets.

*Source* images show a seen class; their masks are labels, with unseen pixels void. *Target* images are used without a
mask. Which classes an image shows is kept in an index file (`dataset.checks`), so that training with
`target_pixels="all"` opens no mask of an image that is target only.
"""

import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.checks import ClassIndex, describe_lists, lack_of_masks, raise_first
from dataset.images import IMAGE_SUFFIXES, MASK_SUFFIXES, Colours, opened, read_image, read_mask
from dataset.splits import BACKGROUND, NAMES, VOID, Split, class_name, read_classes
from utils.errors import UserError, read_lines

IMAGE_FOLDERS = ("JPEGImages", "images", "img")
MASK_FOLDERS = ("SegmentationClassAug", "SegmentationClassPNG", "SegmentationClass", "masks", "masks_machine")
LIST_FOLDER = Path("ImageSets") / "Segmentation"
CLASS_FILES = ("classes.txt", "class_names.txt", "labels.txt", "_classes.csv")
"""Names of the classes in the order of their mask values: our own, labelme's two, and Roboflow's."""
COLOUR_FILES = ("labelmap.txt", "obj_class_to_machine_color.json", "../obj_class_to_machine_color.json")
"""Colours of the classes: CVAT's, `NAME:RED,GREEN,BLUE:...` a line, and Supervisely's."""

MIN_SIDE = 32
"""Pixels: the largest stride of a network."""

TRAIN_LISTS = ("train_aug", "trainaug", "train")
"""The lists of training images, of which the first that is there counts."""


@dataclass(frozen=True)
class VOCFolder:
    """Where images, masks and lists lie below a folder in VOC layout."""

    root: Path  # the folder that holds the others
    images: Path
    masks: Path  # index masks, one for each image

    @classmethod
    def open(cls, data_path: str | Path, split: Split | None = None) -> "VOCFolder":
        """Finds the layout at `data_path`, or below it, see `find_root`.

        Raises `UserError` if a part is missing, or for other classes than those of `split`.
        """
        root = find_root(data_path)
        found = [] if root is None else find_folders(root, MASK_FOLDERS)
        if not found:
            raise UserError(
                f"--data-path {data_path} needs one of {', '.join(IMAGE_FOLDERS)} and beside it one of "
                f"{', '.join(MASK_FOLDERS)}, and it {holds(root or data_path)}: see DATA_PATH.md"
            )
        with_masks = (masks for masks in found if list_files(masks, MASK_SUFFIXES) or not os.listdir(masks))
        masks = next(with_masks, found[0])  # labelme writes arrays to SegmentationClass
        folder = cls(root, find_folders(root, IMAGE_FOLDERS)[0], masks)
        if split and not dict(zip(split.names, split.mask_values)).items() <= folder.classes.items():
            source = folder.class_file or "VOC, for want of a classes.txt"
            raise UserError(f"{root} holds other classes than the split, those of {source}: see --split and --unseen")
        return folder

    @property
    def lists(self) -> Path:
        """The folder of the lists: `ImageSets/Segmentation`, or the root where that is not there."""
        return self.root / LIST_FOLDER if os.path.isdir(self.root / LIST_FOLDER) else self.root

    @cached_property
    def image_files(self) -> dict[str, str]:
        """The file of each image id."""
        return list_files(self.images, IMAGE_SUFFIXES)

    @cached_property
    def mask_files(self) -> dict[str, str]:
        """The file of each mask. The mask of image x may also be called x_mask.png or x.jpg.png."""
        files = list_files(self.masks, MASK_SUFFIXES)
        for name in [name for name in files if name not in self.image_files]:
            files.setdefault(re.sub(r"([_-]mask|\.jpe?g|\.png)$", "", name), files[name])
        return files

    def image_path(self, image: str) -> Path:
        return self.images / self.image_files.get(image, f"{image}.jpg")

    def mask_path(self, image: str) -> Path:
        return self.masks / self.mask_files.get(image, f"{image}.png")

    def first_file(self, names: Sequence[str]) -> Path | None:
        """The first of these files in the folder; None if there is none."""
        return next((self.root / name for name in names if (self.root / name).is_file()), None)

    @property
    def class_file(self) -> Path | None:
        """The file that says what the mask values mean; None where there is none, which means VOC."""
        return self.first_file((*CLASS_FILES, *COLOUR_FILES))

    @cached_property
    def classes(self) -> dict[str, int]:
        """Class name -> mask value; a class of a grey colour has its level. Raises `UserError` for a bad file."""
        path = self.class_file or NAMES / "voc.txt"
        if path != self.first_file(COLOUR_FILES):
            return read_classes(path)
        colours = read_colours(path)
        is_grey = all(len(set(colour)) == 1 for colour in colours.values())
        rows = [f"{colour[0] if is_grey else place}: {name}" for place, (name, colour) in enumerate(colours.items())]
        return read_classes(path, rows)

    @cached_property
    def colours(self) -> Colours:
        """The values that masks may hold besides `VOID`, with the colours that the folder gives to them."""
        path = self.first_file(COLOUR_FILES)
        given = read_colours(path) if path else {}
        return {value: given.get(name) for name, value in self.classes.items()}

    def read_list(self, name: str | None = None) -> list[str]:
        """Image ids of a list, see `image_id` for what a line may be.

        `name` is that of a list in `ImageSets/Segmentation`, or the path of a text file with an image a line; None: the
        training images. Raises `UserError` for a list that is missing, unreadable or empty, lines that name no image,
        and doubled images.
        """
        paths = [self.lists / f"{one}.txt" for one in ([name] if name else TRAIN_LISTS)]
        path = next((path for path in [*paths, Path(name or "")] if os.path.isfile(path)), None)
        if path is None:
            raise UserError(
                f"no list {' or '.join(path.name for path in paths)} in {self.lists}: write one image id a line, or "
                f"run python -m dataset.prepare own --data-path {shlex.quote(str(self.root))}"
            )
        lines = read_lines(path)
        if lines and re.fullmatch(r"\d+([\s,]+\d+)+", lines[0]) and lines[0] not in self.image_files:
            del lines[0]  # a line of class ids, as published lists have it
        ids = list(map(self.image_id, lines))
        missing = [line for line, image in zip(lines, ids) if image not in self.image_files]
        if missing:
            raise UserError(
                f"{path}: {missing[0]!r} names no image in {self.images} ({len(missing)} of the {len(ids)} entries do "
                "not): copy it there or shorten the list"
            )
        if len(set(ids)) < max(1, len(ids)):
            wrong = f"lists {Counter(ids).most_common(1)[0][0]} twice" if ids else "is empty"
            raise UserError(f"{path} {wrong}: write one image id a line, each once")
        return ids

    def image_id(self, line: str) -> str:
        """The image that a line of a list names: `x`, `x.jpg`, or `/JPEGImages/x.jpg /SegmentationClass/x.png`."""
        if line in self.image_files:
            return line
        image = re.sub(r"(\.\w{3,4})[\s,;]+\S.*", r"\1", line)  # without the mask
        name = re.split(r"[/\\]", image.strip("\"'"))[-1]
        stem, suffix = os.path.splitext(name)
        return stem if suffix.lower() in IMAGE_SUFFIXES and name not in self.image_files else name


def holds(folder: str | Path) -> str:
    """What a folder holds, for a message."""
    if not os.path.isdir(folder):
        return "is not there"
    return f"holds {', '.join(sorted(os.listdir(folder))[:6]) or 'nothing'}"


def find_folders(root: Path, names: Sequence[str]) -> list[Path]:
    """The folders in `root` that are called so, in upper or lower case, in the order of `names`."""
    there = {name.lower(): root / name for name in os.listdir(root)}
    found = (there.get(name.lower()) for name in names)
    return [path for path in found if path is not None and os.path.isdir(path)]


def find_root(data_path: str | Path) -> Path | None:
    """The folder with the images' folder in it: `data_path`, or VOC's or the only such one below it; None for none."""
    data_path = Path(data_path)
    below = [data_path / name for name in os.listdir(data_path)] if os.path.isdir(data_path) else []
    places = [data_path, data_path / "VOC2012", data_path / "VOCdevkit" / "VOC2012"]
    found = [place for place in (*places, *below) if os.path.isdir(place) and find_folders(place, IMAGE_FOLDERS)]
    return found[0] if found and (found[0] in places or len(found) == 1) else None


def list_files(folder: Path, suffixes: Sequence[str]) -> dict[str, str]:
    """Name without ending -> name, of the files with such an ending in any case; hidden files are left out.

    Of names that differ in their ending alone, the one whose ending is first in `suffixes` counts.
    """
    parts = [(*os.path.splitext(name), name) for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    known = [(suffixes.index(suffix.lower()), stem, name) for stem, suffix, name in parts if suffix.lower() in suffixes]
    return dict(sorted({stem: name for _, stem, name in sorted(known, reverse=True)}.items()))


def read_colours(path: Path) -> dict[str, tuple[int, int, int]]:
    """Class name -> colour, from one of `COLOUR_FILES`, in its order; a background without a line is black."""
    text = "\n".join(read_lines(path))
    try:
        rows = re.findall(r"^([^#\n:]+):(\d+),(\d+),(\d+)", text, flags=re.MULTILINE)
        rows = json.loads(text).items() if path.suffix == ".json" else [(name, colour) for name, *colour in rows]
        colours = {class_name(name): tuple(map(int, colour)) for name, colour in rows}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} can't be read as names and colours: export it again") from error
    has_black = BACKGROUND in colours or (0, 0, 0) in colours.values()
    return colours if has_black else {BACKGROUND: (0, 0, 0), **colours}


def choose_split(data_path: str | Path, name: int | str, unseen: Sequence[str] | None, background: str) -> Split:
    """The split `name`, or with `unseen` these classes of the folder, which must have them, against all its others."""
    if unseen is None:
        return Split.named(name, background)
    split = Split.of(VOCFolder.open(data_path).classes, unseen, background)
    return replace(split, name=re.sub(r"[^\w.-]+", "-", "unseen-" + "-".join(split.unseen))[:120])


def showing(shown: dict[str, frozenset[int] | None], values: frozenset[int], kind: str) -> list[str]:
    """Ids of the images that show "a seen" or "an unseen" class, one of `values`. Raises `UserError` if none does."""
    ids = [image for image, there in shown.items() if there and there & values]
    if not ids:
        raise UserError(f"no training image shows {kind} class: check the training list, the masks and --split")
    return ids


@dataclass(eq=False)
class _Images(Dataset):
    """Images and masks of one size; an item for training is asked for by (index, seed), see `loaders.StepSampler`."""

    folder: VOCFolder
    ids: Sequence[str]
    split: Split
    transform: Callable | None = None  # see `transforms.training_transform`

    def __len__(self) -> int:
        return len(self.ids)

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 [H, W, 3] and mask uint8 [H, W]."""
        mask = read_mask(self.folder.mask_path(self.ids[index]), self.folder.colours)
        return read_image(self.folder.image_path(self.ids[index]), mask.shape[::-1]), mask

    def _augment(self, image: np.ndarray, label: np.ndarray, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The pair transformed with random numbers that depend on nothing but `seed`."""
        image, label = torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label)  # the image as a view
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed also visits GPUs, which takes a millisecond
            return self.transform(image, label)


@dataclass(eq=False)
class SourceDataset(_Images):
    """Labelled images: image uint8 [3, H, W] and label uint8 [H, W] of `split.trained`; unseen pixels are `VOID`.

    `supervised` keeps the labels of the unseen classes, which is not zero-shot: the ceiling.
    """

    supervised: bool = False

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        index, seed = key
        image, mask = self._read(index)
        return self._augment(image, self.split.trained.to_labels(mask, "all" if self.supervised else "seen"), seed)

    def divide(self, target: "TargetDataset") -> list["SourceDataset"]:
        """The images that are targets too, and the others: with `--target-images unseen` these show no unseen class."""
        ids = set(target.ids)
        return [replace(self, ids=[image for image in self.ids if (image in ids) is both]) for both in (True, False)]


@dataclass(eq=False)
class TargetDataset(_Images):
    """Unlabelled images: image uint8 [3, H, W], valid bool [H, W], the pixels that losses use, and may_show_seen, bool.

    `pixels` "all" uses every pixel of the image and opens no mask; "oracle" opens the mask and uses the pixels of
    unseen classes, as the published code does. may_show_seen is false for an image that is not among `labelled`, the
    images that show a seen class; None: that is not known, and any image may.
    """

    pixels: str = "all"
    labelled: Collection[str] | None = None

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index, seed = key
        if self.pixels == "oracle":
            image, mask = self._read(index)
            label = self.split.to_labels(mask, "unseen")
        else:
            image = read_image(self.folder.image_path(self.ids[index]))
            label = np.zeros(image.shape[:2], np.uint8)  # not a label: it tells pixels from padding
        image, label = self._augment(image, label, seed)
        return image, label != VOID, torch.tensor(self.labelled is None or self.ids[index] in self.labelled)


class EvaluationDataset(_Images):
    """Whole images: image uint8 [3, H, W], label uint8 [H, W] with seen and unseen classes, and the index.

    Images narrower than `MIN_SIDE` are padded to it at the right and below; the label is `VOID` there.
    """

    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each item, from the headers of the masks. Raises `UserError`."""
        sizes = []
        for image in self.ids:
            with opened(self.folder.mask_path(image), "a mask") as mask:
                sizes.append((max(mask.width, MIN_SIDE), max(mask.height, MIN_SIDE)))
        return sizes

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        image, mask = self._read(index)
        pad = [(0, max(0, MIN_SIDE - side)) for side in mask.shape]
        image = np.pad(image, (*pad, (0, 0)), mode="edge")
        mask = np.pad(mask, pad, constant_values=VOID)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(self.split.to_labels(mask)), index


def training_datasets(
    data_path: str | Path, split: Split, transform: Callable, target_images: str, target_pixels: str,
    train_list: str | None = None, supervised: bool = False, complete_labels: bool = False,
) -> tuple[SourceDataset, TargetDataset]:  # fmt: skip
    """The source and target images of a folder in VOC layout, whose files were all read once.

    Source images show a seen class; the background does not count, or training would open the masks of all images.
    `target_images` are "all", or those known to show an "unseen" class. With `complete_labels` source labels name all
    that an image shows. Raises `UserError` for whatever is wrong with the folder, its list, its images or its masks.
    """
    folder = VOCFolder.open(data_path, split)
    index = ClassIndex(folder)
    shown = index.classes(folder.read_list(train_list))
    labelled = split.seen_values | (split.unseen_values if supervised else frozenset())
    source = SourceDataset(folder, showing(shown, labelled, "a seen"), split, transform, supervised)
    if target_images == "unseen":
        raise_first(lack_of_masks([image for image, values in shown.items() if values is None], len(shown)))
        shown = showing(shown, split.unseen_values, "an unseen")
    labelled = frozenset(source.ids if complete_labels else shown)
    target = TargetDataset(folder, list(shown), split, transform, target_pixels, labelled)
    masked = [*source.ids, *(target.ids if target_pixels == "oracle" else ())]
    raise_first(index.check([*source.ids, *target.ids], masked))
    return source, target


def evaluation_dataset(
    data_path: str | Path, split: Split, evaluation_list: str | None = None, training: Iterable[str] = ()
) -> EvaluationDataset:
    """The evaluation images of a folder in VOC layout, whose files were all read once.

    Prints what is odd about their list and that of the `training` images. Raises `UserError` as `training_datasets`.
    """
    folder, training = VOCFolder.open(data_path, split), list(dict.fromkeys(training))
    ids, index = folder.read_list(evaluation_list or "val"), ClassIndex(folder)
    raise_first(index.check(ids, ids))
    for note in describe_lists(index, training, ids) if training else ():
        print(f"note: {note}", file=sys.stderr)
    return EvaluationDataset(folder, ids, split)

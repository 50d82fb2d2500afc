"""A folder in the layout of PASCAL VOC, its lists, and the source, target and evaluation datasets.

*Source* images show a seen class; their masks are labels, with unseen pixels void. *Target* images are used without a
mask. Which classes an image shows is kept in an index file (`dataset.checks`), so that training with
`target_pixels="all"` opens no mask of an image that is target only.

PASCAL Context and COCO-Stuff are prepared in the same layout (`dataset.prepare`). Images of one's own may lie in
`images` and `masks`; a file `classes.txt`, or one that a labelling tool wrote, then says what the mask values mean.
"""

import copy
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.checks import ClassIndex, describe_lists, lack_of_masks, overlap, raise_first
from dataset.images import IMAGE_SUFFIXES, MASK_SUFFIXES, Colours, opened, read_image, read_mask
from dataset.splits import BACKGROUND, NAMES, VOID, Split, class_name, read_classes
from utils.errors import UserError, read_lines

IMAGE_FOLDERS = ("JPEGImages", "images", "img")
MASK_FOLDERS = ("SegmentationClassAug", "SegmentationClassPNG", "SegmentationClass", "masks", "masks_machine")
LIST_FOLDER = Path("ImageSets") / "Segmentation"
CLASS_FILES = ("classes.txt", "class_names.txt", "labels.txt", "_classes.csv")
"""Names of the classes in the order of their mask values: our own, labelme's two, and Roboflow's."""
COLOUR_FILES = ("labelmap.txt", "obj_class_to_machine_color.json")
"""Colours of the classes: CVAT's, `NAME:RED,GREEN,BLUE:...` a line, and Supervisely's."""

MIN_SIDE = 32
"""Pixels: the largest stride of a network."""

TRAIN_LISTS = ("train_aug", "trainaug", "train")
EVALUATION_LISTS = ("val",)


@dataclass(frozen=True)
class VOCFolder:
    """Where images, masks and lists lie below a folder in VOC layout."""

    root: Path  # the folder that holds the others
    images: Path
    masks: Path  # index masks, one for each image

    @classmethod
    def open(cls, data_path: str | Path) -> "VOCFolder":
        """Finds the layout at `data_path`, or below it, see `find_root`. Raises `UserError` if a part is missing."""
        root = find_root(data_path)
        found = [] if root is None else find_folders(root, MASK_FOLDERS)
        if not found:
            raise UserError(
                f"--data-path {data_path} needs one of {', '.join(IMAGE_FOLDERS)} and beside it one of "
                f"{', '.join(MASK_FOLDERS)}, and it {holds(root or data_path)}: see DATA_PATH.md"
            )
        with_masks = (masks for masks in found if list_files(masks, MASK_SUFFIXES) or not os.listdir(masks))
        masks = next(with_masks, found[0])  # labelme writes arrays to SegmentationClass
        return cls(root, find_folders(root, IMAGE_FOLDERS)[0], masks)

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

    @cached_property
    def colour_file(self) -> Path | None:
        """A labelling tool's file of colours, if there is one."""
        places = [*(self.root / name for name in COLOUR_FILES), self.root.parent / COLOUR_FILES[-1]]
        return next((path for path in places if path.is_file()), None)

    @cached_property
    def class_file(self) -> Path | None:
        """The file that says what the mask values mean; None where there is none, which means VOC."""
        places = [self.root / name for name in CLASS_FILES]
        return next((path for path in places if path.is_file()), self.colour_file)

    @cached_property
    def classes(self) -> dict[str, int]:
        """Class name -> mask value; a class of a grey colour has its level. Raises `UserError` for a bad file."""
        path = self.class_file or NAMES / "voc.txt"
        if path != self.colour_file:
            return read_classes(path)
        colours = read_colours(path)
        is_grey = all(len(set(colour)) == 1 for colour in colours.values())
        rows = [f"{colour[0] if is_grey else place}: {name}" for place, (name, colour) in enumerate(colours.items())]
        return read_classes(path, rows)

    @cached_property
    def colours(self) -> Colours:
        """The values that masks may hold besides `VOID`, with the colours that the folder gives to them."""
        given = read_colours(self.colour_file) if self.colour_file else {}
        return {value: given.get(name) for name, value in self.classes.items()}

    def check_split(self, split: Split) -> None:
        """Raises `UserError` for a split of another data set, whose mask values would be taken for others."""
        where = self.class_file or "VOC, which a folder without classes.txt is taken for"
        for name, value in zip(split.names, split.mask_values):
            if self.classes.get(name) != value:
                raise UserError(
                    f"{self.root} holds other classes than the split: {name!r} has no mask value {value} in {where}; "
                    "give the --data-path or --split of the same data set"
                )

    def read_list(self, name: str | None, defaults: Sequence[str]) -> list[str]:
        """Image ids of a list, see `image_id` for what a line may be.

        Args:
            name: the name of a list in `ImageSets/Segmentation`, or the path of a text file with an image a line.
            defaults: the names to try in turn where `name` is None.

        Raises:
            UserError: for a list that is missing, unreadable or empty, lines that name no image, and doubled images.
        """
        path = self.list_path(name, defaults)
        lines = read_lines(path)
        if lines and re.fullmatch(r"\d+([\s,]+\d+)+", lines[0]) and lines[0] not in self.image_files:
            del lines[0]  # a line of class ids, as published lists have it
        if not lines:
            raise UserError(f"{path} is empty: write one image id a line")
        ids = list(map(self.image_id, lines))
        missing = [line for line, image in zip(lines, ids) if image not in self.image_files]
        if missing:
            raise UserError(
                f"{path}: {missing[0]!r} names no image in {self.images} ({len(missing)} of the {len(ids)} entries do "
                "not): copy it there or shorten the list"
            )
        image, count = Counter(ids).most_common(1)[0]
        if count > 1:
            raise UserError(f"{path} lists {image} twice: remove one")
        return ids

    def image_id(self, line: str) -> str:
        """The image that a line of a list names: `x`, `x.jpg`, or `/JPEGImages/x.jpg /SegmentationClass/x.png`."""
        if line in self.image_files:
            return line
        image = re.sub(r"(\.\w{3,4})[\s,;]+\S.*", r"\1", line)  # without the mask
        name = re.split(r"[/\\]", image.strip("\"'"))[-1]
        stem, suffix = os.path.splitext(name)
        return stem if suffix.lower() in IMAGE_SUFFIXES and name not in self.image_files else name

    def list_path(self, name: str | None, defaults: Sequence[str]) -> Path:
        """The file of a list, see `read_list`. Raises `UserError` if there is none."""
        if name is not None and os.path.isfile(name):
            return Path(name)
        paths = [self.lists / f"{n}.txt" for n in (defaults if name is None else [name])]
        found = next((path for path in paths if os.path.isfile(path)), None)
        if found is None:
            names = " or ".join(repr(path.name)[1:-1] for path in paths)
            raise UserError(
                f"no list {names} in {self.lists}: write one image id a line, or run python -m dataset.prepare own "
                f"--data-path {shlex.quote(str(self.root))}"
            )
        return found


def holds(folder: str | Path) -> str:
    """What a folder holds, for a message."""
    return (
        f"holds {', '.join(sorted(os.listdir(folder))[:6]) or 'nothing'}" if os.path.isdir(folder) else "is not there"
    )


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
    """Class name -> colour, from one of `COLOUR_FILES`, in its order; the background is black if it has no line.

    Raises `UserError` if it can't be read.
    """
    text = "\n".join(read_lines(path))
    try:
        if path.suffix == ".json":
            rows = json.loads(text).items()
        else:
            rows = re.findall(r"^([^#\n:]+):(\d+,\d+,\d+)", text, flags=re.MULTILINE)
            rows = [(name, colour.split(",")) for name, colour in rows]
        colours = {class_name(name): tuple(map(int, colour)) for name, colour in rows}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} can't be read as names and colours: export it again") from error
    has_black = BACKGROUND in colours or (0, 0, 0) in colours.values()
    return colours if has_black else {BACKGROUND: (0, 0, 0), **colours}


def choose_split(
    data_path: str | Path, name: int | str, unseen: Sequence[str] | None, background: str = "ignore"
) -> Split:
    """The split `name`, see `Split.named`, or with `unseen` these classes of the folder against all its others.

    Raises `UserError` for a class that the folder does not have.
    """
    if unseen is None:
        return Split.named(name, background)
    split = Split.of(VOCFolder.open(data_path).classes, unseen, background)
    return replace(split, name=re.sub(r"[^\w.-]+", "-", "unseen-" + "-".join(split.unseen))[:120])


# Source and target images


def choose_source(shown: dict[str, frozenset[int] | None], split: Split, supervised: bool = False) -> list[str]:
    """Ids of the images that show a seen class (`supervised`: or an unseen one), in order. Raises `UserError` for none.

    The background does not count here even where it is a seen class: else every image would be a source image, and
    training would open the masks of those that show only unseen classes.
    """
    labelled = split.seen_values | (split.unseen_values if supervised else frozenset())
    source = [image for image, values in shown.items() if values and values & labelled]
    if not source:
        raise UserError("no training image shows a seen class: check the training list, the masks and --split")
    return source


def choose_target(shown: dict[str, frozenset[int] | None], split: Split, images: str) -> list[str]:
    """Ids of the unlabelled images to train on: "all", or those known to show an "unseen" class.

    Raises `UserError` if there is none, or if "unseen" meets an image of which nothing is known.
    """
    if images == "all":
        return list(shown)
    unknown = [image for image, values in shown.items() if values is None]
    if unknown:
        raise UserError(lack_of_masks(unknown, len(shown)))
    target = [image for image, values in shown.items() if values & split.unseen_values]
    if not target:
        advice = "check --split (--target-images all is another protocol)"
        raise UserError(f"no training image shows an unseen class: {advice}")
    return target


# Datasets

Transform = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class _Images(Dataset):
    """What the three datasets share: ids in, an image and a mask of the same size out.

    An item of a training dataset is asked for by (index, seed), see `loaders.StepSampler`: the seed draws the random
    numbers of `transform`.
    """

    def __init__(self, folder: VOCFolder, ids: Sequence[str], split: Split, transform: Transform | None = None):
        self.folder, self.ids, self.split, self.transform = folder, list(ids), split, transform

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


class SourceDataset(_Images):
    """Labelled images: image uint8 [3, H, W] and label uint8 [H, W] of `split.trained`; unseen pixels are `VOID`.

    `supervised` keeps the labels of the unseen classes, which is not zero-shot: the ceiling.
    """

    def __init__(
        self, folder: VOCFolder, ids: Sequence[str], split: Split, transform: Transform, supervised: bool = False
    ):
        super().__init__(folder, ids, split, transform)
        self.to_labels = split.trained.to_labels if supervised else split.trained.to_seen_labels

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        index, seed = key
        image, mask = self._read(index)
        return self._augment(image, self.to_labels(mask), seed)

    def divide(self, target: "TargetDataset") -> tuple["SourceDataset", "SourceDataset"]:
        """The images that are targets too, and the others: with `--target-images unseen` these show no unseen class."""
        ids, shared, others = set(target.ids), copy.copy(self), copy.copy(self)
        shared.ids = [image for image in self.ids if image in ids]
        others.ids = [image for image in self.ids if image not in ids]
        return shared, others


class TargetDataset(_Images):
    """Unlabelled images: image uint8 [3, H, W], valid bool [H, W], the pixels that losses use, and may_show_seen, bool.

    `pixels` "all" uses every pixel of the image and opens no mask; "oracle" opens the mask and uses the pixels of
    unseen classes, as the published code does. may_show_seen is false for an image that is not among `labelled`, the
    images that show a seen class; None: that is not known, and any image may.
    """

    def __init__(
        self, folder: VOCFolder, ids: Sequence[str], split: Split, transform: Transform, pixels: str,
        labelled: Sequence[str] | None = None,
    ):  # fmt: skip
        super().__init__(folder, ids, split, transform)
        self.pixels, self.labelled = pixels, set(ids if labelled is None else labelled)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index, seed = key
        if self.pixels == "oracle":
            image, mask = self._read(index)
            label = self.split.to_unseen_labels(mask)
        else:
            image = read_image(self.folder.image_path(self.ids[index]))
            label = np.zeros(image.shape[:2], np.uint8)  # not a label: it tells pixels from padding
        image, label = self._augment(image, label, seed)
        return image, label != VOID, torch.tensor(self.ids[index] in self.labelled)


class EvaluationDataset(_Images):
    """Whole images: image uint8 [3, H, W], label uint8 [H, W] with seen and unseen classes, and the index.

    Images narrower than `MIN_SIDE` are padded to it at the right and below; the label is `VOID` there.
    """

    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each item, from the headers of the masks. Raises `UserError`."""
        sizes = []
        for image in self.ids:
            with opened(self.folder.mask_path(image), "mask") as mask:
                sizes.append((max(mask.width, MIN_SIDE), max(mask.height, MIN_SIDE)))
        return sizes

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        image, mask = self._read(index)
        height, width = mask.shape
        pad = ((0, max(0, MIN_SIDE - height)), (0, max(0, MIN_SIDE - width)))
        if any(end for _, end in pad):
            image = np.pad(image, (*pad, (0, 0)), mode="edge")
            mask = np.pad(mask, pad, constant_values=VOID)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(self.split.to_labels(mask)), index


def training_datasets(
    data_path: str | Path, split: Split, transform: Transform, target_images: str, target_pixels: str,
    train_list: str | None = None, supervised: bool = False, complete_labels: bool = False,
) -> tuple[SourceDataset, TargetDataset]:  # fmt: skip
    """The source and target images of a folder in VOC layout; for the arguments see what they are given to.

    Raises `UserError` for whatever is wrong with the folder, its list or its masks.
    """
    folder = VOCFolder.open(data_path)
    folder.check_split(split)
    shown = ClassIndex(folder).classes(folder.read_list(train_list, TRAIN_LISTS))
    source = SourceDataset(folder, choose_source(shown, split, supervised), split, transform, supervised)
    ids, labelled = choose_target(shown, split, target_images), source.ids if complete_labels else None
    return source, TargetDataset(folder, ids, split, transform, target_pixels, labelled)


def evaluation_dataset(data_path: str | Path, split: Split, evaluation_list: str | None = None) -> EvaluationDataset:
    """The evaluation images of a folder in VOC layout. Raises `UserError` as `training_datasets` does."""
    folder = VOCFolder.open(data_path)
    folder.check_split(split)
    return EvaluationDataset(folder, folder.read_list(evaluation_list, EVALUATION_LISTS), split)


def check_datasets(
    evaluation: EvaluationDataset, source: SourceDataset | None = None, target: TargetDataset | None = None
) -> None:
    """Reads every file that training and evaluation will read, and prints what is odd about the lists.

    Raises `UserError` for the first file that can't be used, with the number of such files.
    """
    index = ClassIndex(evaluation.folder)
    sources, targets = ([] if images is None else images.ids for images in (source, target))
    masked = [*evaluation.ids, *sources]
    if target is not None and target.pixels == "oracle":
        masked += targets
    training = list(dict.fromkeys([*sources, *targets]))
    raise_first(index.check([*training, *evaluation.ids], masked))
    if source is None:
        return
    classes = dict(zip(evaluation.split.names, evaluation.split.mask_values))
    notes = describe_lists(index, classes, training, evaluation.ids)
    for note in filter(None, [overlap(training, evaluation.ids), *notes]):
        print(f"note: {note}", file=sys.stderr)

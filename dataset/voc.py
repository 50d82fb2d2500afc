"""Pictures in the layout of PASCAL VOC: the folder, its lists, and the source, target and evaluation datasets.

*Source* pictures show a seen class; their masks teach, with unseen pixels left out. *Target* pictures teach
without a mask. Which classes a picture shows is read from the masks once and kept in an index file, so that
training with `target_pixels="all"` opens no mask of a picture that is target only.

PASCAL Context and COCO-Stuff are prepared in the same layout (`dataset.prepare`), and anyone's own pictures may lie in
`images` and `masks`; a file `classes.txt` then says what the mask values mean.
"""

import contextlib
import functools
import json
import os
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch.utils.data import Dataset

from dataset.parallel import spread
from dataset.splits import NAMES, VOID, Split, read_classes
from utils.errors import UserError, atomic_write

IMAGE_FOLDERS = ("JPEGImages", "images")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp", ".tif", ".tiff", ".webp")
MASK_FOLDERS = ("SegmentationClassAug", "SegmentationClass", "masks")
LIST_FOLDER = Path("ImageSets") / "Segmentation"
CLASSES_FILE = "classes.txt"
TRAIN_LISTS = ("train_aug", "trainaug", "train")
EVALUATION_LISTS = ("val",)


@dataclass(frozen=True)
class VOCFolder:
    """Where pictures, masks and lists lie below a folder in VOC layout.

    Args:
        root: the folder that holds the others.
        images: the folder of pictures.
        masks: the folder of index masks, one PNG a picture.
    """

    root: Path
    images: Path
    masks: Path

    @classmethod
    def open(cls, data_path: str | Path) -> "VOCFolder":
        """Finds the layout at `data_path`, or at the `VOC2012` or `VOCdevkit/VOC2012` below it.

        Raises:
            UserError: if the folder or one of its parts is missing.
        """
        root = find_root(data_path)
        if root is None:
            reason = "has no JPEGImages" if os.path.isdir(data_path) else "is not a folder"
            raise UserError(f"--data-path {data_path} {reason}: give a folder in VOC layout (DATA_PATH.md)")
        images = next(root / name for name in IMAGE_FOLDERS if os.path.isdir(root / name))
        masks = next((root / name for name in MASK_FOLDERS if os.path.isdir(root / name)), None)
        if images.name == "JPEGImages" and not os.path.isdir(root / LIST_FOLDER):
            raise UserError(f"{root / LIST_FOLDER} is missing: put train.txt and val.txt there")
        if masks is None:
            raise UserError(f"{root} has neither {' nor '.join(MASK_FOLDERS)}: put the index masks there")
        return cls(root, images, masks)

    @property
    def lists(self) -> Path:
        """The folder of the lists: `ImageSets/Segmentation`, or the root where that is not there."""
        return self.root / LIST_FOLDER if os.path.isdir(self.root / LIST_FOLDER) else self.root

    def read_classes(self) -> dict[str, int]:
        """Class name -> mask value, from the folder's `classes.txt`; VOC's where there is none."""
        path = self.root / CLASSES_FILE
        return read_classes(path if path.is_file() else NAMES / "voc.txt")

    def check_split(self, split: Split) -> None:
        """Refuses a split of another data set, whose mask values would be taken for others.

        Raises:
            UserError: if a class of the split has another mask value here, or none.
        """
        classes = self.read_classes()
        for name, value in zip(split.names, split.mask_values):
            if classes.get(name) != value:
                raise UserError(
                    f"{self.root} holds other classes than the split: {name!r} has no mask value {value} in "
                    f"{self._classes_source()}; give the --data-path or --split of the same data set"
                )

    def _classes_source(self) -> str:
        path = self.root / CLASSES_FILE
        return str(path) if path.is_file() else f"VOC, which a folder without {CLASSES_FILE} is taken for"

    def image_path(self, picture: str) -> Path:
        """The file of a picture. VOC's end in .jpg; anyone's own may have another ending."""
        path = self.images / f"{picture}.jpg"
        if self.images.name == "JPEGImages" or path.is_file():
            return path
        others = (self.images / (picture + suffix) for suffix in IMAGE_SUFFIXES)
        return next((other for other in others if other.is_file()), path)

    def mask_path(self, picture: str) -> Path:
        return self.masks / f"{picture}.png"

    def read_list(self, name: str | None, defaults: Sequence[str]) -> list[str]:
        """Picture ids of a list.

        Args:
            name: the name of a list in `ImageSets/Segmentation`, or the path of a text file with an id a line.
            defaults: the names to try in turn where `name` is None.

        Raises:
            UserError: for a list that is missing or unreadable, and for ids that are empty, doubled or paths.
        """
        path = self._list_path(name, defaults)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} can't be read as a text list: {error}") from error
        ids = [line.strip() for line in lines if line.strip()]
        if not ids:
            raise UserError(f"{path} is empty: write one picture id a line")
        for number, picture in enumerate(ids, start=1):
            if Path(picture).name != picture or picture == ".." or not picture.isprintable():
                raise UserError(f"{path}, entry {number}: {picture!r} is no picture id; write a name like 2007_000032")
        if len(set(ids)) != len(ids):
            double = next(picture for i, picture in enumerate(ids) if picture in ids[:i])
            raise UserError(f"{path} lists {double} twice: remove one")
        missing = [picture for picture in ids if not os.path.isfile(self.image_path(picture))]
        if missing:
            raise UserError(
                f"{self.image_path(missing[0])} is missing ({len(missing)} of the {len(ids)} pictures of {path}): "
                "copy it there or shorten the list"
            )
        return ids

    def _list_path(self, name: str | None, defaults: Sequence[str]) -> Path:
        folder = self.lists
        if name is not None and os.path.isfile(name):
            return Path(name)
        names = [name] if name is not None else list(defaults)
        found = next((folder / f"{n}.txt" for n in names if os.path.isfile(folder / f"{n}.txt")), None)
        if found is None:
            own = self.images.name != "JPEGImages"
            raise UserError(
                f"no list {' or '.join(repr(f'{n}.txt')[1:-1] for n in names)} in {folder}: write one picture id a line"
                + (f", or run python -m dataset.prepare own --data-path {self.root}" if own else "")
            )
        return found


def find_root(data_path: str | Path) -> Path | None:
    """The folder with the pictures' folder in it: `data_path`, or VOC's below it; None without one."""
    data_path = Path(data_path)
    places = [data_path, data_path / "VOC2012", data_path / "VOCdevkit" / "VOC2012"]
    return next((place for place in places for name in IMAGE_FOLDERS if os.path.isdir(place / name)), None)


def choose_split(
    data_path: str | Path, name: int | str, unseen: Sequence[str] | None, background: str = "ignore"
) -> Split:
    """The split of a run: a named one, or the `unseen` classes of the folder against all its other classes.

    Args:
        data_path: where the classes are read for `unseen`, see `VOCFolder.read_classes`.
        name: a named split; not used with `unseen`.
        unseen: unseen classes of the folder.
        background: "ignore", "score" or "auxiliary", see `Split.named`.

    Raises:
        UserError: for a class that the folder does not have.
    """
    if unseen is None:
        return Split.named(name, background)
    split = Split.of(VOCFolder.open(data_path).read_classes(), unseen, background)
    return replace(split, name=re.sub(r"[^\w.-]+", "-", "unseen-" + "-".join(split.unseen))[:120])


def read_image(path: Path) -> np.ndarray:
    """The picture as RGB, uint8 [H, W, 3], as it is stored: a rotation in its EXIF data is not applied.

    Raises:
        UserError: if it is missing, broken, huge, animated or has more than 8 bits a colour.
    """
    with _opened(path, "picture") as image:
        if getattr(image, "is_animated", False) and image.format != "MPO":  # cameras add a preview to a JPEG
            raise UserError(f"{path} is animated: save one of its frames as a JPEG")
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{path} has more than 8 bits a colour (mode {image.mode}): save it as an 8-bit picture")
        return np.array(image.convert("RGB"))


def read_mask(path: Path, known_values: Sequence[int]) -> np.ndarray:
    """An index mask: uint8 [H, W] of mask values.

    Args:
        path: a PNG of mode P or L, as VOC's are.
        known_values: the values it may hold besides `VOID`.

    Raises:
        UserError: for a missing or broken file, a colour mask, and values that no class has.
    """
    return _read_mask(path, known_values)[0]


def read_mask_values(path: Path, known_values: Sequence[int]) -> list[int]:
    """The values that an index mask shows, in order, with `VOID`. Raises as `read_mask` does."""
    return _read_mask(path, known_values, pixels=False)[1]


def _read_mask(path: Path, known_values: Sequence[int], pixels: bool = True) -> tuple[np.ndarray | None, list[int]]:
    """The mask, if its `pixels` are wanted, and the values in it."""
    with _opened(path, "mask") as image:
        mode = image.mode
        if mode in ("P", "L"):
            values = [value for value, count in enumerate(image.histogram()) if count]
            mask = np.array(image) if pixels else None
    if mode not in ("P", "L"):
        if mode in ("RGB", "RGBA"):
            raise UserError(
                f"{path} is a colour mask, not an index mask (8-bit PNG of class indices, 255 void): convert the "
                "folder's with python -m dataset.prepare own --data-path FOLDER --convert-colour-masks"
            )
        raise UserError(f"{path} is of mode {mode}, not an index mask: save class indices as an 8-bit PNG, 255 void")
    unknown = sorted(set(values) - set(known_values) - {VOID})
    if unknown:
        raise UserError(
            f"{path} holds the value {unknown[0]}, which no class has: "
            f"masks hold {min(known_values)}-{max(known_values)} and {VOID} (void)"
        )
    return mask, values


@contextlib.contextmanager
def _opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """The file opened by Pillow; whatever goes wrong in the block is a `UserError`. `kind` is for messages."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: copy the {kind} there or take the picture off the list") from error
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} can't be read as a {kind} ({reason}): replace the file") from error


_UNREADABLE = (
    OSError, SyntaxError, ValueError, OverflowError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""What Pillow ends in with files that are broken, or so large that they would fill the memory."""


def _check_size(image: np.ndarray, mask: np.ndarray, image_path: Path, mask_path: Path) -> None:
    if image.shape[:2] != mask.shape:
        (h, w), (mh, mw) = image.shape[:2], mask.shape
        with _opened(image_path, "picture") as stored:
            turned = (w, h) == (mh, mw) and stored.getexif().get(ExifTags.Base.Orientation, 1) > 4
        mend = "turn the picture's pixels as its EXIF data says" if turned else "make them the same size"
        raise UserError(f"{mask_path} is {mw} x {mh} but {image_path} is {w} x {h}: {mend}")


# Which classes a picture shows


def index_classes(
    folder: VOCFolder, ids: Sequence[str], known_values: Sequence[int]
) -> dict[str, frozenset[int] | None]:
    """Mask values that each picture shows, from the index file, which this brings up to date.

    An entry is remade when its mask has another size or time of change; a picture whose mask is gone keeps
    its entry, or gets None if it never had one.

    Args:
        folder: where the masks lie. The index is the file `class_index_<mask folder>.json` beside them.
        ids: the pictures asked for.
        known_values: the values that a mask may hold.
    """
    path = folder.root / f"class_index_{folder.masks.name}.json"
    entries = _load_index(path)
    stamps = {picture: _stamp(folder.mask_path(picture)) for picture in ids}
    stale = [p for p in ids if stamps[p] is not None and entries.get(p, {}).get("stamp") != stamps[p]]
    read = functools.partial(read_mask_values, known_values=tuple(known_values))
    done = 0
    try:
        for picture, values in zip(stale, spread(read, [folder.mask_path(p) for p in stale], "indexing masks", "mask")):
            entries[picture] = {"stamp": stamps[picture], "values": values}
            done += 1
    finally:  # a bad mask, or a user who stops it, costs what is left and not what is done
        if done:
            _save_index(path, entries)
    if stale:
        print(f"{len(stale)} masks were opened once, to list the classes that each picture shows in {path}")
    return {p: frozenset(entries[p]["values"]) - {VOID} if p in entries else None for p in ids}


def keep_class_values(folder: VOCFolder, shown: Mapping[str, list[int]]) -> None:
    """Notes in the index file which values each picture's mask shows, where somebody else has just read the masks."""
    path = folder.root / f"class_index_{folder.masks.name}.json"
    entries = {p: {"stamp": _stamp(folder.mask_path(p)), "values": values} for p, values in shown.items()}
    _save_index(path, _load_index(path) | entries)


def _stamp(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _load_index(path: Path) -> dict[str, dict]:
    """The index's entries that are whole; a broken index is only a slower start."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {p: e for p, e in entries.items() if _is_whole(e)}


def _is_whole(entry) -> bool:
    values = entry.get("values") if isinstance(entry, dict) else None
    return isinstance(values, list) and all(isinstance(value, int) for value in values)


def _save_index(path: Path, entries: dict[str, dict]) -> None:
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(entries), encoding="utf-8")
    except OSError as error:
        print(f"note: the class index can't be kept ({error}); masks are indexed again next time", file=sys.stderr)


def choose_source(shown: dict[str, frozenset[int] | None], split: Split, supervised: bool = False) -> list[str]:
    """Ids of the pictures that show a seen class (`supervised`: or an unseen one), in order.

    The background does not count here even where it is a seen class: else every picture would be a source
    picture, and training would open the masks of those that show only unseen classes.

    Raises:
        UserError: if there is none.
    """
    labelled = split.seen_values | (split.unseen_values if supervised else frozenset())
    source = [picture for picture, values in shown.items() if values and values & labelled]
    if not source:
        raise UserError("no training picture shows a seen class: check the training list, the masks and --split")
    return source


def choose_target(shown: dict[str, frozenset[int] | None], split: Split, images: str) -> list[str]:
    """Ids of the pictures to learn from without labels, in order.

    Args:
        images: "unseen" for the pictures known to show an unseen class, "all" for every picture.

    Raises:
        UserError: if there is none, or if "unseen" meets a picture of which nothing is known.
    """
    if images == "all":
        return list(shown)
    unknown = next((picture for picture, values in shown.items() if values is None), None)
    if unknown is not None:
        raise UserError(
            f"picture {unknown} has neither a mask nor an entry in the class index, so nobody knows whether it "
            "shows an unseen class: --target-images all takes it as it is"
        )
    target = [picture for picture, values in shown.items() if values & split.unseen_values]
    if not target:
        raise UserError("no training picture shows an unseen class: check --split, or use --target-images all")
    return target


# Datasets

Transform = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class _Pictures(Dataset):
    """What the three datasets share: ids in, a picture and a mask of the same size out."""

    def __init__(self, folder: VOCFolder, ids: Sequence[str], split: Split):
        self.folder, self.ids, self.split = folder, list(ids), split

    def __len__(self) -> int:
        return len(self.ids)

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image_path = self.folder.image_path(self.ids[index])
        mask_path = self.folder.mask_path(self.ids[index])
        image, mask = read_image(image_path), read_mask(mask_path, self.split.known_values)
        _check_size(image, mask, image_path, mask_path)
        return image, mask

    @staticmethod
    def _tensors(image: np.ndarray, label: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label)  # the image as a view


class SourceDataset(_Pictures):
    """Labelled pictures: image uint8 [3, H, W] and label uint8 [H, W], unseen and void pixels `VOID`.

    `supervised` keeps the labels of the unseen classes, which is not zero-shot: the ceiling.

    An item is asked for by (index, seed), see `loaders.StepSampler`: the seed draws the augmentation.
    """

    def __init__(
        self, folder: VOCFolder, ids: Sequence[str], split: Split, transform: Transform, supervised: bool = False
    ):
        super().__init__(folder, ids, split)
        self.transform = transform
        self.to_labels = split.trained.to_labels if supervised else split.trained.to_seen_labels

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        index, seed = key
        image, mask = self._read(index)
        return _augment(self.transform, *self._tensors(image, self.to_labels(mask)), seed)


class TargetDataset(_Pictures):
    """Unlabelled pictures: image uint8 [3, H, W] and valid bool [H, W], the pixels that may teach.

    Args:
        pixels: "all" takes every pixel of the picture and opens no mask; "oracle" opens the mask and takes
            the pixels of unseen classes, as the published code does.
    """

    def __init__(self, folder: VOCFolder, ids: Sequence[str], split: Split, transform: Transform, pixels: str):
        super().__init__(folder, ids, split)
        if pixels not in ("all", "oracle"):
            raise ValueError(f"target pixels are 'all' or 'oracle', not {pixels!r}")
        self.transform, self.pixels = transform, pixels

    def others(self, source: SourceDataset) -> "TargetDataset":
        """The source pictures that are no target, without their labels: where `--target-images unseen` says which
        pictures show an unseen class, these show none."""
        ids = [picture for picture in source.ids if picture not in set(self.ids)]
        return TargetDataset(self.folder, ids, self.split, self.transform, "all")

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        index, seed = key
        if self.pixels == "oracle":
            image, mask = self._read(index)
            label = self.split.to_unseen_labels(mask)
        else:
            image = read_image(self.folder.image_path(self.ids[index]))
            label = np.zeros(image.shape[:2], np.uint8)  # not a label: it tells pixels from padding
        image, label = _augment(self.transform, *self._tensors(image, label), seed)
        return image, label != VOID


class EvaluationDataset(_Pictures):
    """Whole pictures: image uint8 [3, H, W], label uint8 [H, W] with seen and unseen classes, and the index."""

    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each picture, from the headers of the files. Raises `UserError`."""

        def size(picture: str) -> tuple[int, int]:
            with _opened(self.folder.image_path(picture), "picture") as image:
                return image.size

        return [size(picture) for picture in self.ids]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        image, mask = self._read(index)
        image, label = self._tensors(image, self.split.to_labels(mask))
        return image, label, index


def training_datasets(
    data_path: str | Path, split: Split, transform: Transform, target_images: str, target_pixels: str,
    train_list: str | None = None, supervised: bool = False,
) -> tuple[SourceDataset, TargetDataset]:  # fmt: skip
    """The source and target pictures of a folder in VOC layout.

    Args:
        data_path: the folder, see `VOCFolder.open`.
        split: which classes are seen.
        transform: the joint augmentation of both.
        target_images: "unseen" or "all", see `choose_target`.
        target_pixels: "all" or "oracle", see `TargetDataset`.
        train_list: see `VOCFolder.read_list`.
        supervised: NOT zero-shot: source pictures are those that show any class, and bring every label.

    Raises:
        UserError: for whatever is wrong with the folder, its list or its masks.
    """
    folder = VOCFolder.open(data_path)
    folder.check_split(split)
    shown = index_classes(folder, folder.read_list(train_list, TRAIN_LISTS), split.known_values)
    source = SourceDataset(folder, choose_source(shown, split, supervised), split, transform, supervised)
    target = TargetDataset(folder, choose_target(shown, split, target_images), split, transform, target_pixels)
    return source, target


def evaluation_dataset(data_path: str | Path, split: Split, evaluation_list: str | None = None) -> EvaluationDataset:
    """The evaluation pictures of a folder in VOC layout. Raises `UserError` as `training_datasets` does."""
    folder = VOCFolder.open(data_path)
    folder.check_split(split)
    return EvaluationDataset(folder, folder.read_list(evaluation_list, EVALUATION_LISTS), split)


def _augment(transform: Transform, image: torch.Tensor, label: torch.Tensor, seed: int):
    """The pair transformed with random numbers that depend on nothing but `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed sees to GPUs too, for a millisecond
        return transform(image, label)

"""The class index: which classes each mask shows, and which images and masks can be read.

Training, evaluation and `dataset.prepare` read files with the same code, before the first step. What was read is kept
in a file beside the masks, so that it is read once: an entry is made anew when its file has another size or time of
change.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.images import read_image, read_mask
from dataset.splits import VOID
from utils.errors import UserError, atomic_write

Entry = dict[str, Any]
"""What is known of one image: `stamp`, `values` and `size` of its mask, and `image_stamp`, if they were read."""


def stamp(path: Path) -> list[int] | None:
    """Size and time of change of a file; None if it is not there."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [status.st_size, status.st_mtime_ns]


def is_current(known: list[int] | None, path: Path) -> bool:
    """Whether a file is there with the size and time of change that are known of it."""
    return known is not None and known == stamp(path)


class ClassIndex:
    """What is known of the images and masks of a folder in VOC layout.

    Args:
        folder: a `dataset.voc.VOCFolder`; the index is the file `class_index_<mask folder>.json` in it.
        keep: write what is found to that file.
    """

    def __init__(self, folder: Any, keep: bool = True):
        self.folder, self.keep = folder, keep
        self.path = folder.root / f"class_index_{folder.masks.name}.json"
        try:
            self.entries: dict[str, Entry] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a broken index only costs time
            self.entries = {}

    def values(self, image: str) -> list[int] | None:
        """What the mask of an image shows; None if it was never read."""
        return self.entries.get(image, {}).get("values")

    def classes(self, ids: Sequence[str]) -> dict[str, frozenset[int] | None]:
        """The mask values of each image, without `VOID`; masks that are new or changed are opened for it.

        An image whose mask is gone keeps its entry; it gets None if it never had one. Raises `UserError` for bad masks.
        """
        before = {image: self.entries.get(image, {}).get("stamp") for image in ids}
        masked = [image for image in ids if self.folder.mask_path(image).exists()]
        raise_first(self.check([], masked, "indexing masks"))
        opened = sum(self.entries[image]["stamp"] != before[image] for image in masked)
        if opened:
            print(f"{opened} masks were opened once, to list the classes that each image shows in {self.path}")
        known = {image: self.values(image) for image in ids}
        if set().union(*(values for values in known.values() if values)) == {0, VOID}:
            raise UserError(
                f"all masks in {self.folder.masks} hold only 0 and {VOID}, which is void: write the value of its class "
                "to the pixels of each object"
            )
        return {image: None if values is None else frozenset(values) - {VOID} for image, values in known.items()}

    def check(self, images: Iterable[str], masked: Iterable[str], title: str = "reading images") -> list[str]:
        """Reads the images of `images` and the masks of `masked` that are new or changed; what is wrong, a line a file.

        Call it with whose mask is used: no other mask is opened.
        """
        images, masked = dict.fromkeys(images), dict.fromkeys(masked)
        ids = list(images | masked)
        before, problems = dict(self.entries), []
        bar = tqdm(total=len(ids), desc=title, unit="file", disable=None if len(ids) > 1 else True)
        try:
            with bar, ThreadPool(min(16, os.cpu_count() or 1)) as pool:
                jobs = ((image, image in images, image in masked) for image in ids)
                for image, (entry, problem) in zip(ids, pool.imap(self._read, jobs, chunksize=16)):
                    self.entries[image] = entry
                    if problem is not None:
                        problems.append(problem)
                    bar.update()
        finally:  # after Ctrl-C, what is done is kept
            if self.keep and self.entries != before:
                self._save()
        return problems

    def _read(self, job: tuple[str, bool, bool]) -> tuple[Entry, str | None]:
        """What is known of an image after reading it, its mask or both, and what is wrong with them."""
        image, with_image, with_mask = job
        image_path, mask_path = self.folder.image_path(image), self.folder.mask_path(image)
        entry = self.entries.get(image, {})
        try:
            if with_mask and not is_current(entry.get("stamp"), mask_path):
                mask = read_mask(mask_path, self.folder.colours)
                entry = {"stamp": stamp(mask_path), "values": np.unique(mask).tolist(), "size": [*mask.shape[::-1]]}
            if with_image and not is_current(entry.get("image_stamp"), image_path):
                size = entry.get("size")
                read_image(image_path, size and tuple(size))
                entry = entry | {"image_stamp": stamp(image_path)}
        except UserError as error:
            return entry, str(error)
        return entry, None

    def _save(self) -> None:
        try:
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(self.entries), encoding="utf-8")
        except UserError as error:
            print(f"note: the class index can't be kept ({error}); masks are indexed again next time", file=sys.stderr)


def raise_first(problems: Sequence[str]) -> None:
    """Raises `UserError` with the first problem and how many there are more, if there is any."""
    if problems:
        more = f" (and {len(problems) - 1:,} more problems)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)


def overlap(training: Iterable[str], evaluation: Sequence[str]) -> str | None:
    """What is wrong with lists that share images."""
    training = set(training)
    both = [image for image in evaluation if image in training]
    if not both:
        return None
    return (
        f"the lists overlap: {len(both)} evaluation images are among the training images, {both[0]} first; figures on "
        "them are not those of new images: take them off one of the lists"
    )


def lack_of_masks(unmasked: Sequence[str], number: int) -> str:
    """What to do about the images without a mask among `number` training images."""
    return (
        f"{len(unmasked)} of {number} training images have no mask, {unmasked[0]} first: get the masks (SBD's of VOC: "
        "python -m dataset.prepare voc --data-path data/voc), or give a --train-list of images that have one; with "
        "--target-images all, which is another protocol, they are target images"
    )


def describe_lists(
    index: ClassIndex, classes: Mapping[str, int], training: Sequence[str], evaluation: Sequence[str]
) -> list[str]:
    """What is odd about the lists, a line each; call it after `ClassIndex.check`.

    Args:
        index: of the folder.
        classes: mask values of the classes that count.
        training: ids of source and target images.
        evaluation: ids of evaluation images.
    """
    unmasked = [image for image in training if index.values(image) is None]
    if unmasked:
        return [lack_of_masks(unmasked, len(training))]
    trained, evaluated = (
        {value for image in ids for value in index.values(image) or ()} for ids in (training, evaluation)
    )
    alone = [name for name, value in classes.items() if value in evaluated - trained]
    if not alone:
        return []
    return [
        f"no training image shows {', '.join(alone)}, which evaluation images show: add training images of it, or take "
        "it out of the classes, which is another protocol"
    ]

"""The class index: which classes each mask shows, and which images and masks can be read.

Training, evaluation and `dataset.prepare` read files with this code before the first step. What was read is kept in a
file beside the masks; an entry is made anew when its file has another size or time of change.
"""

import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.images import read_image, read_mask
from dataset.splits import BACKGROUND, VOID
from utils.errors import UserError, write_text


def stamp(path: Path) -> list[int]:
    """Size and time of change of a file; empty, which no entry of the index is, if it is not there."""
    status = path.stat() if path.is_file() else None
    return [status.st_size, status.st_mtime_ns] if status else []


class ClassIndex:
    """What is known of the images and masks of a `dataset.voc.VOCFolder`, kept in its `class_index_<mask folder>.json`.

    An entry is what is known of one image: `stamp`, `values` and `size` of its mask, and `image_stamp`, if they were
    read. `keep` writes what is found to the file.
    """

    def __init__(self, folder: Any, keep: bool = True):
        self.folder, self.keep = folder, keep
        self.path = folder.root / f"class_index_{folder.masks.name}.json"
        try:
            self.entries: dict[str, dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a broken index only costs time
            self.entries = {}

    def values(self, image: str) -> list[int] | None:
        """What the mask of an image shows; None if it was never read."""
        return self.entries.get(image, {}).get("values")

    def classes(self, ids: Sequence[str]) -> dict[str, frozenset[int] | None]:
        """The mask values of each image, without `VOID`; masks that are new or changed are opened for it.

        An image whose mask is gone keeps its entry; it gets None if it never had one. Raises `UserError` for bad masks.
        """
        before = dict(self.entries)
        raise_first(self.check([], [image for image in ids if self.folder.mask_path(image).exists()], "indexing masks"))
        opened = sum(self.entries.get(image) is not before.get(image) for image in ids)
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
        ids, before, problems = list(images | masked), dict(self.entries), []
        jobs = ((image, image in images, image in masked) for image in ids)
        try:
            with ThreadPool(min(16, os.cpu_count() or 1)) as pool:
                results = zip(ids, pool.imap(self._read, jobs, chunksize=16))
                for image, (entry, wrong) in tqdm(results, title, len(ids), unit="file", disable=None):
                    self.entries[image] = entry
                    problems += wrong
        finally:  # after Ctrl-C, what is done is kept
            if self.keep and self.entries != before:
                try:
                    write_text(self.path, json.dumps(self.entries))
                except UserError as error:
                    print(f"note: the class index can't be kept ({error}): masks are read each time", file=sys.stderr)
        return problems

    def _read(self, job: tuple[str, bool, bool]) -> tuple[dict[str, Any], list[str]]:
        """What is known of an image after reading it, its mask or both, and what is wrong with them."""
        image, with_image, with_mask = job
        image_path, mask_path = self.folder.image_path(image), self.folder.mask_path(image)
        entry = self.entries.get(image, {})
        try:
            if with_mask and entry.get("stamp") != stamp(mask_path):
                mask = read_mask(mask_path, self.folder.colours)
                entry = {"stamp": stamp(mask_path), "values": np.unique(mask).tolist(), "size": mask.shape[::-1]}
            if with_image and entry.get("image_stamp") != stamp(image_path):
                read_image(image_path, tuple(entry["size"]) if "size" in entry else None)
                entry = entry | {"image_stamp": stamp(image_path)}
        except UserError as error:
            return entry, [str(error)]
        return entry, []


def raise_first(problems: Iterable[str]) -> None:
    """Raises `UserError` with the first problem and how many there are more, if there is any."""
    if problems := list(problems):
        more = f" (and {len(problems) - 1:,} more problems)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)


def overlap(training: Iterable[str], evaluation: Iterable[str]) -> Iterator[str]:
    """What is wrong with lists that share images."""
    both = sorted({*training}.intersection(evaluation))
    if both:
        yield (
            f"the lists overlap: {len(both)} evaluation images are among the training images, {both[0]} first; figures "
            "on them are not those of new images: take them off one of the lists"
        )


def lack_of_masks(unmasked: Sequence[str], number: int) -> Iterator[str]:
    """What to do about the images without a mask among `number` training images."""
    if unmasked:
        yield (
            f"{len(unmasked)} of {number} training images have no mask, {unmasked[0]} first: get the masks (SBD's of "
            "VOC: python -m dataset.prepare voc --data-path data/voc), or give a --train-list of images that have one; "
            "with --target-images all, which is another protocol, they are target images"
        )


def describe_lists(index: ClassIndex, training: Collection[str], evaluation: Collection[str]) -> Iterator[str]:
    """What is odd about the lists of images, a line each; call it after `ClassIndex.check`."""
    unmasked = [image for image in training if index.values(image) is None]
    trained, evaluated = ({v for image in ids for v in index.values(image) or ()} for ids in (training, evaluation))
    classes = [(name, value) for name, value in index.folder.classes.items() if name != BACKGROUND]
    alone = ", ".join(name for name, value in classes if value in evaluated - trained)
    yield from overlap(training, evaluation)
    yield from lack_of_masks(unmasked, len(training))
    if alone and not unmasked:
        yield (
            f"no training image shows {alone}, which evaluation images show: add training images of it, or take it out "
            "of the classes, which is another protocol"
        )

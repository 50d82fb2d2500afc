"""What is known of the images and masks on disk: the classes that each mask shows, and what is wrong with a file.

Training, evaluation and `dataset.prepare` look at files with the same code, before the first step. What was looked at
is kept in the *class index*, a file beside the masks, so that it is looked at once: an entry is made anew when its file
has another size or time of change. Masks that training opens anyway are compared by a checksum too, so that a replaced
mask is noticed although its size and time are the same.
"""

import functools
import json
import os
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.images import Colours, check_image, opened, orientation, read_image, read_mask
from dataset.loaders import leave_signals_to_the_main_process
from dataset.splits import VOID
from utils.errors import UserError, atomic_write

CHUNK = 128
"""Jobs that a process is handed at a time: then handing over costs little beside them."""


def spread(function: Callable, jobs: Sequence, title: str) -> Iterator:
    """`function(job)` of each job, in their order, with all cores, and with a progress bar on a terminal."""
    cores = min(16, os.cpu_count() or 1)
    loader = DataLoader(
        jobs, CHUNK, num_workers=cores if len(jobs) >= 2 * CHUNK and cores > 1 else 0,
        collate_fn=functools.partial(_apply, function), worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),  # the run's own is left alone
    )  # fmt: skip
    with tqdm(total=len(jobs), desc=title, unit="file", disable=None if len(jobs) > 1 else True) as bar:
        for results in loader:
            yield from results
            bar.update(len(results))


def _apply(function: Callable, jobs: Sequence) -> list:
    return [function(job) for job in jobs]


def in_one_line(problems: Sequence[str]) -> str:
    """The first of several problems of one kind, and how many there are."""
    return problems[0] + (f" ({len(problems) - 1} more files are like it)" if len(problems) > 1 else "")


# One image and its mask

Entry = dict[str, Any]
"""What is known of one image: `stamp`, `values`, `size` and `checksum` of its mask, `image_stamp`, `image_size` and
`turn` of its image. Each part is there once it was looked at."""


def stamp(path: Path) -> list[int] | None:
    """Size and time of change of a file; None if it is not there."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [status.st_size, status.st_mtime_ns]


def tail(path: Path) -> bytes:
    """The last bytes of a file."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 64))
        return file.read()


def checksum(path: Path) -> int:
    """Of the end of a PNG, which holds a checksum of its pixels; of the whole of any other file."""
    return zlib.crc32(tail(path) if path.suffix.lower() == ".png" else path.read_bytes())


def look_at_mask(path: Path, colours: Colours) -> Entry:
    """What is to be known of a mask. Raises `UserError` as `read_mask` does."""
    mask = read_mask(path, colours)
    values = np.flatnonzero(np.bincount(mask.ravel(), minlength=VOID + 1)).tolist()
    return {"stamp": stamp(path), "values": values, "size": list(mask.shape[::-1]), "checksum": checksum(path)}


def look_at_image(path: Path, mask_size: tuple[int, int] | None, decode: bool) -> Entry:
    """What is to be known of an image. Raises `UserError` if it can't be used, or not with a mask of that size.

    A JPEG that has its end mark is read whole only to `decode` it.
    """
    with opened(path, "image") as image:
        check_image(path, image, mask_size)
        is_whole = image.format in ("JPEG", "MPO") and tail(path).endswith(b"\xff\xd9")
        turn = orientation(image, mask_size)
        size = list(image.size[::-1] if turn > 4 else image.size)
    if decode or not is_whole:
        read_image(path, mask_size)
    return {"image_stamp": stamp(path), "image_size": size, "turn": turn}


def look(job: tuple[Path | None, Path | None, Entry], colours: Colours, decode: bool) -> tuple[str | None, Entry]:
    """What is wrong with an image and its mask, or None, and what is now known of them.

    Args:
        job: image and mask, None for one that is not used, and what is known of them already.
        colours: see `read_mask`.
        decode: read all of both, also if they were looked at before.
    """
    image_path, mask_path, entry = job
    try:
        if mask_path is not None:
            is_known = entry.get("stamp") == stamp(mask_path) is not None and entry["checksum"] == checksum(mask_path)
            if decode or not is_known:
                entry = entry | look_at_mask(mask_path, colours)
        if image_path is not None:
            size = None if mask_path is None else entry["size"]
            is_known = entry.get("image_stamp") == stamp(image_path) is not None
            if decode or not is_known or size not in (None, entry["image_size"]):
                entry = entry | look_at_image(image_path, size and tuple(size), decode)
    except UserError as error:
        return str(error), entry
    except OSError as error:
        return f"{error.filename}: {error.strerror}: check that it may be read", entry
    return None, entry


# All of them


class ClassIndex:
    """What is known of the images and masks of a folder in VOC layout.

    Args:
        folder: a `dataset.voc.VOCFolder`; the index is the file `class_index_<mask folder>.json` in it.
        keep: write what is found to that file.
    """

    def __init__(self, folder: Any, keep: bool = True):
        self.folder, self.keep = folder, keep
        self.path = folder.root / f"class_index_{folder.masks.name}.json"
        self.entries = _load(self.path)

    def values(self, image: str) -> list[int] | None:
        """What the mask of an image shows; None if it was never looked at."""
        return self.entries.get(image, {}).get("values")

    def forget(self, ids: Iterable[str]) -> None:
        """Drops the entries of images, whose masks are not to come back."""
        for image in ids:
            self.entries.pop(image, None)
        if self.keep:
            self._save()

    def classes(self, ids: Sequence[str]) -> dict[str, frozenset[int] | None]:
        """The mask values of each image, without `VOID`; masks that are new or changed are opened for it.

        An image whose mask is gone keeps its entry; it gets None if it never had one. Raises `UserError` for bad masks.
        """
        masks = {image: self.folder.mask_path(image) for image in ids}
        stamps = {image: stamp(path) for image, path in masks.items()}
        stale = [i for i in ids if stamps[i] is not None and self.entries.get(i, {}).get("stamp") != stamps[i]]
        problems = self._look({image: (None, masks[image], {}) for image in stale}, "indexing masks", decode=False)
        if problems:
            raise UserError(problems[0])
        if stale:
            print(f"{len(stale)} masks were opened once, to list the classes that each image shows in {self.path}")
        known = {image: self.values(image) for image in ids}
        if set().union(*(values for values in known.values() if values)) == {0, VOID}:
            raise UserError(
                f"all masks in {self.folder.masks} hold only 0 and {VOID}, which is void: write the value of its class "
                "to the pixels of each object"
            )
        return {image: None if values is None else frozenset(values) - {VOID} for image, values in known.items()}

    def check(self, images: Iterable[str], masked: Iterable[str], decode: bool = False) -> list[str]:
        """Looks at the images of `images` and the masks of `masked`, see `look`; what is wrong, a line for each kind.

        Call it with whose mask is used: no other mask is opened.
        """
        images, masked = dict.fromkeys(images), dict.fromkeys(masked)
        jobs = {}
        for image in images | masked:
            image_path = self.folder.image_path(image) if image in images else None
            mask_path = self.folder.mask_path(image) if image in masked else None
            jobs[image] = image_path, mask_path, self.entries.get(image, {})
        return self._look(jobs, "checking images", decode)

    def _look(self, jobs: dict[str, tuple], title: str, decode: bool) -> list[str]:
        problems: dict[str, list[str]] = defaultdict(list)  # of each kind: the message without the paths
        before = dict(self.entries)
        results = spread(functools.partial(look, colours=self.folder.colours, decode=decode), [*jobs.values()], title)
        try:
            for (image, job), (problem, entry) in zip(jobs.items(), results):
                self.entries[image] = self.entries.get(image, {}) | entry
                if problem is not None:
                    kind = problem.replace(str(job[0]), "").replace(str(job[1]), "")
                    problems[kind].append(problem)
        finally:  # after Ctrl-C, what is done is kept
            if self.keep and self.entries != before:
                self._save()
        return list(map(in_one_line, problems.values()))

    def _save(self) -> None:
        try:
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(self.entries), encoding="utf-8")
        except UserError as error:
            print(f"note: the class index can't be kept ({error}); masks are indexed again next time", file=sys.stderr)


def _load(path: Path) -> dict[str, Entry]:
    """The entries of an index; a broken or an older one only costs time."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {image: entry for image, entry in entries.items() if _is_whole(**entry)}
    except (OSError, ValueError, RecursionError, TypeError, AttributeError):
        return {}


def _is_whole(stamp=None, values=(), size=(), checksum=0, image_stamp=None, image_size=(), turn=1) -> bool:
    """Whether the parts of an entry are numbers. Raises `TypeError` for other parts."""
    return all(isinstance(number, int) for number in (*values, *size, *image_size, checksum, turn))


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


def describe_lists(
    index: ClassIndex, classes: Mapping[str, int], training: Sequence[str], evaluation: Sequence[str]
) -> list[str]:
    """What is odd about the lists and their images, a line each; call it after `ClassIndex.check`.

    Args:
        index: of the folder.
        classes: mask values of the classes that count.
        training: ids of source and target images.
        evaluation: ids of evaluation images.
    """
    notes = []
    unknown = [image for image in training if index.values(image) is None]
    if unknown:
        notes.append(
            f"{len(unknown)} of {len(training)} training images have no mask, {unknown[0]} first: they can only be "
            "target images, with --target-images all, which is another protocol"
        )
    trained, evaluated = (
        {value for image in ids for value in index.values(image) or ()} for ids in (training, evaluation)
    )
    alone = [name for name, value in classes.items() if value in evaluated - trained]
    if alone and not unknown:
        notes.append(
            f"no training image shows {', '.join(alone)}, which evaluation images show: add training images of it, or "
            "take it out of the classes, which is another protocol"
        )
    turned = [image for image in (*training, *evaluation) if _is_in_doubt(**index.entries.get(image, {}))]
    if turned:
        notes.append(
            f"{len(turned)} images with a mask are turned as their EXIF data says, {turned[0]} first, and no size "
            "tells whether the masks are too: if they were drawn on the images as stored, remove the EXIF data"
        )
    return notes


def _is_in_doubt(turn: int = 1, size: Sequence = (), image_size: Sequence = (0, 1), **_) -> bool:
    """Whether an image with a mask was turned in a way that leaves its size as it is."""
    return bool(size) and turn > 1 and (turn <= 4 or image_size[0] == image_size[1])

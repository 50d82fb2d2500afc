"""What is wrong with a data set on disk: its lists, pictures and masks, each looked at once."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dataset.parallel import spread
from dataset.splits import NAMES, read_classes
from dataset.voc import (
    CLASSES_FILE,
    EVALUATION_LISTS,
    TRAIN_LISTS,
    VOCFolder,
    keep_class_values,
    read_mask_values,
)
from utils.errors import UserError

EXPECTED = {
    "voc": {"train": 10_582, "val": 1_449},
    "pascal_context": {"train": 4_998, "val": 5_105},
    "coco_stuff": {"train": 118_287, "val": 5_000},
    "own": {},
}
"""How many pictures published tables train and evaluate on; of anyone's own, none."""


def inspect(job: tuple[Path, Path], known_values: Sequence[int]) -> tuple[str | None, list[int]]:
    """What is wrong with a picture and its mask (or None), and the values that the mask shows."""
    image_path, mask_path = job
    try:
        with Image.open(image_path) as image:
            size = image.size
    except FileNotFoundError:
        return f"{image_path} is missing", []
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        return f"{image_path} can't be read as a picture ({error})", []
    try:
        values = read_mask_values(mask_path, known_values)
    except UserError as error:
        return str(error), []
    with Image.open(mask_path) as mask:
        if mask.size != size:
            return f"{mask_path} is {mask.width} x {mask.height} but {image_path} is {size[0]} x {size[1]}", []
    return None, values


def check(dataset: str, data_path: Path, keep_index: bool = False) -> list[str]:
    """Looks at every list, picture and mask, prints what there is, and returns what is wrong, a line each.

    Args:
        dataset: a key of `EXPECTED`.
        data_path: as for training.
        keep_index: write the class index too, so that training need not read the masks again.
    """
    try:
        folder = VOCFolder.open(data_path)
        classes = folder.read_classes()
    except UserError as error:
        return [str(error)]
    problems = []
    if dataset == "own":
        if not (folder.root / CLASSES_FILE).is_file():
            problems.append(f"{folder.root / CLASSES_FILE} is missing: write one class a line")
    elif classes != read_classes(NAMES / f"{dataset}.txt"):
        problems.append(f"{folder.root} holds other classes than {dataset}: see its {CLASSES_FILE}, or the lack of one")
    lists = {}
    for subset, names in (("train", TRAIN_LISTS), ("val", EVALUATION_LISTS)):
        path = next((folder.lists / f"{n}.txt" for n in names if (folder.lists / f"{n}.txt").is_file()), None)
        if path is None:
            wanted = " or ".join(f"{name}.txt" for name in names)
            problems.append(f"no {wanted} in {folder.lists}: write one picture id a line")
            continue
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{path} can't be read as a text list: {error}")
            continue
        ids = lists[subset] = [line.strip() for line in text.splitlines() if line.strip()]
        expected = EXPECTED[dataset].get(subset, len(ids))
        if not ids:
            problems.append(f"{path} is empty: write one picture id a line")
        elif len(ids) != expected:
            problems.append(f"{path} lists {len(ids):,} pictures; published tables use {expected:,}")
        twice = [picture for picture, count in Counter(ids).items() if count > 1]
        if twice:
            problems.append(f"{path} lists {len(twice)} pictures twice, {twice[0]} first")
    both = sorted(set(lists.get("train", ())) & set(lists.get("val", ())))
    if both:
        problems.append(f"{len(both)} evaluation pictures are among the training pictures, {both[0]} first")
    for subset, ids in lists.items():
        problems += check_pictures(subset, list(dict.fromkeys(ids)), folder, classes, dataset == "own", keep_index)
    return problems


def check_pictures(
    subset: str, ids: list[str], folder: VOCFolder, classes: Mapping[str, int], may_lack: bool, keep_index: bool
) -> list[str]:
    """The part of `check` that reads files: the pictures of a list. `may_lack`: training pictures need no mask."""
    unmasked = [p for p in ids if may_lack and subset == "train" and not folder.mask_path(p).is_file()]
    ids = sorted(set(ids) - set(unmasked))
    look = functools.partial(inspect, known_values=tuple(classes.values()))
    jobs = [(folder.image_path(picture), folder.mask_path(picture)) for picture in ids]
    found = list(spread(look, jobs, f"checking {subset}", "picture"))
    shown = {picture: values for picture, (problem, values) in zip(ids, found) if problem is None}
    counts = Counter(value for values in shown.values() for value in values)
    print(f"{subset}: {len(ids):,} pictures with masks" + (f", {len(unmasked):,} without" if unmasked else ""))
    print("  pictures that show a class: " + ", ".join(f"{name} {counts[v]:,}" for name, v in classes.items()))
    if unmasked:
        print(f"  {unmasked[0]} and others have no mask: train with --target-images all to learn from them")
    if keep_index:
        keep_class_values(folder, shown)
    return [problem for problem, _ in found if problem is not None]

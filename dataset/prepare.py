"""Make a data set ready for training from its publishers' archives, or check one that was made by hand.

    python -m dataset.prepare voc --data-path data/VOCdevkit/VOC2012
    python -m dataset.prepare pascal_context --data-path data/pascal_context
    python -m dataset.prepare coco_stuff --data-path data/coco_stuff
    python -m dataset.prepare voc --data-path DIR --check                    # say what is wrong; change nothing
    python -m dataset.prepare own --data-path DIR --convert-colour-masks     # your own images: DATA_PATH.md

What is done is not done again: a command that was stopped may be run once more. Archives are fetched into DIR/archives
unless they lie there already; that folder may be deleted in the end. The last lines say what was made, or what is wrong
with it.
"""

import argparse
import json
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy.io import loadmat
from torchvision.datasets.utils import download_url
from tqdm import tqdm

from dataset.checks import ClassIndex, describe_lists, lack_of_masks, overlap, raise_first
from dataset.images import IMAGE_SUFFIXES, convert_colour_mask
from dataset.splits import BACKGROUND, NAMES, read_classes
from dataset.voc import (
    CLASS_FILES,
    COLOUR_FILES,
    EVALUATION_LISTS,
    LIST_FOLDER,
    TRAIN_LISTS,
    VOCFolder,
    find_root,
    holds,
    list_files,
)
from utils.config import Parser
from utils.errors import UserError, one_line_errors, write_text
from utils.visualize import save_index_png

PUBLISHED = json.loads(Path(__file__).with_name("archives.json").read_text(encoding="utf-8"))
"""Of each data set: its archives in the order in which they are unpacked (`url`, `md5` where a source for it was found,
`convert`, a key of `CONVERT`, and `move`, which of its files go to which folder), where that was found, and how many
images published tables train and evaluate on."""

# Archives


def extract(path: Path, folder: Path) -> None:
    """Unpacks an archive, with nothing outside of `folder`. Raises `UserError` if it is broken or unsafe."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        shutil.unpack_archive(path, folder, **({} if path.suffix == ".zip" else {"filter": "data"}))
    except tarfile.FilterError as error:
        raise UserError(f"{path} is not what its publisher serves, don't use it: {error}") from error
    except (shutil.ReadError, tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is broken ({error}): delete it and fetch it again") from error


def find(folder: Path, pattern: str) -> list[Path]:
    """The files below `folder` that match, without hidden ones: macOS packs a ._name beside each."""
    return sorted(path for path in folder.rglob(pattern) if not path.name.startswith("."))


def write_list(folder: Path, name: str, ids: Iterable[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.txt", "".join(f"{image}\n" for image in ids))
    return folder / f"{name}.txt"


def read_mat(path: Path, pick: Callable) -> np.ndarray:
    """The matrix that `pick` takes from a MATLAB file. Raises `UserError` if it is broken, or another file."""
    try:
        matrix = np.asarray(pick(loadmat(path)))
    except Exception as error:  # scipy raises many kinds of errors for a broken file
        raise UserError(f"{path} can't be read as a MATLAB file ({error}): fetch the archive again") from error
    if matrix.ndim != 2 or matrix.dtype.kind not in "iu":
        raise UserError(f"{path} holds {matrix.dtype} of shape {matrix.shape}, not a matrix of labels")
    return matrix


# What is made of their content: (folder of the content, folder of the data set)


def convert_sbd(content: Path, root: Path) -> None:
    """SBD's masks for the images that have none of VOC, and the list of what may be trained on.

    That list is VOC's training images and all of SBD's, less VOC's evaluation images: SBD divides the images
    otherwise, and has most of them among its own training images.
    """
    train, val = (set((root / LIST_FOLDER / f"{name}.txt").read_text().split()) for name in ("train", "val"))
    for path in find(content, "dataset/*.txt"):
        if path.stem in ("train", "val"):
            train.update(path.read_text().split())
    for path in find(content, "dataset/cls/*.mat"):
        target = root / "SegmentationClassAug" / f"{path.stem}.png"
        if not target.is_file():  # VOC's masks are there already, and stay
            save_index_png(read_mat(path, lambda mat: mat["GTcls"][0]["Segmentation"][0]).astype(np.uint8), target)
    write_list(root / LIST_FOLDER, "train_aug", sorted(train - val))


def convert_context(content: Path, root: Path) -> None:
    """PASCAL Context's .mat, a matrix `LabelMap` of 459 labels, to masks of 59 classes; 0 is everything else."""
    labels_of_classes = PUBLISHED["pascal_context"]["labels"]
    to_class = np.zeros(460, np.uint8)
    to_class[labels_of_classes] = np.arange(1, len(labels_of_classes) + 1)
    for path in find(content, "*.mat"):
        labels = read_mat(path, lambda mat: mat["LabelMap"])
        if labels.max(initial=0) >= len(to_class):
            raise UserError(f"{path} has the label {labels.max()}, of 459: fetch the archive again")
        save_index_png(to_class[labels], root / "SegmentationClass" / f"{path.stem}.png")


def list_coco(content: Path, root: Path) -> None:
    """COCO's lists, after the folders of its pixel maps."""
    for subset in ("train", "val"):
        write_list(root / LIST_FOLDER, subset, (path.stem for path in find(content, f"{subset}2017/*.png")))


CONVERT = {"sbd": convert_sbd, "context": convert_context, "coco_maps": list_coco}


def prepare(dataset: str, root: Path) -> None:
    """Fetches and unpacks what is not unpacked yet; `prepared.json` says what is.

    An archive that lies in `root/archives` already is checked and taken.

    Raises:
        UserError: an archive that is damaged, unsafe or out of reach, or a folder of another data set.
    """
    names, listing = (NAMES / f"{dataset}.txt").read_text(encoding="utf-8"), root / "classes.txt"
    before = listing.read_text(encoding="utf-8") if listing.is_file() else None
    if before != names and (before is not None or (dataset != "voc" and (root / "JPEGImages").is_dir())):
        raise UserError(f"--data-path {root} holds other classes than {dataset}: give another folder")
    folder, marker = root / "archives", root / "prepared.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(listing, names)
    done = json.loads(marker.read_text(encoding="utf-8"))["unpacked"] if marker.is_file() else []
    for archive in PUBLISHED[dataset]["archives"]:
        url, name = archive["url"], archive["url"].rpartition("/")[2]
        if name in done:
            continue
        try:
            download_url(url, str(folder), name, archive["md5"])
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{url} can't be fetched ({error}): run the command again, or put {name} into {folder} by other means "
                "(curl -C - -O URL continues where it stopped)"
            ) from error
        content = folder / "content"
        extract(folder / name, content)
        if "convert" in archive:
            CONVERT[archive["convert"]](content, root)
        for pattern, name_of_folder in archive.get("move", {}).items():
            (root / name_of_folder).mkdir(parents=True, exist_ok=True)
            for path in find(content, pattern):
                path.replace(root / name_of_folder / path.name)
        shutil.rmtree(content)
        done.append(name)
        write_text(marker, json.dumps({"unpacked": done}) + "\n")


# Images of one's own


def copy_roboflow(root: Path) -> None:
    """Copies Roboflow's `train` and `valid`, where x_mask.png lies beside x.jpg, to images, masks and lists, once."""
    subsets = {name: root / folder for name, folder in (("train", "train"), ("val", "valid"))}
    subsets = {name: folder for name, folder in subsets.items() if (folder / "_classes.csv").is_file()}
    if not subsets or (root / "_classes.csv").is_file():
        return
    images, masks = root / "images", root / "masks"
    for name, folder in subsets.items():
        files = list_files(folder, IMAGE_SUFFIXES)
        ids = [image for image in files if f"{image}_mask" in files]
        for image in ids:
            for part, file in ((images, files[image]), (masks, files[f"{image}_mask"])):
                part.mkdir(exist_ok=True)
                shutil.copy2(folder / file, part)
        if len(subsets) == 2:
            write_list(root, name, ids)
        print(f"copied {len(ids)} images of {folder}, and their masks, to {images} and {masks}")
    shutil.copy2(folder / "_classes.csv", root)  # last: it says that all is copied


def read_lists(folder: VOCFolder) -> dict[str, list[str]]:
    """Ids of the training and evaluation images. Raises `UserError` for a bad list."""
    return {"train": folder.read_list(None, TRAIN_LISTS), "val": folder.read_list(None, EVALUATION_LISTS)}


def divide(folder: VOCFolder) -> dict[str, list[str]]:
    """Lists for images of one's own: every fifth that has a mask is for evaluation.

    Raises:
        UserError: without masks.
    """
    ids = sorted(folder.image_files)
    with_mask = [image for image in ids if image in folder.mask_files]
    if len(with_mask) < 2:
        raise UserError(
            f"{folder.masks} has masks of {len(with_mask)} of the {len(ids)} images in {folder.images}: two or more "
            f"are needed, called like their images (x.png or x_mask.png for x.jpg); it {holds(folder.masks)}"
        )
    evaluated = with_mask[::5]
    return {"train": [image for image in ids if image not in set(evaluated)], "val": evaluated}


def print_left_out(folder: VOCFolder) -> None:
    """Names the files that are not used: of other endings, hidden ones, doubled ones, and masks without an image."""
    masks = {folder.mask_path(image).name for image in folder.image_files}
    for place, used in ((folder.images, folder.image_files.values()), (folder.masks, masks)):
        unused = sorted(set(os.listdir(place)).difference(used))
        if unused:
            print(f"left out: {len(unused)} files in {place}, {', '.join(unused[:3])}")


def convert_colour_masks(folder: VOCFolder) -> None:
    """Makes index masks of all colour masks, and keeps the colours beside them. Raises `UserError`."""
    keep = folder.masks.with_name(f"{folder.masks.name}_colour")
    converted, problems = 0, []
    for name in tqdm(sorted(set(folder.mask_files.values())), "converting masks", unit="file", disable=None):
        try:
            converted += convert_colour_mask(folder.masks / name, folder.colours, keep)
        except UserError as error:
            problems.append(str(error))
    raise_first(problems)
    print(f"{converted} masks were colour masks" + f"; they are kept in {keep}" * (converted > 0))


# The check


def check(dataset: str, folder: VOCFolder, lists: dict[str, list[str]], index: ClassIndex) -> list[str]:
    """Reads every image and mask of the lists "train" and "val", and prints what there is.

    Args:
        dataset: a key of `PUBLISHED`, or "own".
        folder: the data set.
        lists: image ids.
        index: takes what is found.

    Returns:
        What is wrong, a line each.
    """
    problems, train, val = [], lists["train"], lists["val"]
    if len(folder.classes.keys() - {BACKGROUND}) < 2:
        problems.append(f"{folder.root} has one class: two are needed, one to be seen and one to be unseen")
    if dataset != "own" and folder.classes != read_classes(NAMES / f"{dataset}.txt"):
        problems.append(f"{folder.root} holds other classes than {dataset}: see {folder.class_file or 'DATA_PATH.md'}")
    for subset, ids in lists.items():
        expected = PUBLISHED.get(dataset, {}).get(subset, len(ids))
        if len(ids) != expected:
            problems.append(f"{subset} lists {len(ids):,} images; published tables use {expected:,}")
    problems += filter(None, [overlap(train, val)])
    unmasked = [image for image in train if image not in folder.mask_files] if dataset == "own" else []
    if unmasked and any(
        (folder.lists / f"{name}.txt").is_file() for name in ("train_aug", "trainaug")
    ):  # without SBD's
        problems.append(lack_of_masks(unmasked, len(train)))
    problems += index.check([*train, *val], {*train, *val} - set(unmasked))
    for subset, ids in lists.items():
        shown = [index.values(image) or [] for image in ids]
        counts = Counter(value for values in shown for value in values)
        print(f"{subset}: {len(ids):,} images, {sum(map(bool, shown)):,} with a mask that can be used")
        print("  images that show a class: " + ", ".join(f"{name} {counts[v]:,}" for name, v in folder.classes.items()))
    if not problems:
        index.classes([*train, *val])
        counted = {name: value for name, value in folder.classes.items() if name != BACKGROUND}
        for note in describe_lists(index, counted, train, val):
            print(f"note: {note}")
    return problems


# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m dataset.prepare", description=__doc__)
    parser.add_argument(
        "dataset", choices=[*PUBLISHED, "own"], help="own: your own images, in DIR/images and DIR/masks"
    )
    parser.add_argument("--data-path", type=Path, required=True, metavar="DIR", help="the folder to make, or to check")
    parser.add_argument("--check", action="store_true", help="only say what is there and what is wrong with it")
    parser.add_argument("--convert-colour-masks", action="store_true", help="own: first make index masks of colours")
    args = parser.parse_args(argv)
    if args.convert_colour_masks and (args.check or args.dataset != "own"):
        parser.error("--convert-colour-masks goes with own, and without --check, which changes nothing")
    return args


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    root, is_own = find_root(args.data_path) or args.data_path, args.dataset == "own"
    if is_own and not args.check:
        copy_roboflow(root)
    elif not args.check:
        prepare(args.dataset, root)
    folder = VOCFolder.open(root)
    if is_own and folder.class_file is None:
        names = ", ".join((*CLASS_FILES[1:], *COLOUR_FILES))
        raise UserError(f"{folder.root}/classes.txt is missing, and so are {names}: write one class a line")
    if args.convert_colour_masks:
        convert_colour_masks(folder)
        folder = VOCFolder.open(root)
    has_lists = any((folder.lists / f"{name}.txt").is_file() for name in (*TRAIN_LISTS, *EVALUATION_LISTS))
    is_new = is_own and not has_lists and not args.check
    lists = divide(folder) if is_new else read_lists(folder)
    print_left_out(folder)
    index = ClassIndex(folder, keep=not args.check)
    index.entries.clear()  # every file is read anew, and masks that are gone are forgotten
    problems = check(args.dataset, folder, lists, index)
    for problem in problems[:20]:
        print(f"problem: {problem}")
    raise_first(problems)
    for name, ids in lists.items() if is_new else ():
        print(f"wrote {write_list(folder.lists, name, ids)}, {len(ids)} images")
    print(f"{args.data_path} is ready: give it to the scripts as --data-path")
    return 0


if __name__ == "__main__":
    sys.exit(main())

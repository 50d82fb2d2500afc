"""Make a data set ready for training from its publishers' archives, or check one that was made by hand.

    python -m dataset.prepare voc --data-path data/VOCdevkit/VOC2012
    python -m dataset.prepare pascal_context --data-path data/pascal_context
    python -m dataset.prepare coco_stuff --data-path data/coco_stuff
    python -m dataset.prepare voc --data-path DIR --archive VOCtrainval_11-May-2012.tar benchmark.tgz
    python -m dataset.prepare voc --data-path DIR --check                    # say what is wrong; change nothing
    python -m dataset.prepare own --data-path DIR --convert-colour-masks     # your own images: DATA_PATH.md

What is done is not done again: a command that was stopped may be run once more. Archives are fetched into DIR/archives,
which may be deleted in the end. The last lines say what was made, or what is wrong with it.
"""

import argparse
import functools
import gzip
import json
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import loadmat
from torchvision.datasets import SBDataset
from torchvision.datasets.utils import check_integrity, download_url
from torchvision.datasets.voc import DATASET_YEAR_DICT

from dataset.checks import ClassIndex, describe_lists, overlap, spread
from dataset.images import convert_colour_mask, save_mask
from dataset.splits import BACKGROUND, NAMES, read_classes
from dataset.voc import (
    CLASSES_FILE,
    COLOURS_FILE,
    EVALUATION_LISTS,
    LIST_FOLDER,
    TRAIN_LISTS,
    VOCFolder,
    find_root,
    read_colours,
)  # fmt: skip
from utils.errors import UserError, one_line_errors, write_text

MACHINE_COLOURS = "obj_class_to_machine_color.json"
"""Supervisely's name of the file of class values."""

EXPECTED = {
    "voc": {"train": 10_582, "val": 1_449},
    "pascal_context": {"train": 4_998, "val": 5_105},
    "coco_stuff": {"train": 118_287, "val": 5_000},
    "own": {},
}
"""How many images published tables train and evaluate on."""

# Archives


@dataclass(frozen=True)
class Archive:
    """A publisher's file.

    Args:
        url: where it is fetched.
        md5: its checksum; None where no source for one was found.
        place: (folder of its content, folder of the data set) moves or converts what the data set needs.
    """

    url: str
    md5: str | None
    place: Callable[[Path, Path], None]

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def fetch(archive: Archive, path: Path) -> None:
    """Fetches the archive to `path`. Raises `UserError` if that fails, or it is not what its publisher serves."""
    partial = path.with_name(f"{path.name}.part")
    partial.unlink(missing_ok=True)
    try:
        download_url(archive.url, str(path.parent), partial.name, archive.md5)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{archive.url} can't be fetched ({error}): run the command again, or fetch {archive.name} by other means "
            "(curl -C - -O URL continues) and give --archive"
        ) from error
    partial.rename(path)


def extract(path: Path, folder: Path) -> None:
    """Unpacks an archive, with nothing outside of `folder`. Raises `UserError` if it is broken or unsafe."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        shutil.unpack_archive(path, folder, **({} if path.suffix == ".zip" else {"filter": "data"}))
    except tarfile.FilterError as error:
        raise UserError(f"{path} is not what its publisher serves, don't use it: {error}") from error
    except (shutil.ReadError, tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is broken ({error}): delete it and fetch it again") from error


def files(folder: Path, pattern: str) -> list[Path]:
    """The files below `folder` that match, without hidden ones: macOS packs a ._name beside each."""
    return sorted(path for path in folder.rglob(pattern) if not path.name.startswith("."))


def move(paths: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.replace(folder / path.name)


def write_list(folder: Path, name: str, ids: Iterable[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.txt", "".join(f"{image}\n" for image in ids))


def read_mat(path: Path, pick: Callable) -> np.ndarray:
    """The matrix that `pick` takes from a MATLAB file. Raises `UserError` if it is broken, or another file."""
    try:
        matrix = np.asarray(pick(loadmat(path)))
    except Exception as error:  # scipy raises many kinds of errors for a broken file
        raise UserError(f"{path} can't be read as a MATLAB file ({error}): fetch the archive again") from error
    if matrix.ndim != 2 or matrix.dtype.kind not in "iu":
        raise UserError(f"{path} holds {matrix.dtype} of shape {matrix.shape}, not a matrix of labels")
    return matrix


# PASCAL VOC 2012 with SBD


def place_voc(content: Path, root: Path) -> None:
    """Images, masks and lists of VOC 2012; its masks go to `SegmentationClassAug` too, where SBD's join them."""
    for name in ("JPEGImages", "SegmentationClass", LIST_FOLDER):
        move(files(content, f"VOC2012/{name}/*"), root / name)
    shutil.copytree(root / "SegmentationClass", root / "SegmentationClassAug", dirs_exist_ok=True)


def place_sbd(content: Path, root: Path) -> None:
    """SBD's masks for the images that have none of VOC, and the list of what may be trained on.

    That list is VOC's training images and all of SBD's, less VOC's evaluation images: SBD divides the images
    otherwise, and has most of them among its own training images.
    """
    train, val = (set((root / LIST_FOLDER / f"{name}.txt").read_text().split()) for name in ("train", "val"))
    for path in files(content, "dataset/*.txt"):
        if path.stem in ("train", "val"):
            train.update(path.read_text().split())
    for path in files(content, "dataset/cls/*.mat"):
        target = root / "SegmentationClassAug" / f"{path.stem}.png"
        if not target.is_file():  # VOC's masks are there already, and stay
            save_mask(read_mat(path, lambda mat: mat["GTcls"][0]["Segmentation"][0]).astype(np.uint8), target)
    write_list(root / LIST_FOLDER, "train_aug", sorted(train - val))


# PASCAL Context: VOC 2010's images, annotations with 459 labels, of which 59 count

CONTEXT_LABELS = (
    2, 23, 25, 31, 34, 45, 59, 65, 72, 98, 397, 113, 207, 258, 284, 308, 347, 368, 416, 427, 9, 18, 22, 33, 44,
    46, 68, 80, 85, 104, 115, 144, 158, 159, 162, 187, 189, 220, 232, 259, 260, 105, 296, 355, 295, 324, 326, 349, 354,
    360, 366, 19, 415, 420, 424, 440, 445, 454, 458,
)  # fmt: skip
"""The label, of the 459 in an annotation, of each class in names/pascal_context.txt, which begins at 1.

The order is that of the authors' list of 59 (as in FCN's classes-59.txt, which says diningtable, bedcloth and clothes
for table, bedclothes and cloth); OpenMMLab's converter keeps the same 59. Every other label is background."""


def place_context(content: Path, root: Path) -> None:
    """Annotations (.mat, a matrix `LabelMap` of 459 labels) to masks of the 59 classes; 0 is everything else."""
    to_class = np.zeros(460, np.uint8)
    to_class[list(CONTEXT_LABELS)] = np.arange(1, len(CONTEXT_LABELS) + 1)
    (root / "SegmentationClass").mkdir(exist_ok=True)
    for path in files(content, "*.mat"):
        labels = read_mat(path, lambda mat: mat["LabelMap"])
        if labels.max(initial=0) >= len(to_class):
            raise UserError(f"{path} has the label {labels.max()}, of 459: fetch the archive again")
        save_mask(to_class[labels], root / "SegmentationClass" / f"{path.stem}.png")


def place_voc2010(content: Path, root: Path) -> None:
    """The annotated images of VOC 2010, and its lists `Main`, which divide them into training and evaluation."""
    lists = [path for path in files(content, "VOC2010/ImageSets/Main/*.txt") if path.stem in ("train", "val")]
    wanted = {image for path in lists for image in path.read_text().split()}
    move((path for path in files(content, "VOC2010/JPEGImages/*.jpg") if path.stem in wanted), root / "JPEGImages")
    move(lists, root / LIST_FOLDER)


# COCO-Stuff: COCO 2017's images, pixel maps with a value for each class


def place_coco_images(content: Path, root: Path) -> None:
    """Images of COCO 2017, of either half; no name is in both."""
    move(files(content, "*2017/*.jpg"), root / "JPEGImages")


def place_coco_maps(content: Path, root: Path) -> None:
    """The pixel maps as they are: a class's value is its id less 1 (0-181 with eleven unused), 255 is unlabelled."""
    for subset in ("train", "val"):
        maps = files(content, f"{subset}2017/*.png")
        write_list(root / LIST_FOLDER, subset, (path.stem for path in maps))
        move(maps, root / "SegmentationClass")


# What the publishers serve

VOC2010, VOC2012 = DATASET_YEAR_DICT["2010"], DATASET_YEAR_DICT["2012"]
CONTEXT_URL = "https://cs.stanford.edu/~roozbeh/pascal-context/trainval.tar.gz"
STUFF_URL = "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip"
COCO_URL = "http://images.cocodataset.org/zips"

ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "voc": (
        Archive(VOC2012["url"], VOC2012["md5"], place_voc),
        Archive(SBDataset.url, SBDataset.md5, place_sbd),
    ),
    "pascal_context": (
        Archive(VOC2010["url"], VOC2010["md5"], place_voc2010),
        Archive(CONTEXT_URL, None, place_context),
    ),
    "coco_stuff": (
        Archive(STUFF_URL, None, place_coco_maps),
        Archive(f"{COCO_URL}/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80", place_coco_images),
        Archive(f"{COCO_URL}/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2", place_coco_images),
    ),
}
"""Each data set's archives, in the order in which they are unpacked.

URLs and checksums of VOC and SBD: torchvision. URLs of COCO and COCO-Stuff: github.com/nightrome/cocostuff, README.md;
checksums of COCO: github.com/intel/neural-compressor, download_dataset.sh. URL of PASCAL Context: its authors' page."""


def prepare(dataset: str, root: Path, given: Sequence[Path]) -> None:
    """Fetches and unpacks what is not unpacked yet; `prepared.json` says what is.

    Args:
        dataset: a key of `ARCHIVES`.
        root: the folder to make.
        given: archives on disk already, known by their names.

    Raises:
        UserError: an archive that is none of these, damaged, unsafe or out of reach, or a folder of other data.
    """
    archives = {archive.name: archive for archive in ARCHIVES[dataset]}
    on_disk = {path.name: path for path in given}
    stranger = next((path for path in given if path.name not in archives), None)
    if stranger is not None:
        raise UserError(f"--archive {stranger} is none of {dataset}: give {', '.join(archives)}")
    names = (NAMES / f"{dataset}.txt").read_text(encoding="utf-8")
    before = (root / CLASSES_FILE).read_text(encoding="utf-8") if (root / CLASSES_FILE).is_file() else None
    if before != names and (before is not None or (dataset != "voc" and (root / "JPEGImages").is_dir())):
        raise UserError(f"--data-path {root} holds other classes than {dataset}: give another folder")
    (root / "archives").mkdir(parents=True, exist_ok=True)
    write_text(root / CLASSES_FILE, names)
    try:
        done = list(json.loads((root / "prepared.json").read_text(encoding="utf-8"))["unpacked"])
    except (OSError, ValueError, KeyError, TypeError):
        done = []
    for name, archive in archives.items():
        if name in done:
            continue
        path = on_disk.get(name, root / "archives" / name)
        if not path.is_file() and name not in on_disk:
            fetch(archive, path)
        elif not check_integrity(path, archive.md5):
            raise UserError(f"{path} is missing or damaged (its MD5 is not {archive.md5}): get it from {archive.url}")
        content = root / "archives" / f"{name}.content"
        extract(path, content)
        archive.place(content, root)
        shutil.rmtree(content)
        write_text(root / "prepared.json", json.dumps({"unpacked": [*done, name]}) + "\n")
        done.append(name)


# Images of one's own, and what labelling tools export


def prepare_own(root: Path) -> None:
    """Writes what images of one's own lack: classes.txt, from what a labelling tool wrote, and train.txt and val.txt.

    Every fifth image that has a mask is for evaluation.

    Raises:
        UserError: without class names, images or masks.
    """
    folder = VOCFolder.open(root)
    if not (folder.root / CLASSES_FILE).is_file():
        write_text(folder.root / CLASSES_FILE, "".join(f"{line}\n" for line in exported_classes(folder.root)))
    print_left_out(folder)
    if any((folder.lists / f"{name}.txt").is_file() for name in (*TRAIN_LISTS, *EVALUATION_LISTS)):
        return
    ids = sorted(folder.image_files)
    with_mask = [image for image in ids if image in folder.mask_files]
    evaluated = with_mask[::5]
    if len(with_mask) < 2:
        found = ", ".join(sorted(os.listdir(folder.masks))[:3]) or "nothing"
        raise UserError(
            f"{folder.masks} has masks of {len(with_mask)} of {len(ids)} images: two or more are needed, called like "
            f"their images (x.png or x_mask.png for x.jpg); found: {found}"
        )
    write_list(folder.lists, "train", (image for image in ids if image not in set(evaluated)))
    write_list(folder.lists, "val", evaluated)
    print(f"wrote {folder.lists / 'train.txt'} and val.txt: every fifth image with a mask is for evaluation")


def exported_classes(root: Path) -> list[str]:
    """The lines of classes.txt from the files of labelling tools: labelme, CVAT, Roboflow and Supervisely.

    Raises:
        UserError: if there is none.
    """
    for name in ("class_names.txt", "labels.txt"):
        if (root / name).is_file():
            return (root / name).read_text(encoding="utf-8-sig").splitlines()
    if colours := read_colours(root / COLOURS_FILE):
        return list(colours)
    if (root / "_classes.csv").is_file():
        rows = (root / "_classes.csv").read_text(encoding="utf-8-sig").splitlines()[1:]
        return [": ".join(part.strip() for part in row.split(",", 1)) for row in rows if row.strip()]
    for path in (root / MACHINE_COLOURS, root.parent / MACHINE_COLOURS):
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            return [f"0: {BACKGROUND}", *(f"{value[0]}: {name}" for name, value in values.items() if any(value))]
    raise UserError(
        f"{root / CLASSES_FILE} is missing, and so are class_names.txt, labels.txt, {COLOURS_FILE}, _classes.csv and "
        f"{MACHINE_COLOURS}: write one class a line, the first has mask value 0"
    )


def print_left_out(folder: VOCFolder) -> None:
    """Names the files that are not used: of other endings, hidden ones, and masks without an image."""
    for kind, place, files in (
        ("images", folder.images, folder.image_files),
        ("masks", folder.masks, folder.mask_files),
    ):
        used = {name for names in files.values() for name in names}
        unused = sorted(set(os.listdir(place)) - used)
        if unused:
            print(f"left out: {len(unused)} files in {place} that are no {kind}, {', '.join(unused[:3])}")
    alone = sorted(names[0] for image, names in folder.mask_files.items() if image not in folder.image_files)
    if alone:
        print(f"left out: {len(alone)} masks without an image, {', '.join(alone[:3])}")


def convert_colour_masks(root: Path) -> None:
    """Makes index masks of all colour masks, and keeps the colours beside them. Raises `UserError`."""
    folder = VOCFolder.open(root)
    keep = folder.masks.with_name(f"{folder.masks.name}_colour")
    paths = [folder.masks / names[0] for names in folder.mask_files.values()]
    convert = functools.partial(convert_colour_mask, colours=folder.colours, keep=keep)
    results = list(spread(convert, list(dict.fromkeys(paths)), "converting masks"))
    wrong = [result for result in results if result not in (None, "converted")]
    if wrong:
        raise UserError(wrong[0] + (f" ({len(wrong) - 1} more masks like it)" if len(wrong) > 1 else ""))
    converted = results.count("converted")
    print(f"{converted} of {len(paths)} masks were colour masks" + f"; they are kept in {keep}" * (converted > 0))


# The check


def check(dataset: str, data_path: Path, keep_index: bool = False) -> list[str]:
    """Reads every list, image and mask, prints what there is, and returns what is wrong, a line each.

    Args:
        dataset: a key of `EXPECTED`.
        data_path: as for training.
        keep_index: write the class index, so that training need not read the masks again.
    """
    try:
        folder = VOCFolder.open(data_path)
        classes = folder.classes
    except UserError as error:
        return [str(error)]
    problems, lists = [], {}
    if dataset != "own" and classes != read_classes(NAMES / f"{dataset}.txt"):
        problems.append(f"{folder.root} holds other classes than {dataset}: see its {CLASSES_FILE}, or the lack of one")
    for subset, names in (("train", TRAIN_LISTS), ("val", EVALUATION_LISTS)):
        try:
            lists[subset] = ids = folder.read_list(None, names)
        except UserError as error:
            problems.append(str(error))
            continue
        expected = EXPECTED[dataset].get(subset, len(ids))
        if len(ids) != expected:
            problems.append(f"{subset} lists {len(ids):,} images; published tables use {expected:,}")
    train, val = lists.get("train", []), lists.get("val", [])
    problems += filter(None, [overlap(train, val)])
    may_lack = [image for image in train if image not in folder.mask_files] if dataset == "own" else []
    index = ClassIndex(folder, keep_index)
    problems += index.check([*train, *val], {*train, *val} - set(may_lack), decode=True)
    for subset, ids in lists.items():
        shown = [index.entries.get(image, {}).get("values", []) for image in ids]
        counts = Counter(value for values in shown for value in values)
        print(f"{subset}: {len(ids):,} images, {sum(map(bool, shown)):,} with a mask that can be used")
        print("  images that show a class: " + ", ".join(f"{name} {counts[v]:,}" for name, v in classes.items()))
    counted = {name: value for name, value in classes.items() if name != BACKGROUND}
    for note in describe_lists(index, counted, train, val):
        print(f"note: {note}")
    return problems


# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dataset.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("dataset", choices=EXPECTED, help="own: images of your own, in DIR/images and DIR/masks")
    parser.add_argument(
        "--data-path", type=Path, required=True, metavar="DIR", help="the folder to make, and to train with later"
    )
    parser.add_argument(
        "--archive", type=Path, nargs="+", default=[], metavar="FILE", help="archives that you have fetched already"
    )
    parser.add_argument("--check", action="store_true", help="only say what is there and what is wrong with it")
    parser.add_argument("--convert-colour-masks", action="store_true", help="first make index masks of colour masks")
    args = parser.parse_args(argv)
    if args.check and (args.archive or args.convert_colour_masks):
        parser.error("--check changes nothing: leave --archive and --convert-colour-masks out")
    return args


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    root = find_root(args.data_path) or args.data_path
    if args.convert_colour_masks:
        convert_colour_masks(root)
    elif not args.check and args.dataset != "own":
        prepare(args.dataset, root, args.archive)
    if not args.check and args.dataset == "own":
        prepare_own(root)
    problems = check(args.dataset, args.data_path, keep_index=not args.check)
    for problem in problems[:20]:
        print(f"problem: {problem}")
    if problems:
        raise UserError(f"{args.data_path} has {len(problems):,} problems, the first: {problems[0]}")
    print(f"{args.data_path} is ready: give it to the scripts as --data-path")
    return 0


if __name__ == "__main__":
    sys.exit(main())

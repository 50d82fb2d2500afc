"""Make a data set ready for training from its publishers' archives, or check one that was made by hand.

    python -m dataset.prepare voc --data-path data/VOCdevkit/VOC2012
    python -m dataset.prepare pascal_context --data-path data/pascal_context
    python -m dataset.prepare coco_stuff --data-path data/coco_stuff
    python -m dataset.prepare voc --data-path DIR --archive VOCtrainval_11-May-2012.tar benchmark.tgz
    python -m dataset.prepare voc --data-path DIR --check                    # say what is wrong; change nothing
    python -m dataset.prepare own --data-path DIR --convert-colour-masks     # your own pictures: DATA_PATH.md

What is there already is not done again: stop it when you like and run it once more. Archives are fetched into
DIR/archives; when all is done they may go. The last lines say what was made, or what is wrong with it.
"""

import argparse
import errno
import functools
import io
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from scipy.io import loadmat
from torchvision.datasets import SBDataset
from torchvision.datasets.voc import DATASET_YEAR_DICT

from dataset.archives import Archive, check_space, fetch, members, verify
from dataset.check import EXPECTED, check
from dataset.files import write_bytes, write_text
from dataset.masks import convert_colour_mask, save_mask
from dataset.parallel import spread
from dataset.splits import BACKGROUND, NAMES, read_classes
from dataset.voc import (
    CLASSES_FILE,
    EVALUATION_LISTS,
    IMAGE_SUFFIXES,
    LIST_FOLDER,
    TRAIN_LISTS,
    VOCFolder,
    find_root,
)
from utils.errors import UserError

MARKER = "prepared.json"

STEM = r"[^/.][^/]*"
"""A file's name in an archive, without its ending. None that is hidden: macOS packs a ._name beside each."""

# ---------------------------------------------------------------------------------------------------------
# PASCAL VOC 2012 with SBD


def unpack_voc(archive: Path, root: Path) -> None:
    """Pictures, masks and lists of VOC 2012; its masks go to `SegmentationClassAug` too, where SBD's join them."""
    make_folders(root, "JPEGImages", "SegmentationClass", "SegmentationClassAug", LIST_FOLDER)
    lists = r"ImageSets/Segmentation/(?:train|val|trainval)\.txt"
    pattern = re.compile(rf"(?:.*/)?VOC2012/(JPEGImages/{STEM}\.jpg|SegmentationClass/{STEM}\.png|{lists})$")
    for name, data in members(archive, pattern.match):
        target = root / pattern.match(name)[1]
        write_new(target, data)
        if target.parent.name == "SegmentationClass":
            write_new(root / "SegmentationClassAug" / target.name, data)


def unpack_sbd(archive: Path, root: Path) -> None:
    """SBD's masks for the pictures that have none of VOC, and the list of what may be trained on.

    That list is VOC's training pictures and all of SBD's, less VOC's evaluation pictures: SBD divides the pictures
    otherwise, and has most of them among its own training pictures.
    """
    of_voc = {subset: set(read_ids(root / LIST_FOLDER / f"{subset}.txt")) for subset in ("train", "val")}
    pattern = re.compile(rf"(?:.*/)?dataset/(?:cls/({STEM})\.mat|((?:train|val)\.txt))$")
    of_sbd = set()
    for name, data in members(archive, pattern.match):
        picture, is_list = pattern.match(name).groups()
        if is_list:
            of_sbd.update(data.decode().split())
            continue
        target = root / "SegmentationClassAug" / f"{picture}.png"
        if not target.is_file():  # VOC's masks are there already, and stay
            save_mask(sbd_mask(data, f"{archive}: {name}"), target)
    write_list(root, "train_aug", sorted((of_voc["train"] | of_sbd) - of_voc["val"]))


def sbd_mask(data: bytes, where: str) -> np.ndarray:
    """uint8 [H, W] of an SBD file: the matrix `Segmentation` in the struct `GTcls`, VOC's mask values without void.

    As torchvision.datasets.SBDataset reads it. Raises `UserError` for another file.
    """
    return read_mat(data, where, lambda mat: mat["GTcls"][0]["Segmentation"][0]).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------
# PASCAL Context: VOC 2010's pictures, annotations with 459 labels, of which 59 count

CONTEXT_LABELS = (
    2, 23, 25, 31, 34, 45, 59, 65, 72, 98, 397, 113, 207, 258, 284, 308, 347, 368, 416, 427, 9, 18, 22, 33, 44,
    46, 68, 80, 85, 104, 115, 144, 158, 159, 162, 187, 189, 220, 232, 259, 260, 105, 296, 355, 295, 324, 326, 349, 354,
    360, 366, 19, 415, 420, 424, 440, 445, 454, 458,
)  # fmt: skip
"""The label, of the 459 in an annotation, of each class in names/pascal_context.txt, which begins at 1.

The names are those of the annotations; the order is that of the authors' list of 59 (as in FCN's classes-59.txt, which
says diningtable, bedcloth and clothes for table, bedclothes and cloth). The same 59 labels are those that OpenMMLab's
converter keeps. Every other label is background."""


def unpack_context(archive: Path, root: Path) -> None:
    """Annotations (.mat, a matrix `LabelMap` of 459 labels) to masks of the 59 classes; 0 is everything else."""
    make_folders(root, "SegmentationClass")
    to_class = np.zeros(460, np.uint8)
    to_class[list(CONTEXT_LABELS)] = np.arange(1, len(CONTEXT_LABELS) + 1)
    pattern = re.compile(rf"(?:.*/)?(?:({STEM})\.mat|labels\.txt)$")
    for name, data in members(archive, pattern.match):
        where, picture = f"{archive}: {name}", pattern.match(name)[1]
        if picture is None:
            check_context_labels(data.decode(), where)
            continue
        target = root / "SegmentationClass" / f"{picture}.png"
        if not target.is_file():
            labels = read_mat(data, where, lambda mat: mat["LabelMap"])
            if labels.max(initial=0) >= len(to_class):
                raise UserError(f"{where} has the label {labels.max()}, of 459: fetch the archive again")
            save_mask(to_class[labels], target)


def check_context_labels(text: str, where: str) -> None:
    """Refuses annotations whose own list gives other names to the labels of the 59 classes. Raises `UserError`."""
    stated = dict(re.findall(r"^\s*(\d+)\s*:\s*(.+?)\s*$", text, flags=re.MULTILINE))
    classes = [name for name in read_classes(NAMES / "pascal_context.txt") if name != BACKGROUND]
    for label, name in zip(CONTEXT_LABELS, classes):
        if stated.get(str(label), name).replace(" ", "") != name:
            raise UserError(f"{where} calls label {label} {stated[str(label)]!r}, not {name!r}: not the data we know")


def unpack_voc2010(archive: Path, root: Path) -> None:
    """The annotated pictures of VOC 2010, and its lists `Main`, which divide them into training and evaluation."""
    make_folders(root, "JPEGImages", LIST_FOLDER)
    lists = re.compile(r"(?:.*/)?VOC2010/ImageSets/Main/(train|val)\.txt$")
    wanted = set()
    for name, data in members(archive, lists.match):
        ids = data.decode().split()
        write_list(root, lists.match(name)[1], ids)
        wanted.update(ids)
    pictures = re.compile(rf"(?:.*/)?VOC2010/JPEGImages/({STEM})\.jpg$")
    for name, data in members(archive, lambda name: (found := pictures.match(name)) and found[1] in wanted):
        write_new(root / "JPEGImages" / PurePosixPath(name).name, data)


# ---------------------------------------------------------------------------------------------------------
# COCO-Stuff: COCO 2017's pictures, pixel maps with a value a class


def unpack_coco_pictures(archive: Path, root: Path) -> None:
    """Pictures of COCO 2017, of either half; their names are apart."""
    make_folders(root, "JPEGImages")
    for name, data in members(archive, re.compile(rf"(?:.*/)?(train|val)2017/{STEM}\.jpg$").match):
        write_new(root / "JPEGImages" / PurePosixPath(name).name, data)


def unpack_coco_maps(archive: Path, root: Path) -> None:
    """The pixel maps as they are: a class's value is its id less 1 (0-181 with eleven unused), 255 is unlabelled."""
    make_folders(root, "SegmentationClass", LIST_FOLDER)
    pattern = re.compile(rf"(?:.*/)?(train|val)2017/({STEM})\.png$")
    ids = {"train": [], "val": []}
    for name, data in members(archive, pattern.match):
        subset, picture = pattern.match(name).groups()
        ids[subset].append(picture)
        write_new(root / "SegmentationClass" / f"{picture}.png", data)
    for subset, pictures in ids.items():
        write_list(root, subset, sorted(pictures))


# ---------------------------------------------------------------------------------------------------------
# What the publishers serve

VOC2010, VOC2012 = DATASET_YEAR_DICT["2010"], DATASET_YEAR_DICT["2012"]

ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "voc": (
        Archive(VOC2012["url"], VOC2012["md5"], 2_000_000_000, 2_000_000_000, unpack_voc),
        Archive(SBDataset.url, SBDataset.md5, 1_420_000_000, 100_000_000, unpack_sbd),
    ),
    "pascal_context": (
        Archive(VOC2010["url"], VOC2010["md5"], 1_300_000_000, 1_200_000_000, unpack_voc2010),
        Archive("https://cs.stanford.edu/~roozbeh/pascal-context/trainval.tar.gz", None, 31_000_000, 100_000_000,
                unpack_context),
    ),
    "coco_stuff": (
        Archive("http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip",
                None, 660_000_000, 800_000_000, unpack_coco_maps),
        Archive("http://images.cocodataset.org/zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80",
                820_000_000, 820_000_000, unpack_coco_pictures),
        Archive("http://images.cocodataset.org/zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2",
                19_400_000_000, 19_400_000_000, unpack_coco_pictures),
    ),
}  # fmt: skip
"""Each data set's archives, in the order in which they are unpacked.

URLs and checksums of VOC and SBD: torchvision. URLs of COCO and COCO-Stuff: github.com/nightrome/cocostuff, README.md;
checksums of COCO: github.com/intel/neural-compressor, download_dataset.sh. URL of PASCAL Context: its authors' page,
cs.stanford.edu/~roozbeh/pascal-context. No checksum was found for the two archives of annotations without one; gzip's
and zip's own are checked as they are read. Sizes are rounded, and only decide whether the disk has room."""


# ---------------------------------------------------------------------------------------------------------
# Files


def make_folders(root: Path, *names: str | Path) -> None:
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that is not there yet. One that is there is whole, see `dataset.files`."""
    if not path.is_file():
        write_bytes(path, data)


def read_ids(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split()


def write_list(root: Path, name: str, ids: Iterable[str]) -> None:
    write_text(root / LIST_FOLDER / f"{name}.txt", "".join(f"{picture}\n" for picture in ids))


def read_mat(data: bytes, where: str, pick) -> np.ndarray:
    """The matrix that `pick` takes from a MATLAB file. Raises `UserError` if it is broken, or another file."""
    try:
        matrix = np.asarray(pick(loadmat(io.BytesIO(data))))
        if matrix.ndim == 2 and matrix.dtype.kind in "iu":
            return matrix
    except Exception as error:  # scipy raises whatever a spoilt file leads it to
        raise UserError(
            f"{where} can't be read as a MATLAB file of labels ({error}): fetch the archive again"
        ) from error
    raise UserError(f"{where} holds {matrix.dtype} of shape {matrix.shape}, not a matrix of labels")


# ---------------------------------------------------------------------------------------------------------
# Prepare


def prepare(dataset: str, root: Path, given: Sequence[Path]) -> None:
    """Fetches and unpacks what is not unpacked yet.

    Args:
        dataset: a key of `ARCHIVES`.
        root: the folder to make.
        given: archives on disk already, told by their names.

    Raises:
        UserError: too little room, an archive that is none of these, damaged, unsafe or out of reach.
    """
    archives = ARCHIVES[dataset]
    on_disk = {path.name: path for path in given}
    strangers = [path for path in given if path.name not in {archive.name for archive in archives}]
    if strangers:
        raise UserError(
            f"--archive {strangers[0]} is none of {dataset}: give {', '.join(archive.name for archive in archives)}"
        )
    names = (NAMES / f"{dataset}.txt").read_text(encoding="utf-8")
    if (root / CLASSES_FILE).is_file() and (root / CLASSES_FILE).read_text(encoding="utf-8") != names:
        raise UserError(f"{root / CLASSES_FILE} lists other classes than {dataset}: give another --data-path")
    if dataset != "voc" and (root / "JPEGImages").is_dir() and not (root / CLASSES_FILE).is_file():
        raise UserError(f"--data-path {root} holds pictures without a {CLASSES_FILE}, like VOC's: give another folder")
    done = read_marker(root)
    missing = [archive for archive in archives if archive.name not in done]
    to_fetch = [a for a in missing if a.name not in on_disk and not (root / "archives" / a.name).is_file()]
    check_space(root, sum(a.unpacked for a in missing) + sum(a.size for a in to_fetch))
    make_folders(root, "")
    write_text(root / CLASSES_FILE, names)
    for archive in missing:
        if archive.name in on_disk:
            path = on_disk[archive.name]
            verify(path, archive)
        else:
            path = fetch(archive, root / "archives")
        archive.unpack(path, root)
        done.append(archive.name)
        write_text(root / MARKER, json.dumps({"unpacked": done}) + "\n")


def read_marker(root: Path) -> list[str]:
    """The archives that were unpacked to their ends, so that neither they nor a look into them is needed again."""
    try:
        return list(json.loads((root / MARKER).read_text(encoding="utf-8"))["unpacked"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def prepare_own(root: Path) -> None:
    """Writes train.txt and val.txt for pictures that have no lists: every fifth that has a mask is for evaluation.

    Raises:
        UserError: without `classes.txt`, pictures or masks.
    """
    folder = VOCFolder.open(root)
    if not (folder.root / CLASSES_FILE).is_file():
        raise UserError(f"{folder.root / CLASSES_FILE} is missing: write one class a line, the first has mask value 0")
    folder.read_classes()
    if any((folder.lists / f"{name}.txt").is_file() for name in (*TRAIN_LISTS, *EVALUATION_LISTS)):
        return
    ids = sorted({path.stem for path in folder.images.iterdir() if path.suffix in IMAGE_SUFFIXES})
    with_mask = [picture for picture in ids if folder.mask_path(picture).is_file()]
    evaluated = with_mask[::5]
    if not evaluated or len(with_mask) < 2:
        raise UserError(f"{folder.masks} has masks of {len(with_mask)} of {len(ids)} pictures: give two or more")
    for name, chosen in (("train", [p for p in ids if p not in set(evaluated)]), ("val", evaluated)):
        write_text(folder.lists / f"{name}.txt", "".join(f"{picture}\n" for picture in chosen))
    print(f"wrote {folder.lists / 'train.txt'} and val.txt: every fifth picture with a mask is for evaluation")


def convert_colour_masks(root: Path) -> None:
    """Makes index masks of all colour masks, and keeps the colours beside them. Raises `UserError`."""
    folder = VOCFolder.open(root)
    keep = folder.masks.with_name(f"{folder.masks.name}_colour")
    convert = functools.partial(convert_colour_mask, known_values=tuple(folder.read_classes().values()), keep=keep)
    paths = sorted(folder.masks.glob("*.png"))
    converted = sum(spread(convert, paths, "converting masks", "mask"))
    print(
        f"{converted} of {len(paths)} masks were colour masks" + f"; the colours are kept in {keep}" * (converted > 0)
    )


# ---------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line on stderr instead of the usage."""
        self.exit(2, f"error: {message}\n")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m dataset.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", choices=EXPECTED, help="own: pictures of your own, in DIR/images and DIR/masks")
    parser.add_argument(
        "--data-path", type=Path, required=True, metavar="DIR", help="the folder to make, and to train with later"
    )
    parser.add_argument(
        "--archive", type=Path, nargs="+", default=[], metavar="FILE", help="archives that you have fetched already"
    )
    parser.add_argument("--check", action="store_true", help="only say what is there and what is wrong with it")
    parser.add_argument(
        "--convert-colour-masks", action="store_true", help="make index masks of colour masks (VOC's colours) first"
    )
    args = parser.parse_args(argv)
    if args.check and (args.archive or args.convert_colour_masks):
        parser.error("--check changes nothing: leave --archive and --convert-colour-masks out")
    return args


def run(args: argparse.Namespace) -> list[str]:
    """Does what the flags say; returns what is wrong with the result."""
    root = find_root(args.data_path) or args.data_path
    if args.convert_colour_masks:
        convert_colour_masks(root)
    elif not args.check and args.dataset != "own":
        prepare(args.dataset, root, args.archive)
    if not args.check and args.dataset == "own":
        prepare_own(root)
    return check(args.dataset, args.data_path, keep_index=not args.check)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        problems = run(args)
    except UserError as error:
        message = str(error)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        mend = "make room and run the command again, what is done is kept" if full else "mend it and run it again"
        message = f"{error.filename or args.data_path}: {error.strerror or error}: {mend}"
    except KeyboardInterrupt:
        message = "stopped: run the command again to go on"
    else:
        for problem in problems[:20]:
            print(f"problem: {problem}")
        if not problems:
            print(f"{args.data_path} is ready: give it to the scripts as --data-path")
            return 0
        message = f"{args.data_path} has {len(problems):,} problems, the first: {problems[0]}"
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())

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
import contextlib
import functools
import json
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import loadmat
from torchvision.datasets.utils import download_url

from dataset.checks import ClassIndex, describe_lists, in_one_line, overlap, spread
from dataset.images import IMAGE_SUFFIXES, convert_colour_mask
from dataset.splits import BACKGROUND, NAMES, read_classes
from dataset.voc import (
    CLASSES_FILE,
    EVALUATION_LISTS,
    EXPORTED_CLASSES,
    LIST_FOLDER,
    TRAIN_LISTS,
    VOCFolder,
    find_root,
    holds,
    list_files,
    read_colours,
    run_prepare,
)
from utils.config import Parser
from utils.errors import UserError, one_line_errors, read_lines, write_text
from utils.visualize import save_index_png

PUBLISHED = json.loads(Path(__file__).with_name("archives.json").read_text(encoding="utf-8"))
"""Of each data set: its archives in the order in which they are unpacked, where their URLs and checksums were found,
and how many images published tables train and evaluate on."""

# Archives


@dataclass(frozen=True)
class Archive:
    """A publisher's file: where it is fetched, its checksum (None: no source for one was found), and the name in
    `PLACES` of what is done with its content."""

    url: str
    md5: str | None
    place: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


ARCHIVES = {dataset: tuple(Archive(**row) for row in facts["archives"]) for dataset, facts in PUBLISHED.items()}


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


def move(paths: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.replace(folder / path.name)


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


# What of their content goes where: (folder of the content, folder of the data set)


def place_voc(content: Path, root: Path) -> None:
    """Images, masks and lists of VOC 2012; its masks go to `SegmentationClassAug` too, where SBD's join them."""
    for name in ("JPEGImages", "SegmentationClass", LIST_FOLDER):
        move(find(content, f"VOC2012/{name}/*"), root / name)
    shutil.copytree(root / "SegmentationClass", root / "SegmentationClassAug", dirs_exist_ok=True)


def place_sbd(content: Path, root: Path) -> None:
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


def place_context(content: Path, root: Path) -> None:
    """PASCAL Context's .mat, a matrix `LabelMap` of 459 labels, to masks of 59 classes; 0 is everything else."""
    labels_of_classes = PUBLISHED["pascal_context"]["labels"]
    to_class = np.zeros(460, np.uint8)
    to_class[labels_of_classes] = np.arange(1, len(labels_of_classes) + 1)
    for path in find(content, "*.mat"):
        labels = read_mat(path, lambda mat: mat["LabelMap"])
        if labels.max(initial=0) >= len(to_class):
            raise UserError(f"{path} has the label {labels.max()}, of 459: fetch the archive again")
        save_index_png(to_class[labels], root / "SegmentationClass" / f"{path.stem}.png")


def place_voc2010(content: Path, root: Path) -> None:
    """The annotated images of VOC 2010, and its lists `Main`, which divide them into training and evaluation."""
    lists = [path for path in find(content, "VOC2010/ImageSets/Main/*.txt") if path.stem in ("train", "val")]
    wanted = {image for path in lists for image in path.read_text().split()}
    move((path for path in find(content, "VOC2010/JPEGImages/*.jpg") if path.stem in wanted), root / "JPEGImages")
    move(lists, root / LIST_FOLDER)


def place_coco_images(content: Path, root: Path) -> None:
    """Images of COCO 2017, of either half; no name is in both."""
    move(find(content, "*2017/*.jpg"), root / "JPEGImages")


def place_coco_maps(content: Path, root: Path) -> None:
    """COCO-Stuff's pixel maps as they are: a class's value is its id less 1 (0-181 with eleven unused), 255 is void."""
    for subset in ("train", "val"):
        maps = find(content, f"{subset}2017/*.png")
        write_list(root / LIST_FOLDER, subset, (path.stem for path in maps))
        move(maps, root / "SegmentationClass")


PLACES = {
    "voc": place_voc, "sbd": place_sbd, "voc2010": place_voc2010, "context": place_context,
    "coco_images": place_coco_images, "coco_maps": place_coco_maps,
}  # fmt: skip


def prepare(dataset: str, root: Path) -> None:
    """Fetches and unpacks what is not unpacked yet; `prepared.json` says what is.

    An archive that lies in `root/archives` already is checked and taken.

    Raises:
        UserError: an archive that is damaged, unsafe or out of reach, or a folder of another data set.
    """
    names = (NAMES / f"{dataset}.txt").read_text(encoding="utf-8")
    before = (root / CLASSES_FILE).read_text(encoding="utf-8") if (root / CLASSES_FILE).is_file() else None
    if before != names and (before is not None or (dataset != "voc" and (root / "JPEGImages").is_dir())):
        raise UserError(f"--data-path {root} holds other classes than {dataset}: give another folder")
    folder, marker = root / "archives", root / "prepared.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(root / CLASSES_FILE, names)
    done = json.loads(marker.read_text(encoding="utf-8"))["unpacked"] if marker.is_file() else []
    for archive in ARCHIVES[dataset]:
        if archive.name in done:
            continue
        try:
            download_url(archive.url, str(folder), archive.name, archive.md5)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{archive.url} can't be fetched ({error}): run the command again, or put {archive.name} into {folder} "
                "by other means (curl -C - -O URL continues where it stopped)"
            ) from error
        content = folder / "content"
        extract(folder / archive.name, content)
        PLACES[archive.place](content, root)
        shutil.rmtree(content)
        done.append(archive.name)
        write_text(marker, json.dumps({"unpacked": done}) + "\n")


# Images of one's own, and what labelling tools export


@contextlib.contextmanager
def prepare_own(root: Path) -> Iterator[None]:
    """Writes what images of one's own lack: classes.txt, from what a labelling tool wrote, and train.txt and val.txt.

    Every fifth image that has a mask is for evaluation. What was written is removed again if the block fails.

    Raises:
        UserError: without class names, images or masks.
    """
    written: list[Path] = []
    try:
        gather_roboflow(root, written)
        folder = VOCFolder.open(root)
        print_left_out(folder)
        if not (folder.root / CLASSES_FILE).is_file():
            written.append(folder.root / CLASSES_FILE)
            write_text(written[-1], "".join(f"{line}\n" for line in exported_classes(folder.root)))
        if not any((folder.lists / f"{name}.txt").is_file() for name in (*TRAIN_LISTS, *EVALUATION_LISTS)):
            for name, ids in divide(folder).items():
                written.append(write_list(folder.lists, name, ids))
            print(f"wrote {written[-2]} and {written[-1].name}: every fifth image with a mask is for evaluation")
        yield
    except BaseException:
        for path in written:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def gather_roboflow(root: Path, written: list[Path]) -> None:
    """Copies Roboflow's `train` and `valid`, where x_mask.png lies beside x.jpg, to images, masks and lists.

    What is made is added to `written`. Without such folders, or beside an image folder, nothing is done.
    """
    subsets = {name: root / folder for name, folder in (("train", "train"), ("val", "valid"))}
    subsets = {name: folder for name, folder in subsets.items() if (folder / "_classes.csv").is_file()}
    if find_root(root) is not None or not subsets:
        return
    if len({(folder / "_classes.csv").read_bytes() for folder in subsets.values()}) > 1:
        raise UserError(f"{root} has folders with other classes: make their _classes.csv the same")
    images, masks = root / "images", root / "masks"
    for folder in (images, masks):
        folder.mkdir()
        written.append(folder)
    for name, folder in subsets.items():
        files = list_files(folder, IMAGE_SUFFIXES)
        ids = [image for image in files if f"{image}_mask" in files]
        for image in ids:
            shutil.copy(folder / files[image][0], images)
            shutil.copy(folder / files[f"{image}_mask"][0], masks)
        if len(subsets) == 2:
            written.append(write_list(root, name, ids))
        print(f"copied {len(ids)} images of {folder}, and their masks, to {images} and {masks}")
    written.append(Path(shutil.copy(folder / "_classes.csv", root)))


def divide(folder: VOCFolder) -> dict[str, list[str]]:
    """The lists of images of one's own. Raises `UserError` without images or masks."""
    ids = sorted(folder.image_files)
    with_mask = [image for image in ids if image in folder.mask_files]
    if len(with_mask) < 2:
        raise UserError(
            f"{folder.masks} has masks of {len(with_mask)} of the {len(ids)} images in {folder.images}: two or more "
            f"are needed, called like their images (x.png or x_mask.png for x.jpg); it {holds(folder.masks)}"
        )
    evaluated = with_mask[::5]
    return {"train": [image for image in ids if image not in set(evaluated)], "val": evaluated}


def exported_classes(root: Path) -> list[str]:
    """The lines of classes.txt from the files of labelling tools: labelme, CVAT, Roboflow and Supervisely.

    Raises:
        UserError: if there is none.
    """
    for name in ("class_names.txt", "labels.txt"):
        if (root / name).is_file():
            return read_lines(root / name)
    if colours := read_colours(root):
        is_grey = all(len(set(colour)) == 1 for colour in colours.values())
        return [f"{colour[0]}: {name}" if is_grey else name for name, colour in colours.items()]
    if (root / "_classes.csv").is_file():
        return read_lines(root / "_classes.csv")[1:]
    raise UserError(
        f"{root / CLASSES_FILE} is missing, and so are {', '.join(EXPORTED_CLASSES)}: write one class a line, the "
        "first has mask value 0"
    )


def print_left_out(folder: VOCFolder) -> None:
    """Names the files that are not used: of other endings, hidden ones, and masks without an image."""
    for place, known in ((folder.images, folder.image_files), (folder.masks, folder.mask_files)):
        unused = sorted(set(os.listdir(place)).difference(*known.values()))
        if unused:
            print(f"left out: {len(unused)} files in {place} that are no images, {', '.join(unused[:3])}")
    used = {folder.mask_path(image).name for image in folder.image_files}
    alone = sorted({name for names in folder.mask_files.values() for name in names} - used)
    if alone:
        print(f"left out: {len(alone)} masks without an image, {', '.join(alone[:3])}")


def convert_colour_masks(root: Path) -> None:
    """Makes index masks of all colour masks, and keeps the colours beside them. Raises `UserError`."""
    folder = VOCFolder.open(root)
    keep = folder.masks.with_name(f"{folder.masks.name}_colour")
    paths = sorted({folder.masks / names[0] for names in folder.mask_files.values()})
    results = list(spread(functools.partial(_convert, colours=folder.colours, keep=keep), paths, "converting masks"))
    wrong = [result for result in results if isinstance(result, str)]
    if wrong:
        raise UserError(in_one_line(wrong))
    print(f"{sum(results)} of {len(paths)} masks were colour masks" + f"; they are kept in {keep}" * any(results))


def _convert(path: Path, **options) -> bool | str:
    try:
        return convert_colour_mask(path, **options)
    except UserError as error:
        return str(error)


# The check


def check(dataset: str, data_path: Path, keep_index: bool = False) -> tuple[list[str], bool]:
    """Reads every list, image and mask, and prints what there is.

    Args:
        dataset: a key of `ARCHIVES`, or "own".
        data_path: as for training.
        keep_index: write the class index, so that training need not read the masks again.

    Returns:
        What is wrong, a line each, and whether every training image has a mask.
    """
    problems, lists = [], {}
    try:
        folder = VOCFolder.open(data_path)
        classes = folder.classes
    except UserError as error:
        return [str(error)], True
    if len(classes.keys() - {BACKGROUND}) < 2:
        problems.append(f"{folder.root} has one class: two are needed, one to be seen and one to be unseen")
    if dataset != "own" and classes != read_classes(NAMES / f"{dataset}.txt"):
        problems.append(f"{folder.root} holds other classes than {dataset}: see its {CLASSES_FILE}, or the lack of one")
    for subset, names in (("train", TRAIN_LISTS), ("val", EVALUATION_LISTS)):
        try:
            lists[subset] = ids = folder.read_list(None, names)
        except UserError as error:
            problems.append(str(error))
            continue
        expected = PUBLISHED.get(dataset, {}).get(subset, len(ids))
        if len(ids) != expected:
            problems.append(f"{subset} lists {len(ids):,} images; published tables use {expected:,}")
    train, val = lists.get("train", []), lists.get("val", [])
    index = ClassIndex(folder, keep_index)
    unmasked = [image for image in train if image not in folder.mask_files] if dataset == "own" else []
    problems += filter(None, [overlap(train, val), lack_of_masks(index, train, unmasked)])
    problems += index.check([*train, *val], {*train, *val} - set(unmasked), decode=True)
    try:
        if not problems:
            index.classes([*train, *val])
    except UserError as error:
        problems.append(str(error))
    print_contents(index, lists, notes=not problems)
    return problems, not unmasked


def lack_of_masks(index: ClassIndex, train: list[str], unmasked: list[str]) -> str | None:
    """What is wrong with training images of one's own that have no mask; the index is to forget masks that were there.

    SBD's are missing where only VOC's masks are: such images are no target images.
    """
    folder = index.folder
    path = folder.list_path(None, TRAIN_LISTS) if unmasked else Path()
    if "aug" in path.name:
        return (
            f"{len(unmasked)} of {len(train)} images of {path} have no mask in {folder.masks}: get SBD's (python -m "
            "dataset.prepare voc --data-path data/voc), or train with --train-list train, a smaller set"
        )
    gone = [image for image in unmasked if index.values(image) is not None]
    if gone and not index.keep:
        return (
            f"{folder.masks} has lost {len(gone)} masks, {gone[0]} first: copy them back, or {run_prepare(folder.root)}"
        )
    index.forget(gone)
    return None


def print_contents(index: ClassIndex, lists: dict[str, list[str]], notes: bool) -> None:
    """Prints how many images of each list show each class, and with `notes` what is odd about the lists."""
    classes = index.folder.classes
    for subset, ids in lists.items():
        shown = [index.values(image) or [] for image in ids]
        counts = Counter(value for values in shown for value in values)
        print(f"{subset}: {len(ids):,} images, {sum(map(bool, shown)):,} with a mask that can be used")
        print("  images that show a class: " + ", ".join(f"{name} {counts[v]:,}" for name, v in classes.items()))
    counted = {name: value for name, value in classes.items() if name != BACKGROUND}
    for note in describe_lists(index, counted, *lists.values()) if notes else ():
        print(f"note: {note}")


# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m dataset.prepare", description=__doc__)
    parser.add_argument("dataset", choices=[*ARCHIVES, "own"], help="own: your own images, in DIR/images and DIR/masks")
    parser.add_argument("--data-path", type=Path, required=True, metavar="DIR", help="the folder to make, or to check")
    parser.add_argument("--check", action="store_true", help="only say what is there and what is wrong with it")
    parser.add_argument("--convert-colour-masks", action="store_true", help="first make index masks of colour masks")
    args = parser.parse_args(argv)
    if args.check and args.convert_colour_masks:
        parser.error("--check changes nothing: leave --convert-colour-masks out")
    return args


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    root = find_root(args.data_path) or args.data_path
    is_own = args.dataset == "own" and not args.check
    if not (args.check or is_own or args.convert_colour_masks):
        prepare(args.dataset, root)
    with prepare_own(root) if is_own else contextlib.nullcontext():
        if args.convert_colour_masks:
            convert_colour_masks(root)
        problems, complete = check(args.dataset, args.data_path, keep_index=not args.check)
        for problem in problems[:20]:
            print(f"problem: {problem}")
        if problems:
            several = f"{len(problems):,} problems, the first" if len(problems) > 1 else "a problem"
            raise UserError(f"{args.data_path} has {several}: {problems[0]}")
    lacking = "" if complete else ", with --target-images all (another protocol) for the images without a mask"
    print(f"{args.data_path} is ready: give it to the scripts as --data-path{lacking}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

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

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat
from torchvision.datasets.utils import download_url
from tqdm import tqdm

from dataset.checks import ClassIndex, describe_lists, lack_of_masks, overlap, raise_first
from dataset.images import IMAGE_SUFFIXES, read_mask
from dataset.splits import BACKGROUND, NAMES, read_classes
from dataset.voc import CLASS_FILES, COLOUR_FILES, LIST_FOLDER, TRAIN_LISTS, VOCFolder, find_root, holds, list_files
from utils.config import Parser
from utils.errors import UserError, atomic_write, one_line_errors, write_text
from utils.visualize import save_index_png

PUBLISHED = json.loads(Path(__file__).with_name("archives.json").read_text(encoding="utf-8"))
"""Of each data set: its archives in the order in which they are unpacked (`url`; `md5` where a source for it was found;
which of its files are MATLAB's masks, `matrices`, which are the images of a list, `lists`, and which go to what folder,
`move`), where that was found, and how many images published tables train and evaluate on."""


def find(folder: Path, pattern: str) -> list[Path]:
    """The files below `folder` that match, without hidden ones: macOS packs a ._name beside each."""
    return sorted(path for path in folder.rglob(pattern) if not path.name.startswith("."))


def write_list(folder: Path, name: str, ids: Iterable[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.txt", "".join(f"{image}\n" for image in ids))
    return folder / f"{name}.txt"


def convert_matrix(path: Path, labels: Sequence[int], masks: Path) -> None:
    """Makes a mask of the matrix of labels in a MATLAB file, SBD's or PASCAL Context's, unless there is one.

    Label `labels[n]` becomes the mask value n + 1, and any other 0. Raises `UserError` for another file.
    """
    target, to_value = masks / f"{path.stem}.png", np.zeros(460, np.uint8)
    to_value[labels] = np.arange(1, len(labels) + 1)
    if target.is_file():  # VOC's masks are there already, and stay
        return
    try:
        content = loadmat(path)
        matrix = content["LabelMap"] if "LabelMap" in content else content["GTcls"][0]["Segmentation"][0]
        save_index_png(to_value[matrix], target)
    except Exception as error:  # scipy raises many kinds of errors for a broken file
        raise UserError(f"{path} can't be made a mask ({error}): if the disk has room, fetch it again") from error


def prepare(dataset: str, root: Path) -> None:
    """Fetches, unless it lies in `root/archives`, and unpacks what `prepared.json` does not say is unpacked.

    Raises `UserError` for an archive that is damaged, unsafe or out of reach.
    """
    folder, lists, marker = root / "archives", root / LIST_FOLDER, root / "prepared.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(root / "classes.txt", (NAMES / f"{dataset}.txt").read_text(encoding="utf-8"))
    done = json.loads(marker.read_text(encoding="utf-8"))["unpacked"] if marker.is_file() else []
    for archive in PUBLISHED[dataset]["archives"]:
        url, name = archive["url"], archive["url"].rpartition("/")[2]
        if name in done:
            continue
        content = folder / "content"
        shutil.rmtree(content, ignore_errors=True)
        try:
            download_url(url, str(folder), name, archive["md5"])
            shutil.unpack_archive(folder / name, content, **({} if name.endswith(".zip") else {"filter": "data"}))
        except Exception as error:  # of many kinds: no connection, no room, a broken archive, one with a file outside
            raise UserError(
                f"{folder / name} can't be fetched and unpacked ({error}): delete it if it is there and run this "
                f"again, or put it there by other means (curl -C - -O {url} continues where it stopped)"
            ) from error
        for pattern, masks in archive.get("matrices", {}).items():
            for path in find(content, pattern):
                convert_matrix(path, PUBLISHED[dataset].get("labels", range(1, 256)), root / masks)
        for subset, pattern in archive.get("lists", {}).items():
            ids = {path.stem for path in find(root, pattern)}
            if subset == "train_aug":  # all of VOC's and SBD's masks but those of VOC's evaluation images
                ids.difference_update((lists / "val.txt").read_text().split())
            write_list(lists, subset, sorted(ids))
        for pattern, target in archive.get("move", {}).items():
            (root / target).mkdir(parents=True, exist_ok=True)
            for path in find(content, pattern):
                path.replace(root / target / path.name)
        shutil.rmtree(content, ignore_errors=True)
        done.append(name)
        write_text(marker, json.dumps({"unpacked": done}) + "\n")


def copy_roboflow(root: Path) -> None:
    """Copies Roboflow's `train` and `valid`, where x_mask.png lies beside x.jpg, to images, masks and lists, once."""
    folders = [root / name for name in ("train", "valid") if (root / name / "_classes.csv").is_file()]
    if not folders or (root / "_classes.csv").is_file():
        return
    for folder in folders:
        files = list_files(folder, IMAGE_SUFFIXES)
        ids = [image for image in files if f"{image}_mask" in files]
        for part, suffix in (("images", ""), ("masks", "_mask")):
            (root / part).mkdir(exist_ok=True)
            for image in ids:
                shutil.copy2(folder / files[image + suffix], root / part)
        if len(folders) == 2:
            write_list(root, folder.name.replace("valid", "val"), ids)
        print(f"copied {len(ids)} images of {folder}, and their masks, to {root}/images and {root}/masks")
    shutil.copy2(folder / "_classes.csv", root)  # last: it says that all is copied


def divide(folder: VOCFolder) -> dict[str, list[str]]:
    """Lists for images of one's own: every fifth with a mask is for evaluation. Raises `UserError` without masks."""
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
    """Makes index masks, PNGs, of masks of colours or palettes in another order; the old ones go to `..._colour`."""
    keep, converted, problems = folder.masks.with_name(f"{folder.masks.name}_colour"), 0, []
    for name in tqdm(sorted(set(folder.mask_files.values())), "converting masks", unit="file", disable=None):
        path = folder.masks / name
        try:
            mask = read_mask(path, folder.colours, reorder=True)
            with Image.open(path) as image:
                if image.mode in ("P", "L") and np.array_equal(np.array(image), mask):
                    continue
            keep.mkdir(exist_ok=True)
            if not (keep / name).exists():  # else an interrupted run has kept it already
                with atomic_write(keep / name) as temporary:
                    shutil.copyfile(path, temporary)
            save_index_png(mask, path.with_suffix(".png"))
            if path.suffix != ".png":
                path.unlink()
            converted += 1
        except UserError as error:
            problems.append(str(error))
    raise_first(problems)
    print(f"{converted} masks were colour masks" + f"; they are kept in {keep}" * (converted > 0))


def check(dataset: str, folder: VOCFolder, lists: dict[str, list[str]], index: ClassIndex) -> list[str]:
    """Reads the images and masks of the lists "train" and "val", and prints what there is; what is wrong, a line each.

    `dataset` is a key of `PUBLISHED`, or "own".
    """
    train, val = lists["train"], lists["val"]
    problems = list(overlap(train, val))
    if len(folder.classes.keys() - {BACKGROUND}) < 2:
        problems.append(f"{folder.root} has one class: two are needed, one to be seen and one to be unseen")
    for subset, ids in lists.items():
        expected = PUBLISHED.get(dataset, {}).get(subset, len(ids))
        if len(ids) != expected:
            problems.append(f"{subset} lists {len(ids):,} images; published tables use {expected:,}")
    unmasked = [image for image in train if dataset == "own" and image not in folder.mask_files]
    if any(folder.lists.glob("train*aug.txt")):  # the list is there, and SBD's masks are not
        problems += lack_of_masks(unmasked, len(train))
    problems += index.check([*train, *val], {*train, *val} - {*unmasked})
    for subset, ids in lists.items():
        shown = [index.values(image) or [] for image in ids]
        counts = Counter(value for values in shown for value in values)
        print(f"{subset}: {len(ids):,} images, {sum(map(bool, shown)):,} with a mask that can be used")
        print("  images that show a class: " + ", ".join(f"{name} {counts[v]:,}" for name, v in folder.classes.items()))
    if not problems:
        index.classes([*train, *val])
        for note in describe_lists(index, train, val):
            print(f"note: {note}")
    return problems


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m dataset.prepare", description=__doc__)
    parser.add_argument("dataset", choices=[*PUBLISHED, "own"], help="own: your own, in DIR/images and DIR/masks")
    parser.add_argument("--data-path", type=Path, required=True, metavar="DIR", help="the folder to make, or to check")
    parser.add_argument("--check", action="store_true", help="only say what is there and what is wrong with it")
    parser.add_argument("--convert-colour-masks", action="store_true", help="own: first make index masks of colours")
    args = parser.parse_args(argv)
    if args.convert_colour_masks and (args.check or args.dataset != "own"):
        parser.error("--convert-colour-masks goes with own, and without --check, which changes nothing")
    root, is_own = find_root(args.data_path) or args.data_path, args.dataset == "own"
    is_begun = any((root / name).exists() for name in ("classes.txt", "JPEGImages"))
    if not is_own and is_begun and VOCFolder(root, root, root).classes != read_classes(NAMES / f"{args.dataset}.txt"):
        raise UserError(f"--data-path {root} holds other classes than {args.dataset}: give another folder")
    if is_own and not args.check:
        copy_roboflow(root)
    elif not args.check:
        prepare(args.dataset, root)
    folder = VOCFolder.open(root)
    if is_own and folder.class_file is None:
        raise UserError(f"{root} needs {' or '.join(CLASS_FILES + COLOUR_FILES)}: write one class a line to the first")
    if args.convert_colour_masks:
        convert_colour_masks(folder)
        folder = VOCFolder.open(root)
    has_lists = not {*os.listdir(folder.lists)}.isdisjoint(f"{name}.txt" for name in (*TRAIN_LISTS, "val"))
    is_new = is_own and not args.check and not has_lists
    lists = divide(folder) if is_new else {"train": folder.read_list(), "val": folder.read_list("val")}
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

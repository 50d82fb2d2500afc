"""Reading images and index masks: one rule for file formats, orientation, modes, values and palettes."""

import contextlib
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dataset.splits import VOID
from utils.errors import UserError, atomic_write

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".jp2")
"""Endings of image files, in lower case."""

Colours = Mapping[int, tuple[int, int, int]]
"""The values that a mask may hold besides `VOID`, and the colour of each in masks of colours."""

CONVERT = "run python -m dataset.prepare own --data-path FOLDER --convert-colour-masks"

_UNREADABLE = (
    OSError, SyntaxError, ValueError, OverflowError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""What Pillow raises for files that are broken, or so large that they would fill the memory."""


def voc_colours(values) -> Colours:
    """VOC's colour of each mask value."""
    from utils.visualize import voc_palette  # only where a mask has colours

    return {int(value): tuple(voc_palette()[value].tolist()) for value in values}


def values_of_colours(colours: Colours) -> dict[tuple[int, int, int], int]:
    """The mask value of each colour; VOC's colour of void, and white, are void where no class has them."""
    return {voc_colours([VOID])[VOID]: VOID, (255, 255, 255): VOID, **{c: value for value, c in colours.items()}}


@contextlib.contextmanager
def opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """The file opened by Pillow; whatever goes wrong in the block is a `UserError`. `kind` is "image" or "mask"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: copy the {kind} there or take the image off the list") from error
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(str(path), "the file")
        article = "an" if kind == "image" else "a"
        raise UserError(f"{path} can't be read as {article} {kind} ({reason}): replace the file") from error


# Images


def read_image(path: Path, mask_size: tuple[int, int] | None = None) -> np.ndarray:
    """The image in RGB, uint8 [H, W, 3], turned as its EXIF data says, see `orientation`.

    Args:
        path: a file that Pillow reads, of 8 bits a colour and one frame.
        mask_size: width and height of its mask.

    Raises:
        UserError: if it is missing, broken, huge, animated, of more than 8 bits, or its mask has another size.
    """
    with opened(path, "image") as image:
        check_image(path, image, mask_size)
        if orientation(image, mask_size) != 1:
            image = ImageOps.exif_transpose(image)
        return np.array(image.convert("RGB"))


def check_image(path: Path, image: Image.Image, mask_size: tuple[int, int] | None = None) -> None:
    """Raises `UserError` for an image whose header says that it can't be used, or not with a mask of that size."""
    if getattr(image, "is_animated", False) and image.format != "MPO":  # cameras add a preview to a JPEG
        raise UserError(f"{path} is animated: save one of its frames as a JPEG")
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{path} has more than 8 bits a colour (mode {image.mode}): save it as an 8-bit image")
    size = image.size[::-1] if orientation(image, mask_size) > 4 else image.size
    if mask_size is not None and size != mask_size:
        raise UserError(
            f"{path} is {size[0]} x {size[1]} but its mask is {mask_size[0]} x {mask_size[1]}: make them the same size"
        )


def orientation(image: Image.Image, mask_size: tuple[int, int] | None = None) -> int:
    """The EXIF orientation (1-8) by which the image is to be turned; 1 leaves it as it is stored.

    Where the image agrees with its mask in size only as it is stored, it is not turned.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1  # Pillow turns a TIFF itself, and would decode a PNG to look behind its pixels
    turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    if turn not in range(2, 9) or (turn > 4 and mask_size == image.size != image.size[::-1]):
        return 1
    return turn


# Masks


def read_mask(path: Path, colours: Colours) -> np.ndarray:
    """An index mask: uint8 [H, W] of mask values.

    Args:
        path: an image of mode P or L without loss, a PNG as a rule.
        colours: the values that it may hold besides `VOID`.

    Raises:
        UserError: for a missing or broken file, a JPEG, a mask of colours, a value that no class has, and a palette
            with the classes' colours in another order, whose indices are not the classes'.
    """
    with opened(path, "mask") as image:
        _check_mask(path, image)
        mask, values = np.array(image), mask_values(image)
        entries = image.getpalette("RGB") if image.mode == "P" else None
    unknown = [value for value in values if value not in colours and value != VOID]
    wrong = reordered(entries, values, colours) if entries else None
    if wrong:
        raise UserError(f"{path} has the classes' colours in another order ({wrong}): {CONVERT}")
    if unknown:
        raise UserError(
            f"{path} holds the value {unknown[0]}, which no class has: "
            f"masks hold {min(colours)}-{max(colours)} and {VOID} (void)"
        )
    return mask


def mask_values(image: Image.Image) -> list[int]:
    """The values that an image of mode P or L shows, in order."""
    return [value for value, count in enumerate(image.histogram()) if count]


def _check_mask(path: Path, image: Image.Image) -> None:
    if image.format in ("JPEG", "MPO", "JPEG2000") or image.info.get("compression") == "jpeg":
        raise UserError(f"{path} is a JPEG, which changes the values near edges: export the masks as PNG")
    if image.mode in ("RGB", "RGBA"):
        raise UserError(f"{path} is a colour mask, not an index mask (8-bit PNG of class indices, 255 void): {CONVERT}")
    if image.mode not in ("P", "L"):
        raise UserError(f"{path} is of mode {image.mode}, not an index mask: save class indices as an 8-bit PNG")


def reordered(entries: list[int], values: list[int], colours: Colours) -> str | None:
    """What is wrong with a palette that has the classes' colours in another order; None for any other palette.

    Args:
        entries: red, green and blue of each entry.
        values: the entries that the mask shows.
        colours: the colour of each class.
    """
    value_of = values_of_colours(colours)
    colour_of = {value: tuple(entries[3 * value : 3 * value + 3]) for value in values}
    meant = {value: value_of.get(colour) for value, colour in colour_of.items()}
    every = {tuple(entries[start : start + 3]) for start in range(0, len(entries), 3)}
    if None in meant.values() or len(set(colour_of.values())) < len(values):
        return None
    if not every <= {*value_of, *voc_colours(range(256)).values()}:
        return None
    wrong = next((value for value in values if meant[value] != value), None)
    return None if wrong is None else f"index {wrong} has the colour of class {meant[wrong]}"


def convert_colour_mask(path: Path, colours: Colours, keep: Path) -> str | None:
    """Makes an index mask of the mask of colours at `path`, and moves the original to the folder `keep`.

    A palette whose order is not the classes' counts as colours; any other index mask is left as it is.

    Returns:
        None if it was left, "converted", or what is wrong with it; nothing is changed then.
    """
    try:
        with opened(path, "mask") as image:
            if image.format in ("JPEG", "MPO"):
                _check_mask(path, image)
            entries = image.getpalette("RGB") if image.mode == "P" else None
            is_palette = entries and reordered(entries, mask_values(image), colours)
            if image.mode not in ("RGB", "RGBA") and not is_palette:
                return None
            mask = colours_to_values(np.array(image.convert("RGB")), colours, path)
    except UserError as error:
        return str(error)
    keep.mkdir(exist_ok=True)
    if not (keep / path.name).exists():  # else an interrupted run has kept it already
        with atomic_write(keep / path.name) as temporary:
            temporary.write_bytes(path.read_bytes())
    save_mask(mask, path)
    return "converted"


def colours_to_values(image: np.ndarray, colours: Colours, path: Path) -> np.ndarray:
    """The mask values, uint8 [H, W], of a mask of colours, uint8 [H, W, 3].

    A grey mask whose levels are themselves known values is an index mask that was saved in RGB.

    Args:
        image: the mask.
        colours: the colour of each value; void has VOC's.
        path: named in the message.

    Raises:
        UserError: for a colour that no class has.
    """
    pack = np.array([1 << 16, 1 << 8, 1], np.int32)
    packed = image.astype(np.int32) @ pack  # [H, W], one number a colour
    present = np.unique(packed)
    by_colour = {int(np.array(colour) @ pack): value for colour, value in values_of_colours(colours).items()}
    by_grey = {value * 0x010101: value for value in (*colours, VOID)}
    for table in (by_colour, by_grey):
        if np.isin(present, list(table)).all():
            keys = np.array(sorted(table))
            values = np.array([table[key] for key in keys], np.uint8)
            return values[np.searchsorted(keys, packed)]
    stranger = int(present[~np.isin(present, list(by_colour))][0])
    rgb = (stranger >> 16, stranger >> 8 & 255, stranger & 255)
    raise UserError(
        f"{path} shows the colour {rgb}, which no class has: write the classes' colours to labelmap.txt "
        "(NAME:RED,GREEN,BLUE a line), or save the mask without smoothing"
    )


def save_mask(mask: np.ndarray, path: Path) -> None:
    """Writes mask values, uint8 [H, W], as a PNG of mode P in VOC's colours, whole or not at all."""
    image = Image.fromarray(mask)
    from utils.visualize import voc_palette

    image.putpalette(voc_palette().tobytes())
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")

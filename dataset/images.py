"""Reading images and masks: one rule for file formats, orientation, modes, values, palettes and colours."""

import contextlib
import functools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dataset.splits import VOID
from utils.errors import UserError

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg")
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".ppm", ".pgm", ".jp2",
)  # fmt: skip
"""Endings of files, in lower case."""

LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
"""Formats that may change the values of a mask."""

Colours = Mapping[int, tuple[int, int, int] | None]
"""The values that masks may hold besides `VOID`, each with its colour in masks of colours; None: VOC's."""


@contextlib.contextmanager
def opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """The file opened by Pillow; what goes wrong in the block is a `UserError`. `kind` is "an image" or "a mask"."""
    try:
        with Image.open(path) as image:
            yield image
    except (UserError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: copy it there, or take it off the list") from error
    except Exception as error:  # Pillow raises many kinds of errors for broken or huge files
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(str(path), "the file")
        raise UserError(f"{path} can't be read as {kind} ({reason}): replace the file") from error


def read_image(path: Path, mask_size: tuple[int, int] | None = None) -> np.ndarray:
    """The image in RGB, uint8 [H, W, 3], turned as its EXIF data says unless it fits its mask only as it is stored.

    `mask_size` is the width and height of its mask. Raises `UserError` if it is missing, broken, huge, animated, of
    more than 8 bits a colour, or its mask has another size.
    """
    with opened(path, "an image") as image:
        if getattr(image, "is_animated", False) and image.format != "MPO":  # cameras add a preview to a JPEG
            raise UserError(f"{path} is animated: save one of its frames as a JPEG")
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{path} has more than 8 bits a colour (mode {image.mode}): save it as an 8-bit image")
        image.load()  # which turns a TIFF
        is_on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        if not is_on_its_side or mask_size != image.size or image.width == image.height:
            ImageOps.exif_transpose(image, in_place=True)
        if mask_size not in (None, image.size):
            raise UserError(f"{path} has the size {image.size} but its mask {mask_size}: make them the same")
        return np.array(image.convert("RGB"))


def read_mask(path: Path, colours: Colours, reorder: bool = False) -> np.ndarray:
    """The mask values, uint8 [H, W], of an index mask, or of a mask in the classes' colours.

    `reorder` reads a palette that has the classes' colours in another order by its colours. Raises `UserError` for a
    missing or broken file, one that is no 8-bit image without loss, a value or colour that no class has, and without
    `reorder` a palette in another order, whose indices are not the classes'.
    """
    with opened(path, "a mask") as image:
        kind = "JPEG" if image.info.get("compression") == "jpeg" else image.format
        if kind in LOSSY:
            raise UserError(f"{path} is a {kind}, which changes values near edges: export the masks as PNG")
        if image.mode not in ("P", "L", "RGB", "RGBA"):
            raise UserError(f"{path} is of mode {image.mode}, not an index mask: save class indices as an 8-bit PNG")
        mask = np.array(image)
        shown = [value for value, count in enumerate(image.histogram()) if count] if mask.ndim == 2 else []
        wrong = reordered(image, shown, colours) if image.mode == "P" else None
        if wrong and not reorder:
            raise UserError(
                f"{path} has the classes' colours in another order ({wrong}): run python -m dataset.prepare own "
                f"--data-path {shlex.quote(str(path.parent.parent))} --convert-colour-masks"
            )
        if wrong or image.mode in ("RGB", "RGBA"):
            return colours_to_values(np.array(image.convert("RGB")), colours, path)
    unknown = next((value for value in shown if value not in colours and value != VOID), None)
    if unknown is not None:
        raise UserError(
            f"{path} holds the value {unknown}, which no class has: "
            f"masks hold {min(colours)}-{max(colours)} and {VOID} (void)"
        )
    return mask


@functools.cache
def voc_colours() -> list[tuple[int, int, int]]:
    """VOC's colour of each mask value."""
    from utils.visualize import voc_palette  # here: a run that meets no colours loads no drawing code

    return list(map(tuple, voc_palette().tolist()))


def value_of_colours(colours: Colours) -> dict[tuple[int, int, int], int]:
    """The mask value of each colour; VOC's colour of void, and white, are void where no class has them."""
    void = {voc_colours()[VOID]: VOID, (255, 255, 255): VOID}
    return {**void, **{colour or voc_colours()[value]: value for value, colour in colours.items()}}


def reordered(image: Image.Image, shown: Sequence[int], colours: Colours) -> str | None:
    """What is wrong with the palette of a mask whose indices are not the classes'; None for any other palette.

    That is a palette of the classes' and VOC's colours alone, in another order than these; or one that paints a class
    black, as only the background is, like the web palette that Pillow's convert("P") makes. `shown` are the indices
    that the mask holds.
    """
    table = list(map(tuple, np.reshape(image.getpalette("RGB"), (-1, 3)).tolist()))
    colour_of = {value: table[value] for value in shown if value < len(table)}
    value_of = value_of_colours(colours)
    wrong = {value: value_of[c] for value, c in colour_of.items() if value_of.get(c, value) != value}
    if not wrong or table == voc_colours()[: len(table)] or len(set(colour_of.values())) < len(colour_of):
        return None
    is_known = {*colour_of.values()} <= value_of.keys() and {*table} <= {*value_of, *voc_colours()}
    is_black = any(colour_of[value] == (0, 0, 0) and value != VOID for value in wrong)
    return f"index {min(wrong)} has the colour of class {wrong[min(wrong)]}" if is_black or is_known else None


def colours_to_values(image: np.ndarray, colours: Colours, path: Path) -> np.ndarray:
    """The mask values, uint8 [H, W], of a mask of colours, uint8 [H, W, 3].

    Where no class has a colour of its own, a grey mask whose levels are mask values is an index mask saved in RGB.
    Raises `UserError`, which names `path`, for a colour that no class has.
    """
    is_grey = not any(colours.values()) and (image == image[..., :1]).all()
    if is_grey and set(np.unique(image).tolist()) <= {*colours, VOID}:
        return image[..., 0]
    packed = image.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)  # [H, W], one number a colour
    present, inverse = np.unique(packed, return_inverse=True)
    shown = [(number >> 16, number >> 8 & 255, number & 255) for number in present.tolist()]
    value_of = value_of_colours(colours)
    unknown = next((colour for colour in shown if colour not in value_of), None)
    if unknown is not None:
        raise UserError(
            f"{path} is a colour mask and shows {unknown}, which is no class's colour: write the classes' colours to "
            "labelmap.txt (NAME:RED,GREEN,BLUE a line), or save the mask without smoothing"
        )
    return np.array([value_of[colour] for colour in shown], np.uint8)[inverse].reshape(packed.shape)

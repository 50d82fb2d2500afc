"""Reading images and masks: one rule for file formats, orientation, modes, values, palettes and colours."""

import contextlib
import shlex
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dataset.splits import VOID
from utils.errors import UserError, atomic_write

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg")
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".ppm", ".pgm", ".jp2",
)  # fmt: skip
"""Endings of files, in lower case."""

LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
"""Formats that may change the values of a mask."""

Colours = Mapping[int, tuple[int, int, int] | None]
"""The values that masks may hold besides `VOID`, each with its colour in masks of colours; None: VOC's."""

UNREADABLE = (
    OSError, SyntaxError, ValueError, OverflowError, EOFError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises for files that are broken, or so large that they would fill the memory."""


@contextlib.contextmanager
def opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """The file opened by Pillow; whatever goes wrong in the block is a `UserError`. `kind` is "image" or "mask"."""
    try:
        with Image.open(path) as image:
            yield image
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: copy the {kind} there or take the image off the list") from error
    except UNREADABLE as error:
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
        if getattr(image, "is_animated", False) and image.format != "MPO":  # cameras add a preview to a JPEG
            raise UserError(f"{path} is animated: save one of its frames as a JPEG")
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{path} has more than 8 bits a colour (mode {image.mode}): save it as an 8-bit image")
        if orientation(image, mask_size) != 1:
            image = ImageOps.exif_transpose(image)
        if mask_size not in (None, image.size):
            one, other = (f"{width} x {height}" for width, height in (image.size, mask_size))
            raise UserError(f"{path} is {one} but its mask is {other}: make them the same size")
        return np.array(image.convert("RGB"))


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


def read_mask(path: Path, colours: Colours, reorder: bool = False) -> np.ndarray:
    """The mask values, uint8 [H, W], of an index mask, or of a mask in the classes' colours.

    Args:
        path: an image of mode P, L, RGB or RGBA without loss, a PNG as a rule.
        colours: the values that it may hold besides `VOID`.
        reorder: read a palette that has the classes' colours in another order by its colours.

    Raises:
        UserError: for a missing or broken file, a JPEG, a value or colour that no class has, and a palette in another
            order, whose indices are not the classes'.
    """
    with opened(path, "mask") as image:
        kind = "JPEG" if image.info.get("compression") == "jpeg" else image.format
        if kind in LOSSY:
            raise UserError(f"{path} is a {kind}, which changes values near edges: export the masks as PNG")
        if image.mode not in ("P", "L", "RGB", "RGBA"):
            raise UserError(f"{path} is of mode {image.mode}, not an index mask: save class indices as an 8-bit PNG")
        wrong = reordered(image, colours) if image.mode == "P" else None
        if wrong and not reorder:
            root = shlex.quote(str(path.parent.parent))
            raise UserError(
                f"{path} has the classes' colours in another order ({wrong}): run python -m dataset.prepare own "
                f"--data-path {root} --convert-colour-masks"
            )
        if wrong or image.mode in ("RGB", "RGBA"):
            return colours_to_values(np.array(image.convert("RGB")), colours, path)
        mask, values = np.array(image), mask_values(image)
    unknown = next((value for value in values if value not in colours and value != VOID), None)
    if unknown is not None:
        raise UserError(
            f"{path} holds the value {unknown}, which no class has: "
            f"masks hold {min(colours)}-{max(colours)} and {VOID} (void)"
        )
    return mask


def mask_values(image: Image.Image) -> list[int]:
    """The values that an image of mode P or L shows, in order."""
    return [value for value, count in enumerate(image.histogram()) if count]


def value_of_colours(colours: Colours) -> dict[tuple[int, int, int], int]:
    """The mask value of each colour; VOC's colour of void, and white, are void where no class has them."""
    from utils.visualize import voc_palette  # here as below: most runs meet no mask of colours

    palette = list(map(tuple, voc_palette().tolist()))
    return {palette[VOID]: VOID, (255, 255, 255): VOID, **{c or palette[value]: value for value, c in colours.items()}}


def reordered(image: Image.Image, colours: Colours) -> str | None:
    """What is wrong with the palette of a mask whose indices are not the classes'; None for any other palette.

    That is a palette of the classes' and VOC's colours alone, in another order than these; or one that paints a class
    black, as only the background is, like the web palette that Pillow's convert("P") makes.
    """
    from utils.visualize import voc_palette

    table = list(map(tuple, np.reshape(image.getpalette("RGB"), (-1, 3)).tolist()))
    colour_of = {value: table[value] for value in mask_values(image) if value < len(table)}
    value_of = value_of_colours(colours)
    wrong = {value: value_of[c] for value, c in colour_of.items() if value_of.get(c, value) != value}
    is_voc = table == list(map(tuple, voc_palette()[: len(table)].tolist()))
    if not wrong or is_voc or len(set(colour_of.values())) < len(colour_of):
        return None
    is_known = {*colour_of.values()} <= value_of.keys()
    is_only = set(table) <= {*value_of, *value_of_colours(dict.fromkeys(range(256)))}
    is_black = any(colour_of[value] == (0, 0, 0) and value != VOID for value in wrong)
    value = min(wrong)
    return f"index {value} has the colour of class {wrong[value]}" if is_black or (is_known and is_only) else None


def colours_to_values(image: np.ndarray, colours: Colours, path: Path) -> np.ndarray:
    """The mask values, uint8 [H, W], of a mask of colours, uint8 [H, W, 3].

    Where no class has a colour of its own, a grey mask whose levels are mask values is an index mask saved in RGB.

    Args:
        image: the mask.
        colours: the colour of each value; void has VOC's.
        path: named in the message.

    Raises:
        UserError: for a colour that no class has.
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


def convert_colour_mask(path: Path, colours: Colours, keep: Path) -> bool:
    """Makes an index mask, a PNG, of the mask of colours at `path`, and moves the original to the folder `keep`.

    Returns:
        Whether it was a mask of colours, or a palette in another order. Raises `UserError` as `read_mask` does.
    """
    from utils.visualize import save_index_png

    mask = read_mask(path, colours, reorder=True)
    with opened(path, "mask") as image:
        if image.mode in ("P", "L") and np.array_equal(np.array(image), mask):
            return False
    keep.mkdir(exist_ok=True)
    if not (keep / path.name).exists():  # else an interrupted run has kept it already
        with atomic_write(keep / path.name) as temporary:
            temporary.write_bytes(path.read_bytes())
    save_index_png(mask, path.with_suffix(".png"))
    if path.suffix != ".png":
        path.unlink()
    return True

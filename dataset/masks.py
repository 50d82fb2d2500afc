"""Index masks and colour masks: the colour map of VOC, and the way back from colours to indices."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.files import save
from dataset.splits import VOID
from utils.errors import UserError


def voc_palette() -> list[int]:
    """The 256 colours of VOC, flat: bit 3 k + c of a mask value is bit 7 - k of its channel c."""
    value = np.arange(256)[:, None]
    channel = np.arange(3)
    return sum(((value >> (3 * k + channel) & 1) << (7 - k)) for k in range(8)).ravel().tolist()


def save_mask(mask: np.ndarray, path: Path) -> None:
    """Writes uint8 [H, W] mask values as a PNG of mode P in VOC's colours: what one looks at and what code reads."""
    image = Image.fromarray(mask)
    image.putpalette(voc_palette())
    save(image, path)


def colours_to_values(colours: np.ndarray, known_values: Collection[int], path: Path) -> np.ndarray:
    """The mask values, uint8 [H, W], of a colour mask, uint8 [H, W, 3].

    Colours are those of VOC's map, where a class has the colour of its mask value and void is (224, 224, 192). A
    grey mask whose levels are themselves known values is an index mask that was saved as RGB, and is taken as such.

    Args:
        known_values: the values that may occur besides `VOID`.
        path: named in the message.

    Raises:
        UserError: for a colour that no class has.
    """
    packed = colours.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)  # [H, W], one number a colour
    present = np.unique(packed)
    values = np.array(sorted({*known_values, VOID}))
    palette = np.array(voc_palette(), np.int32).reshape(256, 3)[values] @ np.array([1 << 16, 1 << 8, 1], np.int32)
    grey = values * 0x010101
    for table in (palette, grey):
        if np.isin(present, table).all():
            order = np.argsort(table)
            return values[order][np.searchsorted(table[order], packed)].astype(np.uint8)
    stranger = int(present[~np.isin(present, palette)][0])
    red, green, blue = stranger >> 16, stranger >> 8 & 255, stranger & 255
    raise UserError(
        f"{path} shows the colour ({red}, {green}, {blue}), which no class has in VOC's colour map: "
        "save the mask again without smoothing, or as indices"
    )


def convert_colour_mask(path: Path, known_values: Collection[int], keep: Path) -> bool:
    """Makes an index mask of the colour mask at `path`, and moves the colours to the folder `keep`.

    Returns:
        Whether it was a colour mask; any other mask is left as it is.

    Raises:
        UserError: for a file that can't be read, or a colour that no class has; nothing is changed then.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("RGB", "RGBA"):
                return False
            colours = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} can't be read as a mask ({error}): replace the file") from error
    mask = colours_to_values(colours, known_values, path)
    keep.mkdir(exist_ok=True)
    if not (keep / path.name).exists():  # else an interrupted run has kept it already
        save(Image.fromarray(colours), keep / path.name)
    save_mask(mask, path)
    return True

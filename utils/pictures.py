"""Pictures of masks: the VOC colour map, index PNGs, overlays, legends and sheets that compare methods.

A mask is uint8 [H, W] of class numbers, a photo uint8 [H, W, 3] in RGB. What the numbers mean comes in as
`names`.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from utils.errors import UserError, atomic_write

VOID = 255
VOID_COLOUR = (224, 224, 224)  # light grey, for VOC's own colour of 255 looks like one more class
TEXT, MUTED, LINE, PAPER = (56, 56, 56), (128, 128, 128), (176, 176, 176), (255, 255, 255)
CONTOUR = (250, 250, 250)
MARGIN, GAP = 20, 10  # pixels
TITLE_SIZE, HEADING_SIZE, LEGEND_SIZE = 22, 17, 16  # pixels

Prediction = np.ndarray | Mapping[str, np.ndarray]


def read_photo(path: Path) -> np.ndarray:
    """A picture as a person sees it, in RGB: uint8 [H, W, 3].

    It is turned as its EXIF data say, transparent parts are white, 16 bits are scaled to 8, and of several frames the
    first is taken.

    Raises:
        UserError: if it is missing, or no picture that Pillow reads.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I") or picture.mode == "F":
                return np.repeat(_eight_bits(np.asarray(picture), picture.mode)[..., None], 3, axis=2)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return np.array(picture.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give pictures that exist, or their folder") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} can't be read as a picture ({reason}): save it as JPEG or PNG") from error


def _eight_bits(grey: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of 16 bits, of 8 bits in a wider type, or from 0 to 1: uint8 of the same shape."""
    highest = grey.max(initial=0)
    scale = 1 / 257 if highest > 255 or mode.startswith("I;16") else 255 if mode == "F" and highest <= 1 else 1
    return (grey * scale).clip(0, 255).round().astype(np.uint8)


def palette(num_colours: int = 256) -> np.ndarray:
    """The VOC colour map, uint8 [num_colours, 3]; at most 256 colours.

    Bits 0, 1, 2 of a number are the top bits of its red, green and blue; bits 3, 4, 5 the next ones, etc.
    """
    if not 0 < num_colours <= 256:
        raise ValueError(f"a palette has 1 to 256 colours, not {num_colours}")
    number = np.arange(num_colours)[:, None]  # [num_colours, 1]
    channel = np.arange(3)[None]
    colours = np.zeros((num_colours, 3), dtype=np.int64)
    for step in range(3):  # 3 steps use up the 8 bits of a number
        colours |= (number >> (3 * step + channel) & 1) << (7 - step)
    return colours.astype(np.uint8)


def save_index_png(mask: np.ndarray, path: str | os.PathLike) -> None:
    """Write a uint8 [H, W] mask as a palette PNG (mode P, VOC colours) whose pixels are the class numbers.

    A reader never meets half a file: it is written under a temporary name beside `path` and then renamed.
    """
    _check_mask(mask)
    path = Path(path)
    picture = Image.fromarray(mask)
    picture.putpalette(palette().tobytes())
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def colourise(mask: np.ndarray) -> np.ndarray:
    """uint8 [H, W] -> uint8 [H, W, 3] in the VOC colours, except that void (255) is plain light grey."""
    _check_mask(mask)
    return _colours()[mask]


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    opacity: float = 0.6,
    ignore: Collection[int] = (0, VOID),
    faded: np.ndarray | None = None,
) -> np.ndarray:
    """A mask laid over its photo, with thin light contours between regions: uint8 [H, W, 3].

    Args:
        image: uint8 [H, W, 3].
        mask: uint8 [H, W].
        opacity: share of the class colour, 0 to 1. The photo below is light grey, so that colours stay true.
        ignore: mask values that get no colour; the photo shows there.
        faded: bool [H, W] or None: pixels that do not count. The photo is bleached there, whatever the mask
            says.

    Raises ValueError for arrays of another type, or of sizes that differ.
    """
    _check_image(image, mask)
    plain = np.isin(mask, list(ignore))
    grey = image.mean(axis=2, keepdims=True)
    # Black parts of a photo would make every class colour the same dark one: begin at a quarter of white.
    drawn = np.where(plain[..., None], image, (1 - opacity) * (64 + 0.75 * grey) + opacity * _colours()[mask])
    region = np.where(plain, -1, mask.astype(np.int16))
    if faded is not None:
        drawn = np.where(faded[..., None], 0.3 * grey + 0.7 * 255, drawn)
        region = np.where(faded, -2, region)
    edge = _edges(region, thickness=max(1, round(max(mask.shape) / 400)))
    return np.where(edge[..., None], CONTOUR, drawn).round().astype(np.uint8)


def legend(
    values: Sequence[int],
    names: Mapping[int, str],
    width: int,
    marked: Collection[int] = frozenset(),
    counts: Mapping[int, int] | None = None,
    note: str = "* unseen class",
    footnote: str = "",
) -> Image.Image:
    """Colour swatches with names, in as many rows as `width` pixels ask for.

    Args:
        values: class numbers, in the order to show; one without a name is shown as its number.
        marked: those that get a star; where one is shown, `note` says what the star means.
        counts: pixels of each class; adds its share of their sum, in percent.
        footnote: small text at the end.
    """
    font, small = _font(LEGEND_SIZE), _font(LEGEND_SIZE - 2)
    total = sum(counts.values()) if counts else 0
    entries = []
    for value in values:
        share = 100 * counts.get(value, 0) / total if total else 0
        share = "" if not total else " < 0.1 %" if 0 < share < 0.05 else f" {share:.1f} %"
        text = f"{names.get(value, value)}{'*' if value in marked else ''}{share}"
        entries.append((tuple(_colours()[value].tolist()), text, font, TEXT))
    small_print = [note] * any(value in marked for value in values) + [footnote]
    entries += [(None, text, small, MUTED) for text in small_print if text]

    swatch, height = LEGEND_SIZE, LEGEND_SIZE + GAP
    places, left, top = [], 0, 0
    for colour, text, text_font, _ in entries:
        needed = round(text_font.getlength(text)) + (swatch + GAP // 2 if colour else 0)
        if left and left + needed > width:
            left, top = 0, top + height
        places.append((left, top))
        left += needed + 2 * GAP
    picture = Image.new("RGB", (max(1, width), top + height), PAPER)
    draw = ImageDraw.Draw(picture)
    for (colour, text, text_font, ink), (left, top) in zip(entries, places):
        if colour:
            draw.rectangle((left, top, left + swatch - 1, top + swatch - 1), fill=colour, outline=LINE)
            left += swatch + GAP // 2
        draw.text((left, top + swatch // 2), text, fill=ink, font=text_font, anchor="lm")
    return picture


def comparison(
    image: np.ndarray,
    truth: np.ndarray | None,
    prediction: Prediction,
    names: Mapping[int, str],
    marked: Collection[int] = frozenset(),
    title: str = "",
    **options,
) -> Image.Image:
    """One picture: photo | ground truth | prediction(s), and a legend; the arguments are contact_sheet's."""
    return contact_sheet([(image, truth, prediction)], names, marked, title, **options)


def contact_sheet(
    rows: Sequence[tuple[np.ndarray, np.ndarray | None, Prediction]],
    names: Mapping[int, str],
    marked: Collection[int] = frozenset(),
    title: str = "",
    ignore: Collection[int] = (0, VOID),
    fade: bool = True,
    sides: tuple[int, int] = (256, 512),
    opacity: float = 0.6,
    note: str = "* unseen class",
    shares: bool = False,
) -> Image.Image:
    """Several pictures, one a row, as photo | ground truth | prediction(s), with headings and one legend.

    Args:
        rows: (photo, truth, prediction). The truth is None where nobody knows it; that column is missing.
            The prediction is a mask, or {heading: mask} to show several methods side by side.
        names: class number -> name.
        marked: class numbers that get a star in the legend; `note` explains it.
        ignore: values without a colour. By default VOC's background and void.
        fade: bleach the pixels whose truth is in `ignore`, in every column but the photo, for they do not
            count in the evaluation: a network that cannot say "background" paints something there. False
            shows what.
        sides: pixels. Columns are at least the first wide: a narrower picture is enlarged by an integer, as
            far as the second allows. A picture whose longer side exceeds the second is shrunk.
        opacity: of the class colours over the photo.
        shares: the legend also says which share of the pixels each class has in the predictions, most first.

    The legend has the classes that can be seen, in the truth or in a prediction. Raises ValueError without
    rows, or if rows differ in their columns.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    tables = [_columns(truth, prediction) for _, truth, prediction in rows]
    if any(list(table) != list(tables[0]) for table in tables):
        raise ValueError(f"rows differ in their columns: {[list(table) for table in tables]}")
    cells, shown, any_faded, counts = [], set(), False, np.zeros(256, np.int64)
    for (image, truth, _), masks in zip(rows, tables):
        for mask in masks.values():
            _check_image(image, mask)
        faded = np.isin(truth, list(ignore)) if fade and truth is not None else None
        cells.append([_resize(image, sides, Image.Resampling.BICUBIC)])
        for mask in masks.values():
            shown |= set(np.unique(mask if faded is None else mask[~faded]).tolist()) - set(ignore)
            # Resized first, so that contours are thin and sharp whatever the size of the photo.
            small_fade = None if faded is None else _resize(faded.view(np.uint8), sides).astype(bool)
            cells[-1].append(overlay(cells[-1][0], _resize(mask, sides), opacity, ignore, small_fade))
        counts += np.bincount(list(masks.values())[-1].ravel(), minlength=256)
        any_faded = any_faded or (faded is not None and bool(faded.any()))
    share = {value: int(count) for value, count in enumerate(counts)}
    order = sorted(shown, key=share.get, reverse=True) if shares else sorted(shown)
    footnote = "bleached: not evaluated" if any_faded else ""
    return _page(
        ["photo", *tables[0]],
        cells,
        title,
        sides[0],
        lambda width: legend(order, names, width, marked, share if shares else None, note, footnote),
    )


def _page(
    headings: Sequence[str],
    cells: Sequence[Sequence[np.ndarray]],
    title: str,
    min_width: int,
    make_legend: Callable[[int], Image.Image],
) -> Image.Image:
    """Rows of equally wide cells below their headings; title above, legend (from its width) below."""
    width = max(min_width, max(cell.shape[1] for row in cells for cell in row))
    inner = len(headings) * (width + GAP) - GAP
    key = make_legend(inner)
    top = MARGIN + (TITLE_SIZE + 2 * GAP if title else 0)
    rows_top = top + HEADING_SIZE + GAP
    heights = [max(cell.shape[0] for cell in row) for row in cells]
    legend_top = rows_top + sum(heights) + GAP * len(cells) + GAP // 2
    page = Image.new("RGB", (inner + 2 * MARGIN, legend_top + key.height - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        font = _font(TITLE_SIZE)
        draw.text((MARGIN, MARGIN), _fitting(title, font, inner), fill=TEXT, font=font)
    font = _font(HEADING_SIZE)
    for column, heading in enumerate(headings):
        left = MARGIN + column * (width + GAP)
        draw.text((left + width // 2, top), _fitting(heading, font, width), fill=TEXT, font=font, anchor="ma")
        row_top = rows_top
        for row, height in zip(cells, heights):
            page.paste(Image.fromarray(row[column]), (left + (width - row[column].shape[1]) // 2, row_top))
            row_top += height + GAP
    page.paste(key, (MARGIN, legend_top))
    return page


def _columns(truth: np.ndarray | None, prediction: Prediction) -> dict[str, np.ndarray]:
    """{heading: mask} of one row, without the photo."""
    predictions = dict(prediction) if isinstance(prediction, Mapping) else {"prediction": prediction}
    return predictions if truth is None else {"ground truth": truth, **predictions}


def _resize(picture: np.ndarray, sides: tuple[int, int], how=Image.Resampling.NEAREST) -> np.ndarray:
    """Enlarged by a whole number to be sides[0] wide, or shrunk until no side exceeds sides[1]; uint8."""
    height, width = picture.shape[:2]
    longer = max(height, width)
    # Whole numbers keep the pixels of a small mask square; a thin tall picture may not grow without bound.
    factor = min(-(-sides[0] // width), sides[1] // longer) if longer < sides[1] else sides[1] / longer
    if factor == 1:
        return picture
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(Image.fromarray(picture).resize(size, how))


def _edges(region: np.ndarray, thickness: int) -> np.ndarray:
    """bool [H, W]: pixels with another region within `thickness` pixels to the right or below."""
    edge = np.zeros(region.shape, dtype=bool)
    for step in range(1, thickness + 1):
        edge[:, :-step] |= region[:, :-step] != region[:, step:]
        edge[:-step] |= region[:-step] != region[step:]
    return edge


def _colours() -> np.ndarray:
    colours = palette()
    colours[VOID] = VOID_COLOUR
    return colours


def _font(size: int):
    return ImageFont.load_default(size)  # it comes with Pillow, so pictures look the same everywhere


def _fitting(text: str, font, width: int) -> str:
    """The text, cut short with dots if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _check_mask(mask: np.ndarray) -> None:
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(f"a mask is uint8 [H, W], not {mask.dtype} {list(mask.shape)}")


def _check_image(image: np.ndarray, mask: np.ndarray) -> None:
    _check_mask(mask)
    if image.dtype != np.uint8 or image.shape != (*mask.shape, 3):
        raise ValueError(
            f"a photo over a mask {list(mask.shape)} is uint8 {[*mask.shape, 3]}, not {image.dtype} {list(image.shape)}"
        )

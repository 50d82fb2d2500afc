"""Masks as images: the VOC palette, index PNGs, overlays, and sheets that compare images row by row.

A mask is uint8 [H, W] of mask values, an image uint8 [H, W, 3] in RGB. What the values mean comes in as `names`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import Dataset

from utils.errors import atomic_write
from utils.metrics import evaluation_mode

VOID_COLOUR = (224, 224, 224)  # light grey: VOC's own colour of 255 looks like one more class
TEXT, MUTED, LINE, PAPER = (56, 56, 56), (128, 128, 128), (176, 176, 176), (255, 255, 255)
CONTOUR = (250, 250, 250)
OPACITY = 0.6  # of a class colour over its image
MARGIN, GAP = 20, 10  # pixels
TITLE_SIZE, HEADING_SIZE, LEGEND_SIZE = 22, 17, 16  # pixels
COLUMN = 256  # pixels; a narrower image is enlarged
UNSEEN_NOTE = "* not labelled in training"
MAX_SEARCHED = 200  # images that `images_showing` opens at most

Row = tuple[np.ndarray, Mapping[str, np.ndarray]]
"""An image and {heading: mask}, such as {"label": ..., "prediction": ...}."""


def voc_palette() -> np.ndarray:
    """The VOC colour map, uint8 [256, 3].

    Bits 0, 1, 2 of a value are the top bits of its red, green and blue; bits 3, 4, 5 the next ones, and so on.
    """
    value, channel = np.arange(256)[:, None], np.arange(3)[None]
    colours = np.zeros((256, 3), dtype=np.int64)
    for step in range(3):  # 3 steps use up the 8 bits of a value
        colours |= (value >> (3 * step + channel) & 1) << (7 - step)
    return colours.astype(np.uint8)


COLOURS = voc_palette()
COLOURS[255] = VOID_COLOUR


def save_index_png(mask: np.ndarray, path: Path) -> None:
    """Writes a mask, uint8 [H, W], as a palette PNG in VOC's colours. Raises `UserError` if the disk refuses it."""
    image = Image.fromarray(mask)
    image.putpalette(voc_palette().tobytes())
    save_image(image, path)


def save_image(image: Image.Image, path: Path) -> None:
    """Writes an image whole or not at all, and its folder. Raises `UserError` if the disk refuses it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        image.save(temporary, format=Image.registered_extensions()[path.suffix], quality=90)


def overlay(image: np.ndarray, mask: np.ndarray, ignore: Collection[int] = (0, 255)) -> np.ndarray:
    """A mask laid over its image, with thin light contours between regions: uint8 [H, W, 3].

    Args:
        image: uint8 [H, W, 3].
        mask: uint8 [H, W].
        ignore: mask values that get no colour; the image shows there.
    """
    plain = np.isin(mask, list(ignore))
    grey = image.mean(axis=2, keepdims=True)
    # Black parts of an image would make every class colour the same dark one: begin at a quarter of white.
    drawn = np.where(plain[..., None], image, (1 - OPACITY) * (64 + 0.75 * grey) + OPACITY * COLOURS[mask])
    region = np.where(plain, -1, mask.astype(np.int16))
    edge = np.zeros(region.shape, dtype=bool)
    for step in range(1, max(1, round(max(mask.shape) / 400)) + 1):  # thickness in pixels
        edge[:, :-step] |= region[:, :-step] != region[:, step:]
        edge[:-step] |= region[:-step] != region[step:]
    return np.where(edge[..., None], CONTOUR, drawn).round().astype(np.uint8)


def contact_sheet(
    rows: Sequence[Row], names: Mapping[int, str], title: str = "", ignore: Collection[int] = (0, 255),
    longest: int = 512,
) -> Image.Image:  # fmt: skip
    """Several images, a row each, and their masks laid over them, with headings and one legend.

    Pixels whose "label" is void are not evaluated, and have no colour in any mask.

    Args:
        rows: with the same headings, see `Row`.
        names: mask value -> name, in the order of the legend; it shows the values that occur. "*" marks unseen ones.
        title: above all rows.
        ignore: values without a colour. By default VOC's background and void.
        longest: pixels; an image whose longer side exceeds it is shrunk.
    """
    cells, shown = [], set()
    for image, masks in rows:
        cells.append([_resize(image, longest, Image.Resampling.BICUBIC)])
        for mask in masks.values():
            mask = np.where(masks.get("label", mask) == 255, np.uint8(255), mask)
            shown |= set(np.unique(mask).tolist()) - set(ignore)
            # Resized first, so that contours are thin and sharp whatever the size of the image.
            cells[-1].append(overlay(cells[-1][0], _resize(mask, longest), ignore))
    order = [value for value in names if value in shown] + sorted(shown - set(names))
    legend = [(value, names.get(value, str(value))) for value in order]
    if any("*" in name for _, name in legend):
        legend.append((None, UNSEEN_NOTE))
    return _page(["image", *rows[0][1]], cells, title, legend)


def _page(headings, cells, title: str, legend) -> Image.Image:
    """Rows of equally wide cells below their headings; the title above, the legend below."""
    width = max(COLUMN, max(cell.shape[1] for row in cells for cell in row))
    inner = len(headings) * (width + GAP) - GAP
    foot = _legend(legend, inner)
    top = MARGIN + (TITLE_SIZE + 2 * GAP if title else 0)
    row_top = top + HEADING_SIZE + GAP
    heights = [max(cell.shape[0] for cell in row) for row in cells]
    foot_top = row_top + sum(heights) + GAP * len(cells) + GAP // 2
    page = Image.new("RGB", (inner + 2 * MARGIN, foot_top + foot.height - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, fill=TEXT, font=_font(TITLE_SIZE))
    centres = [MARGIN + column * (width + GAP) + width // 2 for column in range(len(headings))]
    for heading, centre in zip(headings, centres):
        draw.text((centre, top), heading, fill=TEXT, font=_font(HEADING_SIZE), anchor="ma")
    for row, height in zip(cells, heights):
        for cell, centre in zip(row, centres):
            page.paste(Image.fromarray(cell), (centre - cell.shape[1] // 2, row_top))
        row_top += height + GAP
    page.paste(foot, (MARGIN, foot_top))
    return page


def _legend(entries: Sequence[tuple[int | None, str]], width: int) -> Image.Image:
    """A swatch and a name for each mask value, grey text for None, in as many rows as `width` pixels ask for."""
    swatch, font, places, left, top = LEGEND_SIZE, _font(LEGEND_SIZE), [], 0, 0
    for value, text in entries:
        needed = round(font.getlength(text)) + (0 if value is None else swatch + GAP // 2)
        if left and left + needed > width:
            left, top = 0, top + swatch + GAP
        places.append((left, top))
        left += needed + 2 * GAP
    image = Image.new("RGB", (max(1, width), top + swatch + GAP), PAPER)
    draw = ImageDraw.Draw(image)
    for (value, text), (left, top) in zip(entries, places):
        if value is not None:
            colour = tuple(COLOURS[value].tolist())
            draw.rectangle((left, top, left + swatch - 1, top + swatch - 1), fill=colour, outline=LINE)
            left += swatch + GAP // 2
        draw.text((left, top + swatch // 2), text, fill=MUTED if value is None else TEXT, font=font, anchor="lm")
    return image


def _resize(image: np.ndarray, longest: int, how=Image.Resampling.NEAREST) -> np.ndarray:
    """Enlarged by a whole number to be `COLUMN` wide, or shrunk until no side exceeds `longest`; uint8."""
    height, width = image.shape[:2]
    longer = max(height, width)
    # Whole numbers keep the pixels of a small mask square; a thin tall image may not grow without bound.
    factor = min(-(-COLUMN // width), longest // longer) if longer < longest else longest / longer
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return image if factor == 1 else np.asarray(Image.fromarray(image).resize(size, how))


def _font(size: int):
    return ImageFont.load_default(size)  # it comes with Pillow, so sheets look the same everywhere


# What a network predicts for images of a data set


def images_showing(dataset: Dataset, classes: Iterable[int], share: float = 0.02) -> list[int]:
    """Indices of the first image that shows each of `classes` on more than `share` of its pixels.

    Args:
        dataset: gives image, label [H, W] and index.
        classes: class indices. One that none of the first images shows is left out.
    """
    wanted, found = set(classes), []
    for index in range(min(len(dataset), MAX_SEARCHED)):
        label = dataset[index][1]
        shown = {c for c in wanted if (label == c).float().mean() > share}
        if shown:
            wanted -= shown
            found.append(index)
        if not wanted:
            break
    return found or list(range(min(len(dataset), 4)))


def prediction_rows(model: nn.Module, dataset: Dataset, split: Any, indices: Iterable[int]) -> list[Row]:
    """Label and prediction of some images of an evaluation data set.

    Args:
        model: see `utils.metrics.predictions`.
        dataset: gives image uint8 [3, H, W], label [H, W] and index.
        split: its `to_mask` turns class indices into mask values.
        indices: of the images.
    """
    rows, device = [], next(model.parameters()).device
    with torch.inference_mode(), evaluation_mode(model):
        for index in indices:
            image, label, _ = dataset[index]
            logits = model.pixel_logits(image[None].to(device))
            (prediction,) = logits.map_pixels(lambda block: (block.argmax(dim=1),))
            masks = (split.to_mask(classes.cpu().numpy()) for classes in (label, prediction[0]))
            rows.append((image.permute(1, 2, 0).numpy(), dict(zip(("label", "prediction"), masks))))
    return rows

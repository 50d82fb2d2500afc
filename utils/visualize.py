"""Masks as images: the VOC palette, index PNGs, overlays, and sheets that compare images row by row.

A mask is uint8 [H, W] of mask values, an image uint8 [H, W, 3] in RGB. What the values mean comes in as `names`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from utils.errors import atomic_write
from utils.metrics import predictions

TEXT, MUTED, LINE, PAPER = (56, 56, 56), (128, 128, 128), (176, 176, 176), (255, 255, 255)
CONTOUR = (250, 250, 250)
OPACITY = 0.6  # of a class colour over its image
MARGIN, GAP = 20, 10  # pixels
TITLE_SIZE, HEADING_SIZE, LEGEND_SIZE = 22, 17, 16  # pixels
COLUMN = 256  # pixels; a narrower image is enlarged

Row = tuple[np.ndarray, Mapping[str, np.ndarray]]  # image, {heading: mask} such as {"label": ..., "prediction": ...}


def voc_palette() -> np.ndarray:
    """The VOC colour map, uint8 [256, 3].

    Bits 0, 1, 2 of a value are the top bits of its red, green and blue; bits 3, 4, 5 the next ones, and so on.
    """
    value, channel = np.arange(256)[:, None], np.arange(3)[None]
    steps = [(value >> (3 * step + channel) & 1) << (7 - step) for step in range(3)]  # which use up 8 bits of a value
    return sum(steps).astype(np.uint8)


COLOURS = voc_palette()
COLOURS[255] = 224  # light grey: VOC's own colour of 255 looks like one more class


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
    """A mask, uint8 [H, W], laid over its image, with thin light contours between regions: uint8 [H, W, 3].

    The image shows where the mask has a value of `ignore`.
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

    Pixels whose "label" is void are not evaluated, and have no colour in any mask. All `rows` have the same headings,
    see `Row`. `names`, mask value -> name, are in the order of the legend, which shows those that occur; "*" marks
    unseen ones. `title` stands above. `ignore` are the values without a colour, by default VOC's background and void.
    An image whose longer side exceeds `longest` pixels is shrunk.
    """
    cells, shown = [], set()
    for image, masks in rows:
        cells.append([_resize(image, longest, Image.Resampling.BICUBIC)])
        for mask in masks.values():
            mask = np.where(masks.get("label", mask) == 255, np.uint8(255), mask)
            shown |= set(np.unique(mask).tolist()) - set(ignore)
            # Resized first, so that contours are thin and sharp whatever the size of the image.
            cells[-1].append(overlay(cells[-1][0], _resize(mask, longest), ignore))
    legend = [(name, value) for value, name in names.items() if value in shown]
    if any("*" in name for name, _ in legend):
        legend.append(("* not labelled in training", None))
    return _page(["image", *rows[0][1]], cells, title, legend)


def _page(headings: list[str], cells: list[list[np.ndarray]], title: str, legend: list) -> Image.Image:
    """Rows of equally wide cells below their headings; the title above, the legend of (name, mask value) below."""
    step = GAP + max(COLUMN, max(cell.shape[1] for row in cells for cell in row))
    centres = [MARGIN + column * step + (step - GAP) // 2 for column in range(len(headings))]
    width = 2 * MARGIN + len(headings) * step - GAP
    room = sum(GAP + max(cell.shape[0] for cell in row) for row in cells) + 200 + 2 * LEGEND_SIZE * len(legend)
    page = Image.new("RGB", (width, room), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default  # it comes with Pillow: sheets look the same everywhere
    draw.text((MARGIN, MARGIN), title, fill=TEXT, font=font(TITLE_SIZE))
    top = MARGIN + (TITLE_SIZE + 2 * GAP if title else 0)
    for heading, centre in zip(headings, centres):
        draw.text((centre, top), heading, fill=TEXT, font=font(HEADING_SIZE), anchor="ma")
    top += HEADING_SIZE + GAP
    for row in cells:
        for cell, centre in zip(row, centres):
            page.paste(Image.fromarray(cell), (centre - cell.shape[1] // 2, top))
        top += GAP + max(cell.shape[0] for cell in row)
    left, top = MARGIN, top + GAP // 2
    for name, value in legend:  # a swatch and a name; without a mask value, grey text
        swatch = 0 if value is None else LEGEND_SIZE + GAP // 2
        needed = swatch + round(font(LEGEND_SIZE).getlength(name))
        if left > MARGIN and left + needed > width - MARGIN:
            left, top = MARGIN, top + LEGEND_SIZE + GAP
        if swatch:
            corner = (left + LEGEND_SIZE - 1, top + LEGEND_SIZE - 1)
            draw.rectangle((left, top, *corner), fill=tuple(COLOURS[value].tolist()), outline=LINE)
        place, colour = (left + swatch, top + LEGEND_SIZE // 2), TEXT if swatch else MUTED
        draw.text(place, name, fill=colour, font=font(LEGEND_SIZE), anchor="lm")
        left += needed + 2 * GAP
    return page.crop((0, 0, width, top + LEGEND_SIZE + MARGIN))


def _resize(image: np.ndarray, longest: int, how=Image.Resampling.NEAREST) -> np.ndarray:
    """Enlarged by a whole number to be `COLUMN` wide, or shrunk until no side exceeds `longest`; uint8."""
    height, width = image.shape[:2]
    longer = max(height, width)
    # Whole numbers keep the pixels of a small mask square; a thin tall image may not grow without bound.
    factor = min(-(-COLUMN // width), longest // longer) if longer < longest else longest / longer
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return image if factor == 1 else np.asarray(Image.fromarray(image).resize(size, how))


# What a network predicts for images of a data set


def images_showing(dataset: Dataset, classes: Iterable[int], share: float = 0.02) -> list[int]:
    """Indices of the first image that shows each of `classes` on more than `share` of its pixels.

    `dataset` gives image, label [H, W] and index. A class that none of the first images shows is left out.
    """
    wanted, found = set(classes), []
    for index in range(min(len(dataset), 200)):
        label = dataset[index][1]
        shown = {c for c in wanted if (label == c).float().mean() > share}
        wanted -= shown
        found += [index] if shown else []
        if not wanted:
            break
    return found or list(range(min(len(dataset), 4)))


def prediction_rows(model: nn.Module, dataset: Dataset, split: Any, indices: Iterable[int]) -> list[Row]:
    """Label and prediction of images of an evaluation data set, see `utils.metrics.predictions`.

    `split.to_mask` turns class indices into mask values.
    """
    rows, loader = [], DataLoader(Subset(dataset, list(indices)))
    for image, label, _, logits in predictions(model, loader, next(model.parameters()).device):
        (prediction,) = logits.map_pixels(lambda block: (block.argmax(dim=1),))
        masks = (split.to_mask(classes[0].cpu().numpy()) for classes in (label, prediction))
        rows.append((image[0].permute(1, 2, 0).cpu().numpy(), dict(zip(("label", "prediction"), masks))))
    return rows

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

from utils.errors import UserError, atomic_write
from utils.metrics import predict_logits

VOID_COLOUR = (224, 224, 224)  # light grey: VOC's own colour of 255 looks like one more class
TEXT, MUTED, LINE, PAPER = (56, 56, 56), (128, 128, 128), (176, 176, 176), (255, 255, 255)
CONTOUR = (250, 250, 250)
OPACITY = 0.6  # of a class colour over its image
MARGIN, GAP = 20, 10  # pixels
TITLE_SIZE, HEADING_SIZE, LEGEND_SIZE = 22, 17, 16  # pixels
UNSEEN_NOTE, FADED_NOTE = "* not labelled in training", "bleached: not evaluated"
NUM_EXTREMES = 3
"""Images with the worst, and with the best, mean IoU that are drawn at an evaluation."""

MAX_SEARCHED = 200  # images that `images_showing` opens at most

Row = tuple[np.ndarray, np.ndarray | None, np.ndarray | Mapping[str, np.ndarray]]
"""Image, label or None, and prediction: a mask, or {heading: mask} for several methods."""


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            image.save(temporary, format=Image.registered_extensions()[path.suffix], quality=90)
    except OSError as error:
        raise UserError(
            f"{path} can't be written ({error.strerror}): choose another folder, or free some disk"
        ) from error


def overlay(
    image: np.ndarray, mask: np.ndarray, ignore: Collection[int] = (0, 255), faded: np.ndarray | None = None
) -> np.ndarray:
    """A mask laid over its image, with thin light contours between regions: uint8 [H, W, 3].

    Args:
        image: uint8 [H, W, 3].
        mask: uint8 [H, W].
        ignore: mask values that get no colour; the image shows there.
        faded: bool [H, W]: pixels that are not evaluated. The image is bleached there, whatever the mask says.
    """
    plain = np.isin(mask, list(ignore))
    grey = image.mean(axis=2, keepdims=True)
    # Black parts of an image would make every class colour the same dark one: begin at a quarter of white.
    drawn = np.where(plain[..., None], image, (1 - OPACITY) * (64 + 0.75 * grey) + OPACITY * COLOURS[mask])
    region = np.where(plain, -1, mask.astype(np.int16))
    if faded is not None:
        drawn = np.where(faded[..., None], 0.3 * grey + 0.7 * 255, drawn)
        region = np.where(faded, -2, region)
    edge = np.zeros(region.shape, dtype=bool)
    for step in range(1, max(1, round(max(mask.shape) / 400)) + 1):  # thickness in pixels
        edge[:, :-step] |= region[:, :-step] != region[:, step:]
        edge[:-step] |= region[:-step] != region[step:]
    return np.where(edge[..., None], CONTOUR, drawn).round().astype(np.uint8)


def contact_sheet(
    rows: Sequence[Row], names: Mapping[int, str], title: str = "", ignore: Collection[int] = (0, 255),
    fade: bool = True, sides: tuple[int, int] = (256, 512),
) -> Image.Image:  # fmt: skip
    """Several images, a row each, as image | label | prediction(s), with headings and one legend.

    Args:
        rows: of one kind, see `Row`. Without a label that column is missing.
        names: mask value -> name, in the order of the legend; it shows the values that occur. "*" marks unseen ones.
        ignore: values without a colour. By default VOC's background and void.
        fade: bleach the pixels whose label is in `ignore`, which are not evaluated, in the label and the predictions.
        sides: pixels. A column is at least the first wide: a narrower image is enlarged by a whole number as far as
            the second allows. An image whose longer side exceeds the second is shrunk.
    """
    cells, shown, any_faded, headings = [], set(), False, []
    for image, label, prediction in rows:
        masks = dict(prediction) if isinstance(prediction, Mapping) else {"prediction": prediction}
        masks = masks if label is None else {"label": label, **masks}
        headings = ["image", *masks]
        faded = np.isin(label, list(ignore)) if fade and label is not None else None
        cells.append([_resize(image, sides, Image.Resampling.BICUBIC)])
        for mask in masks.values():
            shown |= set(np.unique(mask if faded is None else mask[~faded]).tolist()) - set(ignore)
            # Resized first, so that contours are thin and sharp whatever the size of the image.
            small_fade = None if faded is None else _resize(faded.view(np.uint8), sides).astype(bool)
            cells[-1].append(overlay(cells[-1][0], _resize(mask, sides), ignore, small_fade))
        any_faded = any_faded or (faded is not None and bool(faded.any()))
    order = [value for value in names if value in shown] + sorted(shown - set(names))
    entries = [(value, names.get(value, str(value))) for value in order]
    notes = [UNSEEN_NOTE] * any("*" in name for _, name in entries) + [FADED_NOTE] * any_faded
    return _page(headings, cells, title, sides[0], entries, notes)


def _page(headings, cells, title: str, min_width: int, entries, notes) -> Image.Image:
    """Rows of equally wide cells below their headings; the title above, the legend below."""
    width = max(min_width, max(cell.shape[1] for row in cells for cell in row))
    inner = len(headings) * (width + GAP) - GAP
    legend = _legend(entries, notes, inner)
    top = MARGIN + (TITLE_SIZE + 2 * GAP if title else 0)
    row_top = top + HEADING_SIZE + GAP
    heights = [max(cell.shape[0] for cell in row) for row in cells]
    legend_top = row_top + sum(heights) + GAP * len(cells) + GAP // 2
    page = Image.new("RGB", (inner + 2 * MARGIN, legend_top + legend.height - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), _fitting(title, TITLE_SIZE, inner), fill=TEXT, font=_font(TITLE_SIZE))
    centres = [MARGIN + column * (width + GAP) + width // 2 for column in range(len(headings))]
    for heading, centre in zip(headings, centres):
        text = _fitting(heading, HEADING_SIZE, width)
        draw.text((centre, top), text, fill=TEXT, font=_font(HEADING_SIZE), anchor="ma")
    for row, height in zip(cells, heights):
        for cell, centre in zip(row, centres):
            page.paste(Image.fromarray(cell), (centre - cell.shape[1] // 2, row_top))
        row_top += height + GAP
    page.paste(legend, (MARGIN, legend_top))
    return page


def _legend(entries: Sequence[tuple[int, str]], notes: Sequence[str], width: int) -> Image.Image:
    """Colour swatches with names, then notes in small grey text, in as many rows as `width` pixels ask for."""
    swatch, height = LEGEND_SIZE, LEGEND_SIZE + GAP
    items = [(tuple(COLOURS[value].tolist()), text, LEGEND_SIZE) for value, text in entries]
    items += [(None, text, LEGEND_SIZE - 2) for text in notes]
    places, left, top = [], 0, 0
    for colour, text, size in items:
        needed = round(_font(size).getlength(text)) + (swatch + GAP // 2 if colour else 0)
        if left and left + needed > width:
            left, top = 0, top + height
        places.append((left, top))
        left += needed + 2 * GAP
    image = Image.new("RGB", (max(1, width), top + height), PAPER)
    draw = ImageDraw.Draw(image)
    for (colour, text, size), (left, top) in zip(items, places):
        if colour:
            draw.rectangle((left, top, left + swatch - 1, top + swatch - 1), fill=colour, outline=LINE)
            left += swatch + GAP // 2
        draw.text((left, top + swatch // 2), text, fill=TEXT if colour else MUTED, font=_font(size), anchor="lm")
    return image


def _resize(image: np.ndarray, sides: tuple[int, int], how=Image.Resampling.NEAREST) -> np.ndarray:
    """Enlarged by a whole number to be sides[0] wide, or shrunk until no side exceeds sides[1]; uint8."""
    height, width = image.shape[:2]
    longer = max(height, width)
    # Whole numbers keep the pixels of a small mask square; a thin tall image may not grow without bound.
    factor = min(-(-sides[0] // width), sides[1] // longer) if longer < sides[1] else sides[1] / longer
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return image if factor == 1 else np.asarray(Image.fromarray(image).resize(size, how))


def _font(size: int):
    return ImageFont.load_default(size)  # it comes with Pillow, so sheets look the same everywhere


def _fitting(text: str, size: int, width: int) -> str:
    """The text, without what is beyond `width` pixels."""
    while text and _font(size).getlength(text) > width:
        text = text[:-1]
    return text


# What a network predicts for images of a data set, as rows of a sheet


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


class RunSheets:
    """What a run draws at its evaluations, in `images/` of its folder.

    Args:
        folder: of the run.
        dataset: the evaluation images, with their names in `ids`.
        split: the classes; gives `names`, `num_seen`, `to_mask`, `drawing` and, for training labels, `trained`.
    """

    def __init__(self, folder: Path, dataset: Dataset, split: Any):
        self.folder, self.dataset, self.split = folder, dataset, split
        self.indices = images_showing(dataset, range(split.num_seen, len(split.names)))

    def draw_predictions(self, model: nn.Module, step: int, title: str) -> np.ndarray:
        """One sheet with an image for each unseen class, the same ones each time; uint8 [H, W, 3]."""
        return self._save(f"evaluation_{step:06d}", self.rows(model, self.indices), title, self.split)

    def draw_extremes(self, model: nn.Module, per_image: Mapping[str, Sequence]) -> dict[str, str]:
        """A sheet for each of the images with the worst and the best mean IoU; {image: path below the folder}."""
        scored = sorted((score, name) for name, (score, _) in per_image.items() if score is not None)
        count = min(NUM_EXTREMES, len(scored) // 2)
        extremes = {f"worst_{n + 1}": scored[n] for n in range(count)}
        extremes |= {f"best_{n + 1}": scored[-1 - n] for n in range(count)}
        for name, (score, image) in extremes.items():
            rows = self.rows(model, [self.dataset.ids.index(image)])
            self._save(name, rows, f"{image}: mean IoU {score:.1%}", self.split)
        return {image: f"images/{name}.jpg" for name, (_, image) in extremes.items()}

    def draw_pseudo_labels(self, image: torch.Tensor, label: torch.Tensor, step: int, title: str) -> np.ndarray:
        """One sheet of target images uint8 [N, 3, H, W] and their pseudo-labels [N, H, W]; uint8 [H, W, 3]."""
        trained = self.split.trained
        masks = trained.to_mask(label.cpu().numpy())
        images = image.permute(0, 2, 3, 1).cpu().numpy()
        rows = [(image, None, {"pseudo-labels": mask}) for image, mask in zip(images, masks)]
        return self._save(f"pseudo_labels_{step:06d}", rows, title, trained)

    def rows(self, model: nn.Module, indices: Sequence[int]) -> list[Row]:
        """A row with label and prediction for each image."""
        rows = []
        for index in indices:
            image, label, _ = self.dataset[index]
            (prediction,) = predict_logits(model, image[None]).map_pixels(lambda logits: (logits.argmax(dim=1),))
            masks = (self.split.to_mask(classes.cpu().numpy()) for classes in (label, prediction[0]))
            rows.append((image.permute(1, 2, 0).numpy(), *masks))
        return rows

    def _save(self, name: str, rows: Sequence[Row], title: str, split: Any) -> np.ndarray:
        sheet = contact_sheet(rows, title=title, **split.drawing)
        save_image(sheet, self.folder / "images" / f"{name}.jpg")
        return np.asarray(sheet)

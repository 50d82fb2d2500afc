"""Joint transforms of an image and its label: one warp of the bytes that Pillow decoded."""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from dataset.splits import VOID

FILL = {"square": (0, 0, 0), "crop": (124, 116, 104)}
"""The colour outside the image for each `resize`; the label is `VOID` there. "square" stretches the image, as the
published code does, which has black; "crop" takes a square part that keeps the aspect: with ImageNet's mean."""

View = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f): the point (x, y) of the result shows the image's point (a x + b y + c, d x + e y + f).
Points, not pixels: the first pixel's middle is (0.5, 0.5), so that the image, which is interpolated, and the label,
whose nearest pixel is taken, stay together."""


def training_transform(
    size: int, scale: tuple[float, float] = (0.8, 2.5), degrees: float = 15.0, flip: float = 0.5, resize: str = "crop"
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The augmentation of both stages: (image uint8 [3, H, W], label uint8 [H, W]) -> the same with H = W = `size`.

    The image is scaled by a factor drawn from the range `scale`, rotated by up to `degrees` either way and flipped with
    probability `flip`. `resize` "square" shows all of it, but for what a rotation turns out: the factor only decides
    how sharp. "crop" shows a random part of an image larger than the crop; neither scaled nor rotated, pixels stay what
    they are. Pixels outside the image are `VOID` in the label.
    """
    return functools.partial(_augment, resize, size, scale, degrees, flip)


def _augment(
    resize: str, size: int, scale: tuple, degrees: float, flip: float, image: torch.Tensor, label: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    image, label = Image.fromarray(image.permute(1, 2, 0).numpy()), Image.fromarray(label.numpy())
    image, view, label_view = {"square": stretch, "crop": crop}[resize](image, size, scale, degrees, flip)
    square, affine = (size, size), Image.Transform.AFFINE
    image = image.transform(square, affine, view, Image.Resampling.BILINEAR, fillcolor=FILL[resize])
    label = label.transform(square, affine, label_view, Image.Resampling.NEAREST, fillcolor=VOID)
    # Channels apart first: NumPy copies three planes faster than it permutes one array.
    planes = np.stack([np.asarray(plane) for plane in image.split()])
    return torch.from_numpy(planes), torch.from_numpy(np.array(label))


def stretch(image: Image.Image, size: int, scale: tuple, degrees: float, flip: float) -> tuple[Image.Image, View, View]:
    """The image resized by a random factor, then to size x size; a rotation and flip of it; and that of its label."""
    factor = float(torch.empty(1).uniform_(*scale))
    view = _rotation(size, size / 2, size / 2, degrees, flip)
    across, down = image.width / size, image.height / size
    if factor < 1:  # a larger image would only be made smaller again
        image = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BILINEAR)
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return image, view, (*(across * n for n in view[:3]), *(down * n for n in view[3:]))


def crop(image: Image.Image, size: int, scale: tuple, degrees: float, flip: float) -> tuple[Image.Image, View, View]:
    """The image, a view of a random crop of it, scaled and rotated around its middle; and that of its label."""
    factor = float(torch.empty(1).uniform_(*scale))
    side = size / factor  # of the crop, in pixels of the image
    # An image smaller than the crop lies in its middle, a larger one anywhere around it.
    top = (float(torch.rand(1)) if image.height > side else 0.5) * (image.height - side)
    left = (float(torch.rand(1)) if image.width > side else 0.5) * (image.width - side)
    if factor == 1 and not degrees:  # pixel for pixel
        top, left = round(top), round(left)
    view = _rotation(size, left + side / 2, top + side / 2, degrees, flip, factor)
    if factor < 1:  # bilinear interpolation would leave pixels out
        return *_shrink(image, view, size, factor), view
    return image, view, view


def _rotation(size: int, x: float, y: float, degrees: float, flip: float, factor: float = 1.0) -> View:
    """Draws a rotation and a flip: the middle of the result shows the image's point (x, y), enlarged by `factor`."""
    angle = math.radians(float(torch.empty(1).uniform_(-degrees, degrees))) if degrees else 0.0
    mirror = -1 if float(torch.rand(1)) < flip else 1
    cos, sin = math.cos(angle) / factor, math.sin(angle) / factor
    a, b, d, e = mirror * cos, -sin, mirror * sin, cos
    half = size / 2
    return a, b, x - (a + b) * half, d, e, y - (d + e) * half


def _shrink(image: Image.Image, view: View, size: int, factor: float) -> tuple[Image.Image, View]:
    """The part of `image` that `view` shows, made smaller by `factor` with every pixel counted, and its view."""
    a, b, c, d, e, f = view
    across, down = ([k * x + m * y + n for x in (0, size) for y in (0, size)] for k, m, n in ((a, b, c), (d, e, f)))
    margin = 2 / factor  # what interpolation reaches beyond the crop
    left, right = max(0, math.floor(min(across) - margin)), min(image.width, math.ceil(max(across) + margin))
    top, bottom = max(0, math.floor(min(down) - margin)), min(image.height, math.ceil(max(down) + margin))
    width, height = max(1, round((right - left) * factor)), max(1, round((bottom - top) * factor))
    small = image.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    u, v = width / (right - left), height / (bottom - top)
    return small, (a * u, b * u, (c - left) * u, d * v, e * v, (f - top) * v)

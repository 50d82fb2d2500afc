"""Joint transforms of a picture and its label: one warp on the bytes that Pillow decoded."""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from dataset.splits import VOID

FILL = (124, 116, 104)
"""What lies outside the picture: ImageNet's mean colour. The label says `VOID` there."""

View = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f): the point (x, y) of the crop shows the picture's point (a x + b y + c, d x + e y + f).

Points, not pixels: the first pixel's middle is (0.5, 0.5), so that the image, which is interpolated, and the label,
whose nearest pixel is taken, stay together."""


def training_transform(
    size: int, scale: tuple[float, float] = (0.8, 2.5), degrees: float = 15.0, flip: float = 0.5
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The augmentation of both stages: scale, rotation, crop and flip, each pixel of the crop drawn once.

    Args:
        size: side of the square crop in pixels.
        scale: range of the random scale, drawn uniformly.
        degrees: largest rotation either way, around the middle of the crop.
        flip: probability of a horizontal flip.

    Returns:
        A transform of (image uint8 [3, H, W], label uint8 [H, W]) to the same with H = W = size; pixels that
        the picture does not cover are `VOID` in the label. Neither scaled nor rotated, pixels stay what they are.
    """
    return functools.partial(_augment, size=size, scale=scale, degrees=degrees, flip=flip)


def _augment(
    image: torch.Tensor, label: torch.Tensor, size: int, scale: tuple[float, float], degrees: float, flip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    factor, view = draw_view(*label.shape, size, scale, degrees, flip)
    picture, mask = Image.fromarray(image.permute(1, 2, 0).numpy()), Image.fromarray(label.numpy())
    mask = mask.transform((size, size), Image.Transform.AFFINE, view, Image.Resampling.NEAREST, fillcolor=VOID)
    if factor < 1:  # bilinear interpolation would leave pixels out
        picture, view = _shrink(picture, view, size, factor)
    picture = picture.transform((size, size), Image.Transform.AFFINE, view, Image.Resampling.BILINEAR, fillcolor=FILL)
    # Channels apart first: NumPy copies three planes faster than it turns one array round.
    planes = np.stack([np.asarray(plane) for plane in picture.split()])
    return torch.from_numpy(planes), torch.from_numpy(np.array(mask))


def draw_view(
    height: int, width: int, size: int, scale: tuple[float, float], degrees: float, flip: float
) -> tuple[float, View]:
    """Draws a scale and a view of it, see `training_transform`, for a picture of height x width pixels."""
    factor = float(torch.empty(1).uniform_(*scale))
    side = size / factor  # of the crop, in pixels of the picture
    # A picture smaller than the crop lies in its middle, a larger one anywhere around it.
    top = (float(torch.rand(1)) if height > side else 0.5) * (height - side)
    left = (float(torch.rand(1)) if width > side else 0.5) * (width - side)
    angle = math.radians(float(torch.empty(1).uniform_(-degrees, degrees))) if degrees else 0.0
    if factor == 1 and angle == 0:  # pixel for pixel
        top, left = round(top), round(left)
    mirror = -1 if float(torch.rand(1)) < flip else 1
    cos, sin = math.cos(angle) / factor, math.sin(angle) / factor
    a, b, d, e = mirror * cos, -sin, mirror * sin, cos
    half = size / 2  # the middle of the crop shows the middle of its square in the picture
    return factor, (a, b, left + side / 2 - (a + b) * half, d, e, top + side / 2 - (d + e) * half)


def _shrink(picture: Image.Image, view: View, size: int, factor: float) -> tuple[Image.Image, View]:
    """The part of `picture` that `view` shows, made smaller by `factor` with every pixel counted, and its view."""
    a, b, c, d, e, f = view
    across, down = ([k * x + m * y + n for x in (0, size) for y in (0, size)] for k, m, n in ((a, b, c), (d, e, f)))
    margin = 2 / factor  # what interpolation reaches beyond the crop
    left, right = max(0, math.floor(min(across) - margin)), min(picture.width, math.ceil(max(across) + margin))
    top, bottom = max(0, math.floor(min(down) - margin)), min(picture.height, math.ceil(max(down) + margin))
    width, height = max(1, round((right - left) * factor)), max(1, round((bottom - top) * factor))
    small = picture.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    u, v = width / (right - left), height / (bottom - top)
    return small, (a * u, b * u, (c - left) * u, d * v, e * v, (f - top) * v)

"""Joint transforms of a picture and its label, on torchvision's v2 tensors."""

import math

import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from dataset.splits import VOID

FILL = {tv_tensors.Image: [124, 116, 104], tv_tensors.Mask: VOID}
"""What lies outside the picture: ImageNet's mean colour, and no label."""


class RandomScaleRotateCrop(v2.Transform):
    """Scales, rotates and crops, reading only the part of the picture that the crop shows.

    The region to show is cut out first, a margin wider for the rotation, and only that is resized and
    rotated; cutting before scaling gives the same distribution as scaling the whole picture first.

    Args:
        size: side of the square crop in pixels.
        scale: range of the random scale, drawn uniformly.
        degrees: the angle is drawn uniformly from [-degrees, degrees].
    """

    def __init__(self, size: int, scale: tuple[float, float], degrees: float):
        super().__init__()
        self.size, self.scale, self.degrees = size, scale, degrees
        angle = math.radians(min(degrees, 45))
        self.margin = math.ceil(size * (math.sin(angle) + math.cos(angle) - 1) / 2)

    def make_params(self, flat_inputs: list) -> dict:
        height, width = F.get_size(flat_inputs[0])
        low, high = self.scale
        scale = float(torch.empty(1).uniform_(low, high))
        side = self.size / scale  # of the crop, in pixels of the picture
        # A picture smaller than the crop lies in its middle, a larger one anywhere around it.
        top = (float(torch.rand(1)) if height > side else 0.5) * (height - side)
        left = (float(torch.rand(1)) if width > side else 0.5) * (width - side)
        angle = float(torch.empty(1).uniform_(-self.degrees, self.degrees)) if self.degrees else 0.0
        return {"top": top, "left": left, "scale": scale, "angle": angle}

    def transform(self, inpt, params: dict):
        fill = FILL[type(inpt)]
        image = isinstance(inpt, tv_tensors.Image)
        # NEAREST would shift a resized label by half a pixel against the image; rotate knows no NEAREST_EXACT.
        resizing = InterpolationMode.BILINEAR if image else InterpolationMode.NEAREST_EXACT
        rotating = InterpolationMode.BILINEAR if image else InterpolationMode.NEAREST
        margin = self.margin / params["scale"]
        side = max(1, round(self.size / params["scale"] + 2 * margin))
        top, left = round(params["top"] - margin), round(params["left"] - margin)
        region = _cut(inpt, top, left, side, fill)
        grown = self.size + 2 * self.margin
        region = F.resize(region, [grown, grown], interpolation=resizing, antialias=True)
        if params["angle"]:
            region = F.rotate(region, params["angle"], interpolation=rotating, fill=fill)
        return F.center_crop(region, [self.size, self.size])


def _cut(inpt, top: int, left: int, side: int, fill):
    """The square [top, top + side) x [left, left + side), with `fill` where it leaves the picture."""
    height, width = F.get_size(inpt)
    inside = max(top, 0), max(left, 0), min(top + side, height), min(left + side, width)
    region = F.crop(inpt, inside[0], inside[1], inside[2] - inside[0], inside[3] - inside[1])
    padding = [inside[1] - left, inside[0] - top, left + side - inside[3], top + side - inside[2]]
    return F.pad(region, padding, fill=fill) if any(padding) else region


def training_transform(
    size: int, scale: tuple[float, float] = (0.8, 2.5), degrees: float = 15.0, flip: float = 0.5
) -> v2.Transform:
    """The augmentation of both stages.

    Args:
        size: side of the square crop in pixels.
        scale: range of the random scale.
        degrees: largest rotation either way.
        flip: probability of a horizontal flip.

    Returns:
        A transform of (image uint8 [3, H, W], label uint8 [H, W]) to the same with H = W = size; pixels that
        the picture does not cover are `VOID` in the label.
    """
    return v2.Compose([RandomScaleRotateCrop(size, scale, degrees), v2.RandomHorizontalFlip(flip)])

"""Offline demo pictures: scenes of the 20 VOC classes, drawn by code, in the layout of VOC on disk.

    python -m dataset.synthetic --data-path data/synthetic
    python -m dataset.synthetic --preview classes.png

They let every script of the project run without a download, and they are made so that zero-shot learning
has something to work on: classes that are close in meaning are drawn from the same parts. Sheep, cow, horse,
dog and cat stand on the legs of `quadruped`; bus, train and car share `window_row` and painted metal; bicycle
and motorbike share `spoked_wheel`; chair and sofa share upholstery; bottle and pot share `vessel`; aeroplane
and bird share `wing`. Each class also has cues of its own. They are a demo and a test bed, not a benchmark.

How a picture comes about: a *drawer* (`draw_sheep`, ...) fills a `Sketch` with coloured shapes in body units;
`draw_scene` poses sketches over a backdrop and renders them `SUPERSAMPLE` times too large; the picture is
averaged down (smooth edges), the mask is sampled from the same polygons (hard edges, plus a line of void).
"""

import argparse
import itertools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from dataset.files import save, write_text
from dataset.masks import voc_palette
from dataset.splits import VOC_CLASSES, VOID

DRAWING_VERSION = 1
"""Raise it whenever the same seed draws other pictures than before: it makes old folders redraw."""

SUPERSAMPLE = 3
MIN_VISIBLE = 0.02
"""Every requested class keeps at least this share of the picture."""

RGB = tuple[int, int, int]
Point = tuple[float, float]
Random = np.random.Generator


# ---------------------------------------------------------------------------------------------------------
# Shapes: polygons as arrays (N, 2) in body units. x points where the object faces, y points up, the ground
# is y = 0, and an object is about one unit tall. Only proportions matter: `draw_scene` chooses the size.


def ellipse(x: float, y: float, rx: float, ry: float, tilt: float = 0.0, corners: int = 28) -> np.ndarray:
    """Ellipse around (x, y) with half-axes rx and ry, turned by `tilt` radians."""
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    u, v = rx * np.cos(angle), ry * np.sin(angle)
    return np.stack([x + u * np.cos(tilt) - v * np.sin(tilt), y + u * np.sin(tilt) + v * np.cos(tilt)], 1)


def box(x0: float, y0: float, x1: float, y1: float, radius: float = 0.0) -> np.ndarray:
    """Rectangle from (x0, y0) to (x1, y1), its corners rounded by `radius`."""
    if radius <= 0:
        return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], float)
    radius = min(radius, abs(x1 - x0) / 2, abs(y1 - y0) / 2)
    angle = np.linspace(0, np.pi / 2, 6)
    corners = [
        (x1 - radius, y1 - radius),
        (x0 + radius, y1 - radius),
        (x0 + radius, y0 + radius),
        (x1 - radius, y0 + radius),
    ]
    arcs = [
        np.stack([x + radius * np.cos(angle + k * np.pi / 2), y + radius * np.sin(angle + k * np.pi / 2)], 1)
        for k, (x, y) in enumerate(corners)
    ]
    return np.concatenate(arcs)


def polygon(*points: Point) -> np.ndarray:
    return np.array(points, float)


def smooth(*points: Point, steps: int = 5) -> np.ndarray:
    """Closed Catmull-Rom curve through the points."""
    p = np.array(points, float)
    before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]  # (1, steps, 1)
    before, p, after, beyond = (a[:, None] for a in (before, p, after, beyond))  # each (N, 1, 2)
    points = 2 * p + (after - before) * t + (2 * before - 5 * p + 4 * after - beyond) * t**2
    points = points + (3 * p - before - 3 * after + beyond) * t**3
    return points.reshape(-1, 2) / 2


def stroke(points: Sequence[Point], widths: float | Sequence[float]) -> list[np.ndarray]:
    """A line of the given width (or one width per point) with round joints and ends: limbs, tubes, stems."""
    widths = [widths] * len(points) if np.isscalar(widths) else list(widths)
    shapes = [ellipse(x, y, w / 2, w / 2, corners=12) for (x, y), w in zip(points, widths)]
    for (a, b), (u, v) in zip(itertools.pairwise(points), itertools.pairwise(widths)):
        along = np.subtract(b, a)
        normal = np.array([-along[1], along[0]]) / (np.hypot(*along) + 1e-9) / 2
        shapes.append(np.array([a + normal * u, b + normal * v, b - normal * v, a - normal * u]))
    return shapes


def curve(start: Point, bend: Point, end: Point, steps: int = 7) -> list[Point]:
    """Points of a quadratic Bezier curve: tails, stems, handlebars."""
    t = np.linspace(0, 1, steps)[:, None]
    points = (1 - t) ** 2 * np.array(start) + 2 * t * (1 - t) * np.array(bend) + t**2 * np.array(end)
    return [tuple(p) for p in points]


def scalloped(x: float, y: float, rx: float, ry: float, bumps: int, depth: float = 0.07) -> np.ndarray:
    """Ellipse with a bumpy outline: fleeces, crowns of trees, clouds."""
    angle = np.linspace(0, 2 * np.pi, bumps * 6, endpoint=False)
    radius = 1 + depth * (np.abs(np.sin(angle * bumps / 2)) - 0.5) * 2
    return np.stack([x + rx * radius * np.cos(angle), y + ry * radius * np.sin(angle)], 1)


def ring(x: float, y: float, radius: float, width: float) -> np.ndarray:
    """A ring of the given outer radius: one polygon that runs around the rim and back along the hole."""
    angle = np.linspace(0, 2 * np.pi, 41)
    rim = np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.concatenate([rim * radius, rim[::-1] * (radius - width)]) + np.array([x, y])


def leaf(base: Point, tip: Point, width: float) -> np.ndarray:
    """A pointed leaf from base to tip."""
    base, along = np.array(base), np.subtract(tip, base)
    across = np.array([-along[1], along[0]]) / (np.hypot(*along) + 1e-9) * width / 2
    t = np.linspace(0, 1, 8)[:, None]
    side = np.sin(np.pi * t**0.8) * across
    return np.concatenate([base + along * t + side, (base + along * t - side)[::-1]])


# ---------------------------------------------------------------------------------------------------------
# Colours and materials


@dataclass(frozen=True)
class Paint:
    """A material: two colours mixed by a texture, shaded at the rim as if the shape were round.

    Args:
        low, high: colours where the texture is 0 and 1.
        texture: a key of `textures()`.
        grain: pixels of the texture per body unit (more is finer); 0 stretches it once over the shape.
        roundness: width of the shaded rim in body units; 0 leaves the shape flat.
    """

    low: RGB
    high: RGB
    texture: str = "soft"
    grain: float = 60.0
    roundness: float = 0.06

    def shaded(self, factor: float) -> "Paint":
        """The same material in another light: a factor below 1 is darker."""
        return replace(self, low=shade(self.low, factor), high=shade(self.high, factor))


def shade(colour: RGB, factor: float) -> RGB:
    return tuple(int(min(255, max(0, v * factor))) for v in colour)


def vary(rng: Random, colour: RGB, amount: float = 0.12) -> RGB:
    """The colour with another brightness and a slight cast."""
    factor = rng.uniform(1 - amount, 1 + amount) * rng.uniform(1 - amount / 3, 1 + amount / 3, 3)
    return tuple(int(min(255, max(0, v))) for v in np.array(colour) * factor)


def pick(rng: Random, options: Sequence):
    return options[rng.integers(len(options))]


def two_tone(rng: Random, colour: RGB, contrast: float, **style) -> Paint:
    """A varied colour and a lighter one: the common way to make a material."""
    low = vary(rng, colour)
    return Paint(shade(low, 1 - contrast / 2), shade(low, 1 + contrast / 2), **style)


TEXTURE_SIZE = 256


@cache
def textures() -> dict[str, Image.Image]:
    """Grey textures of 256 x 256 pixels; the same in every process and for every seed."""
    rng = np.random.default_rng(20)
    row, column = np.mgrid[:TEXTURE_SIZE, :TEXTURE_SIZE].astype(np.float32)

    def noise(down: float, across: float) -> np.ndarray:
        """Smooth noise of unit variance; the two lengths are in pixels."""
        grid = gaussian_filter(rng.standard_normal((TEXTURE_SIZE, TEXTURE_SIZE)), (down, across), mode="wrap")
        return grid / grid.std()

    def wave(period: float, position: np.ndarray) -> np.ndarray:
        return np.sin(2 * np.pi * position / period)

    fields = {
        "soft": 0.5 + 0.25 * noise(14, 14),
        "fur": 0.5 + 0.28 * noise(1.5, 4),
        "wool": 1.1 - 0.75 * np.abs(noise(2.4, 2.4)),
        "patches": 0.5 + 4 * (noise(13, 16) + 0.1),
        "tabby": 0.5 + 0.9 * (wave(15, column + 5 * noise(14, 14)) + 0.3),
        "weave": 0.5 + 0.2 * wave(6, row + column) + 0.2 * wave(6, row - column) + 0.08 * noise(1, 1),
        "grain": 0.5 + 0.28 * noise(1.2, 26),
        "speckle": 0.5 + 0.25 * noise(0.9, 0.9),
        "blotches": 0.5 + 0.2 * noise(5, 5) + 0.15 * noise(1.5, 1.5),
        "ripples": 0.5 + 0.28 * noise(1.6, 11),
        "grass": 0.5 + 0.2 * noise(4, 1.2) + 0.15 * noise(18, 18),
        "tiles": np.where(np.minimum(row % 32, column % 32) < 2, 0.0, 0.8 + 0.1 * noise(12, 12)),
        "bricks": np.where(
            np.minimum(row % 12, (column + row // 12 % 2 * 12) % 24) < 2, 0.95, 0.3 + 0.15 * noise(4, 8)
        ),
        "bars": 0.5 + 2 * wave(32, column),
        "dots": 0.5 + 4 * (wave(32, column) * wave(32, row) - 0.6),
        "ramp": 1 - row / TEXTURE_SIZE,
        "glint": 0.25 + 0.45 * ((row + column) % 150 > 95) + 0.3 * (1 - row / TEXTURE_SIZE),
    }
    return {name: Image.fromarray((np.clip(f, 0, 1) * 255).astype(np.uint8)) for name, f in fields.items()}


# fmt: off
DARK = (38, 38, 44)
WHITE = (244, 244, 240)
SKIN = ((246, 214, 186), (226, 178, 142), (188, 132, 94), (134, 88, 60), (92, 60, 44))
WOOD = ((150, 104, 62), (116, 76, 46), (190, 146, 96), (84, 58, 42), (206, 178, 138))
CLOTH = ((178, 58, 54), (56, 96, 150), (70, 124, 92), (206, 160, 74), (118, 84, 132), (150, 146, 138),
         (88, 108, 118), (196, 122, 92), (58, 62, 82), (212, 196, 170))
METAL = ((196, 48, 44), (44, 92, 168), (238, 188, 52), (58, 132, 92), (226, 228, 228), (72, 78, 88),
         (226, 118, 44), (86, 160, 190), (140, 36, 60))
# fmt: on


def upholstery(rng: Random) -> Paint:
    """The woven cloth of chairs and sofas."""
    return two_tone(rng, pick(rng, CLOTH), 0.42, texture="weave", grain=170, roundness=0.06)


def wood(rng: Random) -> Paint:
    return two_tone(rng, pick(rng, WOOD), 0.35, texture="grain", grain=130, roundness=0.02)


def painted_metal(rng: Random) -> Paint:
    """The bodywork of cars, buses, trains and motorbikes."""
    return two_tone(rng, pick(rng, METAL), 0.22, texture="ramp", grain=0, roundness=0.04)


def glass(rng: Random) -> Paint:
    low = vary(rng, (70, 104, 128))
    return Paint(low, vary(rng, (196, 222, 232), 0.06), texture="glint", grain=0, roundness=0)


RUBBER = Paint((30, 30, 34), (54, 54, 60), "speckle", 120, 0.02)
CHROME = Paint((120, 124, 132), (222, 226, 230), "ramp", 0, 0.01)


# ---------------------------------------------------------------------------------------------------------
# Sketch, pose, canvas


@dataclass
class Sketch:
    """What a drawer draws: parts from back to front in body units.

    Each part is (polygons, paint, solid). The paint is a material, a plain colour, or None for a part that
    only the mask shows; a part that is not solid leaves no trace in the mask. The polygons of one part are
    painted as their union.
    """

    parts: list[tuple[list[np.ndarray], Paint | RGB | None, bool]] = field(default_factory=list)

    def fill(self, shapes: np.ndarray | list[np.ndarray], paint: Paint | RGB | None, solid: bool = True) -> None:
        self.parts.append(([shapes] if isinstance(shapes, np.ndarray) else list(shapes), paint, solid))

    def points(self) -> np.ndarray:
        """All corners of the solid parts: (N, 2), body units."""
        return np.concatenate([shape for shapes, _, solid in self.parts if solid for shape in shapes])

    def area(self, cells: int = 96) -> float:
        """Area of the silhouette in square body units, counted on a grid of cells x cells."""
        points = self.points()
        low, high = points.min(0), points.max(0)
        step = (high - low) / cells
        grid = Image.new("1", (cells, cells))
        draw = ImageDraw.Draw(grid)
        for shapes, _, solid in self.parts:
            for shape in shapes if solid else ():
                draw.polygon(((shape - low) / step).ravel().tolist(), fill=1)
        return float(np.asarray(grid).mean() * np.prod(high - low))


@dataclass(frozen=True)
class Pose:
    """Affine map from body units (y up) to canvas pixels (y down): p -> matrix p + origin."""

    matrix: np.ndarray
    origin: np.ndarray

    @property
    def scale(self) -> float:
        """Canvas pixels per body unit."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix))))

    def __call__(self, points: np.ndarray) -> np.ndarray:
        return points @ self.matrix.T + self.origin


class Canvas:
    """A picture and its map of instances, both `SUPERSAMPLE` times as large as the result."""

    def __init__(self, rng: Random, width: int, height: int):
        self.rng = rng
        self.size = (width * SUPERSAMPLE, height * SUPERSAMPLE)
        self.light = pick(rng, (-1, 1))  # the side that the light falls to: right or left
        self.image = Image.new("RGB", self.size)
        self.instances = Image.new("L", self.size)
        self.pencils = ImageDraw.Draw(self.image), ImageDraw.Draw(self.instances)

    def draw(self, sketch: Sketch, pose: Pose, instance: int) -> None:
        """Renders the sketch; its solid parts become `instance` in the map (0: background)."""
        for shapes, paint, solid in sketch.parts:
            corners = [pose(shape) for shape in shapes]
            if isinstance(paint, Paint):
                self._paint(corners, paint, pose.scale)
            for shape in corners:
                flat = shape.ravel().tolist()
                if isinstance(paint, tuple):
                    self.pencils[0].polygon(flat, fill=paint)
                if solid:
                    self.pencils[1].polygon(flat, fill=instance)

    def _paint(self, corners: list[np.ndarray], paint: Paint, scale: float) -> None:
        """Fills the union of polygons (canvas pixels) with a material."""
        points = np.concatenate(corners)
        x0, y0 = np.maximum(np.floor(points.min(0)), 0).astype(int)
        x1, y1 = np.minimum(np.ceil(points.max(0)) + 1, self.size).astype(int)
        if x0 >= x1 or y0 >= y1:
            return
        rim = int(np.clip(paint.roundness * scale, 0, 40))
        stencil = Image.new("L", (x1 - x0 + 2 * rim, y1 - y0 + 2 * rim))
        pencil = ImageDraw.Draw(stencil)
        for shape in corners:
            pencil.polygon((shape - (x0 - rim, y0 - rim)).ravel().tolist(), fill=255)
        colours = self._texture(paint, (x1 - x0, y1 - y0), scale)
        inside = (rim, rim, rim + x1 - x0, rim + y1 - y0)
        if rim:
            # The blurred stencil, looked up a little away from the light, is dark on the far side only.
            shift = rim * self.light // 2
            soft = stencil.filter(ImageFilter.BoxBlur(rim))
            soft = soft.crop((inside[0] + shift, inside[1] + rim // 2, inside[2] + shift, inside[3] + rim // 2))
            colours = colours * (0.64 + 0.44 / 255 * np.asarray(soft, np.float32))[..., None]
        picture = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
        self.image.paste(picture, (int(x0), int(y0)), stencil.crop(inside) if rim else stencil)

    def _texture(self, paint: Paint, size: tuple[int, int], scale: float) -> np.ndarray:
        """The unshaded material on `size` = (width, height) canvas pixels: float32 (height, width, 3)."""
        texture = textures()[paint.texture]
        span = (TEXTURE_SIZE, TEXTURE_SIZE)
        if paint.grain:
            span = np.minimum(np.array(size) / scale * paint.grain, TEXTURE_SIZE)
        x, y = self.rng.uniform(0, 1, 2) * np.subtract(TEXTURE_SIZE, span)
        texture = texture.resize(size, Image.Resampling.BILINEAR, box=(x, y, x + span[0], y + span[1]))
        mix = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
        table = np.array(paint.low, np.float32) * (1 - mix) + np.array(paint.high, np.float32) * mix
        return table[np.asarray(texture)]  # (256, 3) looked up by (height, width)

    def shadow(self, x: float, y: float, half: float) -> None:
        """A soft shadow on the ground around (x, y), `half` wide to either side; canvas pixels."""
        depth = max(4, int(0.14 * half))
        stencil = Image.new("L", (int(2 * half) + 4 * depth, 5 * depth))
        ImageDraw.Draw(stencil).ellipse((2 * depth, 1.5 * depth, stencil.width - 2 * depth, 3.5 * depth), fill=120)
        stencil = stencil.filter(ImageFilter.BoxBlur(depth * 0.6))
        self.image.paste((18, 20, 28), (int(x - half) - 2 * depth, int(y - 2.5 * depth)), stencil)


# ---------------------------------------------------------------------------------------------------------
# Parts that several classes share
#
# Drawings are tables of points and read best in rows, so the formatter keeps off from here to the scenes.
# fmt: off


def eye(s: Sketch, x: float, y: float, radius: float, iris: RGB = DARK) -> None:
    s.fill(ellipse(x, y, radius, radius, corners=12), iris)
    s.fill(ellipse(x + radius * 0.3, y + radius * 0.35, radius * 0.35, radius * 0.35, corners=8), WHITE)


def legs(s: Sketch, rng: Random, hips: Sequence[float], top: float, thick: float, paint: Paint,
         hoof: RGB) -> None:
    """Legs from the hips at height `top` down to the ground, in mid-stride."""
    for x in hips:
        foot = x + rng.uniform(-0.16, 0.16) * top
        knee = ((x + foot) / 2 + rng.uniform(-0.04, 0.04) * top, top * 0.48)
        s.fill(stroke([(x, top), knee, (foot, thick * 0.4)], [thick * 1.7, thick, thick * 0.8]), paint)
        s.fill(box(foot - thick * 0.5, 0, foot + thick * 0.65, thick * 0.6, thick * 0.2), hoof)


@dataclass(frozen=True)
class Build:
    """Proportions of a four-legged animal, body units."""

    length: float  # of the trunk
    depth: float  # of the trunk
    leg: float  # from the ground to the belly
    thick: float  # of a leg
    neck: Point  # from the withers to the head
    neck_width: float


def quadruped(s: Sketch, rng: Random, build: Build, coat: Paint, shank: Paint, hoof: RGB,
              fleece: bool = False) -> Point:
    """Trunk, four legs and neck of an animal that faces right; returns where the head goes."""
    half, top = build.length / 2, build.leg + build.depth
    hip = build.leg + build.depth * 0.25
    legs(s, rng, (-half * 0.58, half * 0.86), hip, build.thick, shank.shaded(0.7), hoof)
    legs(s, rng, (-half * 0.84, half * 0.62), hip, build.thick, shank, hoof)
    head = (half * 0.8 + build.neck[0], top + build.neck[1])
    neck = stroke([(half * 0.72, top - build.depth * 0.4), head], [build.neck_width * 1.5, build.neck_width])
    if fleece:
        trunk = scalloped(0, build.leg + build.depth * 0.52, half * 1.08, build.depth * 0.6, bumps=13,
                          depth=0.05)
    else:
        trunk = smooth((-half, top - 0.3 * build.depth), (-half * 0.72, top), (0, top - 0.06 * build.depth),
                       (half * 0.7, top), (half * 1.02, top - 0.35 * build.depth),
                       (half * 0.86, build.leg + 0.12 * build.depth), (0, build.leg - 0.02),
                       (-half * 0.6, build.leg + 0.1 * build.depth),
                       (-half * 1.02, build.leg + 0.3 * build.depth))
    s.fill([trunk, *neck], coat)
    return head


def sitting(s: Sketch, rng: Random, coat: Paint, paw: RGB) -> Point:
    """Trunk and legs of a cat or dog that sits; returns where the head goes."""
    s.fill(stroke(curve((-0.2, 0.08), (-0.5, 0.0), (-0.48, rng.uniform(0.12, 0.4))), 0.085),
           coat.shaded(0.85))
    s.fill(smooth((-0.3, 0.04), (-0.34, 0.28), (-0.16, 0.52), (0.0, 0.78), (0.2, 0.74), (0.26, 0.46),
                  (0.22, 0.04)),
           coat)
    s.fill(stroke([(0.1, 0.42), (0.1, 0.05)], [0.15, 0.1]), coat.shaded(0.86))
    s.fill(stroke([(0.2, 0.42), (0.22, 0.05)], [0.15, 0.1]), coat)
    s.fill(ellipse(-0.16, 0.17, 0.19, 0.2), coat.shaded(0.95))
    s.fill([ellipse(0.13, 0.04, 0.085, 0.045), ellipse(0.25, 0.04, 0.085, 0.045),
            ellipse(-0.04, 0.035, 0.12, 0.04)],
           paw)
    return (0.14, 0.86)


def wheel(s: Sketch, x: float, y: float, radius: float) -> None:
    """A car wheel: tyre, rim, hub."""
    s.fill(ellipse(x, y, radius, radius), RUBBER)
    s.fill(ellipse(x, y, radius * 0.62, radius * 0.62), CHROME)
    s.fill([ellipse(x + radius * 0.36 * np.cos(a), y + radius * 0.36 * np.sin(a), radius * 0.11,
                    radius * 0.11, corners=8)
            for a in np.arange(5) * 2 * np.pi / 5], DARK)


def spoked_wheel(s: Sketch, rng: Random, x: float, y: float, radius: float, tyre: float) -> None:
    """A cycle's wheel that one sees through; its whole disc is solid, as spokes are finer than a pixel."""
    s.fill(ellipse(x, y, radius, radius, corners=40), None)
    s.fill(ring(x, y, radius, tyre), RUBBER)
    s.fill(ring(x, y, radius - tyre, tyre * 0.6), (176, 180, 186))
    inner = radius - tyre * 1.5
    angles = rng.uniform(0, 1) + np.arange(10) * np.pi / 5
    s.fill([shape for a in angles for shape in
            stroke([(x, y), (x + inner * np.cos(a), y + inner * np.sin(a))], 0.014)[2:]], (222, 224, 226))
    s.fill(ellipse(x, y, radius * 0.13, radius * 0.13, corners=12), DARK)


def window_row(s: Sketch, rng: Random, x0: float, x1: float, y0: float, y1: float, count: int) -> None:
    """A row of panes between x0 and x1, set in a dark band."""
    pitch = (x1 - x0) / count
    s.fill(box(x0 - 0.02, y0 - 0.02, x1 + 0.02, y1 + 0.02, 0.03), (44, 50, 60))
    pane = glass(rng)
    for k in range(count):
        s.fill(box(x0 + k * pitch + pitch * 0.08, y0, x0 + (k + 1) * pitch - pitch * 0.08, y1, 0.02), pane)


def wing(root: Point, tip: Point, chord: float) -> np.ndarray:
    """A swept wing from root to tip, `chord` wide at the root: aeroplanes and birds."""
    (x, y), (u, v) = root, tip
    return smooth((x + chord / 2, y), ((x + u) / 2 + chord * 0.36, (y + v) / 2 + 0.02), (u + chord * 0.12, v),
                  (u - chord * 0.12, v), ((x + u) / 2 - chord * 0.32, (y + v) / 2), (x - chord / 2, y))


def vessel(*profile: Point) -> np.ndarray:
    """An upright round vessel from (height, radius) pairs, bottom first: bottles and pots."""
    return np.array([(r, y) for y, r in profile] + [(-r, y) for y, r in reversed(profile)], float)


# ---------------------------------------------------------------------------------------------------------
# Drawers: one a class. All face right; `draw_scene` mirrors, turns and stretches them.


def tail(s: Sketch, start: Point, bend: Point, end: Point, width: float, paint: Paint) -> None:
    s.fill(stroke(curve(start, bend, end), np.linspace(width, width * 0.6, 7)), paint)


def long_head(s: Sketch, x: float, y: float, size: float, drop: float, coat: Paint, muzzle: RGB) -> None:
    """Head in profile with a muzzle that hangs by `drop` radians: sheep, cow, horse, dog."""
    along = np.array([np.cos(drop), -np.sin(drop)]) * size
    nose = (x + along[0], y + along[1])
    s.fill(stroke([(x, y), (x + along[0] * 0.6, y + along[1] * 0.6), nose],
                  [size * 0.78, size * 0.6, size * 0.46]), coat)
    s.fill(ellipse(nose[0], nose[1], size * 0.25, size * 0.25, corners=14), muzzle)
    s.fill(ellipse(nose[0] + size * 0.12, nose[1] + size * 0.04, size * 0.055, size * 0.055, corners=8), DARK)
    eye(s, x + along[0] * 0.28 + size * 0.06, y + along[1] * 0.28 + size * 0.16, size * 0.085)


def draw_sheep(s: Sketch, rng: Random) -> None:
    dark_face = rng.random() < 0.6
    fleece = pick(rng, ((226, 218, 198), (236, 230, 218), (206, 194, 170), (176, 158, 134)))
    coat = Paint(shade(vary(rng, fleece, 0.05), 0.86), shade(fleece, 1.08), "wool", 210, 0.14)
    face = two_tone(rng, (66, 58, 54) if dark_face else (204, 184, 158), 0.2, texture="fur", grain=120,
                    roundness=0.03)
    low = rng.random() < 0.35
    build = Build(rng.uniform(0.95, 1.1), rng.uniform(0.44, 0.52), rng.uniform(0.24, 0.32), 0.085,
                  (0.2, -0.42) if low else (0.2, 0.06), 0.26)
    tail(s, (-build.length / 2, 0.66), (-0.62, 0.62), (-0.6, 0.46), 0.12, coat)
    x, y = quadruped(s, rng, build, coat, face, shade(face.low, 0.6), fleece=True)
    s.fill(leaf((x - 0.04, y + 0.02), (x - 0.19, y - 0.06), 0.1), face.shaded(0.85))
    long_head(s, x, y, 0.22, 1.0 if low else 0.75, face, shade(face.low, 0.85))
    s.fill(scalloped(x - 0.03, y + 0.09, 0.13, 0.085, 7, 0.1), coat)


def draw_cow(s: Sketch, rng: Random) -> None:
    dark, light = pick(rng, (((42, 38, 38), (240, 236, 228)), ((46, 40, 40), (232, 226, 216)),
                             ((118, 66, 38), (238, 226, 206)), ((140, 80, 44), (188, 122, 74))))
    coat = Paint(vary(rng, dark), vary(rng, light, 0.05), "patches", 84, 0.1)
    shank = two_tone(rng, light, 0.12, texture="fur", grain=90, roundness=0.03)
    low = rng.random() < 0.25
    build = Build(rng.uniform(1.12, 1.28), rng.uniform(0.44, 0.5), rng.uniform(0.34, 0.42), 0.12,
                  (0.2, -0.42) if low else (0.2, 0.04), 0.27)
    rump = (-build.length / 2, build.leg + build.depth * 0.8)
    tail(s, rump, (rump[0] - 0.1, rump[1] - 0.1), (rump[0] - 0.05, 0.34), 0.045, shank)
    s.fill(ellipse(rump[0] - 0.05, 0.3, 0.04, 0.08), dark)
    s.fill(ellipse(-build.length * 0.2, build.leg, 0.13, 0.08), (226, 164, 156))
    x, y = quadruped(s, rng, build, coat, shank, (48, 42, 40))
    for lift in (0.0, 0.04):
        s.fill(stroke(curve((x - 0.02 + lift, y + 0.12), (x + lift, y + 0.24), (x + 0.1 + lift, y + 0.25)),
                      0.035),
               (222, 210, 184))
    s.fill(leaf((x - 0.05, y + 0.09), (x - 0.22, y + 0.07), 0.11), coat.low)
    face = Paint(coat.low, shade(coat.low, 1.25), "fur", 90, 0.04)
    long_head(s, x, y, 0.31, 0.8, face, pick(rng, ((222, 170, 158), (96, 76, 72))))


def draw_horse(s: Sketch, rng: Random) -> None:
    brown = pick(rng, ((124, 70, 38), (88, 50, 32), (160, 98, 54), (60, 46, 42), (206, 196, 184)))
    coat = two_tone(rng, brown, 0.2, texture="fur", grain=46, roundness=0.09)
    hair = Paint(*pick(rng, (((30, 24, 24), (64, 50, 44)), ((196, 166, 116), (228, 206, 164)))), "grain",
                 100, 0.02)
    low = rng.random() < 0.2
    build = Build(rng.uniform(1.05, 1.18), rng.uniform(0.34, 0.38), rng.uniform(0.54, 0.62), 0.09,
                  (0.28, -0.42) if low else (0.2, 0.32), 0.19)
    rump = (-build.length / 2, build.leg + build.depth * 0.85)
    s.fill(smooth((rump[0] + 0.04, rump[1] + 0.04), (rump[0] - 0.14, rump[1] - 0.04), (rump[0] - 0.2, 0.5),
                  (rump[0] - 0.12, 0.26), (rump[0] - 0.06, 0.5), (rump[0], rump[1] - 0.12)), hair)
    x, y = quadruped(s, rng, build, coat, coat, (40, 34, 32))
    withers = (build.length * 0.3, build.leg + build.depth)
    mane = curve((x - 0.06, y + 0.12), ((x + withers[0]) / 2 - 0.14, (y + withers[1]) / 2 + 0.1), withers)
    s.fill(stroke(mane, [0.08, 0.13, 0.15, 0.15, 0.14, 0.12, 0.06]), hair)
    for shift in (0.0, 0.06):
        s.fill(leaf((x - 0.04 + shift, y + 0.06), (x - 0.03 + shift, y + 0.21), 0.07), coat.shaded(0.85))
    long_head(s, x, y, 0.34, 0.85, coat, shade(coat.low, 0.75))


def draw_dog(s: Sketch, rng: Random) -> None:
    colour = pick(rng, ((196, 148, 88), (110, 72, 46), (58, 50, 48), (216, 190, 148), (226, 220, 210)))
    coat = (Paint(vary(rng, colour), (236, 230, 220), "patches", 60, 0.08) if rng.random() < 0.3
            else two_tone(rng, colour, 0.25, texture="fur", grain=80, roundness=0.08))
    plain = Paint(coat.low, shade(coat.low, 1.25), "fur", 80, 0.04)
    paw = shade(coat.low, 1.15)
    if rng.random() < 0.4:
        x, y = sitting(s, rng, coat, paw)
        s.fill(ellipse(x, y, 0.2, 0.2), plain)
    else:
        build = Build(rng.uniform(0.85, 1.1), rng.uniform(0.3, 0.36), rng.uniform(0.28, 0.42), 0.1,
                      (0.16, 0.14), 0.2)
        top = build.leg + build.depth * 0.85
        tail(s, (-build.length * 0.45, top), (-build.length * 0.68, top + 0.04),
             (-build.length * 0.62, top + 0.34),
             0.085, plain)
        x, y = quadruped(s, rng, build, coat, coat, paw)
    long_head(s, x, y, 0.31, rng.uniform(0.2, 0.45), plain, shade(coat.low, 1.3))
    s.fill(ellipse(x + 0.36, y - 0.06, 0.05, 0.04, corners=12), (30, 26, 26))
    s.fill(smooth((x - 0.08, y + 0.16), (x + 0.04, y + 0.15), (x + 0.03, y - 0.05), (x - 0.05, y - 0.17),
                  (x - 0.14, y - 0.06)), plain.shaded(0.65))
    if rng.random() < 0.6:
        s.fill(stroke([(x - 0.15, y - 0.15), (x + 0.08, y - 0.2)], 0.05), vary(rng, pick(rng, CLOTH)))


def cat_head(s: Sketch, rng: Random, x: float, y: float, coat: Paint) -> None:
    """A round face seen from the front, with pointed ears and whiskers."""
    for side in (-1, 1):
        s.fill(polygon((x + side * 0.03, y + 0.12), (x + side * 0.19, y + 0.1), (x + side * 0.17, y + 0.34)),
               coat.shaded(0.9))
        s.fill(polygon((x + side * 0.08, y + 0.14), (x + side * 0.16, y + 0.12),
                       (x + side * 0.155, y + 0.27)),
               (214, 150, 140))
    s.fill(smooth((x - 0.22, y - 0.03), (x - 0.14, y + 0.15), (x + 0.14, y + 0.15), (x + 0.22, y - 0.03),
                  (x + 0.1, y - 0.17), (x - 0.1, y - 0.17)), coat)
    s.fill([ellipse(x - 0.045, y - 0.09, 0.06, 0.05), ellipse(x + 0.045, y - 0.09, 0.06, 0.05)],
           (236, 226, 212))
    iris = pick(rng, ((150, 190, 80), (220, 180, 60), (110, 170, 190)))
    for side in (-1, 1):
        s.fill(ellipse(x + side * 0.095, y + 0.025, 0.045, 0.042, corners=14), iris)
        s.fill(ellipse(x + side * 0.095, y + 0.025, 0.016, 0.038, corners=12), (20, 20, 20))
        for slope in (-0.03, 0.02):
            s.fill(stroke([(x + side * 0.09, y - 0.08), (x + side * 0.3, y - 0.08 + slope)], 0.008), WHITE,
                   solid=False)
    s.fill(polygon((x - 0.03, y - 0.045), (x + 0.03, y - 0.045), (x, y - 0.08)), (196, 104, 104))


def draw_cat(s: Sketch, rng: Random) -> None:
    dark, light = pick(rng, (((172, 92, 36), (232, 164, 92)), ((84, 80, 80), (164, 158, 154)),
                             ((92, 66, 46), (176, 142, 106)), ((40, 38, 42), (76, 72, 76))))
    coat = Paint(vary(rng, dark), vary(rng, light), "tabby", 110, 0.07)
    if rng.random() < 0.5:
        x, y = sitting(s, rng, coat, shade(light, 1.15))
        cat_head(s, rng, x - 0.05, y + 0.02, coat)
        return
    build = Build(rng.uniform(0.85, 1.0), rng.uniform(0.26, 0.3), rng.uniform(0.26, 0.32), 0.085,
                  (0.1, 0.12), 0.18)
    back = (-build.length * 0.46, build.leg + build.depth * 0.8)
    tail(s, back, (back[0] - 0.32, back[1]), (back[0] - 0.12, back[1] + rng.uniform(0.3, 0.5)), 0.085, coat)
    x, y = quadruped(s, rng, build, coat, coat, shade(light, 1.15))
    cat_head(s, rng, x + 0.06, y + 0.04, coat)


def cycle_frame(s: Sketch, joints: Sequence[tuple[Point, Point]], width: float, paint: RGB) -> None:
    s.fill([shape for a, b in joints for shape in stroke([a, b], width)], paint)


def draw_bicycle(s: Sketch, rng: Random) -> None:
    colour = vary(rng, pick(rng, METAL))
    r = rng.uniform(0.34, 0.38)
    rear, front, pedal = (-0.56, r), (0.56, r), (-0.1, r * 0.92)
    seat, head = (-0.22, 0.82), (0.36, 0.84)
    for x, y in (rear, front):
        spoked_wheel(s, rng, x, y, r, 0.045)
    s.fill(ring(*pedal, 0.09, 0.03), (60, 60, 66))
    cycle_frame(s, ((rear, pedal), (rear, seat), (seat, pedal), (pedal, head), (seat, (0.36, 0.8)),
                    (head, front)),
                0.055, colour)
    s.fill(stroke([(pedal[0] - 0.09, pedal[1] + 0.1), (pedal[0] + 0.09, pedal[1] - 0.1)], 0.035), DARK)
    s.fill(stroke([seat, (-0.25, 0.93)], 0.04), CHROME)
    s.fill(smooth((-0.4, 0.97), (-0.24, 0.97), (-0.1, 0.94), (-0.24, 0.9), (-0.4, 0.91)), DARK)
    drop = rng.uniform(-0.1, 0.12)
    s.fill(stroke([head, (0.33, 0.96)], 0.045), CHROME)
    s.fill(stroke(curve((0.3, 0.97), (0.52, 1.04), (0.46, 0.94 + drop)), 0.05), DARK)
    if rng.random() < 0.3:
        s.fill(box(0.42, 0.74, 0.68, 0.92, 0.04), Paint((150, 110, 66), (206, 168, 116), "weave", 160, 0.02))


def draw_motorbike(s: Sketch, rng: Random) -> None:
    body = painted_metal(rng)
    r = rng.uniform(0.31, 0.35)
    rear, front = (-0.58, r), (0.62, r)
    for x, y in (rear, front):
        spoked_wheel(s, rng, x, y, r, 0.11)
    s.fill(stroke([(0.36, 0.82), front], 0.09), CHROME)
    s.fill(stroke([(-0.3, 0.55), rear], 0.09), (66, 66, 72))
    s.fill(smooth((-0.3, 0.56), (0.0, 0.62), (0.3, 0.58), (0.32, 0.3), (0.1, 0.18), (-0.24, 0.2)),
           (58, 60, 66))
    s.fill([ellipse(0.02, 0.38, 0.16, 0.15), box(-0.12, 0.44, 0.14, 0.58, 0.03)], CHROME)
    s.fill(stroke([(0.1, 0.24), (-0.3, 0.2), (-0.86, 0.3)], [0.06, 0.08, 0.11]), CHROME)
    s.fill(smooth((-0.1, 0.68), (0.06, 0.84), (0.34, 0.84), (0.42, 0.66), (0.16, 0.58)), body)
    s.fill(smooth((-0.86, 0.74), (-0.56, 0.76), (-0.2, 0.66), (-0.02, 0.7), (-0.1, 0.58), (-0.5, 0.6)),
           RUBBER)
    s.fill(smooth((-0.92, 0.66), (-0.62, 0.72), (-0.34, 0.62), (-0.6, 0.6), (-0.84, 0.54)), body.shaded(0.9))
    s.fill(smooth((0.3, 0.68), (0.6, 0.78), (0.92, 0.62), (0.62, 0.68)), body)
    s.fill(stroke(curve((0.38, 0.84), (0.34, 1.02), (0.16, 1.0)), 0.055), DARK)
    s.fill(ellipse(0.48, 0.82, 0.1, 0.1), Paint((180, 176, 150), (252, 246, 214), "ramp", 0, 0.02))
    if rng.random() < 0.4:
        s.fill(smooth((0.4, 0.9), (0.56, 0.92), (0.42, 1.14), (0.36, 1.1)), glass(rng))


def draw_car(s: Sketch, rng: Random) -> None:
    body = painted_metal(rng)
    roof, deck, r = rng.uniform(0.66, 0.78), rng.uniform(0.42, 0.48), rng.uniform(0.155, 0.18)
    hatch = rng.uniform(-0.78, -0.5)
    s.fill(smooth((-0.98, 0.3), (-0.96, deck), (hatch - 0.08, deck + 0.04), (hatch + 0.14, roof - 0.03),
                  (0.0, roof + 0.02), (0.26, roof - 0.06), (0.5, deck + 0.04), (0.9, deck - 0.04),
                  (1.0, 0.28), (0.92, 0.13), (0, 0.11), (-0.92, 0.13)), body)
    pane = glass(rng)
    s.fill(polygon((hatch + 0.06, deck + 0.03), (hatch + 0.2, roof - 0.06), (-0.1, roof - 0.04),
                   (-0.1, deck + 0.03)), pane)
    s.fill(polygon((-0.05, deck + 0.03), (-0.05, roof - 0.04), (0.2, roof - 0.08), (0.42, deck + 0.03)), pane)
    s.fill(stroke([(-0.08, 0.16), (-0.08, deck)], 0.014), shade(body.low, 0.7))
    s.fill(stroke([(-0.92, 0.17), (0.92, 0.17)], 0.05), (52, 54, 60))
    s.fill(stroke([(-0.22, deck - 0.06), (-0.14, deck - 0.06)], 0.022), CHROME)
    s.fill(ellipse(0.91, deck - 0.12, 0.06, 0.045), (252, 244, 206))
    s.fill(ellipse(-0.94, deck - 0.08, 0.035, 0.055), (196, 36, 32))
    for x in (-0.58, 0.58):
        s.fill(ellipse(x, r + 0.02, r * 1.2, r * 1.2), (36, 36, 40))
        wheel(s, x, r, r)


def draw_bus(s: Sketch, rng: Random) -> None:
    body = painted_metal(rng)
    decks = 2 if rng.random() < 0.3 else 1
    half = rng.uniform(0.78, 0.95) if decks == 2 else rng.uniform(0.95, 1.15)
    top, r = (1.2 if decks == 2 else rng.uniform(0.8, 0.9)), 0.15
    s.fill(box(-half, 0.12, half, top, 0.09), body)
    s.fill(box(-half + 0.02, 0.28, half - 0.02, 0.35), vary(rng, pick(rng, METAL)))
    count = int(rng.integers(4, 7))
    for deck in range(decks):
        bottom = 0.44 + deck * 0.4 if decks == 2 else top - 0.38
        window_row(s, rng, -half + 0.08, half - 0.3, bottom, bottom + 0.24, count)
        s.fill(box(half - 0.2, bottom - 0.04, half + 0.005, bottom + 0.25, 0.03), glass(rng))
    s.fill(box(half - 0.46, 0.17, half - 0.25, min(0.66, top - 0.2), 0.02), glass(rng).shaded(0.8))
    s.fill(box(-half * 0.5, top - 0.085, half - 0.3, top - 0.03, 0.01), shade(body.low, 0.7))
    s.fill(ellipse(half - 0.04, 0.24, 0.04, 0.045), (252, 244, 206))
    s.fill(ellipse(-half + 0.025, 0.26, 0.025, 0.05), (196, 36, 32))
    for x in (-half * 0.6, half * 0.55):
        s.fill(ellipse(x, r + 0.01, r * 1.2, r * 1.2), (36, 36, 40))
        wheel(s, x, r, r)


def draw_train(s: Sketch, rng: Random) -> None:
    body = painted_metal(rng)
    stripe = vary(rng, pick(rng, METAL))
    length, coaches = rng.uniform(1.0, 1.3), int(rng.integers(1, 3))
    # The track belongs to the backdrop: a train is known by it, but VOC does not label it.
    left = -coaches * (length + 0.06)
    s.fill(box(left - 0.4, -0.05, length + 0.4, 0.0), (104, 92, 84), solid=False)
    s.fill(box(left - 0.4, -0.01, length + 0.4, 0.02), CHROME, solid=False)
    for k in range(coaches + 1):
        x0 = left + k * (length + 0.06)
        x1 = x0 + length
        s.fill(box(x0 + 0.05, 0.06, x1 - 0.05, 0.16), (50, 50, 56))
        for x in (x0 + 0.14, x0 + 0.3, x1 - 0.3, x1 - 0.14):
            s.fill(ellipse(x, 0.075, 0.072, 0.072, corners=16), RUBBER)
        if k == coaches:
            s.fill(smooth((x0, 0.15), (x0, 0.64), (x0 + 0.1, 0.7), (x1 - 0.5, 0.7), (x1 - 0.2, 0.6),
                          (x1, 0.3),
                          (x1 - 0.04, 0.13), (x0 + 0.4, 0.13)), body)
            s.fill(polygon((x1 - 0.36, 0.6), (x1 - 0.2, 0.57), (x1 - 0.07, 0.4), (x1 - 0.32, 0.4)),
                   glass(rng))
            window_row(s, rng, x0 + 0.08, x1 - 0.46, 0.4, 0.56, 5)
            s.fill(box(x0 + 0.02, 0.24, x1 - 0.08, 0.3), stripe)
            s.fill(ellipse(x1 - 0.05, 0.24, 0.035, 0.03), (252, 244, 206))
        else:
            s.fill(box(x0, 0.13, x1, 0.7, 0.05), body)
            s.fill(box(x1 - 0.02, 0.2, x1 + 0.08, 0.58), (48, 48, 54))
            window_row(s, rng, x0 + 0.08, x1 - 0.08, 0.4, 0.56, 6)
            s.fill(box(x0, 0.24, x1, 0.3), stripe)


def draw_chair(s: Sketch, rng: Random) -> None:
    frame, cushion = wood(rng), upholstery(rng)
    wide, seat = rng.uniform(0.5, 0.6), rng.uniform(0.44, 0.5)
    lean, depth = rng.uniform(0.02, 0.1), rng.uniform(0.12, 0.18)  # the seat recedes up and to the left
    for x, y in ((-wide / 2 - lean, depth * 0.6), (wide / 2 - lean, depth * 0.6)):
        s.fill(stroke([(x, seat + 0.05), (x, y)], 0.055), frame.shaded(0.7))
    x0, x1, top = -wide / 2 - lean, wide / 2 - lean, rng.uniform(1.0, 1.15)
    style = rng.integers(3)
    if style == 0:
        s.fill(box(x0 - 0.03, seat - 0.02, x1 + 0.03, top, 0.09), frame)
        s.fill(box(x0 + 0.03, seat + 0.06, x1 - 0.03, top - 0.06, 0.07), cushion)
    elif style == 1:
        s.fill(box(x0 - 0.03, seat, x1 + 0.03, top, 0.14), cushion)
    else:
        s.fill([box(x, seat, x + 0.05, top) for x in np.linspace(x0, x1 - 0.05, 5)], frame)
        s.fill(box(x0 - 0.04, top - 0.14, x1 + 0.04, top + 0.02, 0.05), frame)
    s.fill(smooth((x0 - 0.02, seat + depth), (x1 + 0.02, seat + depth), (wide / 2 + 0.05, seat + 0.02),
                  (wide / 2, seat - 0.05), (-wide / 2, seat - 0.05),
                  (-wide / 2 - 0.05, seat + 0.02), steps=3), cushion)
    for x in (-wide / 2 + 0.02, wide / 2 - 0.02):
        s.fill(stroke([(x, seat - 0.04), (x * 1.08, 0.03)], [0.075, 0.05]), frame)
    if rng.random() < 0.3:
        for x in (-wide / 2, wide / 2):
            s.fill(stroke([(x, seat), (x, seat + 0.2), (x - lean * 2, seat + 0.24)], 0.06), frame)


def draw_sofa(s: Sketch, rng: Random) -> None:
    cloth, frame = upholstery(rng), wood(rng)
    half, top = rng.uniform(0.9, 1.2), rng.uniform(0.72, 0.85)
    count = int(rng.integers(2, 4))
    arm, seat = rng.uniform(0.16, 0.24), 0.4
    for x in (-half + 0.1, half - 0.1):
        s.fill(stroke([(x, 0.16), (x, 0.03)], [0.09, 0.06]), frame)
    s.fill(box(-half + 0.06, 0.1, half - 0.06, top, 0.12), cloth.shaded(0.85))
    pitch = 2 * (half - arm) / count
    for k in range(count):
        x0 = -half + arm + k * pitch
        s.fill(box(x0 + 0.012, seat - 0.02, x0 + pitch - 0.012, top - 0.04, 0.09), cloth)
    for k in range(count):
        x0 = -half + arm + k * pitch
        s.fill(box(x0 + 0.006, seat - 0.14, x0 + pitch - 0.006, seat + 0.03, 0.06), cloth.shaded(1.12))
    s.fill(box(-half + arm, 0.09, half - arm, seat - 0.13), cloth.shaded(0.8))
    for x in (-half, half - arm):
        s.fill(box(x, 0.07, x + arm, 0.58, 0.09), cloth)
    if rng.random() < 0.6:
        x = rng.uniform(-half + arm, half - arm - 0.3)
        s.fill(box(x, seat + 0.02, x + 0.3, seat + 0.28, 0.06), upholstery(rng))


def draw_diningtable(s: Sketch, rng: Random) -> None:
    top, half, depth = rng.uniform(0.66, 0.76), rng.uniform(0.72, 0.95), rng.uniform(0.16, 0.28)
    timber = wood(rng)
    is_round, has_cloth = rng.random() < 0.35, rng.random() < 0.35
    surface = timber if not has_cloth else two_tone(rng, pick(rng, CLOTH), 0.25,
                                                    texture=pick(rng, ("dots", "tiles", "weave")),
                                                    grain=90, roundness=0.02)
    if is_round:
        s.fill(stroke([(0, top), (0, 0.12)], [0.16, 0.12]), timber.shaded(0.75))
        s.fill([ellipse(0, 0.07, 0.34, 0.07)], timber.shaded(0.7))
        s.fill([ellipse(0, top - 0.06, half, depth), ellipse(0, top - 0.12 * has_cloth - 0.08, half, depth)],
               surface.shaded(0.72))
        s.fill(ellipse(0, top, half, depth), surface)
    else:
        for x, y in ((-half * 0.74, 0.16), (half * 0.74, 0.16)):
            s.fill(stroke([(x, top), (x, y)], 0.075), timber.shaded(0.6))
        for x in (-half * 0.92, half * 0.92):
            s.fill(stroke([(x, top), (x, 0.04)], [0.12, 0.075]), timber.shaded(0.85))
        s.fill(box(-half, top - 0.13 - 0.13 * has_cloth, half, top), surface.shaded(0.75))
        s.fill(polygon((-half, top - 0.04), (half, top - 0.04), (half * 0.82, top + depth),
                       (-half * 0.82, top + depth)), surface)
    for x in rng.permutation(np.linspace(-0.6, 0.6, 4))[: rng.integers(1, 4)] * half:
        y = top + (0.0 if is_round else depth * rng.uniform(0.2, 0.6))
        s.fill(ellipse(x, y, 0.13, 0.05), (208, 208, 204))
        s.fill(ellipse(x, y + 0.012, 0.115, 0.042), WHITE)
        s.fill(ellipse(x, y + 0.02, 0.06, 0.03), vary(rng, (190, 110, 60), 0.4))


def draw_tvmonitor(s: Sketch, rng: Random) -> None:
    half, bottom, bezel = rng.uniform(0.55, 0.82), rng.uniform(0.16, 0.24), rng.uniform(0.035, 0.06)
    top = bottom + rng.uniform(0.72, 0.84)
    case = pick(rng, ((34, 34, 38), (60, 60, 66), (176, 174, 168)))
    frame = two_tone(rng, case, 0.3, texture="ramp", grain=0, roundness=0.02)
    s.fill(stroke([(0, bottom), (0, 0.05)], [0.2, 0.16]), frame.shaded(0.8))
    s.fill(smooth((-0.32, 0.0), (-0.26, 0.07), (0.26, 0.07), (0.32, 0.0), steps=3), frame.shaded(0.9))
    s.fill(box(-half, bottom, half, top, 0.05), frame)
    x0, x1, y0, y1 = -half + bezel, half - bezel, bottom + bezel + 0.03, top - bezel
    kind = rng.integers(3)
    if kind == 0:  # a film
        s.fill(box(x0, y0, x1, y1), Paint((240, 150, 90), (60, 80, 190), "ramp", 0, 0))
        s.fill(polygon((x0, y0), (x0, y0 + 0.22), (x0 + half * 0.6, y0 + 0.4), (half * 0.3, y0 + 0.16),
                       (x1, y0 + 0.34),
                       (x1, y0)), (52, 40, 88))
        s.fill(ellipse(x1 - 0.24, y1 - 0.22, 0.09, 0.09), (255, 236, 170))
    elif kind == 1:  # a desktop with windows
        s.fill(box(x0, y0, x1, y1), Paint((30, 110, 170), (90, 210, 220), "soft", 60, 0))
        for x, y in rng.uniform((x0, y0 + 0.02), (x1 - 0.5, y1 - 0.4), (2, 2)):
            s.fill(box(x, y, x + 0.46, y + 0.34), (238, 240, 244))
            s.fill(box(x, y + 0.28, x + 0.46, y + 0.34), (80, 90, 120))
            s.fill([box(x + 0.04, y + d, x + 0.36, y + d + 0.025) for d in (0.06, 0.12, 0.18)],
                   (150, 160, 180))
    else:  # colour bars
        bars = ((220, 220, 220), (220, 210, 60), (60, 200, 210), (60, 190, 80), (200, 60, 180),
                (210, 50, 50), (50, 60, 200))
        pitch = (x1 - x0) / len(bars)
        for k, colour in enumerate(bars):
            s.fill(box(x0 + k * pitch, y0, x0 + (k + 1) * pitch, y1),
                   Paint(shade(colour, 0.75), colour, "ramp", 0, 0))
    s.fill(polygon((x0, y1), (x0 + 0.16, y1), (x0, y1 - 0.4)), (196, 214, 236))
    s.fill(ellipse(half - 0.08, bottom + bezel * 0.6, 0.015, 0.015, corners=8), (90, 240, 130))


def draw_bottle(s: Sketch, rng: Random) -> None:
    colour = pick(rng, ((46, 92, 56), (98, 58, 30), (120, 168, 190), (176, 44, 44), (200, 206, 200),
                        (40, 70, 130)))
    low = vary(rng, colour)
    glaze = Paint(shade(low, 0.7), shade(low, 1.45), "soft", 40, 0.07)
    radius, neck, shoulder = rng.uniform(0.15, 0.2), rng.uniform(0.05, 0.065), rng.uniform(0.52, 0.66)
    s.fill(vessel((0, radius * 0.86), (0.03, radius), (shoulder, radius), (shoulder + 0.08, radius * 0.86),
                  (shoulder + 0.17, neck * 1.3), (0.88, neck), (0.9, neck)), glaze)
    s.fill(box(-neck * 1.2, 0.88, neck * 1.2, 1.0, 0.015),
           two_tone(rng, pick(rng, METAL), 0.3, texture="ramp", grain=0))
    label = vary(rng, pick(rng,
                           ((236, 228, 204), (206, 62, 54), (242, 196, 70), (240, 240, 240), (60, 100, 160))))
    y = rng.uniform(0.14, 0.2)
    s.fill(box(-radius, y, radius, shoulder - 0.06), Paint(shade(label, 0.85), label, "soft", 50, 0.05))
    s.fill(ellipse(0, (y + shoulder) / 2, radius * 0.5, radius * 0.5), vary(rng, pick(rng, METAL)))
    s.fill(box(-radius, y + 0.02, radius, y + 0.045), shade(label, 0.6))
    s.fill(stroke([(-radius * 0.62, 0.08), (-radius * 0.62, shoulder - 0.01), (-neck * 0.4, 0.84)],
                  [0.03, 0.035, 0.02]),
           tuple((v + 255) // 2 for v in low))


def draw_pottedplant(s: Sketch, rng: Random) -> None:
    height, radius = rng.uniform(0.32, 0.42), rng.uniform(0.2, 0.27)
    green = Paint(vary(rng, (38, 92, 44), 0.2), vary(rng, (110, 172, 76), 0.2), "blotches", 60, 0.025)
    style = rng.integers(3)
    count = int(rng.integers(11, 17))
    angles = np.linspace(-1.15, 1.15, count) + rng.uniform(-0.1, 0.1, count)
    for k in rng.permutation(count):
        a, reach = angles[k], rng.uniform(0.5, 0.78) * (0.7 + 0.3 * np.cos(angles[k]))
        tip = (reach * np.sin(a) * 0.85, height + reach * np.cos(a))
        paint = green.shaded(rng.uniform(0.65, 1.15))
        if style == 0:  # blades
            s.fill(leaf((0, height - 0.04), tip, 0.17), paint)
        elif style == 1:  # a stem with round leaves
            s.fill(stroke(curve((0, height), (tip[0] * 0.3, tip[1]), tip), 0.022), paint.low)
            s.fill(leaf((tip[0] * 0.75, tip[1] - 0.12), (tip[0] * 1.15, tip[1] + 0.08), 0.19), paint)
        else:  # flowers above a cushion of leaves
            s.fill(leaf((tip[0] * 0.1, height - 0.04), (tip[0] * 0.9, height + (tip[1] - height) * 0.7),
                        0.15), paint)
    if style == 2:
        bloom = vary(rng, pick(rng,
                               ((226, 70, 90), (240, 190, 60), (236, 150, 190), (150, 100, 200),
                                (244, 240, 236))))
        for k in range(5):
            x, y = 0.5 * np.sin(angles[k * count // 5]), height + rng.uniform(0.3, 0.55)
            s.fill(stroke(curve((x * 0.2, height), (x * 0.5, y), (x, y)), 0.03), green.low)
            s.fill([ellipse(x + 0.06 * np.cos(a), y + 0.06 * np.sin(a), 0.045, 0.045, corners=10)
                    for a in np.arange(5) * 2 * np.pi / 5], bloom)
            s.fill(ellipse(x, y, 0.035, 0.035, corners=10), (246, 208, 84))
    clay = two_tone(rng, pick(rng, ((186, 98, 62), (206, 200, 190), (80, 110, 140), (150, 76, 56))), 0.2,
                    roundness=0.07)
    s.fill(vessel((0, radius * 0.68), (height - 0.07, radius * 0.92)), clay)
    s.fill(box(-radius, height - 0.1, radius, height, 0.02), clay.shaded(1.1))


def draw_aeroplane(s: Sketch, rng: Random) -> None:
    hull = two_tone(rng, pick(rng, ((228, 232, 236), (210, 214, 220), (226, 220, 206))), 0.2, texture="ramp",
                    grain=0,
                    roundness=0.07)
    livery = vary(rng, pick(rng, METAL))
    r = rng.uniform(0.12, 0.15)
    s.fill(wing((0.06, 0.06), (-0.36, 0.46), 0.32), hull.shaded(0.72))
    s.fill(wing((-0.8, 0.06), (-0.98, 0.24), 0.16), hull.shaded(0.72))
    s.fill(smooth((-0.74, r * 0.7), (-0.9, 0.42), (-1.06, 0.46), (-1.04, 0.06), steps=4), livery)
    s.fill(smooth((-1.1, 0.07), (-0.6, r * 0.95), (0.5, r), (0.86, r * 0.7), (1.0, 0.0), (0.86, -r * 0.7),
                  (0.5, -r),
                  (-0.5, -r)), hull)
    s.fill(polygon((-1.0, -0.01), (0.96, -0.035), (0.98, -0.01), (-1.02, 0.035)), livery)
    s.fill(polygon((0.8, 0.085), (0.88, 0.07), (0.93, 0.03), (0.81, 0.03)), glass(rng))
    s.fill([ellipse(x, 0.055, 0.022, 0.026, corners=8) for x in np.linspace(-0.62, 0.68, 15)], (56, 72, 92))
    s.fill(stroke([(0.02, -0.2), (0.2, -0.2)], [0.11, 0.13]), hull.shaded(0.85))
    s.fill(ellipse(0.24, -0.2, 0.03, 0.06, corners=12), DARK)
    s.fill(wing((0.06, -0.05), (-0.46, -0.44), 0.36), hull.shaded(0.88))
    s.fill(wing((-0.84, 0.03), (-1.08, -0.12), 0.17), hull.shaded(0.9))


def draw_bird(s: Sketch, rng: Random) -> None:
    colour = pick(rng, ((74, 110, 160), (150, 92, 60), (60, 60, 66), (200, 196, 188), (206, 84, 56),
                        (110, 130, 80)))
    plumage = two_tone(rng, colour, 0.3, texture="fur", grain=60, roundness=0.06)
    belly = Paint(vary(rng, (214, 190, 160)), vary(rng, (238, 222, 198), 0.05), "fur", 60, 0.05)
    beak = vary(rng, (232, 166, 60))
    flying = rng.random() < 0.5
    if flying:
        lift = rng.uniform(0.3, 0.6) * pick(rng, (1, 1, -0.6))
        s.fill(wing((0.04, 0.05), (-0.2, lift * 1.1 + 0.05), 0.36), plumage.shaded(0.72))
        s.fill(polygon((-0.3, 0.05), (-0.78, 0.14), (-0.82, 0.0), (-0.74, -0.1), (-0.3, -0.06)),
               plumage.shaded(0.8))
    else:
        for x in (-0.04, 0.08):
            s.fill(stroke([(x, -0.15), (x + 0.02, -0.34)], 0.028), beak)
            s.fill(stroke([(x - 0.03, -0.34), (x + 0.1, -0.34)], 0.024), beak)
        perch = stroke(curve((-0.62, -0.44), (0.0, -0.34), (0.7, -0.36)), 0.06)
        s.fill(perch, Paint(WOOD[3], WOOD[0], "grain", 120, 0.02), solid=False)
        s.fill(polygon((-0.3, 0.02), (-0.72, -0.06), (-0.7, -0.18), (-0.28, -0.1)), plumage.shaded(0.8))
    s.fill(smooth((-0.42, 0.0), (-0.1, 0.17), (0.24, 0.17), (0.38, 0.02), (0.2, -0.17), (-0.14, -0.16)),
           plumage)
    s.fill(smooth((-0.14, -0.1), (0.16, -0.02), (0.35, 0.04), (0.2, -0.16), (-0.06, -0.17)), belly)
    s.fill(ellipse(0.38, 0.17, 0.155, 0.145), plumage)
    s.fill(polygon((0.5, 0.21), (0.72, 0.14), (0.5, 0.1)), beak)
    eye(s, 0.42, 0.2, 0.032)
    if flying:
        s.fill(wing((0.04, 0.0), (-0.3, lift), 0.42), plumage.shaded(0.9))
        s.fill(wing((-0.02, 0.0), (-0.34, lift * 0.85), 0.2), plumage.shaded(0.65))
    else:
        s.fill(smooth((0.16, 0.1), (-0.1, 0.12), (-0.52, -0.08), (-0.12, -0.1), (0.12, -0.04)),
               plumage.shaded(0.7))


def draw_boat(s: Sketch, rng: Random) -> None:
    half = rng.uniform(0.6, 0.85)
    hull = (wood(rng) if rng.random() < 0.4 else
            two_tone(rng, pick(rng, METAL), 0.25, texture="ramp", grain=0, roundness=0.03))
    deck = rng.uniform(0.24, 0.3)
    if rng.random() < 0.55:
        canvas = Paint(*pick(rng, (((214, 208, 194), (250, 246, 236)), ((196, 70, 54), (224, 110, 84)),
                                   ((70, 110, 150), (220, 226, 230)))), "bars", 50, 0.05)
        s.fill(stroke([(0.0, deck), (0.0, 1.3)], 0.035), WOOD[0])
        s.fill(smooth((-0.04, deck + 0.1), (-0.04, 1.26), (-0.3, 0.75), (-half * 0.85, deck + 0.1), steps=3),
               canvas)
        s.fill(polygon((0.04, deck + 0.1), (0.04, 1.18), (half * 0.9, deck + 0.08)), canvas.shaded(0.92))
    else:
        s.fill(box(-half * 0.55, deck - 0.05, half * 0.3, deck + 0.26, 0.03),
               Paint((206, 206, 204), WHITE, "ramp", 0, 0.04))
        window_row(s, rng, -half * 0.5, half * 0.22, deck + 0.09, deck + 0.2, 3)
        s.fill(box(-half * 0.4, deck + 0.25, half * 0.02, deck + 0.42, 0.03), hull.shaded(0.9))
        s.fill(stroke([(-half * 0.2, deck + 0.4), (-half * 0.2, deck + 0.74)], 0.025), DARK)
        s.fill(polygon((-half * 0.2, deck + 0.74), (-half * 0.2, deck + 0.6), (-half * 0.5, deck + 0.67)),
               (206, 52, 48))
    s.fill(smooth((-half, deck), (-half * 0.4, deck - 0.03), (half * 0.5, deck), (half * 1.08, deck + 0.1),
                  (half * 0.86, 0.06), (half * 0.6, 0.0), (-half * 0.8, 0.0), (-half * 0.94, 0.06)), hull)
    s.fill(stroke([(-half * 0.97, deck - 0.03), (half * 0.5, deck - 0.03), (half * 1.02, deck + 0.06)],
                  0.035), WHITE)
    s.fill([ellipse(x, deck * 0.45, 0.03, 0.03, corners=10) for x in np.linspace(-0.5, 0.5, 4) * half],
           (46, 54, 66))


def draw_person(s: Sketch, rng: Random) -> None:
    skin = vary(rng, pick(rng, SKIN), 0.06)
    shirt = two_tone(rng, pick(rng, CLOTH), 0.25, texture=pick(rng, ("soft", "soft", "bars", "dots")),
                     grain=rng.uniform(150, 330),
                     roundness=0.04)
    trousers = two_tone(rng, pick(rng,
                                  ((52, 66, 104), (60, 56, 54), (124, 104, 78), (150, 152, 156),
                                   (110, 50, 60))), 0.2,
                        texture="speckle", grain=90, roundness=0.03)
    hair = vary(rng, pick(rng, ((38, 30, 28), (92, 58, 36), (170, 122, 66), (120, 116, 114), (142, 66, 40))))
    hip, shoulder, wide = 0.5, 0.8, rng.uniform(0.11, 0.14)
    lean = Paint(shade(skin, 0.88), skin, "soft", 60, 0.03)
    stance, swing = rng.uniform(0.03, 0.12, 2), rng.uniform(-0.06, 0.1)
    long_hair = rng.random() < 0.4
    if long_hair:
        s.fill(smooth((-0.11, 0.96), (0, 1.05), (0.11, 0.96), (0.12, 0.78), (-0.12, 0.78)), hair)
    for side, step in zip((-1, 1), stance):
        foot = (side * (0.04 + step), 0.03)
        s.fill(stroke([(side * 0.06, hip), (side * (0.06 + step * 0.6), 0.27), foot], [0.13, 0.1, 0.08]),
               trousers)
        s.fill(smooth((foot[0] - 0.05, 0.0), (foot[0] - 0.04, 0.06), (foot[0] + 0.04, 0.06),
                      (foot[0] + 0.08, 0.0), steps=3),
               DARK)
    for side in (-1, 1):
        raised = rng.random() < 0.2
        elbow = (side * (wide + 0.09), shoulder - (-0.02 if raised else 0.18))
        hand = (elbow[0] + side * rng.uniform(-0.05, 0.05), elbow[1] + (0.19 if raised else -0.17))
        s.fill(stroke([elbow, hand], [0.065, 0.055]), lean)
        s.fill(ellipse(*hand, 0.036, 0.036, corners=12), skin)
        s.fill(stroke([(side * wide, shoulder - 0.03), elbow], [0.09, 0.08]), shirt.shaded(0.88))
    s.fill(smooth((-wide - 0.02, shoulder - 0.02), (-0.06, shoulder + 0.03), (0.06, shoulder + 0.03),
                  (wide + 0.02, shoulder - 0.02),
                  (wide - 0.005, 0.62), (wide, hip - 0.03), (-wide, hip - 0.03), (-wide + 0.005,
                                                                                  0.62)), shirt)
    if rng.random() < 0.25:
        s.fill(polygon((-wide + 0.01, hip + 0.06), (wide - 0.01, hip + 0.06), (wide + 0.08, 0.24),
                       (-wide - 0.08, 0.24)), shirt)
    s.fill(stroke([(0, shoulder), (0, 0.9)], 0.075), shade(skin, 0.86))
    s.fill(ellipse(swing * 0.2, 0.93, 0.088, 0.105), lean)
    s.fill(smooth((-0.1, 0.94), (-0.095, 1.0), (0, 1.055), (0.095, 1.0), (0.1, 0.94), (0.06, 0.985),
                  (-0.05, 0.985)), hair)
    for side in (-1, 1):
        s.fill(ellipse(side * 0.034 + swing * 0.3, 0.935, 0.011, 0.014, corners=8), DARK)
    s.fill(stroke(curve((-0.025 + swing * 0.3, 0.885), (swing * 0.3, 0.87), (0.03 + swing * 0.3, 0.885)),
                  0.012), (168, 70, 66))


DRAWERS: dict[str, Callable[[Sketch, Random], None]] = {
    "aeroplane": draw_aeroplane, "bicycle": draw_bicycle, "bird": draw_bird, "boat": draw_boat,
    "bottle": draw_bottle, "bus": draw_bus, "car": draw_car, "cat": draw_cat, "chair": draw_chair,
    "cow": draw_cow, "diningtable": draw_diningtable, "dog": draw_dog, "horse": draw_horse,
    "motorbike": draw_motorbike, "person": draw_person, "pottedplant": draw_pottedplant,
    "sheep": draw_sheep, "sofa": draw_sofa, "train": draw_train, "tvmonitor": draw_tvmonitor,
}
"""Class name -> the function that draws one object of it."""


# ---------------------------------------------------------------------------------------------------------
# Backdrops: one unit is the picture's height, x runs from 0 to `aspect`. Nothing here is solid, so what looks
# like an object (a bush, a cabinet, a lamp post) is background in the mask.


def draw_sky(s: Sketch, rng: Random, aspect: float, horizon: float) -> None:
    low, high = pick(rng, (((206, 228, 238), (86, 152, 214)), ((250, 220, 184), (110, 146, 200)),
                           ((222, 226, 228), (158, 174, 190)), ((252, 196, 150), (150, 110, 160))))
    s.fill(box(0, horizon - 0.02, aspect, 1), Paint(vary(rng, low, 0.06), vary(rng, high), "ramp", 0, 0),
           solid=False)
    for _ in range(rng.integers(0, 4)):
        x, y, size = rng.uniform(0, aspect), rng.uniform(horizon + 0.08, 1), rng.uniform(0.06, 0.14)
        puffs = [ellipse(x + d * size, y + size * lift, size * r, size * r * 0.6)
                 for d, lift, r in ((-1.0, 0, 0.7), (0, 0.2, 1.0), (1.0, 0.05, 0.75))]
        s.fill(puffs, Paint(shade(low, 1.0), (252, 252, 250), "soft", 30, size * 0.7), solid=False)


def draw_tree(s: Sketch, rng: Random, x: float, y: float, size: float) -> None:
    green = vary(rng, pick(rng, ((64, 116, 62), (92, 132, 58), (48, 98, 76), (176, 120, 52))))
    crown = Paint(shade(green, 0.65), shade(green, 1.25), "blotches", 70, size * 0.16)
    s.fill(stroke([(x, y), (x, y + size * 0.6)], [size * 0.12, size * 0.08]), WOOD[1], solid=False)
    if rng.random() < 0.35:
        for k in range(3):
            s.fill(polygon((x - size * (0.34 - k * 0.07), y + size * (0.25 + k * 0.24)),
                           (x + size * (0.34 - k * 0.07), y + size * (0.25 + k * 0.24)),
                           (x, y + size * (0.68 + k * 0.2))), crown, solid=False)
    else:
        s.fill([scalloped(x, y + size * 0.75, size * 0.34, size * 0.32, 9),
                scalloped(x - size * 0.2, y + size * 0.6, size * 0.22, size * 0.2, 7),
                scalloped(x + size * 0.2, y + size * 0.58, size * 0.22, size * 0.2, 7)], crown, solid=False)


def draw_house(s: Sketch, rng: Random, x: float, y: float, size: float) -> None:
    wall = vary(rng, pick(rng,
                          ((206, 178, 146), (178, 108, 84), (222, 214, 200), (150, 164, 172),
                           (214, 186, 120))))
    texture = pick(rng, ("bricks", "soft", "soft"))
    wide, tall = size * rng.uniform(0.6, 0.9), size * rng.uniform(0.6, 1.1)
    s.fill(box(x, y, x + wide, y + tall), Paint(shade(wall, 0.88), wall, texture, 160, 0.02), solid=False)
    if rng.random() < 0.7:
        s.fill(polygon((x - 0.03, y + tall), (x + wide + 0.03, y + tall),
                       (x + wide * 0.8, y + tall + size * 0.3), (x + wide * 0.2, y + tall + size * 0.3)),
               Paint(shade(wall, 0.45), (128, 62, 50), "bricks", 200, 0.02), solid=False)
    columns, rows = 3, max(1, int(tall / size * 3))
    panes = [box(x + wide * (k + 0.25) / columns, y + tall * (r + 0.3) / rows,
                 x + wide * (k + 0.75) / columns, y + tall * (r + 0.8) / rows)
             for k in range(columns) for r in range(rows)]
    s.fill(panes, pick(rng, ((74, 92, 112), (240, 214, 140), (96, 120, 140))), solid=False)


def draw_bush(s: Sketch, rng: Random, x: float, y: float, size: float) -> None:
    green = vary(rng, pick(rng, ((58, 104, 56), (96, 130, 62), (44, 88, 66))), 0.2)
    paint = Paint(shade(green, 0.6), shade(green, 1.3), "blotches", 90, size * 0.2)
    s.fill([scalloped(x + d * size, y + size * 0.25, size * r, size * r * 0.9, 8, 0.1) for d,
            r in ((-0.5, 0.4), (0, 0.55), (0.5, 0.42))],
           paint, solid=False)


def draw_hills(s: Sketch, rng: Random, aspect: float, horizon: float) -> None:
    for k in range(rng.integers(1, 4)):
        x = np.linspace(-0.1, aspect + 0.1, 24)
        y = horizon + 0.03 + (0.12 - 0.04 * k) * (1 + np.sin(x * rng.uniform(2, 5) + rng.uniform(0, 6)))
        green = vary(rng, pick(rng, ((126, 158, 150), (116, 150, 104), (140, 156, 120), (120, 132, 160))))
        ridge = np.concatenate([np.stack([x, y], 1),
                                [(aspect + 0.1, horizon - 0.05), (-0.1, horizon - 0.05)]])
        s.fill(ridge, Paint(shade(green, 0.85), shade(green, 1.1), "blotches", 50, 0), solid=False)


def draw_meadow(s: Sketch, rng: Random, aspect: float, horizon: float) -> None:
    draw_sky(s, rng, aspect, horizon)
    draw_hills(s, rng, aspect, horizon)
    for _ in range(rng.integers(0, 4)):
        draw_tree(s, rng, rng.uniform(0, aspect), horizon - 0.03, rng.uniform(0.18, 0.45))
    if rng.random() < 0.25:
        draw_house(s, rng, rng.uniform(0, aspect), horizon - 0.03, rng.uniform(0.15, 0.3))
    low = vary(rng, pick(rng, ((98, 138, 62), (122, 146, 70), (80, 122, 66), (178, 160, 96))))
    s.fill(box(0, 0, aspect, horizon), Paint(shade(low, 0.78), shade(low, 1.2), "grass", 100, 0), solid=False)
    if rng.random() < 0.3:  # a fence behind the objects
        posts = [box(x, horizon - 0.08, x + 0.02, horizon + 0.08)
                 for x in np.arange(rng.uniform(0, 0.1), aspect, 0.14)]
        s.fill([*posts, box(0, horizon, aspect, horizon + 0.02),
                box(0, horizon + 0.045, aspect, horizon + 0.062)],
               vary(rng, WOOD[0]), solid=False)
    dots = rng.uniform((0, 0.02), (aspect, horizon - 0.04), (rng.integers(0, 16), 2))
    for x, y in dots:
        s.fill(ellipse(x, y, 0.009, 0.007, corners=8),
               pick(rng, ((248, 240, 210), (236, 190, 70), (214, 110, 130))), solid=False)


def draw_street(s: Sketch, rng: Random, aspect: float, horizon: float) -> None:
    draw_sky(s, rng, aspect, horizon)
    x = rng.uniform(-0.2, 0)
    while x < aspect:
        size = rng.uniform(0.3, 0.55)
        if rng.random() < 0.75:
            draw_house(s, rng, x, horizon - 0.02, size)
        else:
            draw_tree(s, rng, x + size / 2, horizon - 0.02, size)
        x += size * rng.uniform(0.75, 1.0)
    pavement = vary(rng, (170, 164, 156))
    s.fill(box(0, 0, aspect, horizon), Paint(shade(pavement, 0.9), pavement, "tiles", 220, 0), solid=False)
    tar, kerb = vary(rng, (92, 94, 100)), horizon * rng.uniform(0.7, 0.85)
    s.fill(box(0, 0, aspect, kerb), Paint(shade(tar, 0.82), shade(tar, 1.15), "speckle", 120, 0), solid=False)
    s.fill(box(0, kerb, aspect, kerb + 0.015), (206, 202, 194), solid=False)
    y, start = kerb * rng.uniform(0.2, 0.5), rng.uniform(-0.2, 0)
    s.fill([box(d, y, d + 0.13, y + 0.02) for d in np.arange(start, aspect, 0.26)], (226, 222, 206),
           solid=False)
    if rng.random() < 0.4:
        x = rng.uniform(0.05, aspect)
        s.fill([box(x, kerb, x + 0.018, 0.92), box(x - 0.05, 0.9, x + 0.07, 0.93)], (58, 62, 66), solid=False)


def draw_water(s: Sketch, rng: Random, aspect: float, horizon: float) -> None:
    draw_sky(s, rng, aspect, horizon)
    draw_hills(s, rng, aspect, horizon)
    low = vary(rng, pick(rng, ((48, 108, 148), (62, 130, 140), (84, 110, 134))))
    s.fill(box(0, 0, aspect, horizon), Paint(shade(low, 0.8), shade(low, 1.45), "ripples", 90, 0),
           solid=False)


def draw_open_sky(s: Sketch, rng: Random, aspect: float, horizon: float) -> None:
    draw_sky(s, rng, aspect, 0)
    if rng.random() < 0.5:
        draw_hills(s, rng, aspect, 0.02)


def draw_room(s: Sketch, rng: Random, aspect: float, horizon: float) -> None:
    wall = vary(rng, pick(rng,
                          ((214, 200, 178), (176, 194, 196), (202, 176, 160), (150, 164, 140),
                           (226, 220, 208), (134, 142, 166))))
    paper = pick(rng, ("soft", "soft", "bars", "dots", "bricks"))
    s.fill(box(0, horizon, aspect, 1), Paint(shade(wall, 0.9), wall, paper, rng.uniform(90, 200), 0),
           solid=False)
    for x in np.arange(rng.uniform(-0.2, 0.2), aspect, rng.uniform(0.4, 0.6)):
        draw_wall_piece(s, rng, x, horizon)
    plank = vary(rng, pick(rng, WOOD))
    floor = pick(rng, ("grain", "tiles", "weave", "grain"))
    s.fill(box(0, 0, aspect, horizon), Paint(shade(plank, 0.8), shade(plank, 1.1), floor, 120, 0),
           solid=False)
    s.fill(box(0, horizon, aspect, horizon + 0.03), shade(wall, 1.12), solid=False)
    if rng.random() < 0.5:
        x, cloth = rng.uniform(0.2, aspect - 0.2), vary(rng, pick(rng, CLOTH))
        for grow, tone in ((1.0, 0.8), (0.85, 1.15), (0.75, 1.0)):
            s.fill(ellipse(x, horizon * 0.45, 0.5 * grow, horizon * 0.36 * grow),
                   Paint(shade(cloth, tone * 0.9), shade(cloth, tone), "weave", 200, 0),
                   solid=False)


def draw_wall_piece(s: Sketch, rng: Random, x: float, horizon: float) -> None:
    """A window, a picture, a shelf of books or nothing, on the wall to the right of x."""
    kind, y = rng.integers(4), max(horizon + 0.14, rng.uniform(0.62, 0.74))
    if kind == 0:
        s.fill(box(x, y - 0.06, x + 0.3, 1.02), (232, 228, 220), solid=False)
        s.fill([box(x + 0.02, y - 0.04, x + 0.14, 1), box(x + 0.16, y - 0.04, x + 0.28, 1)],
               Paint((214, 232, 238), (126, 178, 222), "ramp", 0, 0), solid=False)
        drape = two_tone(rng, pick(rng, CLOTH), 0.3, texture="bars", grain=700, roundness=0.01)
        s.fill([box(x - 0.05, y - 0.12, x + 0.03, 1.02), box(x + 0.27, y - 0.12, x + 0.35, 1.02)], drape,
               solid=False)
    elif kind == 1:
        wide, tall = rng.uniform(0.14, 0.26, 2)
        s.fill(box(x, y, x + wide, y + tall), vary(rng, pick(rng, WOOD)), solid=False)
        s.fill(box(x + 0.02, y + 0.02, x + wide - 0.02, y + tall - 0.02),
               Paint(vary(rng, pick(rng, CLOTH)), vary(rng, pick(rng, CLOTH)), "soft", 120, 0),
               solid=False)
    elif kind == 2:
        s.fill(box(x, y, x + 0.34, y + 0.025), vary(rng, WOOD[1]), solid=False)
        left = x + 0.02
        while left < x + 0.28:
            wide = rng.uniform(0.02, 0.04)
            s.fill(box(left, y + 0.025, left + wide, y + rng.uniform(0.1, 0.16)),
                   vary(rng, pick(rng, CLOTH)), solid=False)
            left += wide + 0.004


def draw_cabinet(s: Sketch, rng: Random, x0: float, x1: float, top: float) -> None:
    """A piece of furniture of no class, to stand things on; from the picture's lower edge up to `top`."""
    timber = wood(rng)
    s.fill(box(x0, -0.02, x1, top - 0.02), timber.shaded(0.85), solid=False)
    s.fill([box(x0 + (x1 - x0) * a, 0.02, x0 + (x1 - x0) * b, top - 0.06) for a,
            b in ((0.05, 0.48), (0.52, 0.95))], timber.shaded(0.95), solid=False)
    s.fill(box(x0 - 0.03, top - 0.035, x1 + 0.03, top + 0.02, 0.01), timber.shaded(1.15), solid=False)


BACKDROPS: dict[str, Callable[[Sketch, Random, float, float], None]] = {
    "meadow": draw_meadow, "street": draw_street, "room": draw_room, "water": draw_water,
    "sky": draw_open_sky,
}


# ---------------------------------------------------------------------------------------------------------
# Scenes


@dataclass(frozen=True)
class Habit:
    """Where a class is found, how large it is beside others, and with what."""

    settings: tuple[str, ...]
    size: float
    company: tuple[str, ...]


ANIMALS = ("sheep", "cow", "horse", "dog", "cat", "bird")
VEHICLES = ("car", "bus", "motorbike", "bicycle")
FURNITURE = ("chair", "sofa", "diningtable", "tvmonitor", "pottedplant", "bottle")
HABITS = {
    "aeroplane": Habit(("sky", "sky", "meadow"), 1.1, ("bird", "car", "person", "bus", "aeroplane")),
    "bicycle": Habit(("street", "meadow"), 0.9, ("person", "car", "bus", "motorbike", "dog", "pottedplant")),
    "bird": Habit(("sky", "meadow", "water"), 0.7,
                  ("aeroplane", "boat", "sheep", "cow", "cat", "person", "pottedplant")),
    "boat": Habit(("water",), 1.0, ("person", "bird", "boat", "aeroplane", "dog")),
    "bottle": Habit(("room",), 0.7, ("person", "diningtable", "tvmonitor", "chair", "cat", "pottedplant")),
    "bus": Habit(("street", "street", "meadow"), 1.2, ("car", "person", "bicycle", "motorbike", "train")),
    "car": Habit(("street", "street", "meadow"), 1.0,
                 ("bus", "person", "motorbike", "bicycle", "dog", "train")),
    "cat": Habit(("room", "room", "meadow"), 0.7,
                 ("sofa", "chair", "dog", "person", "bird", "tvmonitor", "pottedplant")),
    "chair": Habit(("room", "room", "meadow"), 0.9,
                   ("diningtable", "person", "cat", "dog", "tvmonitor", "sofa", "pottedplant")),
    "cow": Habit(("meadow",), 1.1, ("sheep", "horse", "person", "dog", "bird", "car")),
    "diningtable": Habit(("room",), 1.0, ("chair", "bottle", "person", "pottedplant", "dog", "cat")),
    "dog": Habit(("meadow", "room", "street"), 0.75,
                 ("person", "cat", "sheep", "sofa", "car", "bicycle", "horse")),
    "horse": Habit(("meadow",), 1.1, ("person", "cow", "sheep", "dog", "car", "bird")),
    "motorbike": Habit(("street", "meadow"), 0.9, ("person", "car", "bus", "bicycle", "dog")),
    "person": Habit(("street", "meadow", "room"), 1.1,
                    (*ANIMALS, *VEHICLES, *FURNITURE, "boat", "train", "aeroplane")),
    "pottedplant": Habit(("room", "room", "street"), 0.8,
                         ("sofa", "tvmonitor", "chair", "cat", "bicycle", "person", "bird")),
    "sheep": Habit(("meadow",), 0.9, ("cow", "horse", "dog", "person", "bird", "cat")),
    "sofa": Habit(("room",), 1.2, ("tvmonitor", "pottedplant", "cat", "dog", "person", "chair", "bottle")),
    "train": Habit(("meadow", "street"), 1.3, ("person", "car", "bus", "cow", "sheep")),
    "tvmonitor": Habit(("room",), 0.9, ("sofa", "chair", "pottedplant", "bottle", "person", "cat")),
}
# fmt: on

ON_CABINET = ("bottle", "tvmonitor")
AIRBORNE = ("aeroplane", "bird")


def draw_scene(
    rng: Random, classes: Sequence[str], size: tuple[int, int] = (128, 128)
) -> tuple[Image.Image, Image.Image]:
    """Draws a picture that shows every class of `classes`, the first one largest, the later ones in front.

    Args:
        rng: the only source of chance.
        classes: names of `VOC_CLASSES`; a name twice means two objects. From four on, layouts fail often.
        size: (width, height) in pixels.

    Returns:
        The picture (mode RGB) and its mask (mode P with the palette of VOC): 1 + index in `VOC_CLASSES`,
        0 for the background, 255 for the line of void around objects.

    Raises:
        ValueError: an unknown class, no class, a picture under 32 pixels, or no layout that leaves every
            class at least `MIN_VISIBLE` of the picture.
    """
    unknown = [name for name in classes if name not in DRAWERS]
    if unknown or not classes:
        raise ValueError(f"cannot draw {', '.join(map(repr, unknown)) or 'a scene without classes'}")
    if min(size) < 32:
        raise ValueError(f"size {size[0]} x {size[1]}: a scene needs at least 32 x 32 pixels")
    values = {name: 1 + VOC_CLASSES.index(name) for name in classes}
    for _ in range(40):
        canvas = compose(rng, classes, size)
        mask = instance_mask(canvas, [values[name] for name in classes])
        share = np.bincount(mask.ravel(), minlength=256) / mask.size
        if all(share[value] >= MIN_VISIBLE for value in values.values()):
            picture = develop(rng, canvas.image.resize(size, Image.Resampling.BOX))
            labels = Image.fromarray(mask)
            labels.putpalette(voc_palette())
            return picture, labels
    raise ValueError(f"no layout of {size[0]} x {size[1]} pixels leaves all of {', '.join(classes)} visible")


def choose_setting(rng: Random, classes: Sequence[str]) -> str:
    """A backdrop of the first class that suits as many of the others as possible."""
    settings = HABITS[classes[0]].settings
    suits = [sum(name in HABITS[other].settings for other in classes) for name in settings]
    return pick(rng, [name for name, count in zip(settings, suits) if count == max(suits)])


def compose(rng: Random, classes: Sequence[str], size: tuple[int, int]) -> Canvas:
    """Backdrop, objects from back to front, and sometimes something in front of them all."""
    width, height = size
    aspect, setting = width / height, choose_setting(rng, classes)
    horizon = rng.uniform(0.36, 0.6)
    canvas = Canvas(rng, width, height)
    unit = Pose(np.diag([1.0, -1.0]) * height * SUPERSAMPLE, np.array([0.0, height * SUPERSAMPLE]))
    backdrop = Sketch()
    BACKDROPS[setting](backdrop, rng, aspect, horizon)
    canvas.draw(backdrop, unit, 0)

    # Slots across the picture; feet come nearer (lower) from one object to the next.
    count = len(classes)
    centres = (rng.permutation(count) + 0.5) / count + rng.uniform(-0.08, 0.08, count)
    step = 0.12 if count > 1 else 0.0
    feet = np.sort(rng.uniform(0.04, 0.2, count) + step * np.arange(count))[::-1]
    for k, name in enumerate(classes):
        share = rng.uniform(0.2, 0.42) if k == 0 else rng.uniform(0.07, 0.17) * HABITS[name].size
        share *= 0.8 if count > 2 else 1.0
        draw_object(canvas, rng, name, setting, share, centres[k], feet[k], k + 1)

    if rng.random() < 0.3:  # a foreground that hides a little
        front = Sketch()
        if setting == "room":
            x = pick(rng, (-0.1, aspect - 0.15))
            draw_cabinet(front, rng, x, x + 0.25, rng.uniform(0.08, 0.25))
        else:
            draw_bush(front, rng, rng.uniform(0, aspect), rng.uniform(-0.06, 0.02), rng.uniform(0.12, 0.28))
        canvas.draw(front, unit, 0)
    return canvas


@dataclass(frozen=True)
class Place:
    """Where an object stands: fractions of the picture's width (x) and height (foot)."""

    x: float  # its middle, from the left edge
    foot: float  # its lowest point, from the lower edge
    half: float  # half its width


def fit(
    rng: Random,
    name: str,
    sketch: Sketch,
    size: tuple[int, int],
    share: float,
    x: float,
    foot: float,
    low: float,
) -> tuple[Pose, Place]:
    """Mirrors, turns, stretches and scales a sketch, and puts it close to (x, foot).

    Args:
        size: (width, height) of the canvas in pixels.
        share: part of the picture that its silhouette should cover, as far as it fits.
        low: what flies stays above this height.
    """
    width, height = size
    flies = name in AIRBORNE
    turn = rng.normal(0, 0.2 if flies else 0.035)
    stretch, lean = rng.uniform(0.9, 1.1), rng.normal(0, 0.04)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = np.diag([pick(rng, (-1.0, 1.0)), -1.0]) @ rotation @ [[stretch, lean], [0, 1 / stretch]]
    points = sketch.points() @ matrix.T  # y points down from here on
    corner, extent = points.min(0), np.ptp(points, 0)
    overhang = {"train": 1.6, "aeroplane": 1.2}.get(name, 1.05)
    widest = rng.uniform(0.85, 1.0) * overhang * width / extent[0]
    tallest = rng.uniform(0.84, 0.95) * height / extent[1]
    scale = min(np.sqrt(share * width * height / sketch.area()), widest, tallest)

    # Within the picture: to the sides up to a small overhang, upwards entirely.
    half, tall = extent[0] * scale / 2 / width, extent[1] * scale / height
    x = float(np.clip(x, min(0.5, half - 0.06), max(0.5, 1.06 - half)))
    if flies:
        highest = max(0.03, 0.96 - tall)
        foot = rng.uniform(min(low, 0.7 * highest), highest)
    elif name in ON_CABINET:
        foot = rng.uniform(0.1, 0.3)
    foot = min(foot, max(0.015, 0.98 - tall))
    bottom = corner + extent * (0.5, 1)
    pose = Pose(matrix * scale, np.array([x * width, (1 - foot) * height]) - bottom * scale)
    return pose, Place(x, foot, half)


def draw_object(
    canvas: Canvas, rng: Random, name: str, setting: str, share: float, x: float, foot: float, instance: int
) -> None:
    """Draws one object of a class, with what it stands on or in; `fit` says what the numbers mean."""
    width, height = canvas.size
    sketch = Sketch()
    DRAWERS[name](sketch, rng)
    pose, place = fit(rng, name, sketch, canvas.size, share, x, foot, 0.02 if setting == "sky" else 0.3)
    aspect, unit = width / height, Pose(np.diag([1.0, -1.0]) * height, np.array([0.0, height]))
    if name in ON_CABINET:
        middle, reach = place.x * aspect, max(place.half * aspect * 1.15, 0.22)
        support = Sketch()
        draw_cabinet(support, rng, middle - reach, middle + reach, place.foot)
        canvas.draw(support, unit, 0)
    on_ground = name not in AIRBORNE
    if on_ground and setting != "water":
        canvas.shadow(place.x * width, (1 - place.foot) * height, place.half * width)
    canvas.draw(sketch, pose, instance)
    if on_ground and setting == "water":
        foam = Paint((70, 130, 164), (206, 228, 236), "ripples", 90, 0)
        crests = np.linspace(place.x - place.half * 1.15, place.x + place.half * 1.15, 9) * aspect
        waterline = Sketch()
        waterline.fill([ellipse(v, place.foot - 0.005, 0.09, 0.018) for v in crests], foam, solid=False)
        canvas.draw(waterline, unit, 0)


def instance_mask(canvas: Canvas, values: Sequence[int]) -> np.ndarray:
    """Instances of the canvas -> mask values (height, width) with void between neighbours.

    Args:
        values: mask value of instance 1, 2, ...; instance 0 is the background.
    """
    middle = SUPERSAMPLE // 2
    instances = np.asarray(canvas.instances)[middle::SUPERSAMPLE, middle::SUPERSAMPLE]
    mask = np.array([0, *values], np.uint8)[instances]
    # The void lies on the farther side of an edge, so that thin parts of the nearer object keep their pixels.
    padded = np.pad(instances, 1, mode="edge")
    for neighbour in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        mask[neighbour > instances] = VOID
    return mask


def develop(rng: Random, picture: Image.Image) -> Image.Image:
    """Light that falls off across the picture, a colour cast, and the noise of a sensor."""
    pixels = np.asarray(picture, np.float32)  # (height, width, 3)
    height, width = pixels.shape[:2]
    slope = rng.uniform(-0.16, 0.16, 2).astype(np.float32)
    across = np.linspace(-1, 1, width, dtype=np.float32)
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    light = 1 + slope[0] * across + slope[1] * down
    cast = (rng.uniform(0.94, 1.14) * rng.uniform(0.96, 1.04, 3)).astype(np.float32)
    grain = rng.standard_normal((height, width, 1), np.float32) * rng.uniform(0.5, 3)
    return Image.fromarray(np.clip(pixels * light[..., None] * cast + grain, 0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------
# The set on disk


def choose_classes(rng: Random, main: str) -> list[str]:
    """The main class alone (half of the time) or with one or two companions."""
    count = rng.choice(3, p=(0.5, 0.34, 0.16))
    return [main, *(str(name) for name in rng.choice(HABITS[main].company, size=count, replace=False))]


SUBSETS = ("train", "val")
MARKER = "synthetic.json"
FOLDERS = ("JPEGImages", "SegmentationClassAug", "ImageSets")


def picture_names(subset: str, count: int) -> list[str]:
    return [f"{subset}_{index:05d}" for index in range(count)]


def write_picture(job: tuple[Path, str, int, int, tuple[int, int]]) -> None:
    """Draws and writes one picture and its mask; (folder, subset, index, seed, size) say all about it."""
    folder, subset, index, seed, size = job
    rng = np.random.default_rng([seed, SUBSETS.index(subset), index])
    picture, mask = draw_scene(rng, choose_classes(rng, VOC_CLASSES[index % len(VOC_CLASSES)]), size)
    name = picture_names(subset, index + 1)[-1]
    save(picture, folder / "JPEGImages" / f"{name}.jpg", quality=92)
    save(mask, folder / "SegmentationClassAug" / f"{name}.png")


def read_marker(folder: Path) -> dict | None:
    """What the folder's marker says, or None for a folder without pictures.

    Raises:
        ValueError: the folder holds pictures that this module did not draw.
    """
    path = folder / MARKER
    if path.is_file():
        try:
            marker = json.loads(path.read_text())
            return {key: marker[key] for key in ("version", "seed", "size", *SUBSETS, "complete")}
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is not the marker of a synthetic set") from None
    for name in FOLDERS:
        if (folder / name).exists():
            raise ValueError(f"{folder} holds {name} but no {MARKER}: it is not ours to draw over")
    return None


def write_dataset(
    data_path: Path,
    num_train: int = 600,
    num_val: int = 120,
    size: tuple[int, int] = (128, 128),
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Writes a synthetic set in the layout of VOC, unless `data_path` holds the same set already.

    Every class is the main one of every 20th picture. A picture depends on `seed`, its subset and its index
    only; a longer set begins with the shorter one.

    Args:
        data_path: folder for JPEGImages/, SegmentationClassAug/, ImageSets/Segmentation/{train,val}.txt and
            the marker synthetic.json. A synthetic set with other arguments is drawn over.
        size: (width, height) in pixels.
        workers: processes; default: one per core for large sets, else this one.

    Raises:
        ValueError: impossible counts, size or seed, or a folder with pictures of another origin.
    """
    data_path = Path(data_path)
    counts = {"train": num_train, "val": num_val}
    if min(counts.values()) < 1 or seed < 0 or min(size) < 32:
        raise ValueError(
            f"{num_train} + {num_val} pictures of {size[0]} x {size[1]} pixels, seed {seed}: "
            "counts begin at 1, sides at 32, seeds at 0"
        )
    wanted = {"version": DRAWING_VERSION, "seed": seed, "size": list(size), **counts}
    found = read_marker(data_path)
    if found == wanted | {"complete": True}:
        return
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (data_path / folder).mkdir(parents=True, exist_ok=True)
    # The marker comes first, so that an interrupted set is known as ours and drawn anew.
    write_text(data_path / MARKER, json.dumps(wanted | {"complete": False}) + "\n")
    for subset in SUBSETS:
        for name in picture_names(subset, (found or {}).get(subset, 0))[counts[subset] :]:
            (data_path / "JPEGImages" / f"{name}.jpg").unlink(missing_ok=True)
            (data_path / "SegmentationClassAug" / f"{name}.png").unlink(missing_ok=True)
    jobs = [(data_path, subset, index, seed, tuple(size)) for subset in SUBSETS for index in range(counts[subset])]
    run_jobs(jobs, workers)
    for subset in SUBSETS:
        lines = "".join(f"{name}\n" for name in picture_names(subset, counts[subset]))
        write_text(data_path / "ImageSets" / "Segmentation" / f"{subset}.txt", lines)
    write_text(data_path / MARKER, json.dumps(wanted | {"complete": True}) + "\n")


def run_jobs(jobs: list[tuple], workers: int | None) -> None:
    """Draws all pictures, in this process or in several, with a progress bar on a terminal."""
    if workers is None:
        workers = 1 if len(jobs) < 200 else min(8, os.cpu_count() or 1)
    bar = tqdm(total=len(jobs), desc="drawing", unit="picture", disable=None)
    with bar:
        if workers <= 1:
            for job in jobs:
                write_picture(job)
                bar.update()
            return
        # Spawned, not forked: the caller may hold threads (torch, CUDA) that a fork would break.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for _ in pool.map(write_picture, jobs, chunksize=8):
                bar.update()


# ---------------------------------------------------------------------------------------------------------
# Command line


def contact_sheet(seed: int = 0, size: tuple[int, int] = (128, 128), columns: int = 4) -> Image.Image:
    """One labelled cell per class: a picture of it and, beside it, its mask in the colours of VOC."""
    width, height = size
    gap, caption = 8, 18
    cell = (2 * width + gap, height + caption + gap)
    rows = -(-len(VOC_CLASSES) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), WHITE)
    pencil, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for index, name in enumerate(VOC_CLASSES):
        rng = np.random.default_rng([seed, index])
        picture, mask = draw_scene(rng, choose_classes(rng, name), size)
        x, y = gap + index % columns * cell[0], gap + index // columns * cell[1]
        pencil.text((x, y), name, DARK, font)
        sheet.paste(picture, (x, y + caption))
        sheet.paste(mask.convert("RGB"), (x + width, y + caption))
    return sheet


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line on stderr instead of the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m dataset.synthetic",
        description="Draw the offline demo pictures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data-path",
        type=Path,
        default=Path("data/synthetic"),
        help="folder to write; a synthetic set in it is replaced, other pictures are refused",
    )
    parser.add_argument(
        "--train", type=int, default=600, help="number of training pictures; multiples of 20 balance classes"
    )
    parser.add_argument("--val", type=int, default=120, help="number of evaluation pictures")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(128, 128),
        metavar=("WIDTH", "HEIGHT"),
        help="pixels of a picture",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pictures")
    parser.add_argument(
        "--workers", type=int, default=None, help="processes that draw; None: one per core for large sets"
    )
    parser.add_argument(
        "--preview",
        type=Path,
        default=None,
        metavar="FILE",
        help="write one contact sheet of all classes here instead of a set",
    )
    args = parser.parse_args(argv)
    try:
        if args.preview:
            contact_sheet(args.seed, tuple(args.size)).save(args.preview)
        else:
            write_dataset(args.data_path, args.train, args.val, tuple(args.size), args.seed, args.workers)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()

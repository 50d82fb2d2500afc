"""Drawn images of the 20 VOC classes, in the layout of VOC on disk: the demo and the tests need no download.

    python -c "from dataset.drawn import write_dataset; write_dataset('data/drawn')"

`shapes.json` holds what is drawn: objects (forms, materials, habits), props of the background, and settings. A form is
a list of parts from back to front; a part is a material and its outlines. x points where the object faces, y points up,
the ground is y = 0, and an object is about one unit tall. Classes of similar meaning share parts, which gives zero-shot
learning something to transfer. The images are a demo and a test bed, not a benchmark.

An image is drawn `SUPERSAMPLE` times too large and averaged down; its mask is sampled from the same polygons.
"""

import itertools
import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from dataset.splits import VOC_CLASSES, VOID
from utils.errors import UserError, write_text
from utils.visualize import voc_palette

VERSION = 2
"""Raise it whenever the same seed draws other images than before: it makes old folders redraw."""
SUPERSAMPLE = 3
MIN_VISIBLE = 0.02
"""Every requested class keeps at least this share of the image."""
SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
OBJECTS, PROPS, SETTINGS = SHAPES["objects"], SHAPES["props"], SHAPES["settings"]


def ellipse(x, y, rx, ry, corners=28):
    """[corners, 2]: an ellipse around (x, y) with half-axes rx and ry."""
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


def ring(x, y, radius, width):
    """[82, 2]: one polygon along the rim of a ring and back along its hole."""
    angle = np.linspace(0, 2 * np.pi, 41)
    rim = np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.concatenate([rim * radius, rim[::-1] * (radius - width)]) + np.array([x, y])


def box(x0, y0, x1, y1, radius=0.0):
    """[24, 2]: a rectangle with rounded corners."""
    radius = min(radius, abs(x1 - x0) / 2, abs(y1 - y0) / 2)
    arc = ellipse(0, 0, 1, 1, 24)
    centre, half = np.array([x0 + x1, y0 + y1]) / 2, np.array([abs(x1 - x0), abs(y1 - y0)]) / 2 - radius
    return centre + arc * radius + half * np.sign(arc.round(9) + 1e-6)


def smooth(*numbers):
    """[5 N, 2]: the closed Catmull-Rom curve through N points."""
    p = np.reshape(numbers, (-1, 1, 2))
    before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = np.linspace(0, 1, 5, endpoint=False)[:, None]  # [5, 1]
    curve = 2 * p + (after - before) * t + (2 * before - 5 * p + 4 * after - beyond) * t**2  # [N, 5, 2]
    return (curve + (3 * p - before - 3 * after + beyond) * t**3).reshape(-1, 2) / 2


def polygon(*numbers):
    """[N, 2]: the points themselves."""
    return np.reshape(numbers, (-1, 2))


def line(*numbers):
    """List of polygons: a line through points (x, y, width) with round joints and ends."""
    points = np.reshape(numbers, (-1, 3))
    polygons = [ellipse(x, y, w / 2, w / 2, 12) for x, y, w in points]
    for (*a, u), (*b, v) in itertools.pairwise(points):
        along = np.subtract(b, a)
        normal = np.array([-along[1], along[0]]) / (np.hypot(*along) + 1e-9) / 2
        polygons.append(np.array([a + normal * u, b + normal * v, b - normal * v, a - normal * u]))
    return polygons


OUTLINES = {function.__name__: function for function in (ellipse, ring, box, smooth, polygon, line)}


@cache
def outline(text: str) -> list[np.ndarray]:
    """Polygons [N, 2] of one outline of `shapes.json`, such as "ellipse 0 0.5 0.2 0.1"."""
    kind, *numbers = text.split()
    shape = OUTLINES[kind](*map(float, numbers))
    return shape if isinstance(shape, list) else [shape]


class Material(NamedTuple):
    """Two colours (float [3], 0-255) mixed by a texture, and shaded at the rim as if the shape were round."""

    low: np.ndarray
    high: np.ndarray
    texture: str
    grain: float  # pixels of the texture a unit; 0 stretches the texture once over the shape
    round: float  # width of the shaded rim in units


def pick(rng: np.random.Generator, options: Sequence):
    return options[rng.integers(len(options))]


class Palette:
    """The materials of one object: each is chosen when it is first used, and then stays."""

    def __init__(self, rng: np.random.Generator, own: dict):
        self.rng, self.known, self.chosen = rng, SHAPES["materials"] | own, {}

    def material(self, text: str) -> Material:
        """`text` is "#rrggbb" or the name of a material, and may end in "*factor": darker below 1, lighter above."""
        name, _, factor = text.partition("*")
        if name not in self.chosen:
            rng, entry = self.rng, self.known.get(name) or {"colours": [name], "vary": 0}
            if "like" in entry:
                ends = np.array([self.material(entry["like"]).low])
            else:
                ends = np.array([ImageColor.getrgb(text) for text in pick(rng, entry["colours"]).split()], float)
                amount = entry.get("vary", 0.12)  # another brightness and a slight cast
                ends *= rng.uniform(1 - amount, 1 + amount) * rng.uniform(1 - amount / 3, 1 + amount / 3, 3)
            half, texture = entry.get("contrast", 0) / 2, pick(rng, entry.get("textures", ["flat"]))
            look = texture, entry.get("grain", 0), entry.get("round", 0)
            self.chosen[name] = Material(ends[0] * (1 - half), ends[-1] * (1 + half), *look)
        found = self.chosen[name]
        return found._replace(low=found.low * float(factor or 1), high=found.high * float(factor or 1))


@cache
def textures() -> dict[str, Image.Image]:
    """Grey textures of 256 x 256 pixels; the same in every process and for every seed."""
    rng = np.random.default_rng(20)
    row, column = np.mgrid[:256, :256]
    stripes = np.sin(2 * np.pi * column / 32)
    fields = {
        "flat": np.zeros((256, 256)),
        "ramp": 1 - row / 256,
        "glint": 0.25 + 0.45 * ((row + column) % 150 > 95) + 0.3 * (1 - row / 256),
        "tiles": np.where(np.minimum(row % 32, column % 32) < 2, 0.0, 0.85),
        "bricks": np.where(np.minimum(row % 12, (column + row // 12 % 2 * 12) % 24) < 2, 0.95, 0.3),
        "bars": 0.5 + 2 * stripes,
        "dots": 0.5 + 4 * (stripes * stripes.T - 0.6),
    }
    for name, (mean, *waves) in SHAPES["textures"].items():
        fields[name] = np.full((256, 256), mean)
        for amount, down, across in waves:  # smooth noise; the lengths are in pixels
            noise = gaussian_filter(rng.standard_normal((256, 256)), (down, across), mode="wrap")
            fields[name] += amount * noise / noise.std()
    return {name: Image.fromarray((np.clip(field, 0, 1) * 255).astype(np.uint8)) for name, field in fields.items()}


class Part(NamedTuple):
    """Polygons [N, 2] whose union is painted with a material (None: not painted) and labelled or not."""

    polygons: list[np.ndarray]
    material: Material | None
    labelled: bool


def sketch(rng: np.random.Generator, thing: dict) -> list[Part]:
    """One of the forms of an object or prop of `shapes.json`, in materials of its own."""
    palette, parts = Palette(rng, thing.get("materials", {})), []
    for style, *outlines in pick(rng, thing["forms"]):
        name, *unlabelled = style.split()
        material = None if name == "invisible" else palette.material(name)
        parts.append(Part([p for text in outlines for p in outline(text)], material, not unlabelled))
    return parts


class Canvas:
    """An image and its map of instances (0: background), both `SUPERSAMPLE` times as large as the result."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.rng, self.size = rng, np.array(size) * SUPERSAMPLE
        self.image, self.instances = Image.new("RGB", tuple(self.size)), Image.new("L", tuple(self.size))

    def draw(self, parts: list[Part], matrix: np.ndarray, origin: np.ndarray, instance: int = 0) -> None:
        """Draws parts at `points @ matrix.T + origin` (canvas pixels, y down); labelled ones become `instance`."""
        pencil, scale = ImageDraw.Draw(self.instances), np.sqrt(abs(np.linalg.det(matrix)))
        for polygons, material, labelled in parts:
            corners = [points @ matrix.T + origin for points in polygons]
            if material:
                self._paint(corners, material, scale)
            for points in corners if labelled else ():
                pencil.polygon(points.ravel().tolist(), fill=instance)

    def shadow(self, x: float, y: float, half: float) -> None:
        """A soft shadow on the ground around (x, y), `half` wide to either side; canvas pixels."""
        depth = max(4, int(0.14 * half))
        stencil = Image.new("L", (int(2 * half) + 4 * depth, 5 * depth))
        ImageDraw.Draw(stencil).ellipse((2 * depth, 1.5 * depth, stencil.width - 2 * depth, 3.5 * depth), fill=120)
        stencil = stencil.filter(ImageFilter.BoxBlur(depth * 0.6))
        self.image.paste((18, 20, 28), (int(x - half) - 2 * depth, int(y - 2.5 * depth)), stencil)

    def _paint(self, corners: list[np.ndarray], material: Material, scale: float) -> None:
        points = np.concatenate(corners)
        low = np.maximum(np.floor(points.min(0)), 0).astype(int)
        wide, tall = np.minimum(np.ceil(points.max(0)) + 1, self.size).astype(int) - low
        if wide <= 0 or tall <= 0:
            return
        rim = int(np.clip(material.round * scale, 0, 40))
        stencil = Image.new("L", (wide + 2 * rim, tall + 2 * rim))
        for polygon in corners:
            ImageDraw.Draw(stencil).polygon((polygon - low + rim).ravel().tolist(), fill=255)
        span = np.minimum(np.array([wide, tall]) / scale * material.grain, 256) if material.grain else (256, 256)
        x, y = self.rng.uniform(0, 1, 2) * np.subtract(256, span)
        area = (x, y, x + span[0], y + span[1])
        texture = textures()[material.texture].resize((wide, tall), Image.Resampling.BILINEAR, box=area)
        mix = np.linspace(0, 1, 256)[:, None]
        colours = (material.low * (1 - mix) + material.high * mix).astype(np.float32)[np.asarray(texture)]  # [H, W, 3]
        if rim:  # the blurred stencil, read a little away from the light, is dark on the far side only
            start = rim + rim // 2
            soft = stencil.filter(ImageFilter.BoxBlur(rim)).crop((start, start, start + wide, start + tall))
            colours = colours * (0.64 + 0.44 / 255 * np.asarray(soft, np.float32))[..., None]
        image = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
        self.image.paste(image, tuple(low.tolist()), stencil.crop((rim, rim, rim + wide, rim + tall)))


def place(canvas: Canvas, parts: list[Part], habit: dict, share: float, x: float, foot: float):
    """Mirrors, turns, stretches and scales an object so that it covers about `share` of the image.

    Its middle comes close to x and its lowest point to foot, as shares of the image's width and height. Returns matrix
    [2, 2] and origin [2] for `Canvas.draw`, and the x, foot and half width that the object has in the end.
    """
    rng, size = canvas.rng, canvas.size
    turn = rng.normal(0, 0.2 if habit.get("flies") else 0.035)
    lean, stretch = rng.normal(0, 0.04), rng.uniform(0.87, 1.15)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = np.diag([pick(rng, (-1.0, 1.0)), -1.0]) @ rotation @ [[stretch, lean], [0, 1 / stretch]]
    polygons = [polygon @ matrix.T for part in parts if part.labelled for polygon in part.polygons]
    low, extent = np.concatenate(polygons).min(0), np.ptp(np.concatenate(polygons), 0)
    silhouette = Image.new("1", (96, 96))
    for polygon in polygons:
        ImageDraw.Draw(silhouette).polygon(((polygon - low) * 96 / extent).ravel().tolist(), fill=1)
    area = np.asarray(silhouette).mean() * extent.prod()
    largest = rng.uniform(0.85, 0.97, 2) * size / extent * (habit.get("overhang", 1.05), 1)
    scale = min(np.sqrt(share * size.prod() / area), *largest)
    half, tall = extent * scale / size * (0.5, 1)
    x = np.clip(x, min(0.5, half - 0.06), max(0.5, 1.06 - half))
    foot = rng.uniform(*habit["foot"]) if "foot" in habit else foot  # what flies or stands on a cabinet
    foot = min(foot, max(0.015, 0.97 - tall))
    return matrix * scale, (x, 1 - foot) * size - (low + extent * (0.5, 1)) * scale, (x, foot, half)


def draw_layers(canvas: Canvas, layers: list[dict], horizon: float) -> None:
    """Draws bands and props; heights in `layers` are 0 at the lower edge, 1 at the horizon, 2 at the upper edge."""
    rng, height = canvas.rng, canvas.size[1]
    aspect, palette = canvas.size[0] / height, Palette(rng, {})
    flip, base = np.diag([1.0, -1.0]) * height, np.array([0, height])
    for layer in layers:
        low, high = np.interp(layer["at"], (0, 1, 2), (0, horizon, 1))
        if "fill" in layer:
            canvas.draw([Part([box(0, low, aspect, high)], palette.material(layer["fill"]), False)], flip, base)
        count = pick(rng, layer.get("count", [0]))
        for k in range(count):
            x, y = (k + rng.uniform(0.2, 0.8)) / count * aspect, rng.uniform(low, high)
            canvas.draw(sketch(rng, PROPS[layer["prop"]]), flip * rng.uniform(*layer["size"]), base + flip @ (x, y))


def draw_object(canvas: Canvas, name: str, on_water: bool, instance: int, share: float, x: float, foot: float) -> None:
    """Draws one object of a class, with what it stands on or in; see `place`."""
    rng, size, habit = canvas.rng, canvas.size, OBJECTS[name]
    parts = sketch(rng, habit)
    matrix, origin, (x, foot, half) = place(canvas, parts, habit, share, x, foot)
    width, height = size * (half, -1)
    if "support" in habit:
        canvas.draw(sketch(rng, PROPS[habit["support"]]), np.diag([width, height * foot]), (x, 1) * size)
    if not (on_water or habit.get("flies")):
        canvas.shadow(x * size[0], (1 - foot) * size[1], width)
    canvas.draw(parts, matrix, origin, instance)
    if on_water and not habit.get("flies"):
        canvas.draw(sketch(rng, PROPS["foam"]), np.diag([width, height * 0.05]), (x, 1 - foot) * size)


def compose(rng: np.random.Generator, classes: Sequence[str], size: tuple[int, int]) -> Canvas:
    """Backdrop, objects from back to front, and sometimes something in front of them all."""
    options = OBJECTS[classes[0]]["settings"]
    suits = [sum(name in OBJECTS[other]["settings"] for other in classes) for name in options]
    setting = pick(rng, [name for name, count in zip(options, suits) if count == max(suits)])
    horizon, canvas, count = rng.uniform(*SETTINGS[setting]["horizon"]), Canvas(rng, size), len(classes)
    draw_layers(canvas, SETTINGS[setting]["backdrop"], horizon)
    centres = (rng.permutation(count) + 0.5) / count + rng.uniform(-0.08, 0.08, count)
    feet = np.sort(rng.uniform(0.04, 0.2, count) + 0.12 * (count > 1) * np.arange(count))[::-1]  # nearer and nearer
    for k, name in enumerate(classes):
        share = rng.uniform(0.2, 0.4) if k == 0 else rng.uniform(0.06, 0.15) * OBJECTS[name]["size"]
        draw_object(canvas, name, setting == "water", k + 1, share, centres[k], feet[k])
    draw_layers(canvas, SETTINGS[setting]["front"], horizon)
    return canvas


def instance_mask(canvas: Canvas, values: Sequence[int]) -> np.ndarray:
    """Mask [H, W] of the canvas: `values` of instance 1, 2, ..., 0 for the background, void between neighbours."""
    instances = np.asarray(canvas.instances)[SUPERSAMPLE // 2 :: SUPERSAMPLE, SUPERSAMPLE // 2 :: SUPERSAMPLE]
    mask, padded = np.array([0, *values], np.uint8)[instances], np.pad(instances, 1, mode="edge")
    # The void lies on the farther side of an edge, so that thin parts of the nearer object keep their pixels.
    for neighbour in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        mask[neighbour > instances] = VOID
    return mask


def develop(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Light that falls off across the image, a colour cast, and the noise of a sensor."""
    pixels = np.asarray(image, np.float32)  # [H, W, 3]
    down, across = np.meshgrid(*(np.linspace(-1, 1, n) for n in pixels.shape[:2]), indexing="ij")
    light = rng.uniform(0.94, 1.14) + rng.uniform(-0.16, 0.16) * across + rng.uniform(-0.16, 0.16) * down
    grain = rng.standard_normal((*light.shape, 1)) * rng.uniform(0.5, 3)
    pixels = pixels * light[..., None] * rng.uniform(0.96, 1.04, 3) + grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_scene(rng: np.random.Generator, classes: Sequence[str], size: tuple[int, int] = (128, 128)):
    """Draws an image that shows every class of `classes`, the first one largest, the later ones in front.

    Args:
        classes: names of `VOC_CLASSES`; a name twice means two objects.
        size: (width, height) in pixels.

    Returns:
        The image (mode RGB) and its mask (mode P, palette of VOC): 1 + index in `VOC_CLASSES`, 0 for the background,
        255 for the line of void around objects.

    Raises:
        UserError: no layout leaves every class at least `MIN_VISIBLE` of the image.
    """
    values = [1 + VOC_CLASSES.index(name) for name in classes]
    for _ in range(40):
        canvas = compose(rng, classes, size)
        mask = instance_mask(canvas, values)
        if all((mask == value).mean() >= MIN_VISIBLE for value in values):
            labels = Image.fromarray(mask)
            labels.putpalette(voc_palette().tobytes())
            return develop(rng, canvas.image.resize(size, Image.Resampling.BOX)), labels
    raise UserError(f"no layout of {size[0]} x {size[1]} pixels leaves all of {', '.join(classes)} visible")


def write_dataset(
    folder: Path, num_train: int = 600, num_val: int = 120, size: tuple[int, int] = (128, 128), seed: int = 0
):
    """Writes drawn images in the layout of VOC, unless `folder` holds the same set already.

    Every class is the main one of every 20th image, alone in half of them, else with one or two companions. An image
    depends on `seed`, its subset and its index only.

    Args:
        folder: for JPEGImages/, SegmentationClassAug/, ImageSets/Segmentation/ and the marker drawn.json.
        size: (width, height) in pixels.

    Raises:
        UserError: a folder with images of another origin.
    """
    folder, counts = Path(folder), {"train": num_train, "val": num_val}
    images, masks, lists = (folder / name for name in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"))
    marker = folder / "drawn.json"
    wanted = json.dumps({"version": VERSION, "seed": seed, "size": list(size), **counts}) + "\n"
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
        return
    for part in (images, masks, lists):
        if part.exists() and not marker.is_file():
            raise UserError(f"{part} is there, but no {marker.name}: give a folder of its own for drawn images")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    write_text(marker, "{}\n")  # an interrupted set is known as ours and drawn anew
    for k, (subset, count) in enumerate(counts.items()):
        names = [f"{subset}_{index:05d}" for index in range(count)]
        for index, name in enumerate(tqdm(names, f"drawing {subset}", unit="image", disable=None)):
            rng, main = np.random.default_rng([seed, k, index]), VOC_CLASSES[index % len(VOC_CLASSES)]
            companions = rng.choice(OBJECTS[main]["company"], rng.choice(3, p=(0.5, 0.34, 0.16)), replace=False)
            image, mask = draw_scene(rng, [main, *companions.tolist()], size)
            image.save(images / f"{name}.jpg", quality=92)
            mask.save(masks / f"{name}.png")
        write_text(lists / f"{subset}.txt", "\n".join(names) + "\n")
    write_text(marker, wanted)

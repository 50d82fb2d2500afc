"""Drawn images of the 20 VOC classes, in the layout of VOC on disk: the demo and the tests need no download.

    python -c "from dataset.drawn import write_dataset; write_dataset('data/drawn')"

`shapes.json` holds what is drawn: objects (forms, materials, habits), props of the background, and settings. A form is
a list of parts from back to front; a part is a material and its outlines. x points where the object faces, y points up,
the ground is y = 0, and an object is about one unit tall. Classes of similar meaning share parts, which gives zero-shot
learning something to transfer. The images are a demo and a test bed, not a benchmark.
"""

import itertools
import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter
from scipy.ndimage import gaussian_filter, maximum_filter
from tqdm import tqdm

from dataset.splits import VOC_CLASSES, VOID
from utils.errors import UserError, write_text
from utils.visualize import voc_palette

VERSION = 3  # raise it whenever the same seed draws other images than before: old folders are then drawn anew
SUPERSAMPLE = 3  # an image is drawn as many times too large, and averaged down
MIN_VISIBLE = 0.02  # the least share of the image that each requested class keeps
SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
OBJECTS, PROPS, SETTINGS = SHAPES["objects"], SHAPES["props"], SHAPES["settings"]
PLAIN = {"vary": 0.12, "contrast": 0, "textures": ["flat"], "grain": 0, "round": 0}
"""Defaults of a material. grain: texture pixels a unit, 0 if stretched over the shape; round: shaded rim in units."""
CIRCLE = np.stack([wave(np.arange(0.5, 28) * np.pi / 14) for wave in (np.cos, np.sin)], 1)


@cache
def outline(text: str) -> list[np.ndarray]:
    """Polygons [N, 2] of one outline of `shapes.json`.

    "ellipse x y rx ry" may end in "hx hy", half the sides of the rectangle that it rounds. "line" has points (x, y,
    width) and round ends. "smooth" is a closed curve, by the four-point scheme of Dyn, Gregory and Levin.
    """
    kind, *numbers = text.split()
    points = np.array(numbers, float).reshape(-1, 3 if kind == "line" else 2)
    if kind == "ellipse":
        centre, radii, *half = points
        return [centre + CIRCLE * radii + np.sign(CIRCLE) * sum(half)]
    if kind == "line":
        polygons = []
        for (*start, w0), (*end, w1) in itertools.pairwise(points):
            ahead = (CIRCLE @ np.subtract(end, start) > 0)[:, None]
            polygons.append(np.where(ahead, end + CIRCLE * w1 / 2, start + CIRCLE * w0 / 2))
        return polygons
    for _ in range(2 if kind == "smooth" else 0):
        between = (9 * (points + np.roll(points, -1, 0)) - np.roll(points, 1, 0) - np.roll(points, -2, 0)) / 16
        points = np.stack([points, between], 1).reshape(-1, 2)
    return [points]


@cache
def texture(name: str) -> Image.Image:
    """Grey, 256 x 256 pixels, the same for every seed: digits of brightness, repeated, or sums of smooth noise."""
    if name in SHAPES["patterns"]:
        repeat, *rows = SHAPES["patterns"][name]
        field = np.tile(np.array([list(row) for row in rows], float) / 9, (repeat, repeat))
    else:
        mean, *waves = SHAPES["noise"][name]
        field, rng = np.full((256, 256), mean), np.random.default_rng(20)
        for amount, *lengths in waves:  # in pixels, down and across
            noise = gaussian_filter(rng.standard_normal((256, 256)), lengths, mode="wrap")
            field += amount * noise / noise.std()
    return Image.fromarray((np.clip(field, 0, 1) * 255).astype(np.uint8)).resize((256, 256), Image.Resampling.BILINEAR)


def pick(rng: np.random.Generator, options: Sequence):
    return options[rng.integers(len(options))]


def sketch(rng: np.random.Generator, thing: dict) -> list[tuple[list[np.ndarray], dict, str]]:
    """One of the forms of an object or prop, in materials of its own: parts (polygons, material, style).

    A material is "#rrggbb" or a name, with "*factor" if darker or lighter; " unlabelled" or " unpainted" may follow.
    Its "colours" and "texture" are chosen when it is first used, and then stay.
    """
    known, chosen, parts = SHAPES["materials"] | thing.get("materials", {}), {}, []
    for style, *outlines in pick(rng, thing["forms"]):
        name, _, factor = style.split()[0].partition("*")
        if name not in chosen:
            material = PLAIN | known.get(name, {"colours": [name], "vary": 0})
            colours = np.array([ImageColor.getrgb(text) for text in pick(rng, material["colours"]).split()])
            colours = colours * (1 + np.array([[-0.5], [0.5]]) * material["contrast"])  # [2, 3]
            colours *= rng.uniform(1 - material["vary"], 1 + material["vary"])
            chosen[name] = material | {"colours": colours, "texture": texture(pick(rng, material["textures"]))}
        material = chosen[name] | {"colours": chosen[name]["colours"] * float(factor or 1)}
        parts.append(([polygon for text in outlines for polygon in outline(text)], material, style))
    return parts


class Canvas:
    """An image and its map of instances (0: background), both `SUPERSAMPLE` times as large as the result."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.rng, self.size = rng, np.array(size) * SUPERSAMPLE
        self.image, self.instances = Image.new("RGB", tuple(self.size)), Image.new("L", tuple(self.size))

    def draw(self, parts: list, matrix: np.ndarray, origin: np.ndarray, instance: int = 0) -> None:
        """Draws what `sketch` returns at `points @ matrix.T + origin` (canvas pixels, y down), labelled `instance`."""
        scale = np.sqrt(abs(np.linalg.det(matrix)))
        for polygons, material, style in parts:
            stencil, rim = Image.new("L", self.image.size), int(min(material["round"] * scale, 40))
            for points in polygons:
                ImageDraw.Draw(stencil).polygon((points @ matrix.T + origin).ravel().tolist(), fill=255)
            *corner, right, bottom = np.add(stencil.getbbox() or (0, 0, 1, 1), (-rim, -rim, rim, rim)).tolist()
            stencil = stencil.crop((*corner, right, bottom))
            if "unlabelled" not in style:
                self.instances.paste(instance, corner, stencil)
            span = np.minimum(np.array(stencil.size) / scale * (material["grain"] or np.inf), 256)
            start = self.rng.uniform(0, 1, 2) * (256 - span)
            field = material["texture"].resize(stencil.size, Image.Resampling.BILINEAR, (*start, *(start + span)))
            look = np.linspace(*material["colours"], 256, dtype=np.float32)[np.asarray(field)]  # [H, W, 3]
            if rim:  # as if round: the blurred stencil, read a little away from the light, is dark on the far side only
                light = ImageChops.offset(stencil.filter(ImageFilter.BoxBlur(rim)), -(rim // 2))
                look *= 0.64 + 0.44 / 255 * np.asarray(light, np.float32)[..., None]
            if "unpainted" not in style:
                self.image.paste(Image.fromarray(look.clip(0, 255).astype(np.uint8)), corner, stencil)


def draw_layers(canvas: Canvas, layers: list[dict], horizon: float) -> None:
    """Draws bands and props; heights in `layers` are 0 at the lower edge, 1 at the horizon, 2 at the upper edge."""
    rng, (width, height) = canvas.rng, canvas.size
    for layer in layers:
        low, high = np.interp(layer["at"], (0, 1, 2), (0, horizon, 1)) * height
        if "fill" in layer:
            band = {"forms": [[[layer["fill"], "polygon 0 0  1 0  1 1  0 1"]]]}
            canvas.draw(sketch(rng, band), np.diag([width, low - high]), (0, height - low))
        count = pick(rng, layer.get("count", [0]))
        for k in range(count):
            x, y = (k + rng.uniform(0.2, 0.8)) / count * width, height - rng.uniform(low, high)
            scale = height * rng.uniform(*layer["size"])
            canvas.draw(sketch(rng, PROPS[layer["prop"]]), np.diag([scale, -scale]), (x, y))


def draw_object(canvas: Canvas, instance: int, name: str, share: float, x: float, foot: float, on_water: bool) -> None:
    """Draws one object of a class, mirrored, turned and stretched at random, with what it stands on or in.

    Its box covers about `share` of the image if there is room; its middle comes close to x and its lowest point to
    foot, as shares of the image's width and height.
    """
    rng, size, habit = canvas.rng, canvas.size, OBJECTS[name]
    parts, flies = sketch(rng, habit), habit.get("flies")
    turn, stretch = rng.normal(0, 0.2 if flies else 0.035), rng.uniform(0.87, 1.15)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = np.diag([pick(rng, (-1, 1)), -1]) @ rotation @ np.diag([stretch, 1 / stretch])
    labelled = [polygon for polygons, _, style in parts if "unlabelled" not in style for polygon in polygons]
    points = np.concatenate(labelled) @ matrix.T
    low, extent = points.min(0), np.ptp(points, 0)
    largest = rng.uniform(0.85, 0.97, 2) * size / extent * (habit.get("overhang", 1.05), 1)
    scale = min(np.sqrt(share * size.prod() / extent.prod()), *largest)
    half, tall = extent * scale / size * (0.5, 1)
    x = np.clip(x, min(0.5, half - 0.06), max(0.5, 1.06 - half))
    foot = min(rng.uniform(*habit.get("foot", (foot, foot))), max(0.015, 0.97 - tall))
    ground, flip = (x, 1 - foot) * size, np.diag([half, -1]) * size
    if "support" in habit:
        canvas.draw(sketch(rng, PROPS[habit["support"]]), flip * (1, foot), (x, 1) * size)
    if not (on_water or flies):
        shadow, reach = Image.new("L", canvas.image.size), half * size[0] * np.array((1, 0.07))
        ImageDraw.Draw(shadow).ellipse((*(ground - reach), *(ground + reach)), fill=120)
        canvas.image.paste((18, 20, 28), mask=shadow.filter(ImageFilter.BoxBlur(int(reach[1]))))
    canvas.draw(parts, matrix * scale, ground - (low + extent * (0.5, 1)) * scale, instance)
    if on_water and not flies:
        canvas.draw(sketch(rng, PROPS["foam"]), flip * (1, 0.05), ground)


def compose(rng: np.random.Generator, classes: Sequence[str], size: tuple[int, int]) -> Canvas:
    """Backdrop, objects from back to front, and sometimes something in front of them all."""
    options = rng.permutation(OBJECTS[classes[0]]["settings"])
    name = max(options, key=lambda option: sum(option in OBJECTS[other]["settings"] for other in classes))
    setting, canvas, count = SETTINGS[name], Canvas(rng, size), len(classes)
    horizon = rng.uniform(*setting["horizon"])
    draw_layers(canvas, setting["backdrop"], horizon)
    centres = (rng.permutation(count) + 0.5) / count + rng.uniform(-0.08, 0.08, count)
    feet = np.sort(rng.uniform(0.04, 0.2, count) + 0.12 * (count > 1) * np.arange(count))[::-1]  # nearer and nearer
    for k, other in enumerate(classes):
        share = (rng.uniform(0.12, 0.3) if k else rng.uniform(0.4, 0.75)) * OBJECTS[other]["size"]
        draw_object(canvas, k + 1, other, share, centres[k], feet[k], name == "water")
    draw_layers(canvas, setting["front"], horizon)
    return canvas


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
    values = np.array([0, *(1 + VOC_CLASSES.index(name) for name in classes)], np.uint8)
    for _ in range(40):
        canvas = compose(rng, classes, size)
        instances = np.asarray(canvas.instances.resize(size, Image.Resampling.NEAREST))  # [H, W]
        # The void lies on the farther side of an edge, so that thin parts of the nearer object keep their pixels.
        nearest = np.maximum(maximum_filter(instances, (1, 3)), maximum_filter(instances, (3, 1)))
        mask = np.where(nearest > instances, np.uint8(VOID), values[instances])
        if all((mask == value).mean() >= MIN_VISIBLE for value in values[1:]):
            break
    else:
        raise UserError(f"no layout of {size[0]} x {size[1]} pixels leaves all of {', '.join(classes)} visible")
    labels = Image.fromarray(mask)
    labels.putpalette(voc_palette().tobytes())
    pixels = np.asarray(canvas.image.reduce(SUPERSAMPLE), float)  # [H, W, 3]
    light = np.linspace(*rng.uniform(0.8, 1.28, 2), size[0])[:, None] * rng.uniform(0.96, 1.04, 3)  # [W, 3]
    pixels = pixels * light + rng.uniform(0.5, 3) * rng.standard_normal((*mask.shape, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), labels


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

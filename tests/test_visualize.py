"""Images of masks: colours against known values, files read back, and sheets compared pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.splits import Split
from dataset.voc import evaluation_dataset
from model.upsampling import PixelLogits
from utils import visualize
from utils.errors import UserError
from utils.visualize import contact_sheet, images_showing, overlay, prediction_rows, save_index_png

NAMES = {7: "car", 8: "cat", 15: "person", 20: "tvmonitor"}
CAR, CAT, PERSON, SCREEN = (128, 128, 128), (64, 0, 0), (192, 128, 128), (0, 64, 128)
RED, BLUE = (250, 10, 20), (10, 20, 250)
SPLIT = Split.named(1)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def halves(height, width, left, right):
    mask = np.full((height, width, *np.shape(left)), left, dtype=np.uint8)
    mask[:, width // 2 :] = right
    return mask


def swatches(page):
    """Which of the known colours have a swatch in the legend at the foot of the page, from left to right."""
    foot = np.asarray(page.convert("RGB"))[-45:]
    side = visualize.LEGEND_SIZE - 2
    found = {}
    for name, colour in {"car": CAR, "cat": CAT, "person": PERSON, "screen": SCREEN, "background": (0, 0, 0)}.items():
        windows = np.lib.stride_tricks.sliding_window_view((foot == colour).all(2), (side, side)).all((2, 3))
        if windows.any():
            found[name] = np.argwhere(windows)[0][1]
    return sorted(found, key=found.get)


def test_palette_has_the_colours_of_voc():
    colours = visualize.voc_palette()
    assert colours.shape == (256, 3) and colours.dtype == np.uint8
    known = {0: (0, 0, 0), 1: (128, 0, 0), 4: (0, 0, 128), 7: CAR, 8: CAT, 15: PERSON, 20: SCREEN, 64: (32, 0, 0),
             255: (224, 224, 192)}  # fmt: skip
    assert {value: tuple(colours[value].tolist()) for value in known} == known
    assert len(np.unique(colours, axis=0)) == 256


def test_index_png_keeps_values_and_colours_and_replaces_a_file(tmp_path):
    mask, path = np.arange(256, dtype=np.uint8).reshape(8, 32), tmp_path / "new" / "mask.png"
    for values in (mask[::-1], mask):
        save_index_png(values, path)
    with Image.open(path) as image:
        assert image.mode == "P" and (np.asarray(image) == mask).all()
        assert (np.asarray(image.convert("RGB")) == visualize.voc_palette()[mask]).all()
    assert [p.name for p in path.parent.iterdir()] == ["mask.png"]


def test_image_that_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "mask.png"
    save_index_png(np.full((2, 2), 7, dtype=np.uint8), path)

    def half_written(image, target, **_):
        target.write_bytes(b"half")
        raise OSError(28, "disk full")

    monkeypatch.setattr(Image.Image, "save", half_written)
    with pytest.raises(UserError, match=r"mask\.png can't be written .disk full"):
        save_index_png(np.zeros((2, 2), dtype=np.uint8), path)
    assert np.asarray(Image.open(path)).tolist() == [[7, 7], [7, 7]] and list(tmp_path.iterdir()) == [path]


def test_overlay_leaves_ignored_pixels_and_tints_the_others():
    image, mask = noise(20, 30), halves(20, 30, 0, 15)
    copies = image.copy(), mask.copy()
    drawn = overlay(image, mask)
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    assert (drawn[:, :14] == image[:, :14]).all() and (drawn[:, 14] == visualize.CONTOUR).all()
    grey = drawn[:, 15:].astype(int) - np.round(0.6 * np.array(PERSON))
    assert (grey.max(2) - grey.min(2) <= 1).all() and len(np.unique(grey)) > 20  # below the colour lies a grey image
    assert (overlay(image, mask, ignore=(15,))[:, 15:] == image[:, 15:]).all()
    assert (overlay(image, halves(20, 30, 0, 255)) == image).all()  # no contour between ignored values
    assert (image == copies[0]).all() and (mask == copies[1]).all()


def test_overlay_bleaches_pixels_that_are_not_evaluated():
    image, mask = noise(10, 12), halves(10, 12, 15, 15)
    drawn = overlay(image, mask, faded=halves(10, 12, 0, 1).astype(bool))
    assert (drawn[:, :5] == overlay(image, mask)[:, :5]).all() and (drawn[:, 5] == visualize.CONTOUR).all()
    assert drawn[:, 6:].min() >= 178 and (drawn[:, 6:].max(2) == drawn[:, 6:].min(2)).all()


@pytest.mark.parametrize(
    "label, prediction, options, shown",
    [
        ((0, 8), (15, 8), {}, ["cat"]),  # person is painted only where the label is background
        ((0, 8), (15, 8), {"fade": False}, ["cat", "person"]),
        ((0, 8), (0, 8), {"ignore": (255,), "names": {0: "background", **NAMES}}, ["background", "cat"]),
        (None, (8, 7), {}, ["car", "cat"]),
        (None, (8, 7), {"names": {8: "cat 60 %", 7: "car* 40 %"}}, ["cat", "car"]),  # in the order of the names
        (None, (20, 255), {"names": {}}, ["screen"]),
    ],
)
def test_legend_shows_the_classes_that_occur(label, prediction, options, shown):
    masks = {"prediction": halves(300, 320, *prediction)}
    masks = masks if label is None else {"label": halves(300, 320, *label), **masks}
    options = {"names": NAMES, **options}
    page = contact_sheet([(np.full((300, 320, 3), 250, np.uint8), masks)], **options)
    assert swatches(page) == shown
    assert page.width == 2 * visualize.MARGIN + (1 + len(masks)) * (320 + visualize.GAP) - visualize.GAP


def test_legend_wraps_into_rows():
    row = noise(256, 256), {"prediction": np.repeat(np.array([7, 8, 15, 20], np.uint8), 64)[None].repeat(256, axis=0)}
    narrow = contact_sheet([row], dict.fromkeys(NAMES, "a long name " * 3))
    assert narrow.height > contact_sheet([row], NAMES).height + 40


def test_sheet_has_a_column_a_method_and_a_row_an_image():
    label = halves(260, 260, 7, 8)
    row = noise(260, 260), {"label": label, "source only": label, "stage 1": label, "stage 2": halves(260, 260, 20, 8)}
    one, three = contact_sheet([row], NAMES), contact_sheet([row] * 3, NAMES)
    assert one.width == three.width == 2 * visualize.MARGIN + 5 * 260 + 4 * visualize.GAP
    assert three.height - one.height == 2 * (260 + visualize.GAP) and "screen" in swatches(one)
    assert contact_sheet([row], NAMES, title="Split 1").height > one.height


@pytest.mark.parametrize("size, drawn", [((100, 128), (200, 256)), ((800, 1600), (256, 512)), ((260, 300), (260, 300))])
def test_images_are_enlarged_by_a_whole_number_or_shrunk(size, drawn):
    masks = {"prediction": np.zeros(size, np.uint8)}
    page = contact_sheet([(np.full((*size, 3), (7, 50, 200), np.uint8), masks)], NAMES)
    left = np.asarray(page)[:, : page.width // 2]
    rows, columns = np.where((left == (7, 50, 200)).all(2))
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == drawn


def test_images_of_different_sizes_do_not_cover_each_other():
    sizes = {RED: (300, 400), BLUE: (400, 300)}
    rows = [(np.full((*size, 3), colour, np.uint8), {"prediction": halves(*size, 7, 7)})
            for colour, size in sizes.items()]  # fmt: skip
    page = np.asarray(contact_sheet(rows, NAMES, title="two sizes"))
    first, second = (np.argwhere((page == colour).all(2)) for colour in sizes)
    assert len(first) == len(second) == 300 * 400
    assert second.min(0).tolist() == [first.max(0)[0] + 1 + visualize.GAP, visualize.MARGIN + 50]  # centred


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (1, 700), (700, 1)])
def test_images_one_pixel_wide(size):
    mask = np.full(size, 7, dtype=np.uint8)
    assert overlay(noise(*size), mask).shape == (*size, 3)
    page = contact_sheet([(noise(*size), {"label": mask, "prediction": mask})], NAMES, title="x" * 300)
    assert page.width >= 3 * 256 and page.height < 800


# --- what a network predicts ----------------------------------------------------------------------------


def test_images_that_show_the_unseen_classes_are_found(data):
    dataset = evaluation_dataset(data, SPLIT, "train")
    unseen = range(SPLIT.num_seen, len(SPLIT.names))
    chosen = images_showing(dataset, unseen)
    shown = [{c for c in unseen if (dataset[index][1] == c).float().mean() > 0.02} for index in chosen]
    assert set().union(*shown) == set(unseen) and len(chosen) <= len(unseen) and all(shown)


def test_rows_hold_image_label_and_prediction(data):
    class Constant(torch.nn.Conv2d):
        def pixel_logits(self, image):
            assert not self.training
            return PixelLogits(torch.eye(len(SPLIT.names))[3].view(1, -1, 1, 1), *image.shape[-2:])

    dataset, model = evaluation_dataset(data, SPLIT), Constant(1, 1, 1)
    (shown, masks), _ = prediction_rows(model, dataset, SPLIT, [2, 0])
    image, label, _ = dataset[2]
    assert model.training and (shown == image.permute(1, 2, 0).numpy()).all()
    assert (masks["label"] == SPLIT.to_mask(label.numpy())).all()
    assert (masks["prediction"] == SPLIT.mask_values[3]).all()

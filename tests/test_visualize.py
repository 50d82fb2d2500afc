"""Images of masks: colours against known values, files read back, and sheets compared pixel by pixel."""

import numpy as np
import torch
from PIL import Image

from dataset.splits import Split
from dataset.voc import evaluation_dataset
from model.upsampling import PixelLogits
from utils import visualize
from utils.visualize import contact_sheet, images_showing, overlay, prediction_rows, save_index_png

NAMES = {7: "car", 8: "cat", 15: "person", 20: "tvmonitor"}
CAR, CAT, PERSON, SCREEN = (128, 128, 128), (64, 0, 0), (192, 128, 128), (0, 64, 128)
SPLIT = Split.named(1)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def halves(height, width, left, right):
    mask = np.full((height, width, *np.shape(left)), left, dtype=np.uint8)
    mask[:, width // 2 :] = right
    return mask


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


def test_sheet_shows_no_prediction_where_the_label_is_void():
    image, label = noise(260, 260), halves(260, 260, 8, 255)
    sheets = [contact_sheet([(image, {"label": label, "stage 1": halves(260, 260, 8, n)})], NAMES) for n in (255, 7)]
    assert sheets[0] == sheets[1]


def test_sheet_has_a_column_a_method_and_a_row_an_image():
    label = halves(260, 260, 7, 8)
    row = noise(260, 260), {"label": label, "source only": label, "stage 1": label, "stage 2": halves(260, 260, 20, 8)}
    one, three = contact_sheet([row], NAMES), contact_sheet([row] * 3, NAMES)
    assert one.width == three.width == 2 * visualize.MARGIN + 5 * 260 + 4 * visualize.GAP
    assert three.height - one.height == 2 * (260 + visualize.GAP)
    assert contact_sheet([row], NAMES, title="Split 1").height > one.height


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

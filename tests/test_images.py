"""Reading images and masks: formats, orientation, modes, values, palettes, and conversion of colours."""

import numpy as np
import pytest
from PIL import Image

from dataset.images import colours_to_values, read_image, read_mask
from dataset.splits import VOID
from utils.errors import UserError
from utils.visualize import voc_palette

VOC = dict.fromkeys(range(21))
OWN = {0: (0, 0, 0), 1: (48, 112, 32), 2: (250, 50, 83), 3: (51, 221, 255)}


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_turned_as_their_exif_data_says(tmp_path, turn, kind):
    """By definition: 3 is half a turn, 6 is stored with its top at the right, and so on; read as viewers show it."""
    shown = np.zeros((40, 64, 3), np.uint8)
    shown[:20, :32] = 255  # bright at the top left, as a viewer shows it
    stored = {
        1: shown, 2: shown[:, ::-1], 3: shown[::-1, ::-1], 4: shown[::-1], 5: shown.transpose(1, 0, 2),
        6: np.rot90(shown), 7: shown[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(shown, -1),
    }[turn]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x", kind, exif=exif, quality=95)
    image = read_image(tmp_path / "x", (64, 40))
    assert image.shape == (40, 64, 3) and np.abs(image.astype(int) - shown).max() < 40
    np.testing.assert_array_equal(read_image(tmp_path / "x"), image)  # without a mask too
    if turn > 4 and kind != "TIFF":  # a mask that was drawn on the pixels as stored says so by its size
        assert read_image(tmp_path / "x", (40, 64)).shape == (64, 40, 3)


VOC_ENTRIES = voc_palette()
WEB = np.reshape(Image.new("RGB", (1, 1)).convert("P").getpalette(), (-1, 3))
TWISTED = VOC_ENTRIES.copy()
TWISTED[[1, 12]] = TWISTED[[12, 1]]
PALETTES = {
    "VOC's": ([[0, 7, 255]], VOC_ENTRIES, VOC, True),
    "grey": ([[0, 7, 20]], np.arange(256)[:, None].repeat(3, 1), VOC, True),
    "one colour for all": ([[0, 7, 255]], np.full((256, 3), 200), VOC, True),
    "of another data set": ([[0, 1, 2]], [(128, 64, 128), (244, 35, 232), (70, 70, 70)], VOC, True),
    "with more colours than VOC's": ([[0, 1]], [(128, 128, 128), (128, 0, 0), (60, 40, 222)], VOC, True),
    "VOC's, two exchanged": ([[0, 1, 12]], TWISTED, VOC, False),
    "of the colours that are there": ([[0, 1, 2]], VOC_ENTRIES[[0, 12, 17]], VOC, False),
    "the same with white borders": ([[0, 1, 2]], [*VOC_ENTRIES[[0, 12]], (255, 255, 255)], VOC, False),
    "the background last": ([[0, 1]], VOC_ENTRIES[[15, 0]], VOC, False),
    "the web palette": ([[10, 10]], WEB, VOC, False),
    "a class in black": ([[0, 3]], [(128, 0, 0), (9, 9, 9), (7, 7, 7), (0, 0, 0)], VOC, False),
    "own colours": ([[0, 1, 3]], list(OWN.values()), OWN, True),
    "own colours in another order": ([[0, 1, 3]], [OWN[n] for n in (0, 3, 2, 1)], OWN, False),
}


@pytest.mark.parametrize("mask, entries, colours, fine", PALETTES.values(), ids=PALETTES)
def test_a_palette_in_another_order_is_refused_and_can_be_read(tmp_path, mask, entries, colours, fine):
    path, image = tmp_path / "mask.png", Image.fromarray(np.asarray(mask, np.uint8), mode="P")
    image.putpalette(np.asarray(entries, np.uint8).ravel().tolist())
    image.save(path)
    shown = np.array(image.convert("RGB"))
    if fine:
        assert read_mask(path, colours).tolist() == read_mask(path, colours, reorder=True).tolist() == mask
        return
    with pytest.raises(UserError, match=r"in another order .*--convert-colour-masks"):
        read_mask(path, colours)
    np.testing.assert_array_equal(read_mask(path, colours, reorder=True), colours_to_values(shown, colours, path))


def test_indices_saved_as_grey_colours_are_indices(tmp_path):
    mask = np.array([[0, 3, 20, VOID]], np.uint8)
    path = tmp_path / "x"
    np.testing.assert_array_equal(colours_to_values(np.stack([mask] * 3, axis=-1), VOC, path), mask)
    grey = np.full((2, 2, 3), 128, np.uint8)  # the colour of VOC's class 7, and no index
    np.testing.assert_array_equal(colours_to_values(grey, VOC, path), np.full((2, 2), 7))
    white = np.array([[(0, 0, 0), (128, 0, 0), (255, 255, 255)]], np.uint8)
    assert colours_to_values(white, VOC, path).tolist() == [[0, 1, VOID]]
    with pytest.raises(UserError, match=r"\(99, 99, 99\)"):
        colours_to_values(np.full((2, 2, 3), 99, np.uint8), VOC, path)

"""Pictures: colours against known numbers, files read back, and pages looked at pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from utils import pictures
from utils.errors import UserError
from utils.pictures import colourise, comparison, contact_sheet, legend, overlay, palette, read_photo, save_index_png

NAMES = {7: "car", 8: "cat", 15: "person", 20: "tvmonitor"}
CAR, CAT, PERSON, SCREEN = (128, 128, 128), (64, 0, 0), (192, 128, 128), (0, 64, 128)


def photo(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def halves(height, width, left, right):
    mask = np.full((height, width), left, dtype=np.uint8)
    mask[:, width // 2 :] = right
    return mask


def has_swatch(picture, colour, size=pictures.LEGEND_SIZE):
    """Whether a filled square of that colour, as large as a swatch without its outline, is in the picture."""
    same = (np.asarray(picture.convert("RGB")) == colour).all(2)
    windows = np.lib.stride_tricks.sliding_window_view(same, (size - 2, size - 2))
    return bool(windows.all((2, 3)).any())


def ink(picture):
    """Pixels that are not paper."""
    return int((np.asarray(picture) != 255).any(2).sum())


def test_palette_has_the_colours_of_voc():
    colours = palette()
    assert colours.shape == (256, 3) and colours.dtype == np.uint8
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        3: (128, 128, 0),
        4: (0, 0, 128),
        7: CAR,
        8: CAT,
        15: PERSON,
        16: (0, 64, 0),
        20: SCREEN,
        64: (32, 0, 0),
        255: (224, 224, 192),
    }
    assert {number: tuple(colours[number].tolist()) for number in known} == known
    assert len(np.unique(colours, axis=0)) == 256
    assert (palette(21) == colours[:21]).all()


@pytest.mark.parametrize("count", [0, 257])
def test_palette_of_impossible_size_raises(count):
    with pytest.raises(ValueError, match="palette"):
        palette(count)


def test_index_png_keeps_numbers_and_colours(tmp_path):
    mask = np.arange(256, dtype=np.uint8).reshape(8, 32)
    save_index_png(mask, tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as picture:
        assert picture.mode == "P"
        assert (np.asarray(picture) == mask).all()
        assert (np.asarray(picture.convert("RGB")) == palette()[mask]).all()
    assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]


def test_index_png_replaces_a_file_and_does_not_write_into_it(tmp_path):
    path, link = tmp_path / "mask.png", tmp_path / "link.png"
    save_index_png(np.array([[7]], dtype=np.uint8), path)
    link.hardlink_to(path)
    save_index_png(np.array([[20]], dtype=np.uint8), str(path))
    assert np.asarray(Image.open(path)).tolist() == [[20]]
    assert np.asarray(Image.open(link)).tolist() == [[7]]


def test_index_png_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "mask.png"
    save_index_png(np.full((2, 2), 7, dtype=np.uint8), path)

    def half_written(picture, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        save_index_png(np.zeros((2, 2), dtype=np.uint8), path)
    assert np.asarray(Image.open(path)).tolist() == [[7, 7], [7, 7]]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [np.zeros((2, 2), dtype=np.int64), np.zeros((1, 2, 2), dtype=np.uint8)])
def test_mask_of_another_type_raises(mask, tmp_path):
    for call in (
        lambda: save_index_png(mask, tmp_path / "mask.png"),
        lambda: colourise(mask),
        lambda: overlay(photo(2, 2), mask),
    ):
        with pytest.raises(ValueError, match="mask"):
            call()


def test_photo_of_another_size_raises():
    with pytest.raises(ValueError, match="photo"):
        overlay(photo(4, 5), np.zeros((5, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match="photo"):
        comparison(photo(4, 5), np.zeros((4, 5), dtype=np.uint8), np.zeros((5, 4), dtype=np.uint8), NAMES)


def test_colourise_paints_void_light_grey():
    painted = colourise(np.array([[0, 15, 255]], dtype=np.uint8))
    assert painted.dtype == np.uint8
    assert painted.tolist() == [[[0, 0, 0], list(PERSON), list(pictures.VOID_COLOUR)]]


def test_overlay_leaves_ignored_pixels_and_tints_the_others():
    image, mask = photo(20, 30), halves(20, 30, 0, 15)
    drawn = overlay(image, mask)
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    assert (drawn[:, :14] == image[:, :14]).all()
    assert (drawn[:, 14] == pictures.CONTOUR).all()  # the contour lies left of the border
    assert (overlay(image, mask, opacity=1.0)[:, 15:] == PERSON).all()
    spread = drawn[:, 15:].astype(int) - np.round(0.6 * np.array(PERSON))
    assert (spread.max(2) - spread.min(2) <= 1).all()  # below the colour the photo is grey
    assert len(np.unique(drawn[:, 15:, 0])) > 20  # but still to be seen
    assert (overlay(image, mask, ignore=(15,))[:, 15:] == image[:, 15:]).all()


def test_overlay_draws_no_contour_between_ignored_values():
    image = photo(10, 12)
    assert (overlay(image, halves(10, 12, 0, 255)) == image).all()
    drawn = overlay(image, halves(10, 12, 7, 8))
    assert (drawn == pictures.CONTOUR).all(2).sum() == 10


def test_overlay_bleaches_pixels_that_do_not_count():
    image, mask = photo(10, 12), halves(10, 12, 15, 15)
    drawn = overlay(image, mask, faded=halves(10, 12, 0, 1).astype(bool))
    assert (drawn[:, :5] == overlay(image, mask)[:, :5]).all()  # the rest is untouched
    assert drawn[:, 6:].min() >= 178  # 0.7 of white
    assert (drawn[:, 6:].max(2) == drawn[:, 6:].min(2)).all()
    assert (drawn[:, 5] == pictures.CONTOUR).all()  # where counting ends
    everywhere = overlay(image, halves(10, 12, 7, 8), faded=np.ones((10, 12), dtype=bool))
    assert (everywhere[:, 6:] == drawn[:, 6:]).all() and not (everywhere[:, 5] == pictures.CONTOUR).all()


def test_overlay_does_not_write_into_its_inputs():
    image, mask = photo(6, 6), halves(6, 6, 7, 0)
    copies = image.copy(), mask.copy()
    overlay(image, mask)
    assert (image == copies[0]).all() and (mask == copies[1]).all()


def test_legend_shows_the_classes_asked_for_and_no_others():
    picture = legend([8, 15], NAMES, 400)
    assert has_swatch(picture, CAT) and has_swatch(picture, PERSON)
    assert not has_swatch(picture, CAR) and not has_swatch(picture, SCREEN)


def test_legend_wraps_into_rows():
    wide, narrow = legend([7, 8, 15, 20], NAMES, 600), legend([7, 8, 15, 20], NAMES, 130)
    assert (wide.width, narrow.width) == (600, 130)
    assert narrow.height > 2 * wide.height
    assert has_swatch(narrow, SCREEN)


def test_legend_marks_and_explains():
    plain, marked = legend([8, 15], NAMES, 600), legend([8, 15], NAMES, 600, marked={15})
    assert ink(marked) > ink(legend([8, 15], NAMES, 600, marked={15}, note="")) > ink(plain)
    assert ink(legend([8], NAMES, 600, marked={15})) == ink(legend([8], NAMES, 600))  # nothing to explain


def test_legend_with_shares_unknown_numbers_and_nothing_at_all():
    assert ink(legend([8], NAMES, 600, counts={8: 3, 15: 1})) > ink(legend([8], NAMES, 600))
    assert ink(legend([8], NAMES, 600, counts={8: 0})) == ink(legend([8], NAMES, 600))
    assert has_swatch(legend([20], {}, 300), SCREEN)
    assert ink(legend([], NAMES, 300)) == 0


def test_comparison_has_three_columns_and_the_legend_of_what_is_seen():
    image = np.zeros((300, 320, 3), dtype=np.uint8)
    page = comparison(image, halves(300, 320, 0, 8), halves(300, 320, 15, 8), NAMES)
    assert page.mode == "RGB"
    assert page.width == 2 * pictures.MARGIN + 3 * 320 + 2 * pictures.GAP
    assert 300 < page.height < 420
    key = page.crop((0, page.height - 45, page.width, page.height))
    assert has_swatch(key, CAT)
    assert not has_swatch(key, PERSON)  # painted only where the truth is background
    shown = comparison(image, halves(300, 320, 0, 8), halves(300, 320, 15, 8), NAMES, fade=False)
    assert has_swatch(shown.crop((0, shown.height - 45, shown.width, shown.height)), PERSON)


def test_prediction_where_the_truth_is_ignored_does_not_show():
    image, truth = photo(300, 300), halves(300, 300, 0, 8)
    first = comparison(image, truth, halves(300, 300, 15, 8), NAMES)
    second = comparison(image, truth, halves(300, 300, 7, 8), NAMES)
    assert (np.asarray(first) == np.asarray(second)).all()
    third = comparison(image, truth, halves(300, 300, 7, 15), NAMES)
    assert third.tobytes() != second.tobytes()


def test_background_that_counts_is_in_the_legend():
    image, truth = np.full((300, 300, 3), 90, dtype=np.uint8), halves(300, 300, 0, 8)
    page = comparison(image, truth, truth, {0: "background", **NAMES}, ignore=(255,))
    assert has_swatch(page.crop((0, page.height - 45, page.width, page.height)), (0, 0, 0))


def test_small_pictures_are_enlarged_by_a_whole_number():
    mask = halves(100, 128, 8, 15)
    blue = (7, 50, 200)  # no grey, which the edges of letters are
    page = comparison(np.full((100, 128, 3), blue, dtype=np.uint8), mask, mask, NAMES)
    pixels = np.asarray(page)
    assert page.width == 2 * pictures.MARGIN + 3 * 256 + 2 * pictures.GAP
    rows, columns = np.where((pixels == blue).all(2))
    assert rows.max() - rows.min() + 1 == 200 and columns.max() - columns.min() + 1 == 256


def test_large_pictures_are_shrunk():
    mask = halves(800, 1600, 8, 15)
    page = comparison(photo(800, 1600), mask, mask, NAMES)
    assert page.width == 2 * pictures.MARGIN + 3 * 512 + 2 * pictures.GAP
    assert 256 < page.height < 380


def test_contact_sheet_has_a_column_a_method_and_a_row_a_picture():
    truth = halves(260, 260, 7, 8)
    methods = {"source only": truth, "stage 1": truth, "stage 2": halves(260, 260, 20, 8)}
    row = photo(260, 260), truth, methods
    one, three = contact_sheet([row], NAMES), contact_sheet([row] * 3, NAMES)
    assert one.width == three.width == 2 * pictures.MARGIN + 5 * 260 + 4 * pictures.GAP
    assert three.height - one.height == 2 * (260 + pictures.GAP)
    assert has_swatch(one.crop((0, one.height - 45, one.width, one.height)), SCREEN)
    assert contact_sheet([row], NAMES, title="Split 1").height > one.height


def test_sheet_takes_pictures_of_different_sizes():
    red, blue = (200, 30, 0), (0, 30, 200)
    rows = [
        (np.full((*size, 3), colour, dtype=np.uint8), halves(*size, 7, 8), halves(*size, 7, 7))
        for size, colour in (((300, 400), red), ((400, 300), blue))
    ]
    page = contact_sheet(rows, NAMES, marked={8}, title="two sizes")
    assert page.width == 2 * pictures.MARGIN + 3 * 400 + 2 * pictures.GAP
    first, second = (np.argwhere((np.asarray(page) == colour).all(2)) for colour in (red, blue))
    assert len(first) == len(second) == 300 * 400  # whole, and neither covers the other
    assert second.min(0).tolist() == [first.max(0)[0] + 1 + pictures.GAP, pictures.MARGIN + 50]  # centred


def test_without_truth_there_is_no_column_for_it():
    mask = halves(256, 256, 7, 0)
    page = comparison(photo(256, 256), None, mask, NAMES)
    assert page.width == 2 * pictures.MARGIN + 2 * 256 + pictures.GAP
    key = page.crop((0, page.height - 45, page.width, page.height))
    assert has_swatch(key, CAR) and not has_swatch(key, (0, 0, 0))


def test_rows_that_do_not_fit_together_raise():
    mask = halves(4, 4, 7, 8)
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], NAMES)
    with pytest.raises(ValueError, match="columns"):
        contact_sheet([(photo(4, 4), mask, mask), (photo(4, 4), None, mask)], NAMES)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (1, 700), (700, 1)])
def test_pictures_one_pixel_wide(size, tmp_path):
    mask = np.full(size, 7, dtype=np.uint8)
    mask[0, 0] = 255
    assert overlay(photo(*size), mask).shape == (*size, 3)
    predictions = {"a very long heading, which cannot fit" * 3: mask}
    page = comparison(photo(*size), mask, predictions, NAMES, title="x" * 300)
    assert page.width >= 3 * 256 and page.height < 800
    save_index_png(mask, tmp_path / "thin.png")
    assert (np.asarray(Image.open(tmp_path / "thin.png")) == mask).all()


# --- photos as they come --------------------------------------------------------------------------------

RED, BLUE = (250, 10, 20), (10, 20, 250)


def two_halves(left=RED, right=BLUE, size=(8, 12)):
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:, : size[1] // 2], pixels[:, size[1] // 2 :] = left, right
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation, top_left", [(1, RED), (3, BLUE), (6, RED), (8, BLUE)])
def test_photo_is_turned_as_exif_says(tmp_path, orientation, top_left):
    exif = Image.Exif()
    exif[0x0112] = orientation
    two_halves().save(tmp_path / "p.png", exif=exif)
    photo = read_photo(tmp_path / "p.png")
    assert photo.shape == ((8, 12, 3) if orientation in (1, 3) else (12, 8, 3)) and tuple(photo[0, 0]) == top_left


def test_transparent_parts_of_a_photo_are_white(tmp_path):
    clear = two_halves().convert("RGBA")
    clear.putalpha(Image.fromarray(halves(8, 12, 0, 255)))
    clear.save(tmp_path / "p.png")
    photo = read_photo(tmp_path / "p.png")
    assert (photo[:, :6] == 255).all() and (photo[:, 6:] == BLUE).all()
    palette_picture = Image.fromarray(halves(8, 12, 0, 1))
    palette_picture.putpalette([*RED, *BLUE])
    palette_picture.save(tmp_path / "q.gif", transparency=0)
    photo = read_photo(tmp_path / "q.gif")
    assert (photo[:, :6] == 255).all() and (photo[:, 6:] == BLUE).all()


@pytest.mark.parametrize("kind, high", [(np.uint16, 65535), (np.int32, 65535), (np.int32, 255), (np.float32, 1)])
def test_deep_grey_is_scaled_to_8_bits(tmp_path, kind, high):
    grey = np.linspace(0, high, 96).reshape(8, 12).astype(kind)
    Image.fromarray(grey).save(tmp_path / "p.tiff")
    photo = read_photo(tmp_path / "p.tiff")
    assert photo.shape == (8, 12, 3) and (photo[..., 0] == photo[..., 2]).all()
    assert np.abs(photo[..., 0].astype(int) - np.linspace(0, 255, 96).reshape(8, 12)).max() <= 1


def test_dark_picture_of_16_bits_stays_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / "p.png")
    assert read_photo(tmp_path / "p.png").max() == 1


def test_first_frame_of_a_moving_picture(tmp_path):
    two_halves().save(tmp_path / "p.gif", save_all=True, append_images=[two_halves(BLUE, RED)])
    photo = read_photo(tmp_path / "p.gif")
    assert abs(photo[0, 0].astype(int) - RED).max() < 8 and abs(photo[0, -1].astype(int) - BLUE).max() < 8


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path, mode):
    two_halves((0, 0, 0), (255, 255, 255)).convert(mode).save(tmp_path / "p.tiff")
    photo = read_photo(tmp_path / "p.tiff").astype(int)
    assert photo.shape == (8, 12, 3) and photo[:, :6].max() < 8 and photo[:, 6:].min() > 247


@pytest.mark.parametrize("content", [None, b"", b"no picture", "cut"])
def test_what_is_no_photo_is_named(tmp_path, content):
    if content == "cut":
        two_halves(size=(80, 120)).save(tmp_path / "p.png")
        content = (tmp_path / "p.png").read_bytes()[:60]
    if content is not None:
        (tmp_path / "p.png").write_bytes(content)
    with pytest.raises(UserError, match=r"p\.png (is missing|can't be read as a picture)"):
        read_photo(tmp_path / "p.png")


def test_legend_with_shares_begins_with_the_largest():
    mask = np.full((100, 100), 7, np.uint8)
    mask[:30], mask[0, 0] = 8, 15
    said = []
    page = contact_sheet([(photo(100, 100), None, mask)], NAMES, shares=True)
    order = [CAR, CAT, PERSON]
    swatches = [np.argwhere((np.asarray(page)[-60:] == colour).all(2)).min(axis=0) for colour in order]
    said = [tuple(place) for place in swatches]
    assert said == sorted(said)
    tiny = legend([7, 15], NAMES, 600, counts={7: 9999, 15: 1})
    assert ink(tiny) > ink(legend([7, 15], NAMES, 600))

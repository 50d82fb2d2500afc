"""Joint transforms: image and label stay together, padding is void, a seed repeats everything."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import map_coordinates

from dataset.splits import VOID
from dataset.transforms import FILL, crop, training_transform


def pair(label: np.ndarray):
    """A image whose grey is ten times its label, and the label."""
    label = torch.from_numpy(label.astype(np.uint8))
    return (10 * label).expand(3, -1, -1).clone(), label


def drawn(transform, image, label, seed):
    torch.manual_seed(seed)
    return transform(image, label)


def test_scales_are_drawn_over_their_range():
    label = np.zeros((100, 100))
    label[40:60, 40:60] = 1
    transform = training_transform(400, (0.8, 2.5), 0, 0)
    sides = [(drawn(transform, *pair(label), seed)[1] == 1).sum().sqrt().item() / 20 for seed in range(60)]
    assert min(sides) < 1.0 and max(sides) > 2.2 and min(sides) > 0.7 and max(sides) < 2.6


@pytest.mark.parametrize("height, width", [(48, 64), (47, 33), (64, 64), (1, 2), (31, 64)])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_neither_scaled_nor_rotated_a_image_stays_as_it_is(height, width, flip):
    """Bit for bit, whole in the middle of its crop: what is computed of it once can be kept (--cache-features)."""
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    label = torch.randint(0, 20, (height, width), dtype=torch.uint8)
    found = drawn(training_transform(64, (1, 1), 0, flip), image, label, 0)
    top, left = round((height - 64) / 2), round((width - 64) / 2)
    for source, result in zip((image, label), found):
        result = result.flip(-1) if flip else result
        assert torch.equal(result[..., -top : height - top, -left : width - left], source)
    void = found[1] == VOID
    assert void.sum() == 64 * 64 - height * width
    assert found[0][:, void].unique(dim=1).T.tolist() in ([], [list(FILL["crop"])])


@pytest.mark.parametrize("seed", range(10))
def test_each_pixel_is_what_its_point_of_the_image_shows(seed):
    """The warp against SciPy's: the image between pixels, the label at the nearest one."""
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8)
    label = torch.randint(0, 20, (90, 120), dtype=torch.uint8)
    settings = 64, (1, 2.5), 15, 0.5
    shown, cut = drawn(training_transform(*settings), image, label, seed)
    torch.manual_seed(seed)
    *_, (a, b, c, d, e, f) = crop(Image.new("RGB", (120, 90)), *settings)
    row, column = np.mgrid[:64, :64] + 0.5
    x, y = a * column + b * row + c, d * column + e * row + f
    inside = (x >= 0) & (x < 120) & (y >= 0) & (y < 90)
    assert ((cut.numpy() != VOID) == inside).mean() > 0.999  # a pixel on the very edge may be rounded either way
    inside &= cut.numpy() != VOID
    points = y[inside] - 0.5, x[inside] - 0.5
    for plane, channel in zip(shown.numpy(), image.double()):
        assert np.abs(map_coordinates(channel, points, order=1, mode="nearest") - plane[inside]).max() <= 1
    nearest = label.numpy()[y[inside].astype(int), x[inside].astype(int)]
    assert (nearest == cut.numpy()[inside]).mean() > 0.99


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("degrees", [0, 15])
def test_a_smaller_image_counts_every_pixel(scale, degrees):
    """Stripes of one pixel become an even grey, not a pattern of those that happened to be looked at."""
    stripes = torch.arange(400).remainder(2).mul(200).to(torch.uint8).expand(3, 400, 400).clone()
    transform = training_transform(100, (scale, scale), degrees, 0.5)
    for seed in range(5):
        shown, _ = drawn(transform, stripes, torch.zeros(400, 400, dtype=torch.uint8), seed)
        assert shown.float().std() < (30 if scale == 0.8 else 10)  # with pixels left out: above 55
        assert shown.float().mean() == pytest.approx(100, abs=5)


@pytest.mark.parametrize("seed", range(8))
def test_a_stretched_image_and_its_label_stay_together(seed):
    slope = np.add(*np.mgrid[:60, :90]) // 6  # of the label; the image rises by 10 every 6 pixels
    image, label = drawn(training_transform(96, resize="square"), *pair(slope), seed)
    void = label == VOID
    assert (image[:, ~void].float() - 10 * label[~void]).abs().mean() < 2  # two pixels apart, it is 4
    assert (image[:, void] > 0).sum() < 9  # black outside, as published, but for pixels on the edge


@pytest.mark.parametrize("resize", FILL)
def test_flips_and_rotations_are_drawn_over_their_range(resize):
    halves = pair(np.kron([[0, 1]], np.ones((32, 16))))
    flip = training_transform(32, (1, 1), 0, 0.5, resize)
    assert 8 < sum(drawn(flip, *halves, seed)[1][0, 0].item() for seed in range(40)) < 32
    void = [(drawn(training_transform(64, resize="square"), *halves, s)[1] == VOID).float().mean() for s in range(20)]
    assert min(void) < 0.03 and 0.04 < max(void) < 0.25

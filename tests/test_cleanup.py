"""Clean-up of pseudo-labels on small drawn ones."""

import pytest
import torch

from model.cleanup import grid_superpixels, majority_by_region, remove_specks

VOID = 255


def drawing(*pictures):
    """Rows of digits -> int64 [N, H, W]; a dot is void."""
    return torch.tensor([[[VOID if c == "." else int(c) for c in row] for row in picture] for picture in pictures])


def test_small_pieces_go_and_corners_connect():
    label = drawing(
        ["11..2", "11.2.", "....2", "3.1.."],  # the 1 at the bottom is apart from the other four
        ["44444", "45444", "44444", "4444."],  # a speck inside another class
    )
    expected = drawing(
        ["11..2", "11.2.", "....2", "....."],
        ["44444", "4.444", "44444", "4444."],
    )
    before = label.clone()
    assert torch.equal(remove_specks(label, 3), expected)
    assert torch.equal(label, before)


@pytest.mark.parametrize(("min_pixels", "stays"), [(0, True), (1, True), (4, True), (5, False)])
def test_a_piece_of_just_enough_pixels_stays(min_pixels, stays):
    label = drawing(["00.", "00.", "..."])  # class 0 is a class
    assert torch.equal(remove_specks(label, min_pixels), label if stays else torch.full_like(label, VOID))


def test_another_ignore_index_is_neither_piece_nor_lost():
    label = torch.tensor([[[9, 1, 1], [1, 1, 2]]])
    assert remove_specks(label, 2, ignore_index=9).tolist() == [[[9, 1, 1], [1, 1, 9]]]


def test_pictures_do_not_connect():
    assert (remove_specks(drawing(["1"], ["1"], ["1"]), 2) == VOID).all()


def test_each_region_votes():
    regions = drawing(["0011", "0011", "2233", "2233"], ["0000", "0000", "1111", "1111"])
    label = drawing(["01.2", "00..", "..34", "..43"], ["5.5.", "5.5.", "66..", "6..."])
    # Region 1 of the first picture has one labelled pixel of four, region 3 two of each of two classes.
    expected = drawing(["00..", "00..", "..33", "..33"], ["5555", "5555", "....", "...."])
    assert torch.equal(majority_by_region(label, regions), expected)
    lower = drawing(["0022", "0022", "..33", "..33"], ["5555", "5555", "6666", "6666"])
    assert torch.equal(majority_by_region(label, regions, share=0.25), lower)


def test_nothing_labelled_stays_void_whatever_the_share():
    label = torch.full((1, 4, 4), VOID)
    assert torch.equal(majority_by_region(label, torch.zeros_like(label), share=0.0), label)


def test_superpixels_follow_an_edge_that_the_grid_does_not():
    image = torch.full((2, 3, 40, 50), 60, dtype=torch.uint8)
    image[0, :, 5:27, 11:38] = 200
    inside = torch.zeros(40, 50, dtype=torch.bool)
    inside[5:27, 11:38] = True
    regions = grid_superpixels(image, side=8)
    assert regions.shape == (2, 40, 50) and regions.dtype == torch.int64
    assert regions.min() >= 0 and regions.max() < 5 * 7
    assert not set(regions[0][inside].tolist()) & set(regions[0][~inside].tolist())
    # Where all is one colour only the place counts: even tiles.
    sizes = regions[1].flatten().bincount(minlength=35)
    assert sizes.min() > 30 and sizes.max() < 100


def test_superpixels_of_a_picture_are_its_own_and_local():
    image = torch.randint(0, 256, (3, 3, 30, 36), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    regions = grid_superpixels(image, side=6)
    assert torch.equal(regions[1:2], grid_superpixels(image[1:2], side=6))
    row, column = regions // 6, regions % 6  # of the tile, in a grid of 5 x 6
    y, x = torch.arange(30)[:, None] // 6, torch.arange(36) // 6
    assert (row - y).abs().max() <= 1 and (column - x).abs().max() <= 1

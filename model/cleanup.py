"""Spatial clean-up of pseudo-labels: specks removed, and a vote of each superpixel."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage


def remove_specks(label: torch.Tensor, min_pixels: int, ignore_index: int = 255) -> torch.Tensor:
    """Voids each connected piece of one class that has fewer than `min_pixels` pixels.

    Pixels that touch at a corner are connected. The work is done on the CPU.

    Args:
        label: int64 [N, H, W].
        min_pixels: the smallest piece that stays; up to 1 all do.
        ignore_index: label that is no class, and that specks get.

    Returns:
        int64 [N, H, W], on the device of `label`.
    """
    cleaned = label.cpu().numpy().copy()
    for picture in cleaned:  # [H, W], changed in place
        for c in np.setdiff1d(picture, ignore_index):
            pieces, _ = ndimage.label(picture == c, structure=np.ones((3, 3)))
            small = np.bincount(pieces.ravel()) < min_pixels  # by the number of the piece
            small[0] = False  # what is not of this class
            picture[small[pieces]] = ignore_index
    return torch.from_numpy(cleaned).to(label.device)


def majority_by_region(
    label: torch.Tensor, regions: torch.Tensor, share: float = 0.5, ignore_index: int = 255
) -> torch.Tensor:
    """Each region takes the class that most of its labelled pixels have, if these are enough, or becomes void.

    Args:
        label: int64 [N, H, W], class indices or `ignore_index`.
        regions: int64 [N, H, W], numbers from 0 in each picture, such as `grid_superpixels` gives.
        share: of all pixels of a region, labelled or not, so many must have that class. Of equals the lowest wins.

    Returns:
        int64 [N, H, W].
    """
    number, num_regions = len(label), int(regions.max()) + 1
    labelled = label != ignore_index
    num_classes = int(torch.where(labelled, label, 0).max()) + 1
    place = regions + num_regions * torch.arange(number, device=label.device)[:, None, None]  # of the batch
    votes = torch.bincount((place * num_classes + label)[labelled], minlength=number * num_regions * num_classes)
    most, winner = votes.view(-1, num_classes).max(dim=1)  # [N * R]
    size = torch.bincount(place.flatten(), minlength=number * num_regions)
    winner[(most == 0) | (most < share * size)] = ignore_index
    return winner[place]


def grid_superpixels(
    image: torch.Tensor, side: int = 16, compactness: float = 10.0, iterations: int = 5
) -> torch.Tensor:
    """Superpixels: k-means of (colour, place) where each pixel chooses among the 3 x 3 nearest tiles of a grid.

    The distance is that of SLIC, colour^2 + (compactness / side)^2 * place^2 (Achanta et al., "SLIC Superpixels
    Compared to State-of-the-Art Superpixel Methods", PAMI 2012), with colours in RGB and pieces left as they fall.

    Args:
        image: uint8 [N, 3, H, W].
        side: of a tile in pixels.
        compactness: colour levels that weigh as much as a tile's side; the higher, the squarer.
        iterations: of assigning pixels and moving centres.

    Returns:
        int64 [N, H, W], numbers below ceil(H / side) * ceil(W / side), in each picture; some may be missing.
    """
    number, _, height, width = image.shape
    h, w = -(-height // side), -(-width // side)
    y, x = torch.arange(height, device=image.device), torch.arange(width, device=image.device)
    place = torch.stack(torch.meshgrid(y, x, indexing="ij")) * (compactness / side)  # [2, H, W]
    features = torch.cat([image.float(), place.expand(number, -1, -1, -1)], dim=1)  # [N, 5, H, W]
    centres = F.adaptive_avg_pool2d(features, (h, w))  # [N, 5, h, w]
    for _ in range(iterations):
        nearest = torch.full((number, height, width), torch.inf, device=image.device)
        regions = torch.zeros(number, height, width, dtype=torch.long, device=image.device)
        for dy, dx in ((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
            row, column = (y * h // height + dy).clamp(0, h - 1)[:, None], (x * w // width + dx).clamp(0, w - 1)
            distance = (features - centres[:, :, row, column]).square().sum(dim=1)  # [N, H, W]
            regions = torch.where(distance < nearest, row * w + column, regions)
            nearest = nearest.minimum(distance)
        index = regions.flatten(1)[:, None].expand(-1, 5, -1)  # [N, 5, H * W]
        means = centres.flatten(2).scatter_reduce(2, index, features.flatten(2), "mean", include_self=False)
        centres = means.view_as(centres)  # a centre that nobody chose stays
    return regions

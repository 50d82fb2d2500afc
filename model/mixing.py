"""Strong augmentation of what a student sees: colours, and pieces of source pictures pasted into target pictures.

Pictures are uint8 [N, 3, H, W] of one size, labels integer [N, H, W] with class indices below 255, which is void.
Random numbers come from torch's global generator on the CPU alone, so a step that is seeded is drawn again in the same
way, on whatever device the tensors are.
"""

import math

import torch
from torchvision.transforms import v2


def colour_jitter(image: torch.Tensor, strength: float) -> torch.Tensor:
    """Changes brightness, contrast and saturation of each picture by factors of its own, and greys a few.

    Args:
        image: uint8 [N, 3, H, W].
        strength: factors are drawn from [1 - strength, 1 + strength], none below 0, and applied in a random order; a
            picture turns grey with a probability of 0.4 * strength. 0.5 is strong, 0 leaves pictures as they are.

    Returns:
        uint8 [N, 3, H, W].
    """
    jitter = v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength)
    transform = v2.Compose([jitter, v2.RandomGrayscale(p=min(1.0, 0.4 * strength))])
    return torch.stack([transform(picture) for picture in image])  # a draw for all of them would be one draw a batch


def cut_mix(
    source_image: torch.Tensor,
    source_label: torch.Tensor,
    target_image: torch.Tensor,
    target_label: torch.Tensor,
    share: tuple[float, float] = (0.1, 0.4),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pastes a rectangle of a random source picture, labels and all, into the same place of each target picture.

    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", arXiv
    1905.04899; between labels, as French et al., "Semi-supervised semantic segmentation needs strong, varied
    perturbations", BMVC 2020.

    Args:
        source_image, source_label: [N, 3, H, W] and [N, H, W].
        target_image, target_label: [M, 3, H, W] and [M, H, W].
        share: range of the rectangle's share of the picture's area, within [0, 1]; the share is drawn uniformly, the
            sides' ratio between 1 : 2 and 2 : 1 times that of the picture as far as the rectangle fits.

    Returns:
        image uint8 [M, 3, H, W], label int64 [M, H, W], and `pasted`, bool [M, H, W]: what comes from the source.
        A void pixel of the source is void in its new place.
    """
    number, height, width = target_label.shape
    area = torch.empty(number).uniform_(*share)
    bound = -area.clamp(min=0.5).log()  # at a ratio in [area, 1 / area] neither side is longer than the picture's
    ratio = torch.exp(bound * torch.empty(number).uniform_(-1, 1))
    sides = torch.stack([(area * ratio).sqrt() * height, (area / ratio).sqrt() * width])  # [2, M] in pixels
    full = torch.tensor([[height], [width]])
    sides = sides.round().long().minimum(full)
    start = (torch.rand(2, number) * (full - sides + 1)).long()  # [2, M]
    (top, left), (bottom, right) = start[..., None], (start + sides)[..., None]  # [M, 1] each
    y, x = torch.arange(height), torch.arange(width)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)  # [M, H], [M, W]
    pasted = (rows[:, :, None] & columns[:, None, :]).to(target_image.device)
    picked = _pick(len(source_image), number, target_image.device)
    return _paste(source_image[picked], source_label[picked], target_image, target_label, pasted)


def class_mix(
    source_image: torch.Tensor,
    source_label: torch.Tensor,
    target_image: torch.Tensor,
    target_label: torch.Tensor,
    ignore_index: int = 255,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pastes half of the classes that a random source picture shows into the same place of each target picture.

    Olsson et al., "ClassMix: Segmentation-Based Data Augmentation for Semi-Supervised Learning", arXiv 2007.07936;
    between source and target, as Tranheden et al., "DACS: Domain Adaptation via Cross-domain Mixed Sampling", arXiv
    2007.08702. Half of an odd number is rounded up, so that a picture of one class is pasted too.

    Args:
        source_image, source_label: [N, 3, H, W] and [N, H, W], values 0 to 255.
        target_image, target_label: [M, 3, H, W] and [M, H, W].
        ignore_index: label that is no class and never pasted.

    Returns:
        image uint8 [M, 3, H, W], label int64 [M, H, W], and `pasted`, bool [M, H, W]: what comes from the source.
    """
    number, device = len(target_image), target_image.device
    picked = _pick(len(source_image), number, device)
    label = source_label[picked]  # [M, H, W]
    index = label.flatten(1).long()  # [M, H * W]
    present = torch.zeros(number, 256, dtype=torch.bool, device=device).scatter_(1, index, True)
    present[:, ignore_index] = False
    # Ranks of random numbers choose without asking the device which classes there are: no sync.
    lot = torch.rand(number, 256).to(device).masked_fill(~present, math.inf)
    rank = lot.argsort(dim=1).argsort(dim=1)
    chosen = present & (rank < (present.sum(dim=1, keepdim=True) + 1) // 2)  # [M, 256]
    pasted = chosen.gather(1, index).view_as(label)
    return _paste(source_image[picked], label, target_image, target_label, pasted)


def _pick(available: int, number: int, device: torch.device) -> torch.Tensor:
    """For each of `number` target pictures the index of a source picture."""
    return torch.randint(available, (number,)).to(device)


def _paste(source_image, source_label, target_image, target_label, pasted):
    """Source where `pasted`, else target; labels may differ in type."""
    image = torch.where(pasted[:, None], source_image, target_image)  # [M, 3, H, W]
    return image, torch.where(pasted, source_label.long(), target_label.long()), pasted

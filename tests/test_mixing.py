"""Colours and mixtures: every pixel's colour and label come from the same place, and draws repeat from a seed."""

import pytest
import torch

from model.mixing import class_mix, colour_jitter, cut_mix

VOID = 255


def batch(number, first, size=(16, 20), seed=0):
    """Pictures whose red channel tells the picture, and labels of classes 0 to 3 in quadrants with void pixels."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    image = torch.randint(0, 256, (number, 3, height, width), generator=generator, dtype=torch.uint8)
    image[:, 0] = torch.arange(first, first + number, dtype=torch.uint8)[:, None, None]
    label = torch.zeros(number, height, width, dtype=torch.uint8)
    label[:, : height // 2, width // 2 :] = 1
    label[:, height // 2 :, : width // 2] = 2
    label[:, height // 2 :, width // 2 :] = 3
    label[torch.rand(label.shape, generator=generator) < 0.2] = VOID
    return image, label


def mixture(mix, seed=0, sources=3, targets=5, **options):
    source, target = batch(sources, 0, seed=1), batch(targets, 100, seed=2)
    target = target[0], target[1].long() + 10 * (target[1] != VOID)  # classes 10 to 13
    torch.manual_seed(seed)
    return source, target, mix(*source, *target, **options)


# --- colour ---------------------------------------------------------------------------------------------


def test_strength_0_changes_nothing():
    image, _ = batch(3, 0)
    assert torch.equal(colour_jitter(image, 0.0), image)


def test_pictures_of_a_batch_are_changed_differently():
    image = batch(1, 0)[0].expand(6, -1, -1, -1)
    torch.manual_seed(0)
    changed = colour_jitter(image, 0.5)
    assert changed.shape == image.shape and changed.dtype == torch.uint8
    assert len({picture.numpy().tobytes() for picture in changed}) == 6
    assert not any(torch.equal(a, b) for a, b in zip(changed, image))


def test_colour_comes_from_the_global_generator():
    image, _ = batch(3, 0)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(colour_jitter(image, 0.5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_brightness_stays_in_its_range_and_some_pictures_turn_grey():
    image = torch.tensor([80, 100, 120], dtype=torch.uint8).view(1, 3, 1, 1).expand(120, 3, 2, 2)
    torch.manual_seed(0)
    changed = colour_jitter(image, 0.5).float()
    mean = changed.mean(dim=(1, 2, 3))
    assert mean.min() > 45 and mean.max() < 155 and mean.std() > 15  # 100 times 0.5 to 1.5, and greying's
    grey = (changed.amax(dim=1) == changed.amin(dim=1)).all(dim=(1, 2)).float().mean()
    assert 0.05 < grey < 0.35  # 0.4 * 0.5, four standard deviations either way


# --- both mixtures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [cut_mix, class_mix])
@pytest.mark.parametrize("seed", range(4))
def test_colour_and_label_come_from_the_same_pixel(mix, seed):
    (source_image, source_label), (target_image, target_label), (image, label, pasted) = mixture(mix, seed)
    assert image.dtype == torch.uint8 and label.dtype == torch.int64 and pasted.dtype == torch.bool
    assert pasted.flatten(1).any(dim=1).all() and not pasted.flatten(1).all(dim=1).any()
    for n in range(len(image)):
        origin = image[n, 0][pasted[n]].unique()  # the red channel names the source picture
        assert len(origin) == 1 and origin < 3
        assert torch.equal(image[n][:, pasted[n]], source_image[int(origin)][:, pasted[n]])
        assert torch.equal(label[n][pasted[n]], source_label[int(origin)][pasted[n]].long())
    assert torch.equal(image.movedim(1, -1)[~pasted], target_image.movedim(1, -1)[~pasted])
    assert torch.equal(label[~pasted], target_label[~pasted])


@pytest.mark.parametrize("mix", [cut_mix, class_mix])
def test_draws_repeat_from_the_seed_and_inputs_stay(mix):
    source, target, first = mixture(mix, seed=5)
    again, other = mixture(mix, seed=5)[2], mixture(mix, seed=6)[2]
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[2], other[2])
    assert torch.equal(source[0], batch(3, 0, seed=1)[0]) and torch.equal(source[1], batch(3, 0, seed=1)[1])
    assert torch.equal(target[0], batch(5, 100, seed=2)[0])


@pytest.mark.parametrize("mix", [cut_mix, class_mix])
def test_every_source_picture_is_used(mix):
    _, _, (image, _, pasted) = mixture(mix, targets=60)
    assert set(image[:, 0][pasted].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("mix", [cut_mix, class_mix])
def test_mixtures_need_no_data_of_the_device(mix):
    """On the meta device nothing can be read back, as a sync would."""
    source, target = batch(3, 0), batch(5, 100)
    image, label, pasted = mix(*(part.to("meta") for part in (*source, *target)))
    assert image.shape == target[0].shape and label.shape == pasted.shape == target[1].shape
    if torch.cuda.is_available():
        torch.manual_seed(0)
        here = mix(*source, *target)
        torch.manual_seed(0)
        there = mix(*(part.cuda() for part in (*source, *target)))
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there))


# --- CutMix ---------------------------------------------------------------------------------------------


def test_the_patch_is_a_rectangle_of_the_share_asked_for():
    source, target = batch(2, 0, size=(60, 80)), batch(200, 50, size=(60, 80))
    torch.manual_seed(0)
    _, _, pasted = cut_mix(*source, *target, share=(0.2, 0.3))
    heights, widths = pasted.any(dim=2).sum(dim=1), pasted.any(dim=1).sum(dim=1)
    area = pasted.sum(dim=(1, 2))
    assert torch.equal(heights * widths, area)  # a filled rectangle
    share = area / (60 * 80)
    assert 0.18 < share.min() < 0.21 and 0.29 < share.max() < 0.32  # sides are whole pixels
    ratio = (heights / 60) / (widths / 80)
    assert 0.45 < ratio.min() < 0.6 and 1.7 < ratio.max() < 2.2
    reached = pasted.any(dim=0)
    assert reached[0].any() and reached[-1].any() and reached[:, 0].any() and reached[:, -1].any()


@pytest.mark.parametrize(("share", "expected"), [((1.0, 1.0), 1.0), ((0.0, 0.0), 0.0), ((0.9, 0.9), 0.9)])
def test_the_largest_and_smallest_patches_fit(share, expected):
    source, target = batch(2, 0), batch(40, 50)
    _, _, pasted = cut_mix(*source, *target, share=share)
    assert (pasted.float().mean(dim=(1, 2)) - expected).abs().max() < 0.06


def test_void_of_the_source_covers_the_target_label():
    source, target = batch(1, 0), batch(2, 50)
    source[1][:] = VOID
    _, label, pasted = cut_mix(*source, target[0], torch.full((2, 16, 20), 7), share=(0.5, 0.5))
    assert (label[pasted] == VOID).all() and (label[~pasted] == 7).all() and pasted.any()


# --- ClassMix -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "half"), [((4,), 1), ((4, 9), 1), ((0, 4, 9), 2), ((0, 1, 2, 254), 2)])
def test_half_of_the_classes_are_pasted_whole(classes, half):
    label = torch.full((1, 8, 8), VOID, dtype=torch.uint8)
    for i, c in enumerate(classes):
        label[0, 2 * i] = c
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    target = torch.full((50, 3, 8, 8), 9, dtype=torch.uint8), torch.full((50, 8, 8), VOID)
    torch.manual_seed(0)
    _, mixed, pasted = class_mix(image, label, *target)
    shown = set()
    for n in range(50):
        values = set(mixed[n].unique().tolist()) - {VOID}
        assert len(values) == half and values <= set(classes)
        assert torch.equal(pasted[n], torch.isin(label[0].long(), torch.tensor(sorted(values))))
        shown |= values
    assert shown == set(classes)  # each has its turn


def test_a_picture_without_labels_pastes_nothing():
    (image, label), target = batch(1, 0), batch(3, 50)
    mixed_image, mixed_label, pasted = class_mix(image, torch.full_like(label, VOID), *target)
    assert not pasted.any() and torch.equal(mixed_image, target[0]) and torch.equal(mixed_label, target[1].long())

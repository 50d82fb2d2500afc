"""Views: mapped back into the picture's frame, averaged, and compared."""

import weakref

import pytest
import torch

from model.views import predict_views


def drawn(height=20, width=26):
    """A grey picture with a bright rectangle that no flip leaves in place; uint8 [2, 3, H, W], its second one empty."""
    image = torch.full((2, 3, height, width), 40, dtype=torch.uint8)
    image[0, :, 3:12, 2:10] = 220
    return image


def by_brightness(image):
    """A teacher without a sense of place: dark is class 0, bright class 1, and class 2 is never likely."""
    bright = (image[:, :1].float() - 128) / 8  # [N, 1, H, W]
    return torch.cat([-bright, bright, torch.full_like(bright, -20)], dim=1)


def test_one_view_is_the_teacher():
    image = drawn()
    probability, agree = predict_views(by_brightness, image, flip=False)
    assert torch.equal(probability, by_brightness(image).softmax(dim=1))
    assert agree.dtype == torch.bool and agree.shape == (2, 20, 26) and agree.all()


def test_a_flip_comes_back_into_the_pictures_frame():
    image = drawn()
    probability, agree = predict_views(by_brightness, image)
    assert torch.allclose(probability, by_brightness(image).softmax(dim=1)) and agree.all()


@pytest.mark.parametrize("scales", [(2.0,), (1.0, 1.5, 1.75), (0.5, 1.0)])
def test_scales_come_back_into_the_pictures_frame(scales):
    image = drawn()
    probability, agree = predict_views(by_brightness, image, scales)
    assert probability.shape == (2, 3, 20, 26)
    assert torch.allclose(probability.sum(dim=1), torch.ones(2, 20, 26), atol=1e-5)
    # Away from the rectangle's edge nothing differs, and the edge is blurred evenly on both sides.
    bright = torch.zeros(20, 26, dtype=torch.bool)
    bright[3:12, 2:10] = True
    inner = torch.zeros(20, 26, dtype=torch.bool)
    inner[5:10, 4:8] = True
    outer = torch.ones(20, 26, dtype=torch.bool)
    outer[1:14, 0:12] = False
    best = probability.argmax(dim=1)
    assert torch.equal(best[0], bright.long()) and not best[1].any()
    assert agree[0, inner].all() and agree[0, outer].all() and agree[1].all()


def test_the_teacher_sees_each_scale_and_its_mirror_image():
    image, seen = drawn(), []

    def teacher(view):
        seen.append(view)
        return by_brightness(view)

    predict_views(teacher, image, scales=(1.0, 1.5))
    assert [tuple(view.shape[-2:]) for view in seen] == [(20, 26), (20, 26), (30, 39), (30, 39)]
    assert all(view.dtype == torch.uint8 for view in seen)
    assert torch.equal(seen[0], image) and torch.equal(seen[1], image.flip(-1))
    assert torch.equal(seen[3], seen[2].flip(-1))


def left_is_class_0(image):
    """A teacher that looks at the place alone: class 0 in the left quarter, with probability 0.9, else class 1."""
    number, _, height, width = image.shape
    left = (torch.arange(width) < width // 4).expand(number, height, width)
    share = torch.where(left, 0.9, 0.1)
    return torch.stack([share, 1 - share], dim=1).log()


def test_views_that_disagree_are_averaged_and_marked():
    image = torch.zeros(1, 3, 4, 16, dtype=torch.uint8)
    probability, agree = predict_views(left_is_class_0, image)
    column = torch.tensor([0.5] * 4 + [0.1] * 8 + [0.5] * 4)  # both outer quarters are class 0 in one view of two
    assert torch.allclose(probability[0, 0], column.expand(4, 16), atol=1e-6)
    assert torch.equal(agree[0], (column == 0.1).expand(4, 16))


def test_every_view_has_a_say_and_not_the_last_alone():
    """Three scales of which the middle one alone sees another class."""
    image = torch.zeros(1, 3, 10, 10, dtype=torch.uint8)

    def teacher(view):
        logits = torch.zeros(1, 2, *view.shape[-2:])
        logits[:, int(view.shape[-1] == 15)] = 5.0
        return logits

    assert not predict_views(teacher, image, (1.0, 1.5, 2.0))[1].any()
    assert predict_views(teacher, image, (1.0, 2.0))[1].all()


def test_only_the_classes_asked_for_need_to_agree():
    """The views quarrel about the seen classes 0 and 1; of the unseen 2 and 3 both prefer 3."""

    def teacher(view):
        quarrel = left_is_class_0(view)
        unseen = torch.tensor([-9.0, -8.0]).view(1, 2, 1, 1).expand(len(view), 2, *view.shape[-2:])
        return torch.cat([quarrel, unseen], dim=1)

    image = torch.zeros(1, 3, 4, 16, dtype=torch.uint8)
    assert not predict_views(teacher, image)[1].all()
    probability, agree = predict_views(teacher, image, classes=slice(2, None))
    assert agree.all() and probability.shape[1] == 4


def test_no_gradient_is_kept():
    factor = torch.ones(1, requires_grad=True)
    probability, _ = predict_views(lambda view: factor * by_brightness(view), drawn())
    assert not probability.requires_grad


def test_memory_holds_one_view_at_a_time():
    """The logits of a view are gone before the next but one is made."""
    alive = []

    def teacher(view):
        logits = by_brightness(view)
        alive.append(weakref.ref(logits))
        assert sum(reference() is not None for reference in alive) <= 2
        return logits

    predict_views(teacher, drawn(), (1.0, 1.25, 1.5, 1.75))
    assert len(alive) == 8


@pytest.mark.parametrize("scales", [(), (1.0, 0.0), (-1.0,)])
def test_impossible_scales_are_refused(scales):
    with pytest.raises(ValueError, match="scales"):
        predict_views(by_brightness, drawn(), scales)

"""The network: logits, training and evaluation mode, groups of the optimiser, views."""

import pytest
import torch

from model.backbone import build_backbone
from model.segmenter import Segmenter, guided_filter
from model.upsampling import PixelLogits

WORDS = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def images(number=2, height=64, width=64):
    return torch.randint(0, 256, (number, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


def segmenter(frozen=False, **options):
    torch.manual_seed(0)
    return Segmenter(build_backbone("small", frozen=frozen), WORDS, **options)


def test_every_pixel_has_logits_and_a_gradient_reaches_every_weight_but_the_class_embeddings():
    model = segmenter(num_auxiliary=1, loss_stride=2)
    before = model.projection.class_embeddings.clone()
    optimizer = torch.optim.SGD(model.parameter_groups(0.1), lr=0.1, weight_decay=0.5)
    logits = model(images(2, 65, 49))
    assert isinstance(logits, PixelLogits) and logits.whole().shape == logits.shape == (2, 6, 33, 25)
    logits.whole().square().mean().backward()
    optimizer.step()
    assert all(parameter.grad.any() for parameter in model.parameters())
    assert torch.equal(model.projection.class_embeddings, before)
    assert model.eval()(images(2, 65, 49)).shape == (2, 5, 65, 49)  # without the auxiliary class


@pytest.mark.parametrize(
    "scales, flip, edges", [((1.0,), True, False), ((0.5, 1.0), True, False), ((1.0,), True, True)]
)
def test_views_are_averaged(scales, flip, edges):
    model, image = segmenter().eval(), images(1, 40, 48)

    def probability(image):
        return model.pixel_logits(image, 1024, scales, flip, edges).whole().softmax(dim=1)

    with torch.no_grad():
        views = torch.stack([model(image), model(image.flip(-1)).flip(-1)]).softmax(dim=2)
    found = probability(image)
    assert found.shape == (1, 5, 40, 48)
    torch.testing.assert_close(probability(image.flip(-1)).flip(-1), found)
    if len(scales) == 1 and not edges:
        torch.testing.assert_close(found, views.mean(dim=0))


def test_guided_filter_moves_a_border_to_the_edge_of_the_image():
    """The image's edge is at column 20; the border between the classes lies 3 pixels beside it and is blurred."""
    image = torch.zeros(1, 3, 24, 40, dtype=torch.uint8)
    image[..., 20:] = 200
    ramp = ((torch.arange(40) - 13.5) / 6).clamp(0, 1).expand(1, 1, 24, 40)
    values = torch.cat([1 - ramp, ramp], dim=1)
    filtered = guided_filter(values, image, radius=6)
    assert values.argmax(dim=1)[0, 0].tolist() == [0] * 17 + [1] * 23
    assert torch.equal(filtered.argmax(dim=1), (image[:, 0] > 100).long())
    torch.testing.assert_close(filtered.sum(dim=1), torch.ones(1, 24, 40), rtol=0, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["vgg16", "deeplabv3_resnet101", "small"])
def test_gpu_computes_what_the_cpu_computes(name):
    model = Segmenter(build_backbone(name), WORDS).eval()
    with torch.inference_mode():
        expected = model(images(1))
        found = model.cuda()(images(1).cuda()).cpu()
    assert torch.allclose(found, expected, atol=1e-2 * expected.abs().max().item())

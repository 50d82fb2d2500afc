"""The network: logits, training and evaluation mode, groups of the optimiser, views, calibration."""

import numpy as np
import pytest
import torch

from model.backbone import build_backbone
from model.segmenter import EmbeddingProjection, Segmenter, calibrate, mean_over_views
from model.upsampling import PixelLogits
from utils.errors import UserError

WORDS = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def images(number=2, height=64, width=64):
    return torch.randint(0, 256, (number, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


def segmenter(frozen=False, **options):
    torch.manual_seed(0)
    return Segmenter(build_backbone("small", frozen=frozen), WORDS, **options)


def test_logits_are_projection_times_class_embeddings():
    projection, features = EmbeddingProjection(6, 7 * WORDS), torch.randn(2, 6, 3, 4)
    weight, bias = (value.detach().numpy() for value in projection.project.parameters())
    projected = np.einsum("dc,nchw->ndhw", weight[:, :, 0, 0], features.numpy()) + bias[:, None, None]
    words = WORDS.numpy() / np.linalg.norm(WORDS.numpy(), axis=1, keepdims=True)
    expected = np.einsum("kd,ndhw->nkhw", words, projected)
    np.testing.assert_allclose(projection(features).detach().numpy(), expected, atol=1e-5)
    assert {name for name, _ in projection.named_parameters()} == {"project.weight", "project.bias"}


def test_every_pixel_has_logits_and_a_gradient_reaches_every_weight():
    model = segmenter(num_auxiliary=1, loss_stride=2)
    logits = model(images(2, 65, 49))
    assert isinstance(logits, PixelLogits) and logits.whole().shape == logits.shape == (2, 6, 33, 25)
    logits.whole().square().mean().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    assert model.eval()(images(2, 65, 49)).shape == (2, 5, 65, 49)  # without the auxiliary class


def test_training_leaves_the_class_embeddings_alone():
    model = segmenter()
    before = model.projection.class_embeddings.clone()
    optimizer = torch.optim.SGD(model.parameter_groups(0.1), lr=0.1, weight_decay=0.5)
    model(images()).whole().sum().backward()
    optimizer.step()
    assert torch.equal(model.projection.class_embeddings, before)


@pytest.mark.parametrize("factor", [10.0, 3.0])
def test_classifier_and_projection_learn_faster(factor):
    model = segmenter()
    trunk, head = model.parameter_groups(0.02, factor)
    assert (trunk["lr"], head["lr"]) == (0.02, pytest.approx(0.02 * factor))
    assert {id(p) for p in trunk["params"]} == {id(p) for p in model.backbone.trunk.parameters()}
    assert len(trunk["params"]) + len(head["params"]) == len(list(model.parameters()))
    (only,) = segmenter(frozen=True).parameter_groups(0.02)
    assert only["lr"] == pytest.approx(0.2)


@pytest.mark.parametrize("num_auxiliary", [0, 1])
def test_weights_alone_rebuild_the_network(num_auxiliary):
    model = segmenter(num_auxiliary=num_auxiliary).eval()
    rebuilt = Segmenter.from_weights("small", model.state_dict()).eval()
    with torch.no_grad():
        assert torch.equal(rebuilt(images()), model(images()))
    with pytest.raises(RuntimeError, match=r"trunk"):
        Segmenter.from_weights("small", {"projection.class_embeddings": WORDS})


def test_compiling_excludes_checkpointed_activations():
    with pytest.raises(UserError, match="--compile can't be used with --checkpoint-activations"):
        Segmenter(build_backbone("small", checkpoint_activations=True), WORDS, compiled=True)


@pytest.mark.parametrize("scales, flip", [((1.0,), False), ((1.0,), True), ((0.5, 1.0), True)])
def test_views_are_averaged(scales, flip):
    model, image = segmenter().eval(), images(1, 40, 48)
    found = mean_over_views(model, image, scales, flip).softmax(dim=1)
    views = [model(image).softmax(dim=1)]
    views += [model(image.flip(-1)).softmax(dim=1).flip(-1)] if flip else []
    if len(scales) == 1:
        torch.testing.assert_close(found, torch.stack(views).mean(dim=0))
    assert found.shape == (1, 5, 40, 48) and torch.allclose(found.sum(dim=1), torch.ones(()))
    if flip:
        torch.testing.assert_close(mean_over_views(model, image.flip(-1), scales, flip).flip(-1).softmax(dim=1), found)


def test_calibration_takes_gamma_from_the_seen_classes():
    logits = torch.tensor([[2.0, 1.0, 1.9]])[:, :, None, None]
    before = logits.clone()
    assert calibrate(logits, 2, 0.0) is logits
    scores = calibrate(logits, 2, 0.3)
    torch.testing.assert_close(scores, logits.softmax(dim=1) - torch.tensor([0.3, 0.3, 0.0])[:, None, None])
    assert torch.equal(logits, before) and scores.argmax() == 2 != logits.argmax()
    assert calibrate(torch.tensor([[9.0, 1.0, -9.0]])[:, :, None, None], 2, 1.0).argmax() == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["vgg16", "deeplabv3_resnet101", "small"])
def test_gpu_computes_what_the_cpu_computes(name):
    model = Segmenter(build_backbone(name), WORDS).eval()
    with torch.inference_mode():
        expected = model(images(1))
        found = model.cuda()(images(1).cuda()).cpu()
    assert torch.allclose(found, expected, atol=1e-2 * expected.abs().max().item())

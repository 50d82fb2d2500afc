"""What the published code computes, as numbers: network, losses, gradients, pseudo-labels, IoU, rates, initialisation.

`parity/values.npz` holds what the published implementation gave on a CPU; docs/PARITY.md lists its constants.
"""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dataset.transforms import training_transform
from model.backbone import build_backbone
from model.losses import bias_loss, cross_entropy, pseudo_labels
from model.segmenter import Segmenter
from utils.metrics import ZeroShotMetrics, best_classes
from utils.trainer import build_optimizer

VALUES = np.load(Path(__file__).with_name("parity") / "values.npz")
SEEN = 15


def value(name: str) -> torch.Tensor:
    return torch.from_numpy(VALUES[name])


@pytest.fixture(scope="module")
def network() -> Segmenter:
    """The published network, as it starts without ImageNet weights."""
    torch.manual_seed(0)
    words = torch.from_numpy(np.random.default_rng(2000).standard_normal((20, 600)))
    return Segmenter(build_backbone("vgg16"), words).eval()


# First, before `test_network` gives the layers other weights.
def test_new_layers_start_as_published(network):
    dilated, projection = network.backbone.classifier[1], network.projection.project
    assert dilated.weight.std().item() == pytest.approx(0.0147, rel=0.01) and not dilated.bias.any()
    assert projection.weight.std().item() == pytest.approx(0.0312, rel=0.01) and not projection.bias.any()


def test_parameter_groups(network):
    trunk, head = network.parameter_groups(1e-4)
    assert (trunk["lr"], head["lr"]) == (1e-4, pytest.approx(1e-3))
    assert (len(trunk["params"]), sum(p.numel() for p in trunk["params"])) == (26, 14_714_688)
    assert (len(head["params"]), sum(p.numel() for p in head["params"])) == (4, 5_334_616)


@pytest.mark.parametrize("n, height, width", [(0, 64, 64), (3, 75, 100)])
def test_network(network, n, height, width):
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert len(layers) == 15
    for i, layer in enumerate(layers):
        draw = np.random.default_rng(1000 + i)
        fan_in = layer.weight[0].numel()
        layer.weight.data = torch.from_numpy(draw.standard_normal(layer.weight.shape) * np.sqrt(2 / fan_in)).float()
        layer.bias.data = torch.from_numpy(draw.standard_normal(layer.bias.shape) * 0.01).float()
    normalised = np.random.default_rng(3000 + n).standard_normal((1, 3, height, width)).astype(np.float32)
    image = torch.from_numpy(normalised) * network.backbone.std + network.backbone.mean
    with torch.no_grad():
        logits = network.projection(network.backbone(image))[0]
    torch.testing.assert_close(logits, value(f"network.{height}x{width}"), rtol=0, atol=1e-4)


def test_grid_of_a_voc_image(network):
    with torch.no_grad():
        assert network.backbone(torch.zeros(1, 3, 375, 500)).shape == (1, 1024, 47, 63)


@pytest.fixture(params=["losses.case0.", "losses.case3."])
def case(request):
    names = (name.removeprefix(request.param) for name in VALUES if name.startswith(request.param))
    return Namespace(**{name: value(request.param + name) for name in names})


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logits)[0]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-6)


def test_losses_and_gradients_of_stage_1(case):
    logits = case.logits.requires_grad_()
    ce = cross_entropy(logits, case.source_label)
    bias_source = bias_loss(logits, SEEN, case.source_label < SEEN)
    bias_target = bias_loss(logits, SEEN, case.target_label != 255)  # the oracle's mask
    close(ce, case.cross_entropy)
    close(bias_source, case.bias_source)
    close(bias_target, case.bias_target)
    close(gradient(ce + 0.2 * 0.8 * bias_source, logits), case.stage1_source_gradient)
    close(gradient(0.2 * 0.2 * bias_target, logits), case.stage1_target_gradient)


def test_pseudo_labels_and_gradient_of_stage_2(case):
    logits = case.logits.requires_grad_()
    pseudo_label = pseudo_labels(logits, SEEN, case.target_label != 255, keep=0.6)
    assert torch.equal(pseudo_label, case.pseudo_label.long())
    loss = cross_entropy(logits, pseudo_label)
    close(loss, case.self_training)
    close(gradient(0.2 * 0.4 * loss, logits), case.stage2_target_gradient)


def test_iou(case):
    names = [str(n) for n in range(20)]
    metrics = ZeroShotMetrics(names, SEEN)
    metrics.update(*best_classes(case.logits, SEEN), case.evaluation_label)
    for name, expected in (("per_class", case.iou), ("per_class_zsl", case.iou_zsl)):
        np.testing.assert_allclose(list(metrics.compute()[name].values()), expected.numpy(), atol=1e-7)


def test_rates():
    args = Namespace(optimizer="sgd", momentum=0.9, weight_decay=5e-4)
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1e-4, 1e-3)]
    optimizer = build_optimizer(groups, args)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, 500, 0.9)
    rates = []
    for _ in range(500):
        rates.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    base = VALUES["schedule.rate_base"]
    np.testing.assert_allclose(np.array(rates), np.stack([base, 10 * base], axis=1), rtol=1e-9)


def test_a_training_image_is_seen_whole_whatever_its_aspect():
    transform = training_transform(64, degrees=0.0, flip=0.0, resize="square")
    column = torch.arange(60, dtype=torch.uint8).expand(40, 60)
    row = torch.arange(40, dtype=torch.uint8)[:, None].expand(40, 60)
    for number in range(8):
        torch.manual_seed(number)
        for place in (column, row):
            image, label = transform(torch.zeros(3, 40, 60, dtype=torch.uint8), place.contiguous())
            assert image.shape == (3, 64, 64) and label.unique().equal(place.unique())  # visible share 1.00

"""Batches at the edge: no pixel, no unseen pixel, one class, one seen class. The step stays finite, or does nothing."""

from argparse import Namespace

import pytest
import torch

import warm
from dataset.splits import VOID
from helpers import STAGES
from model import backbone
from model.backbone import build_backbone
from model.segmenter import Segmenter

FLAGS = {
    "lambda_": 0.2, "st_lambda": 0.4, "weak_proportion": 0.2, "keep": 0.6, "balance_classes": False, "loss_stride": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    monkeypatch.setitem(backbone.ARCHITECTURES, "small", backbone.Architecture(warm.tiny))


def step(stage, label, valid, num_seen, num_classes=5, momentum=0.0, **changes):
    """Two steps of the script's own `train_step`; gives the losses, and the parameters before and after."""
    torch.manual_seed(0)
    model = Segmenter(build_backbone("small"), torch.randn(num_classes, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    source = torch.randint(0, 256, (2, 3, 16, 16)).byte(), label.expand(2, 16, 16)
    target = torch.randint(0, 256, (len(valid), 3, 16, 16)).byte(), valid
    for _ in range(2):
        args = Namespace(**FLAGS | changes)
        losses = STAGES[stage].train_step(model, optimizer, source, target, num_seen, args)
    return losses, before, [parameter.detach() for parameter in model.parameters()]


NO_LABEL, ONE_CLASS = torch.tensor(VOID, dtype=torch.uint8), torch.tensor(0, dtype=torch.uint8)
NO_PIXEL, ALL_PIXELS = torch.zeros(2, 16, 16, dtype=torch.bool), torch.ones(2, 16, 16, dtype=torch.bool)
EDGES = {
    "one class in the batch": (ONE_CLASS, ALL_PIXELS, 3, {}),
    "no valid target pixel": (ONE_CLASS, NO_PIXEL, 3, {}),
    "no label": (NO_LABEL, ALL_PIXELS, 3, {}),
    "a split with one seen class": (ONE_CLASS, ALL_PIXELS, 1, {}),
    "a split with one unseen class": (ONE_CLASS, ALL_PIXELS, 4, {}),
    "nothing kept": (ONE_CLASS, ALL_PIXELS, 3, {"keep": 0.0}),
    "everything kept, class by class": (ONE_CLASS, ALL_PIXELS, 3, {"keep": 1.0, "balance_classes": True}),
    "lambda 0": (ONE_CLASS, ALL_PIXELS, 3, {"lambda_": 0.0, "st_lambda": 0.0}),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("label, valid, num_seen, changes", EDGES.values(), ids=EDGES)
def test_a_step_at_the_edge_is_finite_and_learns(stage, label, valid, num_seen, changes):
    losses, before, after = step(stage, label, valid, num_seen, **changes)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(parameter.isfinite().all() for parameter in after)
    assert not all(map(torch.equal, before, after))


def test_a_step_of_stage_1_without_a_target_picture_is_finite():
    """Which is what `--lambda 0` trains on."""
    losses, _, after = step(1, ONE_CLASS, NO_PIXEL[:0], 3)
    assert losses["bias_target"].item() == 0 and all(parameter.isfinite().all() for parameter in after)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_batch_that_teaches_nothing_changes_nothing(stage, momentum):
    losses, before, after = step(stage, NO_LABEL, NO_PIXEL, 3, momentum=momentum)
    assert all(loss.item() == 0 for loss in losses.values()) and all(map(torch.equal, before, after))

"""--accumulate: a batch that goes through the network in parts is one batch, with the memory of a part."""

import copy

import pytest
import torch
from model.parts import in_parts
from torch import nn

import warm
from helpers import arguments, failure, train, weights
from model import backbone
from model.segmenter import Segmenter
from train_split_lambda import main
from warm import run

FLAGS = {"batch_size": 5, "target_batch_size": 3, "max_steps": 4, "learning_rate": 0.05}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_the_losses_are_those_of_the_whole_batch(data, tmp_path, stage, parts):
    told = {"prepare": warm.note_losses, "told": ("plain",)}
    whole = run(tmp_path / "whole", stage, data, **told, **FLAGS)
    split = run(tmp_path / "split", stage, data, **told, **FLAGS, accumulate=parts)
    for a, b in zip(whole.losses(), split.losses(), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    a, b = weights(whole.folder), weights(split.folder)
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_memory_of_a_gpu_is_that_of_a_part():
    found = []
    for parts in (1, 8):
        torch.manual_seed(0)
        model = Segmenter("vgg16", torch.randn(20, 8), parts=parts).cuda()
        image = torch.randint(0, 256, (8, 3, 128, 128), dtype=torch.uint8, device="cuda")
        model(image[:1]).coarse.sum().backward() if parts == 1 else None  # cuDNN's workspace
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(image).coarse.sum().backward()
        found.append(torch.cuda.max_memory_allocated() - before)
    assert found[1] < found[0] / 2, found


def network(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), *more, nn.ReLU(), nn.Conv2d(8, 4, 1))


def gradients(model: nn.Module, make) -> list[torch.Tensor]:
    """Of a loss that compares all pictures with each other; what `make` draws is drawn from one seed."""
    torch.manual_seed(1)
    output = make(model)
    loss = (output - output.mean(dim=0)).square().sum() + output.flatten().sort().values[::3].sum()
    model.zero_grad()
    loss.backward()
    return [output.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("more", [[], [nn.Dropout(0.5)], [nn.BatchNorm2d(8)]], ids=["plain", "dropout", "batch norm"])
def test_outputs_and_gradients_are_those_of_the_parts_side_by_side(more):
    image = torch.randn(7, 3, 8, 8)
    model, other = network(*more), network(*copy.deepcopy(more))
    found = gradients(model, lambda model: in_parts(model, image, 3))
    wanted = gradients(other, lambda model: torch.cat([model(part) for part in image.tensor_split(3)]))
    assert torch.equal(found[0], wanted[0]) and all(map(torch.allclose, found, wanted))
    a, b = model.state_dict(), other.state_dict()
    assert all(map(torch.equal, a.values(), b.values()))  # the second pass is no second batch


def kept(model: nn.Module, make) -> int:
    """Bytes that wait for the backward pass."""
    found = {}

    def note(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        make(model).sum()
    return sum(found.values())


def test_nothing_but_the_pictures_is_kept():
    image = torch.randn(8, 3, 16, 16)
    model = network(nn.BatchNorm2d(8), nn.ReLU())
    assert kept(model, lambda model: in_parts(model, image, 4)) == image.nbytes
    assert kept(model, lambda model: model(image)) > 5 * image.nbytes


def test_more_parts_than_pictures_are_refused(data, tmp_path, capsys):
    line = failure(capsys, main, arguments(data, tmp_path, "--accumulate", 7, batch_size=3))
    assert "--accumulate 7" in line and "6 pictures" in line


def test_a_part_too_small_for_batch_norm_names_the_flag(data, tmp_path, capsys, monkeypatch):
    needs_two = lambda: backbone.Backbone(warm.tiny().trunk, nn.Conv2d(4, 4, 1), 4, min_batch=2)  # noqa: E731
    monkeypatch.setitem(backbone.ARCHITECTURES, "small", backbone.Architecture(needs_two))
    line = failure(capsys, main, arguments(data, tmp_path, "--accumulate", 4, batch_size=2))
    assert "--batch-size" in line and "--accumulate" in line
    train(1, data, tmp_path, "--accumulate", 2, batch_size=2)

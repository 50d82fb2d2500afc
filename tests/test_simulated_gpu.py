"""On simulated CUDA tensors: devices and types fit, and no step waits for the GPU.

`FakeTensorMode` computes shapes, types and devices without numbers, so these tests need no GPU. torch can't simulate:

- the backward pass, whose engine needs a CUDA device: here it gives each parameter a gradient of its form;
- operations whose shape depends on numbers (`nonzero`, an index by a mask, `bincount`): where they are allowed, `Gpu`
  gives a result of some shape;
- kernels and their results, streams, pinned memory, NCCL, cuDNN's choice of algorithms.

`benchmarks/gpu_check.sh` runs all of this on a real GPU.
"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import train_st_split
from dataset.splits import Split
from helpers import STAGES
from model.backbone import build_backbone
from model.segmenter import Segmenter
from utils.checkpoint import load_schedule
from utils.config import parse_settings
from utils.metrics import ZeroShotMetrics, best_classes, predictions
from utils.trainer import build_optimizer

CUDA = torch.device("cuda", 0)
SPLIT = Split.named(1)
aten = torch.ops.aten


class Gpu(TorchDispatchMode):
    """Refuses whatever makes the host wait for the GPU, or notes it if `may_wait`."""

    def __init__(self):
        super().__init__()
        self.may_wait, self.waits = False, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket
        on_gpu = any(isinstance(value, torch.Tensor) and value.is_cuda for value in args)
        copied = name is aten._to_copy and kwargs.get("device") == torch.device("cpu")
        copied = copied or (name is aten.copy_ and args[1].is_cuda and not args[0].is_cuda)
        masks = name in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        number = name in (aten._local_scalar_dense, aten.item, aten.is_nonzero)
        reads = number or name in (aten.nonzero, aten.bincount, aten.masked_select, aten.equal)
        if on_gpu and (copied or masks or reads):
            if not self.may_wait:
                raise AssertionError(f"{name} waits for the GPU")
            self.waits.append(name.__name__)
        if "_fused_" in str(name):  # an optimiser's kernel, which works in place
            assert all(tensor.is_cuda for group in args[:3] for tensor in group)
            return None
        if number:
            return False if name is aten.is_nonzero else 0.0 if args[0].is_floating_point() else 0
        if name is aten.nonzero:
            return args[0].new_zeros(3, args[0].dim(), dtype=torch.long)
        if name is aten.bincount:
            return args[0].new_zeros(args[2])
        if name is aten.index and masks:
            return args[0].new_zeros(3, *args[0].shape[args[1][0].dim() :])
        return function(*args, **kwargs)


@torch.no_grad()
def apply(module: nn.Module, function, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which can't swap simulated parameters in place."""
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(function(parameter), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def backward(loss: torch.Tensor) -> None:
    """Gives every parameter below `loss` a gradient of its shape, type and device."""
    nodes, found = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in found:
            continue
        found.add(node)
        nodes += [below for below, _ in node.next_functions]
        if hasattr(node, "variable"):
            node.variable.grad = torch.zeros_like(node.variable)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", True)
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # else autocast is off
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(nn.Module, "_apply", apply)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", lambda part, logits: (torch.zeros_like(logits),))
    with FakeTensorMode(allow_non_fake_inputs=True), Gpu() as mode:
        yield mode


def build(stage: int, *flags: str) -> SimpleNamespace:
    """Settings, network and optimiser, as `Trainer` builds them."""
    args = parse_settings(["--backbone", "small", *flags], stage)
    network = Segmenter(build_backbone("small"), torch.randn(20, 8), 0, args.loss_stride, args.amp).to(CUDA).train()
    optimizer = build_optimizer(network.parameter_groups(args.learning_rate, args.head_factor), args)
    return SimpleNamespace(args=args, network=network, optimizer=optimizer)


def draw_batches(device=CUDA) -> tuple[tuple, tuple]:
    """Source and target batch of two images of 32 pixels."""
    image, pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device), (2, 32, 32)
    label = torch.zeros(pixels, dtype=torch.uint8, device=device)
    valid = torch.ones(pixels, dtype=torch.bool, device=device)
    return (image, label), (image.clone(), valid, valid[:, 0, 0])


def step(stage: int, run: SimpleNamespace, *more) -> dict[str, torch.Tensor]:
    return STAGES[stage].train_step(run.network, run.optimizer, *draw_batches(), SPLIT.num_seen, run.args, *more)


BEST = ("--config", "configs/best.toml", "--backbone-weights", "imagenet")
BEST_CPU = ("--config", "configs/best_cpu.toml", "--backbone-weights", "imagenet")


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize(
    "stage, flags",
    [(1, ()), (1, BEST), (1, BEST_CPU), (1, ("--checkpoint-activations",)), (2, ()), (2, ("--balance-classes",))],
)
def test_a_step_fits_the_gpu_and_does_not_wait_for_it(stage, flags, amp, gpu):
    run = build(stage, *flags, "--amp", amp)
    for _ in range(2):
        losses = step(stage, run)
    assert all(loss.device == CUDA and loss.dtype == torch.float32 for loss in losses.values())
    trained = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    assert all(parameter.grad.is_cuda and parameter.dtype == torch.float32 for parameter in trained)


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("flags", [BEST, BEST_CPU])
def test_the_pseudo_labeller_labels_on_the_gpu_without_waiting(flags, amp, gpu, monkeypatch):
    run = build(2, *flags, "--amp", amp)
    head = nn.Linear(run.network.backbone.trunk_channels, 1000)
    monkeypatch.setattr(train_st_split, "build_backbone", lambda name, weights, **more: build_backbone(name, **more))
    monkeypatch.setattr(train_st_split, "imagenet_head", lambda *_: head)
    monkeypatch.setattr(train_st_split, "imagenet_similarity", lambda *_: np.zeros((1000, 5), np.float32))
    labeler = train_st_split.episode_pseudo_labeler(run.args, SPLIT, CUDA)
    # Its fit, before the first step, branches on which classes the images show: torch can't simulate that.
    losses = step(2, run, labeler)
    assert all(tensor.device == CUDA for tensor in [*losses.values(), *labeler.state_dict().values()])


@pytest.mark.parametrize("options", [{}, {"scales": (0.75, 1.0), "flip": True}])
def test_an_evaluation_waits_for_the_gpu_only_at_its_end(options, gpu):
    network = build(1, "--amp", "off").network
    (image, label), _ = draw_batches("cpu")
    metrics, batches = ZeroShotMetrics(SPLIT.names, SPLIT.num_seen), [(image, label, None)] * 4
    gpu.may_wait = True
    for _, label, _, logits in predictions(network, batches, CUDA, **options):
        metrics.update(*logits.map_pixels(partial(best_classes, num_seen=SPLIT.num_seen)), label)
    assert gpu.waits == ["is_nonzero"]  # whether all scores were finite


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [True, None])
def test_a_run_of_a_gpu_or_a_cpu_resumes_on_the_gpu(fused, optimizer, gpu):
    flags = ("--optimizer", optimizer, "--amp", "bf16")
    saved, fresh = build(1, *flags), build(1, *flags)
    step(1, saved)
    state = saved.optimizer.state_dict()
    with _disable_current_modes():  # a checkpoint is loaded to the CPU
        state["state"] = {
            number: {name: torch.zeros(value.shape) for name, value in kept.items()}
            for number, kept in state["state"].items()
        }
    for group in state["param_groups"]:
        group["fused"] = fused
    before, after = (torch.optim.lr_scheduler.PolynomialLR(run.optimizer, 10) for run in (saved, fresh))
    content = {"optimizer": state, "scheduler": before.state_dict()}
    load_schedule(fresh.optimizer, after, content, "latest.pth")
    step(1, fresh)
    assert len(state["state"]) > 0 and all(group["fused"] for group in fresh.optimizer.param_groups)


def test_the_simulation_notices_waits_and_another_device(gpu):
    numbers = torch.zeros(2, device=CUDA)
    waits = [
        lambda: numbers.sum().item(), numbers.cpu, lambda: bool(numbers.any()), numbers.nonzero,
        lambda: numbers[numbers > 0], lambda: torch.zeros(2).copy_(numbers), lambda: float(numbers[0]),
    ]  # fmt: skip
    for look in waits:
        with pytest.raises(AssertionError, match="waits"):
            look()
    with pytest.raises(RuntimeError):
        numbers + torch.zeros(2)

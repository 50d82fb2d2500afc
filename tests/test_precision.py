"""What makes a step faster changes no more of it than is said here, waits for no device, and is resumed exactly."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import utils.run
from torch.utils._python_dispatch import TorchDispatchMode
from utils.prefetch import on_device
from utils.run import build_optimizer, choose_amp

import warm
from helpers import STAGES, failure, load, same_run, train
from model import backbone, segmenter
from model.backbone import build_backbone
from model.segmenter import Segmenter
from test_losses import SETTINGS as FLAGS

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def losses_of(monkeypatch, stage, data, output, *flags, **changes) -> torch.Tensor:
    """The loss of each of a run's first 50 steps."""
    totals, note = [], utils.run.Run.note

    def noting(run, losses):
        totals.append(losses["total"].item())
        note(run, losses)

    with monkeypatch.context() as patch:
        patch.setattr(utils.run.Run, "note", noting)
        train(stage, data, output, *flags, **{"max_steps": 50, "evaluate_every": 0} | changes)
    return torch.tensor(totals)


# --- the losses of the first 50 steps -------------------------------------------------------------------


PUBLISHED_RATE = {"learning_rate": 1e-4}  # at a high one, runs drift apart after any rounding


def without_dropout() -> backbone.Backbone:
    """The small network. Dropout draws other pixels in another precision, which says nothing of the precision."""
    network = backbone.small()
    network.classifier[-1].p = 0.0
    return network


@pytest.fixture
def steady_network(monkeypatch):
    monkeypatch.setitem(backbone.ARCHITECTURES, "small", backbone.Architecture(without_dropout))


@pytest.fixture(scope="module")
def full(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbone.ARCHITECTURES, "small", backbone.Architecture(without_dropout))
        flags = {"amp": "off", **PUBLISHED_RATE}
        return {stage: losses_of(patch, stage, data, tmp_path_factory.mktemp("full"), **flags) for stage in STAGES}


@pytest.mark.parametrize("stage, amp", [(1, "bf16"), (2, "bf16"), (1, "fp16")])
def test_losses_agree_with_full_precision(stage, amp, full, data, tmp_path, monkeypatch, steady_network):
    """Each of the first 50 within 1 %; in fp16 from a scale that leaves no step out."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**8))
    losses = losses_of(monkeypatch, stage, data, tmp_path, amp=amp, **PUBLISHED_RATE)
    assert not torch.equal(losses, full[stage]) and len(losses) == 50
    torch.testing.assert_close(losses, full[stage], rtol=0.01, atol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_losses_agree_with_those_of_the_compiled_network(stage, full, data, tmp_path, monkeypatch, steady_network):
    """As the compiler hands it on, without the code that it would make of it: that takes minutes."""
    through = torch.compile(lambda backbone, image: backbone(image), backend="aot_eager", dynamic=False)
    monkeypatch.setattr(segmenter, "_compiled", lambda: through)
    losses = losses_of(monkeypatch, stage, data, tmp_path, "--compile", amp="off", **PUBLISHED_RATE)
    torch.testing.assert_close(losses, full[stage], rtol=1e-3, atol=0)


def test_a_network_that_cannot_be_compiled_ends_in_one_line(data, tmp_path, monkeypatch, capsys):
    def lacking(*_):
        raise RuntimeError("No working C++ compiler found")

    broken = torch.compile(lambda backbone, image: backbone(image), backend=lacking)
    monkeypatch.setattr(segmenter, "_compiled", lambda: broken)
    argv = warm.arguments(data, tmp_path, "--compile", **warm.PLAN)
    line = failure(capsys, STAGES[1].main, argv)
    assert "No working C++ compiler found" in line and "leave out --compile" in line and "VERBOSE" not in line


def test_the_compiled_network_is_that_of_training_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(segmenter, "_compiled", lambda: lambda backbone, image: calls.append(1) or backbone(image))
    model = Segmenter(build_backbone("small"), torch.randn(5, 8), compiled=True)
    image = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    model(image)
    model.eval()(image)
    assert calls == [1]


# --- precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_weights_logits_and_losses_are_float32_in_any_precision(amp):
    model = Segmenter(build_backbone("small"), torch.randn(5, 8), amp=amp)
    image = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    seen = []
    model.backbone.classifier.register_forward_hook(lambda _, __, features: seen.append(features.dtype))
    assert model(image).coarse.dtype == torch.float32
    model.eval()(image)  # full precision, whatever training has
    dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    assert seen == [dtype, torch.float32]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    "device, has_bf16, chosen", [("cpu", True, "off"), ("cuda", True, "bf16"), ("cuda", False, "off")]
)
def test_auto_is_bf16_on_a_gpu_that_has_it(device, has_bf16, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert choose_amp("auto", torch.device(device)) == chosen
    assert choose_amp("fp16", torch.device(device)) == "fp16"


@pytest.fixture
def tiny_network(monkeypatch):
    monkeypatch.setitem(backbone.ARCHITECTURES, "small", backbone.Architecture(warm.tiny))


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_goes_on_with_the_scale_of_the_loss_to_the_same_bits(stage, data, tmp_path, monkeypatch, tiny_network):
    """The first scale is too large, so its first steps are lost, and the loss's scale is not what it began with."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**20, enabled=enabled))
    flags = warm.PLAN | {"max_steps": 12, "amp": "fp16", "save_every": 6}
    whole = train(stage, data, tmp_path / "whole", **flags)
    kept, save = {}, utils.run.save_checkpoint

    class Stopped(Exception):
        pass

    def stopping(path, **content):
        save(path, **content)
        kept.update(content["scaler"])
        if content["step"] == 6:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(utils.run, "save_checkpoint", stopping)
        with pytest.raises(Stopped):
            train(stage, data, tmp_path / "parts", **flags)
    assert kept["scale"] < 2.0**20
    again = train(stage, data, tmp_path / "parts", **flags, restore_from_where="continue")
    scales = [load(folder / "latest.pth")["scaler"] for folder in (again, whole)]
    assert same_run(again, whole) and scales[0] == scales[1] and scales[0]["_growth_tracker"] > 0


def test_a_run_may_go_on_in_another_precision(data, tmp_path, tiny_network):
    folder = train(1, data, tmp_path, **warm.PLAN, max_steps=2, amp="fp16", poly_power=0)
    checkpoint = load(folder / "latest.pth")
    for amp in ("off", "fp16"):
        changed = {**checkpoint, "step": 1, "scheduler": {**checkpoint["scheduler"], "last_epoch": 1}}
        if amp == "fp16":  # as one was kept before there were scales
            del changed["scaler"]
        torch.save(changed, folder / "latest.pth")
        train(1, data, tmp_path, **warm.PLAN, max_steps=2, amp=amp, poly_power=0, restore_from_where="continue")
        assert load(folder / "latest.pth")["step"] == 2


@pytest.mark.parametrize("scaler", [{"scale": -1.0}, {"scale": 2.0}, {"scale": "high"}, [1]])
def test_a_strange_scale_is_refused(scaler, data, tmp_path, tiny_network, capsys):
    flags = warm.PLAN | {"max_steps": 2, "amp": "fp16"}
    folder = train(1, data, tmp_path, **flags)
    torch.save({**load(folder / "latest.pth"), "scaler": scaler}, folder / "latest.pth")
    argv = warm.arguments(data, tmp_path, **flags, restore_from_where="continue")
    assert str(folder / "latest.pth") in failure(capsys, STAGES[1].main, argv)


# --- optimiser ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_run_of_a_gpu_with_its_fused_optimiser_goes_on_on_a_cpu(name, data, tmp_path, tiny_network):
    flags = warm.PLAN | {"max_steps": 2, "optimizer": name}
    folder = train(1, data, tmp_path, **flags)
    expected = load(folder / "latest.pth")
    fused = [{**group, "fused": True} for group in expected["optimizer"]["param_groups"]]
    checkpoint = {**expected, "optimizer": {**expected["optimizer"], "param_groups": fused}}
    torch.save(checkpoint, folder / "latest.pth")
    train(1, data, tmp_path, **flags, restore_from_where="continue")


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_optimiser_is_fused_on_a_gpu_alone(name, device):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2, device=device))], "lr": 0.1}]
    args = SimpleNamespace(optimizer=name, momentum=0.9, weight_decay=0.1)
    assert bool(build_optimizer(groups, args).param_groups[0]["fused"]) == (device == "cuda")


# --- nothing waits for the device -----------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Collects operations whose result must be known before the next one, so that a GPU is waited for."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        picked = args[1] if name.startswith("aten::index") and len(args) > 1 and isinstance(args[1], list) else ()
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in picked)
        if by_mask or any(part in name for part in self.NAMES):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def one_step(stage, device="cpu", **changes):
    """A function that takes one step of the script's `train_step`."""
    torch.manual_seed(0)
    model = Segmenter(build_backbone("small"), torch.randn(5, 8), loss_stride=changes.get("loss_stride", 1)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pictures, label = torch.randint(0, 256, (4, 3, 16, 16)).byte(), torch.randint(0, 5, (2, 16, 16)).byte()
    source = [tensor.to(device) for tensor in (pictures[:2], label)]
    target = [tensor.to(device) for tensor in (pictures[2:], torch.ones(2, 16, 16, dtype=torch.bool))]
    args = SimpleNamespace(**FLAGS | changes)
    return lambda: STAGES[stage].train_step(model, optimizer, source, target, 3, args)


KINDS = [
    (1, {}), (1, {"lambda_": 0.0}), (2, {}), (2, {"balance_classes": True, "loss_stride": 2}),
]  # fmt: skip


@pytest.mark.parametrize("stage, changes", KINDS)
def test_a_step_asks_the_device_for_no_number(stage, changes):
    step = one_step(stage, **changes)
    with Waits() as waits:
        losses = step()
    assert waits.found == []
    with Waits() as waits:
        losses["total"].item()
    assert waits.found  # the control


@needs_gpu
@pytest.mark.parametrize("stage, changes", KINDS)
def test_a_step_does_not_wait_for_the_gpu(stage, changes):
    step = one_step(stage, "cuda", **changes)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_with_lambda_0_there_is_no_bias_term():
    assert set(one_step(1, lambda_=0.0)()) == {"total", "ce"}
    assert set(one_step(1)()) == {"total", "ce", "bias_source", "bias_target"}


# --- batches on their way to the device -----------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_batches_come_to_the_device_in_order(device):
    batches = [((torch.full((2, 3), n),), (torch.full((1,), n),)) for n in range(5)]
    for number, batch in enumerate(on_device(batches, torch.device(device))):
        assert all(t.device.type == device and (t == number).all() for group in batch for t in group)
        assert [len(group) for group in batch] == [1, 1]
    assert number == 4 and list(on_device([], torch.device(device))) == []


@pytest.mark.parametrize("device, ahead", [("cpu", 1), pytest.param("cuda", 2, marks=needs_gpu)])
def test_a_gpu_has_the_next_batch_on_its_way(device, ahead):
    taken = []
    batches = (taken.append(n) or ((torch.full((2,), n),),) for n in range(5))
    moved = on_device(batches, torch.device(device))
    next(moved)
    assert len(taken) == ahead

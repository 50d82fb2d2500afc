"""The speed benchmark: it runs, its figures have their form, and the plain loop computes what the scripts compute."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

import train_split_lambda
from benchmarks import speed
from dataset.loaders import evaluation_loader
from dataset.voc import evaluation_dataset
from utils.config import parse_settings
from utils.metrics import ZeroShotMetrics, evaluate
from utils.trainer import build_optimizer

CPU = torch.device("cpu")


@pytest.fixture
def args(data):
    return speed.parse_arguments(["--quick", "--device", "cpu", "--backbone", "small", "--data-path", str(data)])


@pytest.fixture(autouse=True)
def quick_processes(monkeypatch):
    """Processes of a server that has imported everything once."""
    multiprocessing.set_forkserver_preload(["benchmarks.speed"])
    context = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(speed, "ProcessPoolExecutor", partial(ProcessPoolExecutor, mp_context=context))


def test_a_quick_run_prints_a_table_and_writes_json(tmp_path, data, capsys):
    flags = ["--quick", "--device", "cpu", "--backbone", "small", "--data-path", str(data)]
    assert speed.main([*flags, "--json", str(tmp_path / "speed.json")]) == 0
    report = json.loads((tmp_path / "speed.json").read_text())
    assert list(report["figures"]) == ["train", "eval", "input", "memory"]
    for figures in report["figures"].values():
        assert figures["ratio"] == pytest.approx(figures["ours"] / figures["plain"]) and figures["plain"] > 0
    assert report["settings"]["batch_size"] == 2 and report["machine"]["threads"] == torch.get_num_threads()
    assert report["figures"]["memory"]["ratio"] < 0.5  # the plain loop keeps the logits of every pixel
    printed = capsys.readouterr().out
    assert printed.index(">= 1.15") < printed.index(">= 2.2") < printed.index("<= 0.45") < printed.index("threads")


def still_networks(args) -> list:
    """Both networks, without dropout and batch statistics, which draw or see other numbers in another order."""
    networks = [speed.build_network(side, args).train() for side in ("ours", "plain")]
    for module in (module for network in networks for module in network.modules()):
        if isinstance(module, (torch.nn.Dropout, torch.nn.BatchNorm2d)):
            module.eval()
    return networks


def test_the_plain_step_moves_the_weights_as_ours_does(args):
    ours, plain = still_networks(args)
    torch.manual_seed(0)
    batches = speed.draw_batches("ours", 2, 32, 15, "cpu")
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    settings = parse_settings(["--backbone", "small"], 1)
    optimizer = build_optimizer(ours.parameter_groups(settings.learning_rate, settings.head_factor), settings)
    losses = train_split_lambda.train_step(ours, optimizer, *batches, 15, settings)
    groups = plain.parameter_groups(settings.learning_rate, settings.head_factor)
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4)
    torch.manual_seed(0)
    speed.plain_step(plain, optimizer, *speed.draw_batches("plain", 2, 32, 15, "cpu"), 15)
    assert losses["ce"] > 0.5
    for name, tensor in plain.state_dict().items():
        moved = ours.state_dict()[name] - before[name]
        assert torch.allclose(moved, tensor - before[name], rtol=1e-2, atol=1e-7), name


def test_the_plain_evaluation_counts_the_same_pixels(args, data):
    split, dataset = speed.SPLIT, evaluation_dataset(data, speed.SPLIT)
    ours, plain = still_networks(args)
    metrics = ZeroShotMetrics(split.names, split.num_seen)
    evaluate(ours, evaluation_loader(dataset, 0, 1), metrics, CPU)
    plain_dataset = speed.PlainDataset(dataset.folder, dataset.ids, split, speed.v2.Identity())
    matrices = speed.plain_evaluate(plain, plain_dataset, split.num_seen, "cpu", 0)
    for matrix, counts in zip(matrices, (metrics.gzsl, metrics.zsl)):
        assert matrix.sum() == counts.sum() > 1000
        assert np.abs(matrix - counts.numpy()).sum() <= 0.01 * matrix.sum()  # logits that are equal but for rounding

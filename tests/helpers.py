"""Short runs of the real scripts, here or in processes of their own, and looking into their results."""

import contextlib
import io
import json
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import eval as evaluation_script
import train_split_lambda
import train_st_split
from model import backbone
from utils.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
STAGES = {1: train_split_lambda, 2: train_st_split}

QUICK = {
    "split": 1, "backbone": "small", "backbone_weights": "none", "embedding": "glove", "device": "cpu",
    "restore_from_where": "pretrained", "input_size": 32, "batch_size": 3, "max_steps": 3, "learning_rate": 0.01,
    "num_workers": 0,
}  # fmt: skip
"""The settings of a run that takes a second."""

SHORT = {"input_size": 16, "batch_size": 2, "target_batch_size": 1, "evaluate_every": 0}
"""Settings of the shortest steps, together with `tiny_network`."""


def arguments(data: Path, output: Path, *flags, **changes) -> list[str]:
    """A quick run's command line; `max_steps=6` gives --max-steps 6, None leaves a flag out."""
    chosen = QUICK | {"data_path": data, "output_dir": output} | changes
    names = {name: "--" + name.strip("_").replace("_", "-") for name, value in chosen.items() if value is not None}
    return [*(text for name in names for text in (names[name], str(chosen[name]))), *map(str, flags)]


def train(stage: int, data: Path, output: Path, *flags, draws: bool = False, **changes) -> Path:
    """Runs the stage's script, in place of a run that is there unless it continues; returns the folder of the run.

    The images of an evaluation, which take most of its time, are drawn only if `draws`.
    """
    folder = output / f"split{changes.get('split', QUICK['split'])}" / f"stage{stage}"
    if changes.get("restore_from_where") != "continue":
        (folder / "latest.pth").unlink(missing_ok=True)
    with contextlib.nullcontext() if draws else mock.patch.object(Trainer, "_draw", return_value={}):
        assert STAGES[stage].main(arguments(data, output, *flags, **changes)) == 0
    return folder


def evaluation_arguments(checkpoint: Path, data: Path, *flags) -> list[str]:
    command = ["--checkpoint", checkpoint, "--data-path", data, "--num-workers", 0, "--device", "cpu", *flags]
    return list(map(str, command))


def evaluate(checkpoint: Path, data: Path, *flags) -> int:
    return evaluation_script.main(evaluation_arguments(checkpoint, data, *flags))


def failure(capsys, main, argv: list[str]) -> str:
    """The one line that `main(argv)` ends in: exit code 2, nothing else on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in argv])
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The network of the run's latest checkpoint."""
    return load(folder / "latest.pth")["model"]


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(save) -> bytes:
    """What `save(stream)` writes."""
    stream = io.BytesIO()
    save(stream)
    return stream.getvalue()


def same(a, b) -> bool:
    """Whether two checkpoints, or parts of them, are alike to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_run(a: Path, b: Path, losses: bool = True) -> bool:
    """Whether two runs ended alike: weights, optimiser, schedule, the best checkpoint and the log.

    Without `losses` the log's losses may differ: an evaluation that a resumed run repeats has none.
    """
    parts = ("stage", "step", "model", "optimizer", "scheduler", "best", "selection", "metadata", "pseudo_labeler")
    for name in ("latest.pth", "best.pth"):
        one, other = (load(folder / name) for folder in (a, b))
        if not all(same(one[part], other[part]) for part in parts):
            return False
    logs = ([{k: v for k, v in line.items() if losses or "loss" not in k} for line in read_log(f)] for f in (a, b))
    return next(logs) == next(logs)


def tiny_network(norm: bool = True, dropout: float = 0.1) -> backbone.Backbone:
    """Two convolutions with batch norm and dropout."""
    layers = [nn.Conv2d(3, 4, 3, stride=4, padding=1), *([nn.BatchNorm2d(4)] if norm else []), nn.ReLU()]
    return backbone.Backbone(nn.Sequential(*layers), nn.Sequential(nn.Dropout(dropout), nn.Conv2d(4, 4, 1)))


normed_network = partial(tiny_network, dropout=0.0)
plain_network = partial(tiny_network, norm=False, dropout=0.0)
"""What it makes of an image does not depend on the rest of the batch."""


def use_network(build, patch=None) -> None:
    """Lets `--backbone small` build this network; `patch` is pytest's monkeypatch, None leaves it so."""
    entry = backbone.ARCHITECTURES["small"]._replace(build=lambda network: build())
    (patch or pytest.MonkeyPatch()).setitem(backbone.ARCHITECTURES, "small", entry)

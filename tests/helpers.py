"""What several test files share: short runs of the real scripts, and looking into what they left behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation_script
import train_split_lambda
import train_st_split
from dataset.checks import ClassIndex
from dataset.splits import Split
from dataset.voc import VOCFolder

ROOT = Path(__file__).resolve().parents[1]
STAGES = {1: train_split_lambda, 2: train_st_split}

QUICK = {
    "--split": "1",
    "--backbone": "small",
    "--backbone-weights": "none",
    "--embedding": "glove",
    "--restore-from-where": "pretrained",
    "--input-size": "32",
    "--batch-size": "3",
    "--max-steps": "3",
    "--learning-rate": "0.01",
    "--num-workers": "0",
    "--device": "cpu",
}
"""The flags of a run that takes a second."""


def arguments(data: Path, output: Path, *flags, pictures: bool = False, **changes) -> list[str]:
    """A quick run's command line; `max_steps="6"` stands for --max-steps 6, None leaves a flag out."""
    flags = flags if pictures else ("--no-pictures", *flags)
    chosen = QUICK | {"--data-path": data, "--output-dir": output}
    chosen |= {"--" + name.strip("_").replace("_", "-"): value for name, value in changes.items()}
    pairs = [[name, str(value)] for name, value in chosen.items() if value is not None]
    return [*(text for pair in pairs for text in pair), *map(str, flags)]


def train(stage: int, data: Path, output: Path, *flags, **changes) -> Path:
    """Runs the stage's script, in place of a run that is there unless it continues; returns the folder of the run."""
    folder = output / f"split{changes.get('split', QUICK['--split'])}" / f"stage{stage}"
    if changes.get("restore_from_where") != "continue":
        (folder / "latest.pth").unlink(missing_ok=True)
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
    assert len(lines) == 1 and lines[0].removeprefix("python -m embeddings.build: ").startswith("error: "), lines
    return lines[0]


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The network of the run's latest checkpoint."""
    return load(folder / "latest.pth")["model"]


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def copy_of(data: Path, folder: Path) -> Path:
    """A copy of a drawn set that a test may spoil; with its times of change, so its index stays good."""
    return Path(shutil.copytree(data, folder))


def classes_shown(data: Path, name: str = "train") -> dict[str, frozenset[int]]:
    """Mask values of each picture of a list, read from its mask (and kept in the class index)."""
    folder = VOCFolder.open(data)
    return ClassIndex(folder).classes(folder.read_list(name, ()))


def target_only(data: Path, split: Split) -> list[str]:
    """Training pictures that show an unseen class and no seen one."""
    shown = classes_shown(data)
    return [p for p, v in shown.items() if v & split.unseen_values and not v & split.seen_values]


def source_and_target(data: Path, split: Split) -> list[str]:
    """Training pictures that show both seen and unseen classes."""
    shown = classes_shown(data)
    return [p for p, v in shown.items() if v & split.unseen_values and v & split.seen_values]


def mask_path(data: Path, picture: str) -> Path:
    return VOCFolder.open(data).mask_path(picture)


def read_values(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def write_values(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask.astype(np.uint8), mode="L").save(path)


def same(a, b) -> bool:
    """Whether two checkpoints, or parts of them, are alike to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_run(a: Path, b: Path) -> bool:
    """Whether two runs have ended alike: weights, optimiser, schedule, the best checkpoint and the log."""
    parts = ("stage", "step", "model", "optimizer", "scheduler", "best", "selection", "setting")
    for name in ("latest.pth", "best.pth"):
        one, other = (load(folder / name) for folder in (a, b))
        if not all(same(one[part], other[part]) for part in parts):
            return False
    return read_log(a) == read_log(b)

"""Short runs of the real scripts, here or in processes of their own, and looking into their results."""

import contextlib
import gc
import io
import itertools
import json
import multiprocessing
import os
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributed import TCPStore

import eval as evaluation_script
import train_split_lambda
import train_st_split
from dataset.checks import ClassIndex
from dataset.splits import Split
from dataset.voc import VOCFolder
from model import backbone
from utils.trainer import Trainer

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


def arguments(data: Path, output: Path, *flags, **changes) -> list[str]:
    """A quick run's command line; `max_steps=6` gives --max-steps 6, None leaves a flag out."""
    chosen = QUICK | {"--data-path": data, "--output-dir": output}
    chosen |= {"--" + name.strip("_").replace("_", "-"): value for name, value in changes.items()}
    pairs = [[name, str(value)] for name, value in chosen.items() if value is not None]
    return [*(text for pair in pairs for text in pair), *map(str, flags)]


def train(stage: int, data: Path, output: Path, *flags, draws: bool = False, **changes) -> Path:
    """Runs the stage's script, in place of a run that is there unless it continues; returns the folder of the run.

    The images of an evaluation, which take most of its time, are drawn only if `draws`.
    """
    folder = output / f"split{changes.get('split', QUICK['--split'])}" / f"stage{stage}"
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


def classes_shown(data: Path, name: str = "train") -> dict[str, frozenset[int]]:
    """Mask values of each image of a list, read from its mask (and kept in the class index)."""
    folder = VOCFolder.open(data)
    return ClassIndex(folder).classes(folder.read_list(name, ()))


def target_only(data: Path, split: Split) -> list[str]:
    """Training images that show an unseen class and no seen one."""
    shown = classes_shown(data)
    return [image for image, v in shown.items() if v & split.unseen_values and not v & split.seen_values]


def source_and_target(data: Path, split: Split) -> list[str]:
    """Training images that show both seen and unseen classes."""
    shown = classes_shown(data)
    return [image for image, v in shown.items() if v & split.unseen_values and v & split.seen_values]


def mask_path(data: Path, image: str) -> Path:
    return VOCFolder.open(data).mask_path(image)


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


# --- scripts in processes of their own ------------------------------------------------------------------

SHORT = {"input_size": 16, "batch_size": 2, "target_batch_size": 1, "evaluate_every": 0}
"""Settings of the shortest steps, together with `tiny_network`."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["helpers"])


def tiny_network(norm: bool = True, dropout: float = 0.1) -> backbone.Backbone:
    """Two convolutions with batch norm and dropout."""
    layers = [nn.Conv2d(3, 4, 3, stride=4, padding=1), *([nn.BatchNorm2d(4)] if norm else []), nn.ReLU()]
    return backbone.Backbone(nn.Sequential(*layers), nn.Sequential(nn.Dropout(dropout), nn.Conv2d(4, 4, 1)), 4)


normed_network = partial(tiny_network, dropout=0.0)
plain_network = partial(tiny_network, norm=False, dropout=0.0)
"""What it makes of an image does not depend on the rest of the batch."""


def use_network(build, patch=None) -> None:
    """Lets `--backbone small` build this network; `patch` is pytest's monkeypatch, None leaves it so."""
    entry = backbone.Architecture(lambda network: build(), head=backbone.ARCHITECTURES["small"].head)
    if patch is None:
        backbone.ARCHITECTURES["small"] = entry
    else:
        patch.setitem(backbone.ARCHITECTURES, "small", entry)


class ScriptProcess:
    """A running script, forked from a process that has imported everything, so that it starts fast.

    Args:
        folder: `--output-dir` is its folder runs.
        stage: 1 or 2.
        data: the data set.
        flags: further flags.
        prepare: called in the process before the script, with the record's path and `args`; it must be a function of a
            module. What it writes with `append` is read with `records`.
        args: its further arguments.
        place: (rank, processes, port): it is one of several processes, as torchrun starts them.
        changes: settings, see `arguments`.
    """

    def __init__(self, folder: Path, stage: int, data: Path, *flags, prepare=None, args=(), place=None, **changes):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder / "runs" / "split1" / f"stage{stage}"
        rank = "" if place is None else place[0]
        self._output, self._record, self._report = (folder / f"{name}{rank}" for name in ("output", "record", "report"))
        self._output.unlink(missing_ok=True)
        argv = arguments(data, folder / "runs", *flags, **SHORT | changes)
        paths, method = (self._output, self._record, self._report), multiprocessing.get_start_method()
        self.process = _context.Process(target=_run, args=(paths, method, stage, argv, prepare, args, place))
        with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT}/tests"):
            self.process.start()  # the first call starts a server, which imports this module

    def records(self) -> list[str]:
        return self._record.read_text().splitlines() if self._record.exists() else []

    def losses(self) -> list[dict[str, float]]:
        """What `record_losses` wrote."""
        return list(map(json.loads, self.records()))

    def report(self) -> dict:
        """After the script: open files before and after it, and workers that are left."""
        return json.loads(self._report.read_text())

    def wait_for(self, condition, seconds=600):
        """Until `condition()`, or until the process has ended."""
        end = time.monotonic() + seconds
        while not condition() and self.process.is_alive():
            assert time.monotonic() < end, f"waited {seconds} s; {self.output()}"
            time.sleep(0.002)

    def end(self, seconds=600) -> int:
        """The exit code; minus a signal's number where one ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"does not end; {self.output()}"
        return self.process.exitcode

    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def signal_all(self, number: int) -> None:
        """To the process and its workers, as a terminal does."""
        os.killpg(self.process.pid, number)


def run_script(*arguments, code=0, **changes) -> ScriptProcess:
    """A script process to its end, which must be exit code `code`."""
    process = ScriptProcess(*arguments, **changes)
    assert process.end() == code, process.output()
    return process


def start_several(number: int, *arguments, prepare=None, args=(), **changes) -> list[ScriptProcess]:
    """Processes that share a run. `args` is for all of them; {rank: args} prepares only those."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun keeps it, not one of them
    args = args if isinstance(args, dict) else dict.fromkeys(range(number), args)
    processes = [
        ScriptProcess(
            *arguments, prepare=prepare if rank in args else None, args=args.get(rank, ()),
            place=(rank, number, store.port), **changes,
        )
        for rank in range(number)
    ]  # fmt: skip
    processes[0].store = store
    return processes


def run_several(number: int, *arguments, code=0, **changes) -> list[ScriptProcess]:
    """Such processes to their end, which must be exit code `code` of each."""
    processes = start_several(number, *arguments, **changes)
    codes = [process.end(120) for process in processes]
    assert codes == [code] * number, "\n".join(process.output() for process in processes)
    return processes


def _run(paths, method, stage, argv, prepare, args, place) -> None:
    """In the child, whose workers start as those of a script do."""
    os.setsid()
    if place is not None:
        rank, number, port = map(str, place)
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    multiprocessing.set_start_method(method, force=True)
    output, record, report = paths
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    use_network(tiny_network)
    Trainer._draw = lambda trainer, result: {}
    if prepare is not None:
        prepare(record, *args)
    before = open_files()
    code = STAGES[stage].main(argv)
    gc.collect()
    report.write_text(json.dumps({"files": [before, open_files()], "workers": len(multiprocessing.active_children())}))
    sys.exit(code)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def append(path: Path, line: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


# --- what `prepare` can be ------------------------------------------------------------------------------


def record_losses(record: Path, build=tiny_network) -> None:
    """Uses this network, and writes the losses of each step as JSON."""
    use_network(build)
    end_step = Trainer.end_step

    def recording(trainer, losses):
        end_step(trainer, losses)
        append(record, json.dumps(trainer._losses.means()))

    Trainer.end_step = recording


def fail_in_step(record: Path, number: int, how: int | str, build=tiny_network) -> None:
    """Uses this network; in step `number` there is a signal, or an error with the text `how`."""
    use_network(build)
    steps = itertools.count(1)
    for module in STAGES.values():

        def failing(*arguments, train_step=module.train_step):
            if next(steps) == number:
                if isinstance(how, str):
                    raise OSError(how)
                os.kill(os.getpid(), how)
            return train_step(*arguments)

        module.train_step = failing


def record_opened(record: Path) -> None:
    """An audit hook, which workers inherit: each file that is opened or renamed, and by which process."""
    handle, main = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT), os.getpid()

    def hook(event, arguments):
        if event in ("open", "os.rename") and isinstance(arguments[0], (str, bytes, os.PathLike)):
            who = "main" if os.getpid() == main else "worker"
            path = arguments[1 if event == "os.rename" else 0]
            os.write(handle, f"{who} {event} {os.fsdecode(path)}\n".encode())

    sys.addaudithook(hook)

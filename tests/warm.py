"""The scripts in processes of their own, forked from one that has imported everything: a fraction of a second each.

What a test wants to be otherwise in such a process it says by `prepare`, one of the functions below.
"""

import gc
import io
import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import utils.run
from torch import nn
from torch.distributed import TCPStore

import eval as evaluation_script
from helpers import ROOT, STAGES, arguments
from model import backbone

PLAN = {"input_size": 16, "batch_size": 2, "target_batch_size": 1, "evaluate_every": 0}
"""Flags of the shortest steps, which `tiny` makes shorter still."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["warm"])


def tiny() -> backbone.Backbone:
    """Two convolutions, with batch norm and dropout as their betters have."""
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return backbone.Backbone(trunk, nn.Sequential(nn.Dropout(0.1), nn.Conv2d(4, 4, 1)), 4)


def plain() -> backbone.Backbone:
    """The same with neither, so that what it makes of a picture depends on nothing else."""
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.ReLU())
    return backbone.Backbone(trunk, nn.Conv2d(4, 4, 1), 4)


def normed() -> backbone.Backbone:
    """The same with batch norm alone."""
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return backbone.Backbone(trunk, nn.Conv2d(4, 4, 1), 4)


class Life:
    """A running script. `log` has its output, `journal` what `prepare` and its like wrote down.

    With `place` (rank, processes, port) it is one of several processes, as torchrun starts them.
    """

    def __init__(self, folder: Path, stage: int, data: Path, *flags, prepare=None, told=(), place=None, **changes):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder / "runs" / "split1" / f"stage{stage}"
        rank = "" if place is None else place[0]
        self.log, self.journal, self.report = (
            folder / name for name in (f"log{rank}.txt", f"journal{rank}.txt", f"report{rank}.json")
        )
        self.log.unlink(missing_ok=True)
        argv = arguments(data, folder / "runs", *flags, **PLAN | changes)
        before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), os.pathsep.join([str(ROOT), f"{ROOT}/tests"])
        try:  # the server, which the first call starts, imports `warm`
            self.process = _context.Process(
                target=_live, args=(self.paths, multiprocessing.get_start_method(), stage, argv, prepare, told, place)
            )
            self.process.start()
        finally:
            os.environ.pop("PYTHONPATH")
            if before is not None:
                os.environ["PYTHONPATH"] = before

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        return self.log, self.journal, self.report

    def notes(self) -> list[str]:
        return self.journal.read_text().splitlines() if self.journal.exists() else []

    def losses(self) -> list[dict[str, float]]:
        """What `note_losses` wrote down."""
        return [json.loads(note) for note in self.notes()]

    def wait_for(self, done, seconds=1800):
        """Until `done()`, or until the process has ended."""
        end = time.monotonic() + seconds
        while not done() and self.process.is_alive():
            assert time.monotonic() < end, f"waited {seconds} s; {self.output()}"
            time.sleep(0.002)

    def end(self, seconds=1800) -> int:
        """The exit code; minus a signal's number where one ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"does not end; {self.output()}"
        return self.process.exitcode

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def signal_all(self, number: int) -> None:
        """To the process and its workers, as a terminal does."""
        os.killpg(self.process.pid, number)


def lives(number: int, *arguments, prepare=None, told=(), **changes) -> list[Life]:
    """Processes that share a run; `told` is for all of them, `told={rank: ...}` prepares only those."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # kept by torchrun, not by one of them
    told = told if isinstance(told, dict) else dict.fromkeys(range(number), told)
    started = [
        Life(
            *arguments,
            prepare=prepare if rank in told else None,
            told=told.get(rank, ()),
            place=(rank, number, store.port),
            **changes,
        )
        for rank in range(number)
    ]
    started[0].store = store
    return started


def run_several(number: int, *arguments, code=0, **changes) -> Life:
    """Such processes to their end, which must be exit code `code` of each; the main one."""
    started = lives(number, *arguments, **changes)
    codes = [life.end() for life in started]
    assert codes == [code] * number, "\n".join(life.output() for life in started)
    return started[0]


def run(*arguments, code=0, **changes) -> Life:
    """A life to its end, which must be exit code `code`."""
    life = Life(*arguments, **changes)
    assert life.end() == code, life.output()
    return life


def _live(paths, method, stage, argv, prepare, told, place) -> None:
    """In the child, whose workers begin as those of a script do."""
    os.setsid()
    if place is not None:
        rank, number, port = map(str, place)
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    multiprocessing.set_start_method(method, force=True)
    log, journal, report = paths
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    backbone.ARCHITECTURES["small"] = backbone.Architecture(tiny)
    if prepare is not None:
        prepare(journal, *told)
    before = open_files()
    code = STAGES[stage].main(argv)
    gc.collect()
    report.write_text(json.dumps({"files": [before, open_files()], "workers": len(multiprocessing.active_children())}))
    sys.exit(code)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def _append(path: Path, line: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


# --- what `prepare` can be ------------------------------------------------------------------------------


def note_saves(journal: Path) -> None:
    """Writes down the step of each `latest.pth` once it is saved."""
    save = utils.run.save_checkpoint

    def noting(path, **content):
        save(path, **content)
        if path.name == "latest.pth":
            _append(journal, str(content["step"]))

    utils.run.save_checkpoint = noting


def stand_still(journal: Path, number: int) -> None:
    """As above; save `number` is not begun for an hour."""
    note_saves(journal)
    save, saves = utils.run.save_checkpoint, itertools.count(1)

    def waiting(path, **content):
        if next(saves) == number:
            time.sleep(3600)
        save(path, **content)

    utils.run.save_checkpoint = waiting


def die_in_save(journal: Path, number: int, share: float) -> None:
    """As `note_saves`; SIGKILL in save `number` after `share` of the bytes, or, if above 1, just after the renaming."""
    save = utils.run.save_checkpoint
    note_saves(journal)
    noting, write, saves = utils.run.save_checkpoint, torch.save, itertools.count(1)

    def dying(thing, file):
        buffer = io.BytesIO()
        write(thing, buffer)
        file.write(buffer.getvalue()[: int(share * buffer.tell())])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def counting(path, **content):
        if next(saves) == number:
            torch.save = dying if share <= 1 else write
            (save if share > 1 else noting)(path, **content)
            os.kill(os.getpid(), signal.SIGKILL)
        noting(path, **content)

    utils.run.save_checkpoint = counting


def note_steps(journal: Path, *slow: int) -> None:
    """Writes down each step that is begun and done; those in `slow` take a minute."""
    for module in STAGES.values():
        _note_steps(journal, module, slow)


def _note_steps(journal: Path, module, slow) -> None:
    train_step, number = module.train_step, itertools.count(1)

    def noting(*arguments):
        step = next(number)
        _append(journal, f"begun {step}")
        if step in slow:
            time.sleep(60)
        losses = train_step(*arguments)
        _append(journal, f"done {step}")
        return losses

    module.train_step = noting


def note_losses(journal: Path, network: str = "tiny") -> None:
    """Builds `network`, and writes down what the log would say of each step, as JSON."""
    backbone.ARCHITECTURES["small"] = backbone.Architecture(globals()[network])
    note = utils.run.Run.note

    def noting(run, losses):
        note(run, losses)
        _append(journal, json.dumps(run._losses.means()))

    utils.run.Run.note = noting


def evaluate_instead(journal: Path, *argv: str) -> None:
    """Runs eval.py with these flags in place of stage 1."""
    STAGES[1] = SimpleNamespace(main=lambda _: evaluation_script.main(list(argv)))


def stop_in_step(journal: Path, number: int, network: str) -> None:
    """As `note_losses`; SIGTERM in step `number`."""
    note_losses(journal, network)
    die_in_step(journal, number, signal.SIGTERM)


def die_in_step(journal: Path, number: int, how: int | str) -> None:
    """In step `number` a signal, or an error that says `how`."""
    for module in STAGES.values():
        _die_in_step(module, number, how)


def _die_in_step(module, number: int, how: int | str) -> None:
    train_step, steps = module.train_step, itertools.count(1)

    def dying(*arguments):
        if next(steps) == number:
            if isinstance(how, str):
                raise OSError(how)
            os.kill(os.getpid(), how)
        return train_step(*arguments)

    module.train_step = dying


def slow_save(journal: Path, number: int) -> None:
    """In save `number` half the file is written, and then for a minute nothing."""
    write, saves = torch.save, itertools.count(1)

    def slowly(thing, file):
        buffer = io.BytesIO()
        write(thing, buffer)
        if next(saves) == number:
            file.write(buffer.getvalue()[: buffer.tell() // 2])
            file.flush()
            _append(journal, "half")
            time.sleep(60)
        file.write(buffer.getvalue())

    torch.save = slowly


def full_disk(journal: Path, save: int, room: int) -> None:
    """From save `save` on no file can grow beyond `room` bytes."""
    write, saves = torch.save, itertools.count(1)

    def limited(thing, file):
        if next(saves) == save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        write(thing, file)

    torch.save = limited


def note_memory(journal: Path, *steps: int) -> None:
    """Writes down the process's memory in bytes after each of `steps`, and its open files."""
    note = utils.run.Run.note

    def noting(run, losses):
        note(run, losses)
        if run.step in steps:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            _append(journal, f"{run.step} {pages * resource.getpagesize()} {open_files()}")

    utils.run.Run.note = noting


def note_opened(journal: Path) -> None:
    """An audit hook, which workers inherit: each file that is opened or renamed, by which process."""
    handle = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    main = os.getpid()

    def hook(event, arguments):
        if event in ("open", "os.rename") and isinstance(arguments[0], (str, bytes, os.PathLike)):
            who = "main" if os.getpid() == main else "worker"
            path = arguments[1 if event == "os.rename" else 0]
            os.write(handle, f"{who} {event} {os.fsdecode(path)}\n".encode())

    sys.addaudithook(hook)

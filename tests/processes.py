"""Scripts in processes of their own, one or several that share a run, and what can be prepared in them."""

import gc
import itertools
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch.distributed import TCPStore

from helpers import ROOT, SHORT, STAGES, arguments, tiny_network, use_network
from utils.trainer import Trainer

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["processes"])


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


def record_losses(record: Path, build=tiny_network) -> None:
    """Uses this network, and writes the losses of each step as JSON."""
    use_network(build)
    end_step = Trainer.end_step

    def recording(trainer, losses):
        end_step(trainer, losses)
        append(record, json.dumps(trainer._losses.means(trainer.step)))

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

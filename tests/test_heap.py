"""--keep-memory: what a step frees on a CPU is there for the next."""

import ctypes
import subprocess
import sys

import pytest
import torch
from utils.heap import ROOMY, keep_memory, machine_memory

from helpers import ROOT, arguments, failure
from train_split_lambda import main
from utils import heap

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def called(monkeypatch):
    """What the C library is told, without telling it."""
    calls = []
    library = type("Library", (), {"mallopt": staticmethod(lambda *values: calls.append(values) or 1)})
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: library)
    return calls


@pytest.mark.parametrize(
    "choice, device, memory, kept",
    [
        ("auto", CPU, ROOMY, True),
        ("auto", CPU, ROOMY - 1, False),
        ("auto", GPU, ROOMY, False),
        ("off", CPU, ROOMY, False),
        ("on", CPU, 0, True),
    ],
)
def test_auto_is_for_a_cpu_with_room(called, monkeypatch, choice, device, memory, kept):
    monkeypatch.setattr(heap, "machine_memory", lambda: memory)
    assert keep_memory(choice, device) is kept and bool(called) is kept


def test_a_library_that_cannot_is_one_line_only_if_asked_for(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(heap, "machine_memory", lambda: ROOMY)
    assert keep_memory("auto", CPU) is False
    line = failure(capsys, main, arguments(data, tmp_path, "--keep-memory", "on"))
    assert "--keep-memory on" in line and "auto" in line


def test_a_container_has_the_memory_of_its_limit(tmp_path):
    limit, whole = tmp_path / "memory.max", machine_memory(tmp_path / "none")
    for text, memory in (("max\n", whole), ("1048576\n", 2**20), (f"{2**80}\n", whole)):
        limit.write_text(text)
        assert machine_memory(limit) == memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_kept_memory_is_not_cleared_by_the_system_again():
    """Bytes of the pages that eight tensors of 32 MiB need anew: those of all, or at best next to none."""
    program = """if True:
        import resource, sys, torch
        from utils.heap import keep_memory
        keep_memory(sys.argv[1], torch.device("cpu"))
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            tensors = [torch.ones(2**23) for _ in range(8)]
            return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()
        print(min(faults() for _ in range(6)))
    """
    on, off = (
        int(subprocess.check_output([sys.executable, "-c", program, choice], cwd=ROOT, text=True))
        for choice in ("on", "off")
    )
    assert off >= 2**28 and on < 2**20

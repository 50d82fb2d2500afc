"""Errors become one line with a hint, and files are written whole or not at all."""

import pytest
import torch

from utils.errors import UserError, atomic_write, describe_error, one_line, one_line_errors, write_text

WRAPPED = """Caught ValueError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "loop.py", line 1, in loop
    data = fetch(index)
some.module.ValueError: the file: is bad ValueError: truly
"""


@pytest.mark.parametrize("text, line", [
    ("one line", "one line"), ("", "ValueError"), (WRAPPED, "the file: is bad ValueError: truly"),
    ("x is not written (first\n  second\n): free some", "x is not written (first second ): free some"),
])  # fmt: skip
def test_an_error_is_one_line(text, line):
    assert one_line(ValueError(text)) == line


BUS_ERROR = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that workers are "
DESCRIBED = [
    (UserError("a.txt is bad"), ["a.txt is bad"]),
    (FileNotFoundError(2, "No such file or directory", "a.txt"), ["No such file", "a.txt", "check that it is there"]),
    (RuntimeError(BUS_ERROR + "out of shared memory. Please try to raise."), ["--num-workers", "--shm-size"]),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_7_8_9>"), ["--num-workers", "--shm-size"]),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), ["died", "lower --num-workers"]),
    (ConnectionResetError(104, "Connection reset by peer"), ["died", "lower --num-workers"]),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), ["CUDA out of memory", "--batch-size"]),
    (MemoryError(), ["MemoryError", "lower --batch-size"]),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), ["--batch-size"]),
    (RuntimeError("x does not have a deterministic implementation"), ["--deterministic"]),
    (RuntimeError("[/gloo/transport/tcp/pair.cc] Connection closed"), ["another process of this run", "continue"]),
]


@pytest.mark.parametrize("error, words", DESCRIBED, ids=lambda value: str(value)[:40])
def test_an_error_of_user_or_machine_has_a_hint(error, words):
    line = describe_error(error)
    assert "\n" not in line and all(word in line for word in words), line


def test_a_mistake_in_the_code_keeps_its_traceback():
    @one_line_errors
    def main(argv):
        raise RuntimeError("shapes differ")

    assert describe_error(RuntimeError("shapes differ")) is None
    with pytest.raises(RuntimeError, match="shapes differ"):
        main([])


@pytest.mark.parametrize("error, code, line", [
    (UserError("a.txt is bad"), 2, "error: a.txt is bad\n"), (KeyboardInterrupt(), 130, "stopped\n"),
])  # fmt: skip
def test_a_script_ends_with_one_line_and_an_exit_code(capsys, error, code, line):
    @one_line_errors
    def main(argv):
        raise error

    with pytest.raises(SystemExit, match=str(code)):
        main([])
    assert capsys.readouterr() == ("", line)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match=r"nowhere/a.txt can't be written .*choose a folder"):
        write_text(tmp_path / "nowhere" / "a.txt", "new")

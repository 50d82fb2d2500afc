"""Bad input ends in one clear line and exit code 2, never in a traceback; files are written whole or not at all."""

import codecs
import contextlib
import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path


class UserError(ValueError):
    """Something that the user gave can't be used. One line: which file or flag, and what to do."""


HINTS = {
    r"shared memory": "lower --num-workers, or give the machine more of it (docker run --shm-size 8g)",
    r"gloo/transport|NCCL": "another process of this run has ended: start all of them again, with continue",
    r"DataLoader worker|^\[Errno \d+\] Connection re": "a process that reads images died: lower --num-workers",
    r"out of memory|allocate memory|MemoryError": "in training lower --batch-size or --input-size, in evaluation and "
    "prediction --longest-side; eval.py evaluates a finished training",
    r"does not have a deterministic implementation": "leave out --deterministic, or give --device cpu",
}
"""Patterns of error messages that tell of the machine, not of a mistake in the code."""


def one_line_errors(main: Callable) -> Callable:
    """Decorator of a script's `main`: errors of the user, of files and of memory become one line and exit code 2.

    Ctrl-C becomes exit code 130. Of several processes only the first that fails prints; the others, which would wait
    for it, end with it.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        from utils import distributed  # which imports this module

        try:
            code = main(argv)
            distributed.disconnect()
            return code
        except KeyboardInterrupt:  # outside the steps of training, which finish and save
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            text = describe_error(error)
            if text is None:
                raise
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise again for each worker that ends
            traceback.clear_frames(error.__traceback__)  # ends the loaders' workers
            if distributed.is_first_failure():
                distributed.disconnect(failed=True)
                print(f"error: {text}", file=sys.stderr)
            raise SystemExit(2) from None
        finally:
            distributed.disconnect(failed=True)

    return wrapped


def describe_error(error: Exception) -> str | None:
    """One line for the user about `error`; None if it is a mistake in the code."""
    text = one_line(error)
    if isinstance(error, UserError):
        return text
    hints = [hint for pattern, hint in HINTS.items() if re.search(pattern, text)]
    if isinstance(error, OSError):
        hints.append("check that it is there, may be used and has room")
    return f"{text[:200]}: {hints[0]}" if hints else None


def one_line(error: Exception) -> str:
    """The error's text in one line, also where a loader's worker wrapped it in the text of a traceback."""
    name, text = type(error).__name__, str(error)
    if text.startswith(f"Caught {name} in "):
        text = re.split(rf"^[\w.]*{name}: ", text, flags=re.MULTILINE)[-1]
    return " ".join(line.strip() for line in text.splitlines() if line.strip()) or name


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written in the block and renamed to `path` at its end.

    Whatever happens, `path` is the file of before or the whole new one, also after a power cut. A process that is
    killed leaves `.NAME.PID.tmp`. Raises `UserError` if the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of the disk's, with a stack of its own
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        hint = "free some disk, or choose a folder you may write; a file that was there before is kept"
        raise UserError(f"{path} can't be written ({reason}): {hint}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all. Raises `UserError` if the disk does not take it."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8 or marked UTF-16, without blanks around them and without empty ones.

    Raises `UserError` if it can't be read.
    """
    try:
        content = path.read_bytes()
        encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        lines = content.decode(encoding).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as text ({getattr(error, 'strerror', 'not UTF-8')})") from error
    return [line.strip() for line in lines if line.strip()]


def check_writable(folder: Path, flag: str) -> None:
    """Raises `UserError`, which names `flag`, for a folder that is neither there and writable nor can be made."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    may_write = os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
    if not (there.is_dir() and may_write):
        raise UserError(f"{flag} can't be written ({there} is no folder, or no permission): choose another folder")

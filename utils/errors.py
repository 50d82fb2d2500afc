"""Bad input ends in one clear line and exit code 2, never in a traceback."""

import functools
import re
import sys
import traceback
from collections.abc import Callable

import torch

from utils import distributed


class InputError(ValueError):
    """Something that the user gave can't be used. One line: which file or flag, and how to mend it."""


def one_line_errors(*kinds: type[Exception]) -> Callable:
    """Decorator of a script's `main`: `InputError` and `kinds` become one line on stderr and exit code 2.

    So do errors of the system, of files and of memory. Ctrl-C becomes exit code 130. Of several processes the first to
    fail alone says why; the others, which would wait for it, end with it.

    Args:
        kinds: the exception types by which the packages say that their input is bad.
    """

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def wrapped(argv=None):
            failed = True
            try:
                code = main(argv)
                failed = False
                return code
            except KeyboardInterrupt:  # outside the steps of training, which finish and save
                print("stopped", file=sys.stderr)
                raise SystemExit(130) from None
            except (InputError, OSError, MemoryError, RuntimeError, *kinds) as error:
                text = one_line(error, (InputError, *kinds))
                if text is None:
                    raise
                traceback.clear_frames(error.__traceback__)  # ends the loaders' workers, which wait on
                if distributed.fails_first():
                    distributed.disconnect(failed)
                    print(f"error: {text}", file=sys.stderr)
                raise SystemExit(2) from None
            finally:
                distributed.disconnect(failed)

        return wrapped

    return decorate


MENDS = {
    "does not have a deterministic implementation": "leave out --deterministic, or give --device cpu",
    "shared memory": "lower --num-workers, or give the machine more of it (docker run --shm-size 8g)",
    "gloo/transport": "another process of this run has ended: start all of them again, with continue",
    "NCCL": "another process of this run has ended, or has no GPU: start all of them again, with continue",
    "DataLoader worker": "a process that reads pictures died: lower --num-workers or free some memory",
    "out of memory": "lower --batch-size or --input-size (--longest-side of photos)",
    "TORCHDYNAMO_VERBOSE": "leave out --compile, or install what it lacks",
    "can't allocate memory": "lower --batch-size or --input-size",
}
"""Parts of the messages of torch's `RuntimeError` that tell of the machine, not of a mistake in the code."""


def one_line(error: Exception, kinds: tuple[type[Exception], ...]) -> str | None:
    """What to tell the user of `error`, one of `kinds` or the system's; None if it is a mistake in the code."""
    if isinstance(error, kinds):
        return message(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or message(error)}: check that it is there, may be used and has room"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{message(error).split('. ')[0]}: {MENDS['out of memory']}"
    if isinstance(error, MemoryError):
        return f"out of memory: {MENDS['out of memory']}"
    mend = next((mend for part, mend in MENDS.items() if part in str(error)), None)
    text = message(error).split(" Set TORCHDYNAMO_VERBOSE")[0]  # advice for those who develop the compiler
    return mend and f"{text[:200]}: {mend}"


def message(error: Exception) -> str:
    """The error's own text in one line, also where a loader's worker wrapped it in the text of a traceback."""
    name, text = type(error).__name__, str(error)
    if text.startswith(f"Caught {name} in "):
        text = re.split(rf"^[\w.]*{name}: ", text, flags=re.MULTILINE)[-1]
    return " ".join(line.strip() for line in text.splitlines() if line.strip()) or name

"""Bad input ends in one clear line and exit code 2, never in a traceback."""

import functools
import re
import sys
from collections.abc import Callable

import torch


class InputError(ValueError):
    """Something that the user gave can't be used. One line: which file or flag, and how to mend it."""


def one_line_errors(*kinds: type[Exception]) -> Callable:
    """Decorator of a script's `main`: `InputError` and `kinds` become one line on stderr and exit code 2.

    Args:
        kinds: the exception types by which the packages say that their input is bad.
    """

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def wrapped(argv=None):
            try:
                return main(argv)
            except (InputError, *kinds) as error:
                print(f"error: {message(error)}", file=sys.stderr)
                raise SystemExit(2) from None
            except torch.OutOfMemoryError as error:
                text = message(error).split(". ")[0]
                print(f"error: {text}: lower --batch-size or --input-size (--longest-side of photos)", file=sys.stderr)
                raise SystemExit(2) from None

        return wrapped

    return decorate


def message(error: Exception) -> str:
    """The error's own text in one line, also where a loader's worker wrapped it in the text of a traceback."""
    name, text = type(error).__name__, str(error)
    if text.startswith(f"Caught {name} in "):
        text = re.split(rf"^[\w.]*{name}: ", text, flags=re.MULTILINE)[-1]
    return " ".join(line.strip() for line in text.splitlines() if line.strip()) or name

"""Files that a reader, a crash or a full disk never leaves half written."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from utils.errors import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written in the block and renamed to `path` at its end.

    Whatever happens, `path` is the file of before or the whole new one, also after a power cut. A process that is
    killed leaves the temporary file, see `remove_leftovers`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Puts a folder's names on the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of processes that were killed as they wrote."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def check_writable(folder: Path, flag: str) -> None:
    """Refuses, without writing anything, a folder that is neither there and writable nor can be made.

    Args:
        folder: where files are to go.
        flag: what the user gave, for the message.

    Raises:
        InputError: if nothing could be written there.
    """
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not os.path.isdir(there):
        raise InputError(f"{flag} can't be made ({there} is no folder): choose a folder you may write")
    effective = os.access in os.supports_effective_ids
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=effective):
        raise InputError(f"{flag} can't be written (no permission for {there}): choose a folder you may write")

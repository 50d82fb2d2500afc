"""Files that are never there by halves: written under another name beside their place, then renamed."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name to write under; `path` is replaced by that file at the end, unless an error comes first."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def save(image: Image.Image, path: Path, **options) -> None:
    """Writes a picture; `options` are Pillow's, and the kind of file is that of the name."""
    with replacing(path) as partial:
        image.save(partial, **options)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(data)

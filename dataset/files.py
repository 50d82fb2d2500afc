"""Images and bytes that are written whole or not at all."""

from pathlib import Path

from PIL import Image

from utils.errors import atomic_write, write_text

__all__ = ["save", "write_bytes", "write_text"]


def save(image: Image.Image, path: Path, **options) -> None:
    """Writes an image; `options` are Pillow's. The kind of file is that of the name."""
    with atomic_write(path) as partial:
        image.save(partial, format=Image.registered_extensions()[path.suffix.lower()], **options)


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_write(path) as partial:
        partial.write_bytes(data)

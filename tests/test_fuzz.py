"""Files of any bytes: they are read, or they end in one line that names the file."""

import gzip
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.images import read_image, read_mask
from dataset.splits import read_classes
from dataset.voc import VOCFolder
from embeddings.loading import find_class_vectors
from helpers import stored
from utils.checkpoint import FORMAT, KEYS, load_checkpoint
from utils.errors import UserError


def vectors(path):
    found = find_class_vectors(path, ["cat", "dog"])
    assert all(np.isfinite(vector).all() and vector.any() for vector in found.values())


def image_list(path):
    ids = VOCFolder.open(path.parent).read_list(str(path))
    assert set(ids) <= {"a", "b c"} and len(set(ids)) == len(ids) > 0


ROWS = b"2 3\ncat 1 -0.5 1e3\ndog 0 1 2\n"
NETWORK = torch.nn.Linear(2, 2)
CHECKPOINT = {key: {} for key in KEYS} | {"format": FORMAT, "stage": 1, "step": 1, "best": None, "selection": "last"}
CHECKPOINT |= {"model": NETWORK.state_dict(), "optimizer": torch.optim.SGD(NETWORK.parameters()).state_dict()}
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 20, (32, 40), dtype=np.uint8))
FILES = {
    # a good file, and what reads it
    "x.vec": (ROWS, vectors),
    "x.txt": (ROWS[4:], vectors),
    "x.vec.gz": (gzip.compress(ROWS), vectors),
    "x.bin": (b"2 2\ncat " + np.ones(2, "<f4").tobytes() + b"dog " + np.ones(2, "<f4").tobytes(), vectors),
    "x.npy": (stored(lambda stream: np.save(stream, np.eye(2))), vectors),
    "x.pkl": (pickle.dumps(np.eye(2)), vectors),
    "list.txt": (b"\xef\xbb\xbfa.jpg a.png\r\nb c\n", image_list),
    "classes.txt": (b"background\n3: cat\ndog\n", read_classes),
    "a.jpg": (stored(lambda stream: IMAGE.save(stream, "JPEG")), read_image),
    "latest.pth": (stored(lambda stream: torch.save(CHECKPOINT, stream)), load_checkpoint),
    "a.png": (stored(lambda stream: IMAGE.save(stream, "PNG")), lambda path: read_mask(path, dict.fromkeys(range(21)))),
}
PIECES = [
    b"", b"\n", b"\0", b"\xff\xfe", b"9" * 18, b"nan", b"-1", b"1e999", b"'|O'", b"../", b"x" * 300, b"\xe2\x80\xa8",
]  # fmt: skip


def broken(content: bytes):
    """The file cut off in many places, and with some bytes replaced; a pickle of each first code, and a web page."""
    rng = np.random.default_rng(0)
    yield from (content[:n] for n in range(0, len(content), max(1, len(content) // 100)))
    yield from (b"\x80\x02" + bytes([code]) + rng.bytes(8) + b"." for code in range(256))
    yield b"<html>404</html>"
    for _ in range(300):
        changed = content
        for at in rng.integers(0, len(content), rng.integers(1, 4)):
            piece = PIECES[rng.integers(len(PIECES))] if rng.integers(2) else rng.bytes(rng.integers(1, 9))
            changed = changed[:at] + piece + changed[at + rng.integers(9) :]
        yield changed


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", FILES)
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path, name):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for image in ("a", "b c"):
        (tmp_path / "images" / f"{image}.jpg").touch()
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    content, read = FILES[name]
    path, refused = tmp_path / name, 0
    path.write_bytes(content)
    read(path)
    for changed in broken(content):
        path.write_bytes(changed)
        try:
            read(path)
        except UserError as error:
            refused += 1
            assert name in str(error) or "classes.txt" in str(error)
            assert all(character.isprintable() for character in str(error)), repr(str(error))
    assert refused > 50

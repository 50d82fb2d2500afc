"""Lists and vectors of any bytes: they are read, or they end in the parser's own one-line error."""

import gzip
import io
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dataset.voc import VOCFolder
from embeddings.loading import find_class_vectors, read_names
from utils.errors import UserError

bounded = settings(
    max_examples=300, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

IDS = ("2007_000032", "a", "ü b")


@pytest.fixture(scope="module")
def folder() -> VOCFolder:
    with tempfile.TemporaryDirectory() as name:
        for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (Path(name) / part).mkdir(parents=True)
        for image in IDS:
            (Path(name) / "JPEGImages" / f"{image}.jpg").touch()
        yield VOCFolder.open(name)


def read(call, error) -> object | None:
    """What `call` gives; None if it ends in `error`, which is one line without control characters."""
    try:
        return call()
    except error as caught:
        assert str(caught) and all(char.isprintable() for char in str(caught)), repr(str(caught))
        return None


LINES = st.lists(
    st.one_of(st.sampled_from([*IDS, "", " ", "..", "../a", "/a", "a/", "\ufeffa", "x" * 300]), st.text(max_size=12))
)
LIST_BYTES = st.one_of(
    st.binary(max_size=60),
    st.builds(lambda bom, lines, end: bom + end.join(lines).encode("utf-8", "surrogatepass"),
              st.sampled_from([b"", b"\xef\xbb\xbf"]), LINES, st.sampled_from(["\n", "\r\n", "\r", "\n\n"])),
)  # fmt: skip


@bounded
@given(LIST_BYTES)
@example(b"a\x00b")
@example(b"x" * 5000)
@example("a\u2028b".encode())
def test_lists_of_images(folder, content):
    path = folder.root / "ImageSets" / "Segmentation" / "train.txt"
    path.write_bytes(content)
    ids = read(lambda: folder.read_list(None, ("train",)), UserError)
    assert ids is None or (set(ids) <= set(IDS) and len(set(ids)) == len(ids) > 0)


@bounded
@given(LIST_BYTES)
def test_lists_of_classes(folder, content):
    path = folder.root / "classes.txt"
    path.write_bytes(content)
    names = read(lambda: read_names(path), UserError)
    assert names is None or (len(set(names)) == len(names) > 0)


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.eye(2))
    return buffer.getvalue()


ROWS = b"2 3\ncat 1 -0.5 1e3\ndog 0 1 2\n"
FILES = {
    ".vec": ROWS,
    ".txt": ROWS[4:],
    ".vec.gz": gzip.compress(ROWS),
    ".bin": b"2 2\ncat " + np.ones(2, "<f4").tobytes() + b"dog " + np.ones(2, "<f4").tobytes(),
    ".npy": npy_bytes(),
    ".pkl": pickle.dumps(np.eye(2)),
}
PIECES = st.one_of(st.binary(max_size=9), st.sampled_from([b"", b"9" * 18, b"nan", b"-1", b"1e999", b"\n", b"'|O'"]))


@bounded
@given(st.sampled_from([*FILES]), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), PIECES), max_size=3))
def test_vectors(folder, suffix, changes):
    """Of a good file, some bytes are replaced."""
    (folder.root / "classes.txt").write_text("cat\ndog\n")
    content = FILES[suffix]
    for share, length, piece in changes:
        at = int(share * len(content))
        content = content[:at] + piece + content[at + length :]
    path = folder.root / f"words{suffix}"
    path.write_bytes(content)
    vectors = read(lambda: find_class_vectors(path, ["cat", "dog"]), UserError)
    assert vectors is None or (len(vectors) == 2 and all(np.isfinite(v).all() and v.any() for v in vectors.values()))

"""Lists and vectors of any bytes: they are read, or they end in the parser's own one-line error."""

import io
import pickle
import tarfile
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
    max_examples=150, deadline=None, derandomize=True, database=None,
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
@given(st.text(max_size=400))
@example("x" * 300)
@example("\x00")
def test_names_of_lists(folder, name):
    read(lambda: folder.read_list(name, ()), UserError)


@bounded
@given(LIST_BYTES)
def test_lists_of_classes(folder, content):
    path = folder.root / "classes.txt"
    path.write_bytes(content)
    names = read(lambda: read_names(path), UserError)
    assert names is None or (len(set(names)) == len(names) > 0)


NUMBERS = st.sampled_from(["1", "-0.5", "1e3", "nan", "inf", "1e999", "x", "", "0", "٣", "1_0"])
TEXT = st.builds(
    lambda header, rows, end: (header + end.join(" ".join(row) for row in rows)).encode(),
    st.sampled_from(["", "2 3\n", "99999999999 3\n", "0 0\n", "-1 3\n", "\ufeff"]),
    st.lists(st.lists(st.one_of(st.sampled_from(["cat", "dog"]), NUMBERS), max_size=5), max_size=4),
    st.sampled_from(["\n", "\r\n"]),
)
WORD = st.builds(
    lambda word, values: word + b" " + np.array(values, "<f4").tobytes(),
    st.sampled_from([b"cat", b"dog", b"\xff", b""]), st.lists(st.floats(width=32), min_size=2, max_size=3),
)  # fmt: skip
BINARY = st.builds(
    lambda header, words, cut: (header + b"".join(words))[: cut or None],
    st.sampled_from([b"2 3\n", b"2 2\n", b"1 3\n", b"999999999999999999 3\n", b"2 999999999\n", b"x\n", b"2 3"]),
    st.lists(WORD, max_size=3), st.integers(-6, 40),
)  # fmt: skip


def array_bytes(header: str, body: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode("latin-1", "replace") + body


ARRAY = st.builds(
    array_bytes,
    st.one_of(
        st.text(max_size=80),
        st.builds("{{'descr': {}, 'fortran_order': {}, 'shape': {}}}\n".format,
                  st.sampled_from(["'<f4'", "'<f8'", "'|O'", "'<i8'", "[('a', '<f4')]", "3"]),
                  st.sampled_from(["True", "False", "2"]),
                  st.sampled_from(["(2, 3)", "(2, 0)", "(-2, 3)", "(2,)", "(10**9, 3)", "(99999999999, 9)", "2"])),
    ),
    st.binary(max_size=60),
)  # fmt: skip
JSON = st.builds(
    lambda dim, norm, row, end: (
        f'{{"l2NormIndex":{norm},"dimensions":{dim},"words":[],"vectors":{{"cat":[{row}],"dog":[{row}]{end}'
    ).encode(),
    st.sampled_from(["2", "0", "-1", "999999", "x"]), st.sampled_from(["2", "0", "7"]),
    st.sampled_from(["3,4,5,0", "0,0,0,0", "NaN,1,1,0", "3,4", "", "x", "3,4,9,0"]), st.sampled_from(["}}", "}", ""]),
)  # fmt: skip


def package_bytes(text: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as package:
        member = tarfile.TarInfo("package/vectors.json")
        member.size = len(text)
        package.addfile(member, io.BytesIO(text))
    return buffer.getvalue()


def fuzz_vectors(folder, suffix, content):
    path = folder.root / f"words{suffix}"
    path.write_bytes(content)
    vectors = read(lambda: find_class_vectors(path, ["cat", "dog"]), UserError)
    assert vectors is None or (len(vectors) == 2 and all(np.isfinite(v).all() and v.any() for v in vectors.values()))


@bounded
@given(st.sampled_from([".vec", ".txt", ".vec.gz"]), st.one_of(TEXT, st.binary(max_size=80)))
def test_vectors_as_text(folder, suffix, content):
    fuzz_vectors(folder, suffix, content)


@bounded
@given(st.sampled_from([".bin", ".bin.gz"]), st.one_of(BINARY, st.binary(max_size=80)))
def test_vectors_in_word2vec_s_format(folder, suffix, content):
    fuzz_vectors(folder, suffix, content)


@bounded
@given(st.one_of(ARRAY, st.binary(max_size=80)))
def test_vectors_in_numpy_s_format(folder, content):
    (folder.root / "classes.txt").write_text("cat\ndog\n")
    fuzz_vectors(folder, ".npy", content)


@bounded
@given(st.one_of(JSON.map(package_bytes), st.binary(max_size=80)))
def test_vectors_in_packages(folder, content):
    fuzz_vectors(folder, ".tgz", content)


@bounded
@given(st.one_of(st.binary(max_size=80), st.binary(max_size=40).map(lambda cut: pickle.dumps(np.eye(2)) + cut)))
def test_vectors_in_pickles(folder, content):
    (folder.root / "classes.txt").write_text("cat\ndog\n")
    fuzz_vectors(folder, ".pkl", content)

"""Readers of the formats in which others publish word vectors: word2vec, fastText, GloVe, a pickle.

A file has millions of words and gigabytes, and a few dozen words are wanted. The scanners hold a word at a time, and
compare words as bytes, since some published files have malformed UTF-8.
"""

import gzip
import io
import itertools
import pickle
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.errors import UserError

LONGEST_LINE, LONGEST_WORD = 16 << 20, 1000  # bytes
BOM = b"\xef\xbb\xbf"
SIGNATURES = {
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself: run git lfs pull",
    b"<": "it is a web page (HTML or XML): download the file itself",
    b"PK\x03\x04": "it is a zip archive: unzip it first",
    b"\x93NUMPY": "it is a NumPy array: give it the ending .npy",
    b"\x80": "it is a Python pickle: give it the ending .pkl",
    b"\xba\x16\x4f\x2f": "it is a fastText model: give the .vec file of the same vectors",
    b"": "it is empty or damaged, or has no vectors: download it again",
}


def describe_file(path: Path) -> str:
    """What a file that can't be read as vectors seems to be, by its first bytes, and what to do."""
    with path.open("rb") as file:
        start = file.read(64).removeprefix(BOM).lstrip()
    return next(text for signature, text in SIGNATURES.items() if start.startswith(signature))


def read_vectors(path: Path, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """Word -> float [D], for those of `wanted` that a word file has; the first where it has several.

    Raises `UserError` or `OSError` if it can't be read.
    """
    scan = scan_binary if path.name.endswith((".bin", ".bin.gz")) else scan_text
    found: dict[str, np.ndarray] = {}
    try:
        keys = {word.encode(): word for word in wanted}
        with io.BufferedReader(gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as stream:
            for word, vector in scan(stream, path, keys):
                found.setdefault(word, vector)
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise UserError(f"{path}: can't be read ({error}): {describe_file(path)}") from None
    return found


def parse_header(line: bytes) -> tuple[int, int] | None:
    """(words, dimensions) if `line` is a header of two whole numbers."""
    match = re.fullmatch(rb"\s*([1-9]\d{,11})\s+([1-9]\d{,4})\s*", line)
    return match and (int(match[1]), int(match[2]))


def scan_binary(stream: BinaryIO, path: Path, keys: Mapping[bytes, str]) -> Iterator[tuple[str, np.ndarray]]:
    """word2vec's binary format: 'words dimensions', then each word, a space, float32 [D] and perhaps a newline."""
    header = parse_header(stream.readline(LONGEST_LINE))
    if header is None:
        raise UserError(f"{path}: not in word2vec's binary format: {describe_file(path)}")
    count, dim = header
    for done in range(count):
        word, byte = b"", stream.read(1)
        while byte not in (b" ", b"") and len(word) < LONGEST_WORD:
            word, byte = word + byte, stream.read(1)
        vector = stream.read(4 * dim)
        if byte != b" " or len(vector) < 4 * dim:
            raise UserError(f"{path}: damaged, or cut short after {done} of {count} words: download it again")
        if name := keys.get(word.lstrip(b"\n")):
            yield name, np.frombuffer(vector, "<f4")


def scan_text(stream: BinaryIO, path: Path, keys: Mapping[bytes, str]) -> Iterator[tuple[str, np.ndarray]]:
    """Text: a word and its numbers on each line, apart by spaces or tabs; fastText's has a header."""
    heads = {key.partition(b" ")[0] for key in keys}  # a phrase is several fields
    first = stream.readline(LONGEST_LINE).removeprefix(BOM)
    header = parse_header(first)
    count, dim = header or (0, len(first.split()) - 1)
    number = 1
    for number, line in enumerate(stream if header else itertools.chain([first], stream), start=2 if header else 1):
        if number > 1 and (not line.strip() or line.split(maxsplit=1)[0] not in heads):
            continue
        fields = line.split()
        try:
            vector = np.array([float(field) for field in fields[-dim:]])
        except ValueError:
            vector = ()
        if not 1 <= len(vector) < len(fields):
            raise UserError(f"{path}, line {number}: no word with {dim} numbers after it: {describe_file(path)}")
        if word := keys.get(b" ".join(fields[:-dim])):
            yield word, vector
    if number - 1 < count:
        raise UserError(f"{path}: {number - 1} words, but its header says {count}: download it again")


class ArrayUnpickler(pickle.Unpickler):
    """Reads a pickled NumPy array and nothing else: any other class or function in the file is refused, not run."""

    def find_class(self, module: str, name: str) -> object:
        allowed = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": lambda *_: np.empty(0)}
        allowed |= {"encode": lambda text, _: text.encode("latin1")}  # how Python 3 pickles bytes for Python 2
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} in it")
        return allowed[name]

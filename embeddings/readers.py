"""Streaming readers of word vectors: word2vec binary, fastText and GloVe text, and arrays of NumPy.

A file of word vectors has millions of words and gigabytes, and we want a few dozen of them. The `scan_*`
functions are generators of (word, vector) for the wanted words alone: the caller stops asking when it has
them all, and nothing but a window of the file is ever in memory. Words are compared as bytes, so that the
malformed UTF-8 in some published files harms nobody. Sizes that a header claims are checked against the file
before anything is allocated. Whatever is wrong with a file raises `UserError`.
"""

import gzip
import os
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from utils.errors import UserError

CHUNK = 1 << 20  # bytes a read
BIG_FILE = 64 << 20  # bytes from which a file gets a progress bar
LONGEST_LINE = 16 << 20  # bytes; a "line" beyond this says that the file is no text
LONGEST_WORD = 1 << 16  # bytes
GZIP_RATIO = 1032  # deflate cannot expand a byte to more than this many
BOM = b"\xef\xbb\xbf"

Found = Iterator[tuple[str, np.ndarray]]  # of (word, vector float64 [D])


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open `path` for reading, unpacked if it ends in .gz, under a progress bar if it is big.

    Yields: an object with `read(n)`, and the most bytes that the file can hold once unpacked.
    """
    try:
        size = os.path.getsize(path)
        bar = {"unit": "B", "unit_scale": True, "desc": path.name, "leave": False}
        with (
            open(path, "rb") as file,
            tqdm.wrapattr(file, "read", size, **bar, disable=None if size >= BIG_FILE else True) as raw,
        ):
            if path.suffix == ".gz":
                yield gzip.GzipFile(fileobj=raw, mode="rb"), size * GZIP_RATIO
            else:
                yield raw, size
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read ({reason}); check the path or download it again") from None


def checked(vector: np.ndarray, where: str) -> np.ndarray:
    """`vector` (float [D]) itself, if it is finite and not zero.

    Raises:
        UserError: NaN, infinity or a zero vector; `where` names file and word.
    """
    if not np.isfinite(vector).all():
        raise UserError(f"{where}: the vector has NaN or infinity; use another file of vectors")
    if not vector.any():
        raise UserError(f"{where}: the vector is zero, so it has no direction; use another word or file")
    return vector


def _counts(line: bytes) -> tuple[int, int] | None:
    """(words, dimensions) if `line` is a header of two whole numbers, else None."""
    fields = line.split()
    if len(fields) == 2 and all(field.isdigit() and len(field) < 19 for field in fields):
        return int(fields[0]), int(fields[1])
    return None


def _check_size(path: Path, count: int, dim: int, number_bytes: int, limit: int) -> None:
    """Refuse a header that claims more than the file can hold; `number_bytes`: the least a number takes."""
    if count < 1 or dim < 1 or count * dim * number_bytes > limit:
        raise UserError(
            f"{path}: the header claims {count} words of {dim} numbers, which the file cannot hold: "
            "it is cut short or damaged; download it again"
        )


def scan_binary(path: Path, wanted: Collection[str]) -> Found:
    """The wanted words of a file in word2vec's binary format.

    'count dimensions' and a newline, then for each word: the word, a space, little-endian float32 [D], and,
    in files by word2vec's own writer but not in GoogleNews, a newline.
    """
    keys = {word.encode(): word for word in wanted}
    with open_stream(path) as (stream, limit):
        header, newline, buffer = stream.read(CHUNK).partition(b"\n")
        counts = _counts(header)
        if not newline or counts is None:
            raise UserError(
                f"{path}: not word2vec's binary format: its first line must be 'words dimensions' "
                "(of fastText, give the .vec file, not the .bin model)"
            )
        count, dim = counts
        _check_size(path, count, dim, 4, limit)
        start = 0
        for done in range(count):
            space = buffer.find(b" ", start)
            while space < 0 or space + 1 + 4 * dim > len(buffer):
                more = stream.read(CHUNK + 4 * dim)
                if not more or (space < 0 and len(buffer) - start > LONGEST_WORD):
                    raise UserError(f"{path}: cut short or damaged after {done} of {count} words; download it again")
                buffer, start = buffer[start:] + more, 0
                space = buffer.find(b" ")
            word = keys.get(buffer[start:space].lstrip(b"\n"))
            if word is not None:
                vector = np.frombuffer(buffer, "<f4", dim, space + 1).astype(np.float64)
                yield word, checked(vector, f"{path}: '{word}'")
            start = space + 1 + 4 * dim


def _lines(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of a stream, split at newlines only: words may hold what Unicode calls line breaks."""
    rest = b""
    while chunk := stream.read(CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        if len(rest) > LONGEST_LINE:
            raise UserError(f"{path}: a line of over {len(rest)} bytes: not word vectors as text")
    if rest:
        yield rest


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _parse_line(line: bytes, dim: int, where: str) -> np.ndarray | None:
    """The vector, float64 [D], on a line of text, or None if the line is of a phrase ('at home 0.1 ...')."""
    fields = line.split()[1:]
    if len(fields) > dim and not _is_number(fields[0]):
        return None
    if len(fields) != dim or not all(map(_is_number, fields)):
        raise UserError(
            f"{where}: {len(fields)} fields after the word where {dim} numbers were expected; "
            "mend the line or download the file again"
        )
    return checked(np.array([float(field) for field in fields]), where)


def scan_text(path: Path, wanted: Collection[str]) -> Found:
    """The wanted words of a text file: a word and its numbers on each line, apart by spaces.

    fastText (.vec) and word2vec's text format begin with a line 'words dimensions', GloVe does not; the first
    line shows which it is.
    """
    keys = {word.encode(): word for word in wanted}
    count, dim, number = 0, 0, 0
    with open_stream(path) as (stream, limit):
        for number, line in enumerate(_lines(stream, path), start=1):
            if number == 1:
                line = line.removeprefix(BOM)
                header = _counts(line)
                if header:
                    count, dim = header
                    _check_size(path, count, dim, 2, limit)
                    continue
                dim = len(line.split()) - 1
                if dim < 1:
                    raise UserError(f"{path}, line 1: no word with numbers after it; not word vectors as text")
            word = keys.get(line.partition(b" ")[0])
            if word is None:
                continue
            vector = _parse_line(line, dim, f"{path}, line {number} ('{word}')")
            if vector is not None:
                yield word, vector
    if number == 0:
        raise UserError(f"{path}: the file is empty; download it again")
    if number - 1 < count:
        raise UserError(f"{path}: cut short: {number - 1} words where the header says {count}; download it again")


def read_array(stream: BinaryIO, path: Path | str, limit: int) -> np.ndarray:
    """A matrix of floats, [N, D], in NumPy's .npy format; nothing in it is ever unpickled.

    Args:
        stream: what to read.
        path: its name, for messages.
        limit: the most bytes that it can hold.
    """
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, fortran, dtype = headers[np.lib.format.read_magic(stream)](stream)
    except (OSError, EOFError, zlib.error):
        raise
    except Exception:  # numpy parses a header as Python's literals: there is hardly a type that it does not end in
        raise UserError(f"{path}: not a NumPy .npy file, or a damaged one; write it with numpy.save") from None
    if dtype.kind != "f" or len(shape) != 2 or min(shape) < 1:
        raise UserError(
            f"{path}: {dtype} of shape {shape} where a float matrix [classes, dimensions] was expected; "
            "save it as float32, one row a class"
        )
    size = dtype.itemsize * int(shape[0]) * int(shape[1])
    data = stream.read(size) if size <= limit else b""
    if len(data) < size:
        raise UserError(f"{path}: cut short: no room for the {shape} numbers of its header; save it again")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def read_names(path: Path) -> tuple[str, ...]:
    """Class names, one a line; blank lines, a byte order mark and the line ends of any system are no names.

    Raises:
        UserError: no file, not UTF-8, no names, or a name twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"{path}: no class names ({reason}); write one a line, in the rows' order") from None
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice or not names:
        fault = f"names {', '.join(map(repr, twice))} twice" if twice else "has no names"
        raise UserError(f"{path}: {fault}; write each class once, one a line, in the rows' order")
    return names


def read_class_table(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """The names in classes.txt beside an array of class vectors, and the array, float [C, D].

    Raises:
        UserError: a file is missing or bad, or the two are not of one length.
    """
    with open_stream(path) as (stream, limit):
        vectors = read_array(stream, path, limit)
    listing = path.with_name("classes.txt")
    names = read_names(listing)
    if len(names) != len(vectors):
        raise UserError(
            f"{listing}: {len(names)} names for the {len(vectors)} rows of {path.name}; give each row a name"
        )
    return names, vectors

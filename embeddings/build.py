"""Make a small table of the vectors of your classes from a large file of word vectors, once.

    python -m embeddings.build --source GoogleNews-vectors-negative300.bin.gz --output embeddings/word2vec

writes embeddings/word2vec.npy, float32 [classes, dimensions], as long as in the source; embeddings/classes.txt, the
names of its rows, which all tables of that folder share; and embeddings/word2vec.json, how it was made.
"""

import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.splits import NAMES
from utils.config import Parser
from utils.errors import UserError, atomic_write, one_line_errors, write_text

from .loading import VOCABULARY, find_class_vectors, read_names, read_words


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m embeddings.build", description=__doc__)
    # fmt: off
    parser.add_argument("--source", type=Path, default=VOCABULARY, metavar="FILE", help="word2vec .bin, fastText .vec, "
                        "GloVe .txt (each also .gz), or a table (default: the shipped words)")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--classes", type=Path, default=NAMES / "voc.txt", metavar="FILE",
                       help="class names, one a line (default: VOC's)")
    given.add_argument("--vocabulary", type=Path, metavar="FILE",
                       help="words, one a line: make a word file of them, not a class table")
    parser.add_argument("--licence", metavar="TEXT", help="the licence of the vectors, for the record")
    parser.add_argument("--output", type=Path, required=True, metavar="NAME",
                        help="write NAME.npy, NAME.json and the list of names")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.output.name:
        raise UserError(f"--output {args.output}: no name: give one, as in embeddings/word2vec")
    output = args.output.with_name(args.output.name.removesuffix(".npy") + ".npy")
    kind = "words" if args.vocabulary else "classes"
    listing, names = output.with_name(f"{kind}.txt"), read_names(args.vocabulary or args.classes)
    if listing.exists() and read_names(listing) != names:
        raise UserError(f"{listing}: lists other names for tables that are there: choose another folder in --output")
    vectors = (read_words if args.vocabulary else find_class_vectors)(args.source, names)
    if missing := ", ".join(name for name in names if name not in vectors):
        raise UserError(f"{args.source}: no vector for {missing}: leave them out of {args.vocabulary}")
    rows = np.stack([vectors[name] for name in names]).astype(np.float32)
    with args.source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record = {
        "source": args.source.name, "source_sha256": digest, "licence": args.licence,
        "shape": rows.shape, "command": shlex.join(["python", "-m", "embeddings.build", *(argv or sys.argv[1:])]),
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(listing, "\n".join(names) + "\n")
    with atomic_write(output) as path, path.open("wb") as file:
        np.save(file, rows)
    write_text(output.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    print(f"{output}: {len(names)} {kind}, {rows.shape[1]} dimensions")
    return 0


if __name__ == "__main__":
    sys.exit(main())

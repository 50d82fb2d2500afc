"""Words beside a checkpoint's classes: embedded from the vectors that these came from, or refused in one line."""

import numpy as np
import pytest

from embeddings import embed_words, load_class_embeddings
from embeddings.loading import class_words
from utils.errors import UserError

WORDS = ["cat", "dog", "zebra", "traffic", "light", "sofa"]


def vectors(words, dim=6, seed=0):
    return dict(zip(words, np.random.default_rng(seed).normal(size=(len(words), dim)).round(4)))


def write_text(path, table):
    path.write_text("".join(f"{word} {' '.join(map(str, vector))}\n" for word, vector in table.items()))
    return path


def unit(vector):
    return vector / np.linalg.norm(vector)


@pytest.fixture
def glove():
    """VOC's classes and their shipped embeddings, as a checkpoint has them."""
    names = class_words()["voc"]
    return dict(zip(names, load_class_embeddings(names, ["glove"])[0]))


def test_classes_of_the_checkpoint_need_no_files(glove):
    rows = embed_words(["Sofa", "cat", "potted plant"], glove, ["no such source"])
    assert (rows == np.stack([glove["sofa"], glove["cat"], glove["pottedplant"]])).all()


def test_common_words_are_shipped(glove):
    rows = embed_words(["cat", "zebra", "Traffic Light", "tv", "OX"], glove, ["glove"])
    assert (rows[0] == glove["cat"]).all() and np.allclose(np.linalg.norm(rows, axis=1), 1)
    assert rows[1] @ glove["cat"] > rows[1] @ glove["sofa"]
    assert rows[2] @ glove["car"] > rows[2] @ glove["sheep"]
    assert rows[3] @ glove["tvmonitor"] > 0.999


def test_words_of_a_given_file(tmp_path):
    table = vectors(WORDS)
    known = {"cat": unit(table["cat"]), "dog": unit(table["dog"])}
    path = write_text(tmp_path / "words.vec", table)
    rows = embed_words(["dog", "zebra", "traffic light"], known, ["mine"], vocabulary=[path])
    wanted = [known["dog"], unit(table["zebra"]), unit(unit(table["traffic"]) + unit(table["light"]))]
    assert np.allclose(rows, wanted, atol=1e-6)


@pytest.mark.parametrize("weighting", ["raw", "equal"])
def test_several_sources_are_combined_as_in_training(tmp_path, weighting):
    tables = [vectors(WORDS, 4, 1), {word: 9 * vector for word, vector in vectors(WORDS, 3, 2).items()}]
    paths = [write_text(tmp_path / f"{number}.txt", table) for number, table in enumerate(tables)]
    trained, _ = load_class_embeddings(["cat", "zebra", "dog"], ["0", "1"], tmp_path, weighting)
    rows = embed_words(["zebra", "cat"], {"cat": trained[0], "dog": trained[2]}, ["0", "1"], tmp_path)
    assert np.allclose(rows, trained[[1, 0]], atol=1e-6)
    with pytest.raises(UserError, match="--vocabulary: 1 files for 0 1"):
        embed_words(["zebra"], {"cat": trained[0]}, ["0", "1"], vocabulary=paths[:1])


@pytest.mark.parametrize("other", [vectors(WORDS, seed=5), vectors(WORDS, 4)], ids=["seed", "dimensions"])
def test_other_vectors_than_the_checkpoints_are_refused(tmp_path, other):
    known = {name: unit(vectors(WORDS)[name]) for name in ("cat", "dog", "sofa")}
    with pytest.raises(UserError, match=r"other.txt: not the checkpoint's vectors: .*--vocabulary"):
        embed_words(["zebra"], known, ["mine"], vocabulary=[write_text(tmp_path / "other.txt", other)])

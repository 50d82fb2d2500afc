"""Checkpoints: written whole or not at all, read without running code, refused where they do not fit."""

import pickle

import numpy as np
import pytest
import torch

from utils.checkpoint import FORMAT, KEYS, load_checkpoint, save_checkpoint
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

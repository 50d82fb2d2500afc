"""A checkpoint file that is spoilt ends in one line; test_hostile.py has what a whole one may hold."""

import pickle

import numpy as np
import pytest
import torch

from utils.checkpoint import KEYS, load_checkpoint, save_checkpoint
from utils.errors import UserError


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_spoilt_file_is_an_input_error_however_it_is_spoilt(tmp_path):
    """Cut off anywhere, with changed bytes, or no checkpoint at all: it loads, or it ends in our error."""
    path, parts, network = tmp_path / "latest.pth", {key: {} for key in KEYS}, torch.nn.Linear(2, 2)
    parts |= {"stage": 1, "step": 1, "best": None, "selection": "last", "model": network.state_dict()}
    save_checkpoint(path, **parts | {"optimizer": torch.optim.SGD(network.parameters()).state_dict()})
    assert load_checkpoint(path)["step"] == 1
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

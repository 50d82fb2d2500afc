"""Published weights: state dicts from a file or a download, and their way into a network."""

import hashlib
from pathlib import Path

import torch
from torch import nn
from torchvision.models import WeightsEnum

from utils.errors import UserError

State = dict[str, torch.Tensor]


def download_weights(published: WeightsEnum) -> State:
    """torchvision's weights, from its cache or the network. Raises `UserError` if they can't be had."""
    try:
        return published.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, a full disk; a download with another checksum
        message = f"the ImageNet weights could not be downloaded ({error}): fetch {published.url} elsewhere and give"
        raise UserError(f"{message} --backbone-weights PATH") from error


def read_weights(path: Path) -> State:
    """The state dict in a file, without a surrounding "state_dict" or "model" and the prefix "module.".

    Raises:
        UserError: saying what the file is, if it is something else or holds values that are not finite.
    """
    flag = f"--backbone-weights {path}"
    if not path.is_file():
        raise UserError(f"{flag} is no file: give imagenet, none or the path of a state dict")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # there is hardly a type that a damaged pickle does not end in
        if "Unsupported global" in str(error):
            raise UserError(f"{flag} holds a whole model, which could run code: save its state_dict()") from error
        start = path.read_bytes()[:24].decode(errors="replace")
        fault = f"it starts with {start!r} (a web page or a pointer of Git LFS is text)"
        raise UserError(f"{flag} can't be read as a state dict, {fault}: download the file itself") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{flag} is no state dict (names to tensors): save one with torch.save")
    for name, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"{flag}: {name} holds values that are not finite: give weights of another training")
    torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")
    return state


def load_weights(network: nn.Module, state: State, origin: str, part: nn.Module) -> None:
    """Loads a state dict, which may hold more than the network's weights and lack batch norm's counters.

    Args:
        origin: where the state is from, for the message.
        part: made of the network's layers; weights of other layers may be missing.

    Raises:
        UserError: for the first weight that is missing or has another shape.
    """
    needed = set(map(id, part.state_dict(keep_vars=True).values()))
    for name, tensor in network.state_dict(keep_vars=True).items():
        if name in state and state[name].shape != tensor.shape:
            fault = f": {name} is {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        elif name in state or id(tensor) not in needed or name.endswith("num_batches_tracked"):
            continue
        else:
            fault = f" has no {name}"
        raise UserError(f"{origin}{fault}: these are weights of another network")
    network.load_state_dict(state, strict=False)


def sha256(state: State) -> str:
    """Of the weights alone, not of their names."""
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()

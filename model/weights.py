"""Published weights: state dicts from a file or a download, and their way into a network."""

import pickle
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
        raise UserError(
            f"the ImageNet weights could not be downloaded ({error}): fetch {published.url} elsewhere and give "
            "--backbone-weights PATH"
        ) from error


def read_weights(path: Path) -> State:
    """The state dict in a file, without a surrounding "state_dict" or "model" and the prefix "module.".

    Raises:
        UserError: saying what the file is, if it is something else or holds values that are not finite.
    """
    flag = f"--backbone-weights {path}"
    if not path.is_file():
        raise UserError(f"{flag} is no file: give imagenet, none or the path of a state dict")
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if start.startswith(b"<"):
        raise UserError(f"{flag} is a web page, not weights: download the file itself")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{flag} is a pointer of Git LFS, not weights: run git lfs pull where it comes from")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # there is hardly a type that a damaged pickle does not end in
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            raise UserError(f"{flag} holds a whole model, which could run code: save its state_dict()") from error
        raise UserError(f"{flag} can't be read as a state dict: download it again") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{flag} is no state dict (names to tensors): save one with torch.save")
    broken = next((name for name, value in state.items() if not value.isfinite().all()), None)
    if broken is not None:
        raise UserError(f"{flag}: {broken} holds values that are not finite: give weights of another training")
    parallel = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if parallel else name: value for name, value in state.items()}


def load_weights(network: nn.Module, state: State, origin: str, optional: tuple[str, ...] = ()) -> None:
    """Loads a state dict, which may hold more than the network's weights and lack batch norm's counters.

    Args:
        origin: where the state is from, for the message.
        optional: how the names of weights begin that may be missing.

    Raises:
        UserError: for the first weight that is missing or has another shape.
    """
    wanted = network.state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            if not name.startswith(optional) and not name.endswith("num_batches_tracked"):
                raise UserError(f"{origin} has no {name}: these are weights of another network")
        elif state[name].shape != tensor.shape:
            shapes = f"{tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            raise UserError(f"{origin}: {name} is {shapes}: these are weights of another network")
    network.load_state_dict({name: state[name] for name in wanted if name in state}, strict=False)

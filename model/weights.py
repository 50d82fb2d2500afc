"""Published weights: state dicts from a file or a download."""

import hashlib
from collections.abc import Callable

import torch
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torchvision.models import WeightsEnum

from utils.errors import UserError


def read_weights(weights: str, published: WeightsEnum | Callable[[], str]) -> dict[str, torch.Tensor]:
    """The state dict that --backbone-weights names, without a surrounding "state_dict" or "model" and prefix "module.".

    `weights` is the path of a file, or "imagenet" for those `published`: torchvision's, from its cache or the network,
    or a function that gives the path of a file.

    Raises `UserError` if it can't be had, is something else, or holds values that are not finite.
    """
    if weights == "imagenet" and isinstance(published, WeightsEnum):
        try:
            return published.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:  # no network, a full disk; a download with another checksum
            advice = f"fetch {published.url} elsewhere and give --backbone-weights PATH"
            raise UserError(f"the ImageNet weights could not be downloaded ({error}): {advice}") from error
    path = published() if weights == "imagenet" else weights
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            state = state[key] if isinstance(state.get(key), dict) else state
        damaged = [name for name, tensor in state.items() if not tensor.isfinite().all()]
        consume_prefix_in_state_dict_if_present(state, "module.")
    except Exception as error:  # there is hardly a type that a damaged pickle does not end in
        raise UserError(
            f"--backbone-weights {path} can't be read as a state dict (no file, cut short, a web page, a pointer of "
            "Git LFS, a whole model): give imagenet, none or a file of torch.save(model.state_dict(), PATH)"
        ) from error
    if damaged:
        raise UserError(f"--backbone-weights {path}: {damaged[0]} is not finite: give weights of another training")
    return state


def sha256(state: dict[str, torch.Tensor]) -> str:
    """Of the weights alone, not of their names."""
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()

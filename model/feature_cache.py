"""Features of a frozen trunk, computed once for each image and kept on disk."""

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from model.weights import sha256
from utils.errors import UserError, atomic_write


class FeatureCache:
    """Keeps what a function makes of an image, by the image's content.

    An image is found again only if it is transformed in the same way each time: with `scale = [1, 1]` and
    `rotation = 0`, with or without a flip. Features are float32 whatever --amp says, so training sees what
    it would see without the cache; several runs may share a folder.

    Args:
        folder: where to keep them, one file an image; made if need be.
        trunk: the frozen network, whose weights are part of what a file is known by.

    Raises:
        UserError: if the folder can't be made.
    """

    def __init__(self, folder: Path, trunk: nn.Module):
        self.root, self.trunk = Path(folder), trunk
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fault = f"--cache-features {folder} can't be made ({error.strerror})"
            raise UserError(f"{fault}: choose another folder") from error

    @cached_property
    def folder(self) -> Path:
        """Named by the weights, and so computed at the first image, when those of a checkpoint are in place."""
        folder = self.root / sha256(self.trunk.state_dict())[:16]
        folder.mkdir(exist_ok=True)
        return folder

    def __call__(self, image: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Features float32 [N, C, h, w] of uint8 images [N, 3, H, W]; `compute` makes those that are not yet kept."""
        paths = [self._path(one) for one in image.cpu()]
        kept = list(map(_load, paths))
        missing = [n for n, features in enumerate(kept) if features is None]
        if missing:
            with torch.autocast(image.device.type, enabled=False):
                computed = compute(image[missing]).float().cpu().numpy()
            for n, features in zip(missing, computed):
                kept[n] = features
                with atomic_write(paths[n]) as temporary, temporary.open("wb") as file:
                    np.save(file, features)
        return torch.from_numpy(np.stack(kept)).to(image.device, memory_format=torch.channels_last)

    def _path(self, image: torch.Tensor) -> Path:
        content = image.contiguous().numpy()
        digest = hashlib.blake2b(content.tobytes(), digest_size=16, person=str(content.shape).encode()[:16])
        return self.folder / f"{digest.hexdigest()}.npy"


def _load(path: Path) -> np.ndarray | None:
    """The features in a file; None if it is missing or damaged."""
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError):
        return None

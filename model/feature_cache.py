"""Features of a frozen trunk, computed once for each picture and kept on disk."""

import hashlib
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn


class FeatureCache:
    """Remembers what a function made of a picture by the picture's content.

    A picture is met again only if it is cut the same way each time: whole pictures (`--scale 1 1 --rotation 0` and a
    crop as large as they are) with or without a flip. Features are float32, so training sees what it would see
    without the cache; several runs may share a folder.

    Args:
        folder: where to keep them, one file a picture; made if need be.
        trunk: the frozen network, whose weights are part of what a file is known by.
    """

    def __init__(self, folder: Path, trunk: nn.Module):
        self.root, self.trunk = Path(folder), trunk
        self.read_only = False  # set where pictures come that will not be met again
        self.root.mkdir(parents=True, exist_ok=True)

    @cached_property
    def folder(self) -> Path:
        """Looked for at the first picture, when the weights that a checkpoint brings are in place."""
        weights = hashlib.sha256()
        for name, tensor in self.trunk.state_dict().items():
            weights.update(name.encode())
            weights.update(tensor.cpu().contiguous().numpy().tobytes())
        folder = self.root / weights.hexdigest()[:16]
        folder.mkdir(exist_ok=True)
        return folder

    def __call__(self, image: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Features [N, C, h, w] of uint8 pictures [N, 3, H, W]; `compute` makes those that are not yet kept."""
        paths = [self._path(picture) for picture in image.cpu()]
        kept = [self._read(path) for path in paths]
        missing = [i for i, features in enumerate(kept) if features is None]
        if missing:
            for i, features in zip(missing, compute(image[missing]).cpu().numpy()):
                kept[i] = features
                if self.read_only:
                    continue
                temporary = paths[i].with_suffix(f".{os.getpid()}.tmp")
                with temporary.open("wb") as file:
                    np.save(file, features)
                os.replace(temporary, paths[i])
        kept = torch.from_numpy(np.stack(kept))
        return kept.to(image.device, memory_format=torch.channels_last)

    @staticmethod
    def _read(path: Path) -> np.ndarray | None:
        """The features in a file; None where it is missing or damaged, as by a power cut."""
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError):
            return None

    def _path(self, picture: torch.Tensor) -> Path:
        content = picture.contiguous().numpy()
        digest = hashlib.blake2b(content.tobytes(), digest_size=16, person=str(content.shape).encode()[:16])
        return self.folder / f"{digest.hexdigest()}.npy"

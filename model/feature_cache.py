"""Features of a frozen trunk, computed once for each image and kept on disk."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from model.weights import sha256
from utils.errors import atomic_write, check_writable


class FeatureCache:
    """Keeps what a function makes of an image, by the image's content, in float32 whatever --amp says.

    An image is found again only if it is transformed in the same way each time: with `scale = [1, 1]` and
    `rotation = 0`, with or without a flip. Several runs may share a folder: the weights of `trunk`, the frozen network,
    are part of what a file is known by. Raises `UserError` if nothing can be written to the folder `root`.
    """

    def __init__(self, root: Path, trunk: nn.Module):
        check_writable(root, f"--cache-features {root}")
        self.root, self.trunk, self.folder = root, trunk, None

    def __call__(self, image: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Features float32 [N, C, h, w] of uint8 images [N, 3, H, W]; `compute` makes those that are not yet kept."""
        if self.folder is None:  # it is named by the weights, and only now those of a checkpoint are in place
            self.folder = self.root / sha256(self.trunk.state_dict())[:16]
            self.folder.mkdir(parents=True, exist_ok=True)
        paths, kept = [], {}
        for n, content in enumerate(image.cpu().numpy()):
            digest = hashlib.blake2b(content.tobytes(), digest_size=16, person=str(content.shape).encode()[:16])
            paths.append(self.folder / f"{digest.hexdigest()}.npy")
            with contextlib.suppress(OSError, ValueError, EOFError):  # it is missing or damaged
                kept[n] = np.load(paths[n])
        missing = [n for n in range(len(image)) if n not in kept]
        if missing:
            with torch.autocast(image.device.type, enabled=False):
                kept |= zip(missing, compute(image[missing]).float().cpu().numpy())
        for n in missing:
            with atomic_write(paths[n]) as temporary, temporary.open("wb") as file:
                np.save(file, kept[n])
        features = np.stack([kept[n] for n in range(len(image))])
        return torch.from_numpy(features).to(image.device, memory_format=torch.channels_last)

"""Logits of every pixel from the network's coarser ones: all at once, or a block of rows at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

BLOCK = {"cpu": 2**18, "cuda": 2**24}
"""Numbers in a block: on a CPU it stays in the cache, which makes blocks faster than the whole; a GPU wants more."""


@dataclass(frozen=True)
class PixelLogits:
    """Logits upsampled bilinearly with align_corners, [N, K, H, W], kept as the coarse logits that they come from.

    The loss functions upsample them a block of rows at a time, so that logits, softmax and gradients of all pixels are
    never in memory at once: at 171 classes, those of eight crops of 512 pixels fill 1.4 GB each. Upsampling is two
    products with small matrices. On a CPU the backward pass is several times as fast as that of `F.interpolate`.
    """

    coarse: torch.Tensor  # [N, K, h, w]
    height: int  # of the images, as the width
    width: int
    stride: int = 1  # every stride-th row and column of pixels counts, from the first on

    @property
    def shape(self) -> torch.Size:
        """(N, K, H, W), H and W after the stride."""
        return torch.Size([*self.coarse.shape[:2], -(-self.height // self.stride), -(-self.width // self.stride)])

    def whole(self) -> torch.Tensor:
        """All of them at once, [N, K, H, W]."""
        coarse, rows, columns = self._factors()
        return rows @ (coarse @ columns.T)

    def split(self, sizes: Sequence[int]) -> tuple["PixelLogits", ...]:
        """Parts of `sizes` images each, as `torch.Tensor.split` makes them."""
        return tuple(replace(self, coarse=part) for part in self.coarse.split(sizes))

    def sum_over_pixels(self, loss: Callable[..., torch.Tensor], *maps: torch.Tensor) -> torch.Tensor:
        """The sum of loss(logits, *maps) over blocks.

        Its gradient is computed block by block together with the value, and kept coarse, so that each block is made
        once, while it is in the cache. (torch.utils.checkpoint would take three times as long at 171 classes.)

        `loss` is (logits [n, K, r, W], the same part [n, r, W] of each of `maps`, [N, H, W]) -> a sum over pixels.
        """
        (coarse, rows, columns), (groups, blocks) = self._factors(), self._blocks()
        total, gradient = coarse.new_zeros(()), torch.zeros_like(coarse)
        learns = torch.is_grad_enabled() and coarse.requires_grad
        for images in groups:
            wide = coarse[images].detach() @ columns.T  # [n, K, h, W]
            wide_gradient = torch.zeros_like(wide)
            for lines, band in blocks:
                logits = (rows[lines, band] @ wide[:, :, band]).requires_grad_(learns)  # [n, K, r, W]
                part = loss(logits, *(values[images, lines] for values in maps))
                total += part.detach()
                if learns:
                    wide_gradient[:, :, band] += rows[lines, band].T @ torch.autograd.grad(part, logits)[0]
            gradient[images] = wide_gradient @ columns
        return total + ((coarse - coarse.detach()) * gradient).sum()  # the value of total, with this gradient

    @torch.no_grad()
    def map_pixels(self, function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        """function(logits), block by block and without a gradient: maps [N, H, W].

        function: logits [n, K, r, W] -> maps [n, r, W], of each pixel alone.
        """
        (coarse, rows, columns), (groups, blocks) = self._factors(), self._blocks()
        results = []
        for images in groups:
            wide = coarse[images] @ columns.T  # [n, K, h, W]
            maps = zip(*[function(rows[lines, band] @ wide[:, :, band]) for lines, band in blocks])
            results.append([torch.cat(parts, dim=1) for parts in maps])
        return [torch.cat(parts) for parts in zip(*results)]

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The coarse logits, of 32 bits at least, and what interpolates rows, [H, h], and columns, [W, w]."""
        coarse = self.coarse if self.coarse.dtype == torch.float64 else self.coarse.float()
        matrices = []
        for few, many in zip(coarse.shape[-2:], (self.height, self.width)):
            units = torch.eye(few, device=coarse.device, dtype=coarse.dtype)[None]
            matrix = F.interpolate(units, size=many, mode="linear", align_corners=True)[0].T
            matrices.append(matrix.contiguous()[:: self.stride])
        return coarse, *matrices

    def _blocks(self) -> tuple[list[slice], list[tuple[slice, slice]]]:
        """Blocks of about `BLOCK` logits: groups of images, and their rows with the coarse rows around these."""
        num_images, num_classes, height, width = self.shape
        size = BLOCK.get(self.coarse.device.type, BLOCK["cuda"])
        group = max(1, size // (num_classes * height * width))
        count = max(16, size // (num_classes * width))  # fewer rows would share most of their coarse rows
        slope = self.stride * (self.coarse.shape[2] - 1) / max(1, self.height - 1)  # coarse rows a row
        images = [slice(n, n + group) for n in range(0, max(1, num_images), group)]  # one where there is no image
        lines = [slice(n, n + count) for n in range(0, height, count)]
        return images, [(s, slice(max(0, int(s.start * slope) - 1), int(s.stop * slope) + 3)) for s in lines]

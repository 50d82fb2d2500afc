"""Logits of every pixel from the network's coarser ones: all at once, or a block of rows at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

BLOCK = {"cpu": 2**18, "cuda": 2**24}
"""Numbers in a block: on a CPU it stays in the cache, which makes blocks faster than the whole; a GPU wants more."""


def upsample(logits: torch.Tensor, height: int, width: int, stride: int = 1) -> torch.Tensor:
    """Bilinear upsampling with align_corners, [N, K, h, w] -> [N, K, height, width].

    With `stride` only every so manieth row and column of that, from the first on.

    Two products with small matrices, since bilinear interpolation is one along rows and one along columns. On a CPU
    the backward pass is several times as fast as that of `F.interpolate`, which it equals to rounding.
    """
    rows, columns = (_interpolation(n, m, logits)[::stride] for n, m in zip(logits.shape[-2:], (height, width)))
    return rows @ (logits @ columns.T)


def _interpolation(num_inputs: int, num_outputs: int, like: torch.Tensor) -> torch.Tensor:
    """The matrix [num_outputs, num_inputs] of linear interpolation with align_corners."""
    units = torch.eye(num_inputs, device=like.device, dtype=like.dtype)
    return F.interpolate(units[None], size=num_outputs, mode="linear", align_corners=True)[0].T.contiguous()


@dataclass(frozen=True)
class PixelLogits:
    """The logits that `upsample` gives, [N, K, H, W], without the memory that they take: kept as what they come from.

    Args:
        coarse: [N, K, h, w].
        height, width: of the pictures.
        stride: every so manieth row and column of pixels counts, from the first on.
    """

    coarse: torch.Tensor
    height: int
    width: int
    stride: int = 1

    @property
    def shape(self) -> torch.Size:
        """(N, K, H, W), H and W after the stride."""
        return torch.Size([*self.coarse.shape[:2], -(-self.height // self.stride), -(-self.width // self.stride)])

    def whole(self) -> torch.Tensor:
        """All of them at once, [N, K, H, W]."""
        return upsample(self.coarse, self.height, self.width, self.stride)

    def split(self, sizes: Sequence[int]) -> tuple["PixelLogits", ...]:
        """Parts of so many pictures, as `torch.Tensor.split` makes them."""
        return tuple(replace(self, coarse=part) for part in self.coarse.split(sizes))

    def sum_over_pixels(self, loss: Callable[..., torch.Tensor], *maps: torch.Tensor) -> torch.Tensor:
        """loss(logits, *maps) for a loss that is a sum over pixels; its gradient can be asked for once.

        Args:
            loss: (logits [n, K, r, W], the same part [n, r, W] of each of `maps`) -> a scalar; called once a block.
            maps: [N, H, W] each, what else is known of the pixels.
        """
        return _SumOverPixels.apply(self._full_precision(), self, loss, maps)

    @torch.no_grad()
    def map_pixels(self, look: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        """look(logits) for a function that looks at each pixel alone; without a gradient.

        Args:
            look: logits [n, K, r, W] -> maps [n, r, W]; called once a block.

        Returns:
            The maps, [N, H, W] each.
        """
        coarse, (rows, columns) = self._full_precision(), self._matrices()
        groups = []
        for pictures, blocks in self._blocks():
            wide = coarse[pictures] @ columns.T  # [n, K, h, W]
            maps = zip(*[look(rows[lines, band] @ wide[:, :, band]) for lines, band in blocks])
            groups.append([torch.cat(parts, dim=1) for parts in maps])
        return [torch.cat(parts) for parts in zip(*groups)]

    def _full_precision(self) -> torch.Tensor:
        return self.coarse if self.coarse.dtype == torch.float64 else self.coarse.float()

    def _matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the interpolation along rows, [H, h], and along columns, [W, w]."""
        like = self._full_precision()
        sizes = zip(self.coarse.shape[-2:], (self.height, self.width))
        rows, columns = (_interpolation(coarse, fine, like)[:: self.stride] for coarse, fine in sizes)
        return rows, columns

    def _blocks(self) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
        """Cuts [N, K, H, W] into blocks of so many numbers that they are quick to work on.

        Yields:
            Pictures, and for each block of these its rows and the coarse rows that those lie between.
        """
        num_pictures, num_classes, height, width = self.shape
        size = BLOCK.get(self.coarse.device.type, BLOCK["cuda"])
        group = max(1, size // (num_classes * height * width))
        lines = min(height, max(16, size // (num_classes * width)))  # fewer would share most of their coarse rows
        coarse_rows = self.coarse.shape[-2]
        slope = self.stride * (coarse_rows - 1) / max(1, self.height - 1)  # coarse rows a row
        blocks = []
        for first in range(0, height, lines):
            last = min(first + lines, height) - 1
            band = slice(max(0, int(first * slope) - 1), min(coarse_rows, int(last * slope) + 3))
            blocks.append((slice(first, last + 1), band))
        for first in range(0, max(1, num_pictures), group):  # once, too, where there is no picture
            yield slice(first, first + group), blocks


class _SumOverPixels(torch.autograd.Function):
    """`PixelLogits.sum_over_pixels`. The gradient is computed block by block on the way forward, and kept coarse."""

    @staticmethod
    def forward(ctx, coarse, logits: PixelLogits, loss, maps):
        rows, columns = logits._matrices()
        total, gradient = coarse.new_zeros(()), torch.empty_like(coarse) if ctx.needs_input_grad[0] else None
        for pictures, blocks in logits._blocks():
            wide = coarse[pictures] @ columns.T  # [n, K, h, W]
            wide_gradient = torch.zeros_like(wide) if gradient is not None else None
            for lines, band in blocks:
                weights = rows[lines, band]  # [r, b]
                block = weights @ wide[:, :, band]  # [n, K, r, W]
                parts = [values[pictures, lines] for values in maps]
                if gradient is None:
                    total += loss(block, *parts)
                    continue
                with torch.enable_grad():
                    part_of_total = loss(block.requires_grad_(), *parts)
                total += part_of_total.detach()
                (slope,) = torch.autograd.grad(part_of_total, block)
                wide_gradient[:, :, band] += weights.T @ slope
            if gradient is not None:
                gradient[pictures] = wide_gradient @ columns
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        (gradient,) = ctx.saved_tensors
        return gradient * slope, None, None, None

"""A batch that goes through the network in parts, so that a small GPU keeps the paper's batch."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def in_parts(
    network: nn.Module, image: torch.Tensor, parts: int, run: Callable[..., torch.Tensor] = nn.Module.__call__
) -> torch.Tensor:
    """`network(image)`, of which no more than one part of the batch is in memory at a time.

    Each part's activations are forgotten, and made again, with the same random numbers, when the backward pass comes to
    it; the gradients of the parts add up. So every loss is that of the whole batch, whatever it divides by or compares
    between pictures, at the cost of a second forward pass. Where batch norm is trained its statistics are of a part.

    Args:
        network: image [N, ...] -> [N, ...]
        image: [N, ...], N at least `parts`.
        parts: how many; they differ by one picture at most. 1 is the plain call: all is in memory, nothing made again.
        run: (network, image) -> what the network gives, for one that is not to be called itself.
    """
    if parts == 1:
        return run(network, image)

    def contexts() -> tuple[contextlib.AbstractContextManager, ...]:
        return contextlib.nullcontext(), _statistics_kept(network)

    return torch.cat(
        [checkpoint(run, network, part, use_reentrant=False, context_fn=contexts) for part in image.tensor_split(parts)]
    )


@contextlib.contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Within it batch norm notes nothing: the second pass is no second batch."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum, number in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(number)

"""Batches on the device, the next one on its way while the present one is worked on."""

from collections.abc import Iterable, Iterator, Sequence

import torch

Batches = tuple[Sequence[torch.Tensor], ...]


def on_device(batches: Iterable[Batches], device: torch.device) -> Iterator[Batches]:
    """The same batches on `device`.

    To a GPU each is copied on a stream of its own, one step before it is asked for, so that copying takes none of the
    step's time. For that the batches are to lie in pinned memory, see `torch.utils.data.DataLoader`.

    Args:
        batches: each some groups of tensors, such as (image, label) of the source and (image, valid) of the target.
        device: where they are to go.
    """
    if device.type != "cuda":
        yield from (_move(batch, device) for batch in batches)
        return
    copying = torch.cuda.Stream(device)
    batches, here = iter(batches), None
    while True:
        with torch.cuda.stream(copying):
            coming = next(batches, None)
            coming = coming and _move(coming, device)
        if here is not None:
            yield here
        if coming is None:
            return
        torch.cuda.current_stream(device).wait_stream(copying)
        for tensor in (tensor for group in coming for tensor in group):
            tensor.record_stream(torch.cuda.current_stream(device))  # its memory is not free before that is through
        here = coming


def _move(batch: Batches, device: torch.device) -> Batches:
    return tuple([tensor.to(device, non_blocking=True) for tensor in group] for group in batch)

"""The device of a process, the precision on it, and batches on their way to it."""

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator

import torch

from utils import distributed
from utils.errors import UserError


def choose_device(name: str, deterministic: bool = False) -> torch.device:
    """The device `name`; "auto" is cuda, else mps, else cpu. Of several processes each takes its own GPU.

    Raises:
        UserError: if it can't be used here.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
        torch.utils.deterministic.fill_uninitialized_memory = False  # no code here reads such memory
    torch.backends.cudnn.allow_tf32 = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = _device_of_process(torch.device(name))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"--device {name} can't be used here: choose cpu, or auto for what there is") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _device_of_process(device: torch.device) -> torch.device:
    if distributed.world_size() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise UserError(f"--device {device} is not for several processes: give cuda or cpu")
    number, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= found:
        raise UserError(f"there are {found} GPUs here: give torchrun no higher --nproc-per-node, or --device cpu")
    return torch.device("cuda", number)


def choose_amp(name: str, device: torch.device) -> str:
    """The precision of the convolutions; "auto" is bf16 on a GPU that has it, else off."""
    if name != "auto":
        return name
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "off"


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, glibc keeps freed memory for the next step: a step of VGG16 is a sixth faster, and memory is higher.

    glibc returns blocks above 32 MiB to the system, which clears each page that it hands out again. Where memory is
    short, MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_MAX_ in the environment leaves glibc as it is.
    """
    if device.type != "cpu" or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"} & os.environ.keys():
        return
    with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):  # macOS, musl, Windows
        if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >= 15 * 2**30:
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: everything from the heap
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink it


def on_device(batches: Iterable[tuple], device: torch.device) -> Iterator[tuple]:
    """The same batches on `device`; to a GPU each is copied on a stream of its own, one step ahead.

    Args:
        batches: each a tuple of groups of tensors, in pinned memory for a GPU.
        device: where they go.
    """
    if device.type != "cuda":
        yield from (_move(batch, device) for batch in batches)
        return
    stream = torch.cuda.Stream(device)
    batches, ready = iter(batches), None
    while True:
        with torch.cuda.stream(stream):
            coming = next(batches, None)
            coming = coming and _move(coming, device)
        if ready is not None:
            yield ready
        if coming is None:
            return
        torch.cuda.current_stream(device).wait_stream(stream)
        for tensor in (tensor for group in coming for tensor in group):
            tensor.record_stream(
                torch.cuda.current_stream(device)
            )  # its memory is not reused before that stream is done
        ready = coming


def _move(batch: tuple, device: torch.device) -> tuple:
    return tuple([tensor.to(device, non_blocking=True) for tensor in group] for group in batch)

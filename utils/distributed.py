"""Devices, and several processes that train one network: `torchrun --nproc-per-node N train_split_lambda.py ...`.

Each process takes its part of every batch. The number of pixels that a loss divides by is summed over all of them
(`all_reduce_sum`), batch norm on GPUs is synchronised, and gradients are summed, so N processes take the step that one
would take with the whole batch. Rank 0 alone writes and prints. With one process nothing here does anything.
"""

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError

PATIENCE = timedelta(hours=1)  # for another process, which may be reading all images for a pseudo-labeller
_silence = contextlib.ExitStack()  # while the output of a process other than rank 0 goes nowhere


def place() -> tuple[int, int]:
    """(rank, world size): the number of this process, from 0, and how many there are, as torchrun says."""
    return (int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", 1))) if "RANK" in os.environ else (0, 1)


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return place()[0] == 0


def connect(device: str = "auto") -> None:
    """Waits for the other processes, and silences all but rank 0 until `disconnect`.

    Tensors on a GPU go through NCCL, those on the CPU through Gloo. With the setting `device` "cpu", or without a GPU
    for each process of this machine, there is Gloo alone, since NCCL connects at once and fails.
    """
    rank, world_size = place()
    if world_size == 1:
        return
    enough = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 0
    backend = "cpu:gloo,cuda:nccl" if enough and device != "cpu" and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    if rank > 0:
        nowhere = _silence.enter_context(open(os.devnull, "w"))  # noqa: SIM115
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            _silence.enter_context(redirect(nowhere))


def disconnect(failed: bool = False) -> None:
    """Lets the process print again and leaves the group; if it `failed`, without waiting for the others."""
    _silence.close()
    if dist.is_initialized():
        # Gloo's threads need Python's lock to release the last tensors. A process that ends holds that lock while it
        # waits for them: pytorch/pytorch#56297. This sleep leaves them time.
        time.sleep(0.2)
        if not failed:
            dist.destroy_process_group()


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 runs the block before the others, which then find its files on the disk."""
    if not is_main():
        all_reduce_sum(torch.zeros(1))  # waits for rank 0
    try:
        yield
    finally:
        if is_main():
            all_reduce_sum(torch.zeros(1))


def is_first_failure() -> bool:
    """Whether this process is the first to fail: the others fail because it is gone, and need not print."""
    if not dist.is_initialized():
        return is_main()  # before they are connected each fails alike
    with contextlib.suppress(RuntimeError):  # the store ended with the process that kept it
        return dist.distributed_c10d._get_default_store().add("failures", 1) == 1
    return True


def choose_device(name: str, deterministic: bool = False) -> torch.device:
    """The device `name`; "auto" is cuda, else mps, else cpu. Of several processes each takes its own GPU.

    Raises `UserError` if it can't be used here.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
        torch.utils.deterministic.fill_uninitialized_memory = False  # no code here reads such memory
    torch.backends.cudnn.allow_tf32 = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if place()[1] > 1 and name != "cpu":
        if name != "cuda":
            raise UserError(f"--device {name} is not for several processes: give cuda or cpu")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        hint = "choose cpu, auto for what there is, or no more processes than GPUs"
        raise UserError(f"--device {name} can't be used here: {hint}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def choose_amp(name: str, device: torch.device) -> str:
    """The precision of the convolutions; "auto" is bf16 on a GPU that has it, else off."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return name if name != "auto" else "bf16" if has_bf16 else "off"


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, glibc keeps freed memory for the next step: a step of VGG16 is a sixth faster, and memory is higher.

    MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_MAX_ in the environment leaves glibc as it is.
    """
    if device.type != "cpu" or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"} & os.environ.keys():
        return
    with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):  # macOS, musl
        if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >= 15 * 2**30:
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: everything from the heap
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink it


def all_reduce_sum(part: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' `part`, without a gradient. Every process must call it, with tensors of one shape."""
    if not dist.is_initialized():
        return part
    total = part.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def broadcast(module: nn.Module) -> None:
    """Gives the state of the main process's `module` to that of every other."""
    if dist.is_initialized():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def replicate(model: nn.Module) -> nn.Module:
    """What to call in training in place of `model`: each backward pass sums the gradients of all processes.

    Parameters are shared with `model`, and those of rank 0 are sent to the others here, so load weights before. On GPUs
    batch norm is synchronised; on a CPU its statistics are of each process's own part. With one process: `model`.
    """
    if not dist.is_initialized():
        return model
    if next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def sum_gradients(_, bucket):  # where DDP takes the mean: losses are divided by what all processes count
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    replica = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)  # they are alike
    replica.register_comm_hook(None, sum_gradients)
    return replica

"""Several processes that train one network: `torchrun --nproc-per-node N train_split_lambda.py ...`.

Each process takes its share of every batch. What a loss divides by is counted over all of them (`joined`), batch norm
takes its statistics from all of them, and gradients are added up, so N processes take the step that one would take
with the whole batch. The first of them, rank 0, alone writes and speaks.

torchrun tells each process its place in the environment. Without that there is one, and everything here does nothing.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(hours=1)
"""How long a process waits for another, which may be reading all pictures for a teacher, before it gives up."""

_store: Any = None  # torchrun's notice board, while the processes are connected
_silent: list = []  # the streams that a process without a voice would write to
_turns = 0  # blocks of `main_first` so far


def share() -> tuple[int, int]:
    """The number of this process among all (its rank) and how many there are."""
    if "RANK" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return share()[0] == 0


def connect() -> None:
    """Waits for the other processes, and takes the voice of all but the main one until `disconnect`.

    What is on a GPU will go through NCCL, what is on the CPU through Gloo.
    """
    global _store
    rank, world = share()
    if world == 1:
        return
    _store, *_ = next(dist.rendezvous("env://", timeout=PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("run", _store), rank=rank, world_size=world, timeout=PATIENCE
    )
    if rank != 0:
        nowhere = open(os.devnull, "w")  # noqa: SIM115
        _silent.extend((sys.stdout, sys.stderr, nowhere))
        sys.stdout = sys.stderr = nowhere


def disconnect(failed: bool) -> None:
    """Gives the process its voice back, and parts from the others.

    Args:
        failed: leave them as they are: they learn of it when this process ends. To part in order would be to wait.
    """
    global _store, _turns
    if _silent:
        sys.stdout, sys.stderr, nowhere = _silent
        _silent.clear()
        nowhere.close()
    if dist.is_initialized():
        # Gloo's threads need Python's lock to let go of the last sums. Once the process ends, it holds that lock while
        # it waits for them, for ever: pytorch/pytorch#56297. Here it is free for as long as they may want it.
        time.sleep(0.2)
        if not failed:
            dist.destroy_process_group()
    _store, _turns = None, 0


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block before the others do, who find on the disk what it left there."""
    global _turns
    _turns += 1
    if _store is not None and not is_main():
        _store.wait([f"turn {_turns}"], PATIENCE)
    try:
        yield
    finally:
        if _store is not None and is_main():
            _store.set(f"turn {_turns}", "over")


def is_first_failure() -> bool:
    """Whether this process is the first to fail, so that it has something to say: the others fail for want of it."""
    if _store is None:
        return is_main()  # what fails before they are connected fails in each of them
    with contextlib.suppress(RuntimeError):  # the board went with the process that kept it
        return _store.add("failures", 1) == 1
    return True


# --- sums over all processes ----------------------------------------------------------------------------


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: torch.Tensor) -> torch.Tensor:
        total = part.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _Joined.apply(gradient)  # the loss is the sum of all processes' parts


def joined(part: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' `part`, with a gradient. Every process must call it, with tensors of one shape."""
    return _Joined.apply(part) if dist.is_initialized() else part


def highest(number: int) -> int:
    """The highest of all processes' `number`. They wait for each other, but not for a GPU."""
    if not dist.is_initialized():
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def gathered(items: Sequence) -> list:
    """All processes' items, those of rank 0 first."""
    if not dist.is_initialized():
        return list(items)
    lists: list = [None] * dist.get_world_size()
    dist.all_gather_object(lists, list(items))
    return [item for part in lists for item in part]


def broadcast(module: nn.Module) -> None:
    """Gives the state of the main process's `module` to that of every other."""
    if dist.is_initialized():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


# --- the network ----------------------------------------------------------------------------------------


def replicated(model: nn.Module) -> nn.Module:
    """What to train in place of `model`, which it shares its parameters with: each backward pass adds up the gradients
    of all processes, and batch norm is over all of them. With one process `model` itself.

    The weights of the main process are taken to the others here, so load them before.
    """
    if not dist.is_initialized():
        return model
    on_gpu = next(model.parameters()).is_cuda
    if on_gpu:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = JoinedBatchNorm
    replica = Replica(model, gradient_as_bucket_view=True, broadcast_buffers=False)  # they are the same everywhere
    replica.register_comm_hook(None, _add_up)
    return replica


class Replica(DistributedDataParallel):
    """What `replicated` gives: it has the attributes of the network that it wraps, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def _add_up(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The sum where DDP takes the mean: a loss is divided by what is counted over all processes already."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


class JoinedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the pictures of all processes, for a CPU: `nn.SyncBatchNorm` knows GPUs only.

    The same parameters and buffers as those of `nn.BatchNorm2d`, and outside training the same numbers.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> the same shape."""
        if not self.training:
            return super().forward(input)
        x = input.float()
        number = x.new_tensor([x.numel() / x.shape[1]])
        sums = joined(torch.cat([x.sum(dim=(0, 2, 3)), number]))  # [C + 1]
        number = sums[-1].detach()
        centred = x - (mean := sums[:-1] / number)[:, None, None]
        variance = joined(centred.square().sum(dim=(0, 2, 3))) / number
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * number / (number - 1), self.momentum)
        scale = self.weight / (variance + self.eps).sqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

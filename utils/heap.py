"""On a CPU: memory that one step frees is kept for the next, as torch keeps a GPU's."""

import ctypes
import os
from pathlib import Path

import torch

from utils.errors import UserError

CHOICES = ("auto", "on", "off")
ROOMY = 15 * 2**30
"""Bytes of a machine that is sold with 16 GiB."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_memory(choice: str, device: torch.device) -> bool:
    """Has the C library keep what is freed, for the rest of the process; says whether it does.

    glibc hands blocks of more than 32 MiB, as most maps of a convolution are, back to the system when they are freed,
    and the system clears every page that it hands out again: a seventh of the time of a step of VGG16. Kept memory has
    gaps, so a process holds more of it (`benchmarks.memory`).

    Args:
        choice: of `CHOICES`; "auto" keeps it for a CPU with `ROOMY` bytes of memory.

    Raises:
        UserError: for "on" without glibc.
    """
    if choice == "off" or (choice == "auto" and (device.type != "cpu" or machine_memory() < ROOMY)):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError) as error:  # macOS, musl; Windows
        if choice == "auto":
            return False
        raise UserError("--keep-memory on needs the C library glibc, of most Linux systems: choose auto") from error
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))  # all of it from the heap; never shrink that


def machine_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Bytes of memory that this process may use: of the machine, or of the container in `limit`; 0 if unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0
    try:
        return min(total, int(limit.read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return total

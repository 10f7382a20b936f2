"""Memory of freed tensors is kept for the next one.

By default glibc gives every large block back to the kernel and faults it in again page by page: on a CPU, the
temporaries of one softmax over a vocabulary then cost ten times the softmax.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 1 << 30


def reuse_freed_memory() -> None:
    """Tell glibc's malloc to keep blocks of up to 1 GiB on its heap; elsewhere nothing is done."""
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, _LARGE)


def give_back_freed_memory() -> None:
    """Give the memory of what is no longer referred to (a whole target) back to the system and the device."""
    gc.collect()  # hooks and modules refer to each other
    malloc_trim = _libc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _libc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc's; None on a system without it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None

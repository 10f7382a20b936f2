"""Where tensors lie: memory of freed ones is kept for the next one, and weights lie in large pages.

By default glibc gives every large block back to the kernel and faults it in again page by page: on a CPU, the
temporaries of one softmax over a vocabulary then cost ten times the softmax. And a CPU that reads ahead stops at the
end of a page, so weights in pages of 2 MiB arrive sooner than in those of 4 KiB.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 1 << 30
_PAGE = 2 << 20
_PIECE = 64 << 20  # of memory that is asked for at once
_LINE = 64


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


def in_large_pages(tensor: Tensor) -> Tensor:
    """Return a CPU's tensor contiguous: a copy in large pages, or where the system has none, as torch makes it."""
    size = tensor.numel() * tensor.element_size()
    room = _pages.take(size) if size else None
    if room is None:
        return tensor.contiguous()
    return room.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class _LargePages:
    """Hands out memory piece by piece; a piece goes back to the system when nothing in it is referred to any more."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)
        self._lock = Lock()

    def take(self, size: int) -> Tensor | None:
        """Return `size` bytes that begin a cache line; None where there are no large pages."""
        if size >= _PIECE:
            return self._piece(size)
        with self._lock:
            if size > self._left.shape[0]:
                piece = self._piece(_PIECE)
                if piece is None:
                    return None
                self._left = piece
            taken, self._left = self._left[:size], self._left[size + -size % _LINE :]
            return taken

    @staticmethod
    def _piece(size: int) -> Tensor | None:
        advice = getattr(mmap, "MADV_HUGEPAGE", None)
        if advice is None:
            return None
        try:
            # Of pages that are never written, none is there.
            memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(advice)
        except OSError:  # a kernel without them
            return None
        piece = torch.frombuffer(memory, dtype=torch.uint8)
        return piece[-piece.data_ptr() % _PAGE :][:size]


_pages = _LargePages()


def _libc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc's; None on a system without it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None

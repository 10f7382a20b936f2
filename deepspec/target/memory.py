"""Memory of freed tensors is kept for the next one.

By default glibc gives every large block back to the kernel and faults it in again page by page: on a CPU, the
temporaries of one softmax over a vocabulary then cost ten times the softmax.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 1 << 30


def reuse_freed_memory() -> None:
    """Tell glibc's malloc to keep blocks of up to 1 GiB on its heap; elsewhere nothing is done."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, _LARGE)

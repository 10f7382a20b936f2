"""Entries of a cache that are moved in all its layers by one call: after a tree, only the accepted path stays."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from deepspec.kernels import function, kernels


class _Entries(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("heads", "length", "width")))


class Entries:
    """Keys and values [slots, heads, length, width] of all layers, in any dtypes; see `of`."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.array = (_Entries * len(tensors))(
            *(_Entries(x.data_ptr(), x.shape[1], x.shape[2], x.shape[3] * x.element_size()) for x in tensors)
        )

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Entries | None:
        """Return them for as long as they lie where they are; None where the kernels cannot move them."""
        if kernels() is None or not all(x.is_cpu and x.is_contiguous() for x in tensors):
            return None
        return cls(tensors)

    def compact(self, slot: int, start: int, kept: list[int]) -> None:
        """Move the entries `start + kept[i]` of a slot to `start + i`; `kept` ascends, and kept[i] >= i."""
        chosen = (ctypes.c_int64 * len(kept))(*kept)
        sizes = (ctypes.c_int64(value) for value in (len(self.array), slot, start, len(kept)))
        function("compact")(self.array, *sizes, chosen)

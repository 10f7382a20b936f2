"""What a block draft reads of the target, as one call: features → keys and values of each of its layers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepspec.kernels import kernels
from deepspec.target.attention import ForwardPass
from deepspec.target.native.layer import NO_ROTATION, Before, Norm, Work, places
from deepspec.target.native.matrix import LANES, Matrix, _Matrix, readable

_Pointer, _Long, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Context(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("join", "kv")),
        *((name, _Pointer) for name in ("norm", "k_norms")),
        *((name, _Float) for name in ("eps", "k_eps")),
        *((name, _Long) for name in ("layers", "kv_heads", "head_dim")),
    )


class NativeContext:
    """Writes features [n, join's inputs] of the target into the caches of a draft's layers.

    Args:
        join: features → states, normed by `norm`.
        kv: states → of each layer its keys, then its values.
        k_norms: of the keys of each layer.
    """

    def __init__(self, join: Matrix, norm: Norm, kv: Matrix, k_norms: Sequence[Norm], head_dim: int):
        library = kernels()
        if library is None or not self.suits(norm, k_norms, head_dim):
            raise RuntimeError("the kernels are not there, or do not take these sizes")
        self._run = library.deepspec_context
        self._run.restype = _Long
        self._made_of = join, norm, kv, tuple(k_norms), head_dim
        self._k_norms = torch.cat([each.weight.detach() for each in k_norms])
        self.layers, self.kv_heads, self.head_dim = (
            len(k_norms),
            kv.out // len(k_norms) // 2 // head_dim,
            head_dim,
        )
        self._struct = _Context(
            join.struct,
            kv.struct,
            norm.weight.data_ptr(),
            self._k_norms.data_ptr(),
            norm.eps,
            k_norms[0].eps,
            self.layers,
            self.kv_heads,
            head_dim,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy what it is made of; addresses are the copy's own."""
        return NativeContext, self._made_of

    @staticmethod
    def suits(norm: Norm, k_norms: Sequence[Norm], head_dim: int) -> bool:
        """Return whether the kernels take such norms."""
        return (
            not head_dim % LANES
            and not len(norm.weight) % LANES
            and all(each.weight.dtype == torch.bfloat16 for each in (norm, *k_norms))
            and len({each.eps for each in k_norms}) == 1
        )

    def __call__(self, features: Tensor, rope: tuple[Tensor, Tensor], step: ForwardPass) -> None:
        """Write keys and values behind what the pass says of its rows.

        Args:
            features: bfloat16 [n, inputs].
            rope: cos and signed sin of each token, [1, n, 1, width], or of each position, [positions, width].

        Raises:
            IndexError: a position that has no rotation.
            ValueError: features of another dtype or shape.
        """
        before = self.before(features, rope, step)
        caches = places(step, range(self.layers), self.kv_heads, self.head_dim, features)
        if self._run(ctypes.byref(before.struct), caches):
            raise IndexError(NO_ROTATION)

    def before(self, features: Tensor, rope: tuple[Tensor, Tensor], step: ForwardPass) -> Before:
        """Return the same to be done in the call that runs the draft's layers over the same cache."""
        join, _, kv, _, _ = self._made_of
        rows = readable("features", features, (sum(step.counts), join.inputs))
        work = Work(step, rows, rope, (join.out, kv.out, 0, join.out, 0), False)
        return Before(ctypes.addressof(self._struct), work, rows)

"""What a draft with a sequential head proposes, grown as one call: whole chains, and trees of the likeliest paths.

A request's proposal does not depend on the other requests nor on the number of threads, to the bit.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.kernels import function
from deepspec.target.native.laws import SHARED
from deepspec.target.native.matrix import Matrix, _Matrix, readable


class _Laws(ctypes.Structure):
    _fields_ = (
        ("second", _Matrix),
        *((name, ctypes.c_void_p) for name in ("first", "ids", "logits", "anchors")),
        *((name, ctypes.c_int64) for name in ("requests", "depth")),
        ("temperature", ctypes.c_float),
    )


class _Chains(ctypes.Structure):
    _fields_ = (("laws", _Laws), *((name, ctypes.c_void_p) for name in ("uniforms", "columns", "probs")))


class _Trees(ctypes.Structure):
    _fields_ = (
        ("laws", _Laws),
        *((name, ctypes.c_void_p) for name in ("depths", "widths")),
        *((name, ctypes.c_int64) for name in ("nodes", "beam")),
        *((name, ctypes.c_void_p) for name in ("columns", "parents", "survival", "counts")),
    )


class RankedTree(NamedTuple):
    """A tree of the likeliest paths: of each node the column of its token, its parent, and its path's probability."""

    columns: list[int]
    parents: list[int]
    survival: list[float]


class SequentialLaws:
    """The laws softmax((U_k + W₂ W₁[x_{k−1}]) / temperature), and what grows from them in one call.

    Everywhere logits U are bfloat16 [depth, requests, columns], and anchors int64 [requests].

    Args:
        first: W₁, bfloat16 [vocab, rank].
        second: W₂ [columns, rank].
        ids: int64, the token of each column; None: the column itself.
    """

    def __init__(self, first: Tensor, second: Matrix, ids: Tensor | None):
        self.first = readable("the first factor", first.detach(), (len(first), second.inputs))
        self.second, self.ids = second, None if ids is None else ids.contiguous()

    def chains(
        self, logits: Tensor, anchors: Tensor, uniforms: Tensor | None, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Return the columns of the tokens, int64 [depth, requests], and the laws [depth, requests, columns].

        Args:
            uniforms: float64 [depth, requests] in [0, 1); None takes the likeliest tokens, and returns no laws.
        """
        logits, anchors = self._read(logits, anchors)
        uniforms = None if uniforms is None else uniforms.contiguous()
        columns = anchors.new_empty(logits.shape[:2])
        probs = None if uniforms is None else logits.new_empty(logits.shape, dtype=torch.float32)
        made = (None if each is None else each.data_ptr() for each in (uniforms, columns, probs))
        struct = _Chains(self._laws(logits, anchors, temperature), *made)
        function("chains")(ctypes.byref(struct), self._threads(logits.shape[1]))
        return columns, probs

    def trees(
        self,
        logits: Tensor,
        anchors: Tensor,
        depths: list[int],
        widths: list[int],
        nodes: int,
        beam: int,
        temperature: float = 1.0,
    ) -> list[RankedTree]:
        """Return a tree a request: the `nodes` likeliest paths, parents before children, as they were found.

        Args:
            depths: levels of each request, at most those of the logits.
            widths: most children of a node at each depth, of the logits' depth.
            beam: nodes of a level that are expanded at most.
        """
        logits, anchors = self._read(logits, anchors)
        requests = logits.shape[1]
        sizes = torch.tensor([*depths, *widths])
        columns, parents = torch.empty(2, requests, nodes, dtype=torch.int64)
        survival = torch.empty(requests, nodes, dtype=torch.float64)
        counts = torch.empty(requests, dtype=torch.int64)
        struct = _Trees(
            self._laws(logits, anchors, temperature),
            sizes.data_ptr(),
            sizes.data_ptr() + requests * sizes.element_size(),
            nodes,
            beam,
            *(made.data_ptr() for made in (columns, parents, survival, counts)),
        )
        function("trees")(ctypes.byref(struct), self._threads(requests * beam))
        rows = zip(columns.tolist(), parents.tolist(), survival.tolist(), counts.tolist(), strict=True)
        return [RankedTree(*(part[:count] for part in parts)) for *parts, count in rows]

    def _read(self, logits: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        return readable("logits", logits, (*logits.shape[:2], self.second.out)), anchors.contiguous()

    def _laws(self, logits: Tensor, anchors: Tensor, temperature: float) -> _Laws:
        ids = None if self.ids is None else self.ids.data_ptr()
        given = self.first.data_ptr(), ids, logits.data_ptr(), anchors.data_ptr()
        depth, requests, _ = logits.shape
        return _Laws(self.second.struct, *given, requests, depth, temperature)

    def _threads(self, rows: int) -> ctypes.c_int64:
        shared = rows * self.second.out * self.second.inputs >= SHARED
        return ctypes.c_int64(torch.get_num_threads() if shared else 1)

"""Llama-shaped decoder layers as one call: norms, projections, RoPE, the cache, attention under any mask, SwiGLU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.kernels import kernels
from deepspec.target.attention import ForwardPass
from deepspec.target.native.matrix import LANES, Matrix, _Matrix, readable

MOST_QUERIES = 48  # query heads of a key head
NO_ROTATION = "a position has no rotation"
_Pointer, _Long, _Int, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _Pointer) for name in ("norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, _Float) for name in ("eps", "mlp_eps", "q_eps", "k_eps", "scale")),
        *((name, _Int) for name in ("heads", "kv_heads", "head_dim", "window")),
    )


class _Pass(ctypes.Structure):
    _fields_ = (
        *(
            (name, _Long)
            for name in ("tokens", "requests", "threads", "bidirectional", "rope_dim", "rope_rows")
        ),
        *((name, _Pointer) for name in ("rows", "starts", "counts", "hidden", "hidden_from", "positions")),
        *((name, _Pointer) for name in ("cos", "sin")),
        *((name, _Pointer) for name in ("normed", "projected", "attended", "middle", "gated")),
    )


class _Cache(ctypes.Structure):
    _fields_ = (("keys", _Pointer), ("values", _Pointer), ("length", _Long))


class _Before(ctypes.Structure):
    _fields_ = tuple((name, _Pointer) for name in ("context", "step", "features"))


class _Ends(ctypes.Structure):
    _fields_ = (
        *((name, _Pointer) for name in ("ids", "embeddings", "norm", "last")),
        ("vocab", _Long),
        ("eps", _Float),
        *((name, _Pointer) for name in ("head", "logits")),
    )


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over the last dimension."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x / rms(x) · weight, rounded once."""
        library = kernels() if self.takes(x) else None
        if library is None:
            return self.by_torch(x)
        rows = x.contiguous()
        made, width = torch.empty_like(rows), self.weight.shape[0]
        sizes = _Long(rows.numel() // width), _Long(width)
        pointers = (_Pointer(each.data_ptr()) for each in (rows, self.weight, made))
        library.deepspec_norm(*pointers, _Float(self.eps), *sizes)
        return made

    def by_torch(self, x: Tensor) -> Tensor:
        """Return the same as torch computes it."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def takes(self, x: Tensor) -> bool:
        """Whether this is for the kernels, if they are there."""
        return (
            self.suits
            and x.shape[-1:] == self.weight.shape
            and x.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad))
        )

    @cached_property
    def suits(self) -> bool:
        """Whether the kernels take its weight."""
        return self.weight.dtype == torch.bfloat16 and self.weight.shape[0] % LANES == 0


@dataclass(frozen=True)
class Parts:
    """What a layer is made of; `window` of 0 is none, and `one_way` is causal where a pass sees both ways."""

    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix
    norms: tuple[Norm, Norm]
    qk_norms: tuple[Norm, Norm] | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    one_way: bool = False

    @property
    def suits(self) -> bool:
        """Whether the kernels take such a layer."""
        width, inner = self.out.out, self.gate_up.out // 2
        norms = (*self.norms, *(self.qk_norms or ()))
        return (
            not any(size % LANES for size in (width, inner, self.head_dim))
            and self.heads // self.kv_heads <= MOST_QUERIES
            and all(norm.weight.dtype == torch.bfloat16 for norm in norms)
        )

    @property
    def sizes(self) -> tuple[int, int, int, int, int, bool]:
        """Return what the room that a pass works in depends on."""
        inner, width = self.heads * self.head_dim, self.out.out
        return max(self.qkv.inputs, width), self.qkv.out, inner, width, self.down.inputs, self.one_way

    def struct(self) -> _Layer:
        """Return them as the kernels read them."""
        norms = [*self.norms, *(self.qk_norms or ())]
        weights = [norm.weight.data_ptr() for norm in norms] + [None] * (4 - len(norms))
        eps = [norm.eps for norm in norms] + [0.0] * (4 - len(norms))
        matrices = (self.qkv.struct, self.out.struct, self.gate_up.struct, self.down.struct)
        sizes = self.heads, self.kv_heads, self.head_dim, self.window
        return _Layer(*matrices, *weights, *eps, self.scale, *sizes)


class NativeLayers:
    """Runs layers of `Parts` that suit, one after the other in one call.

    Args:
        parts: of each layer.
        first: index of the first one in the cache.

    Raises:
        ValueError: layers of several sizes.
    """

    def __init__(self, parts: Sequence[Parts], first: int):
        library = kernels()
        if library is None:
            raise RuntimeError("the kernels are not there")
        if len({each.sizes for each in parts}) != 1:
            raise ValueError("layers of several sizes are not run in one call")
        self._run = library.deepspec_layers
        self._run.restype = _Long
        self.parts, self.first = tuple(parts), first
        self._layers = [each.struct() for each in parts]
        self._pointers = (_Pointer * len(parts))(*map(ctypes.addressof, self._layers))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy what it is made of; addresses are the copy's own."""
        return NativeLayers, (self.parts, self.first)

    def __call__(
        self, normed: Tensor | None, x: Tensor, rope: tuple[Tensor, Tensor], step: ForwardPass
    ) -> list[Tensor]:
        """Run the layers over x [1, n, d], and write their keys and values into the pass's cache.

        Args:
            normed: [1, n, ·] what the first attention reads where that is not x under the layer's first norm.
            rope: cos and signed sin of each token, [1, n, 1, width], or of each position, [positions, width].

        Returns:
            What each layer hands on, [1, n, d]; two take turns with the memory of those that the pass does not keep.

        Raises:
            IndexError: a position that has no rotation.
            ValueError: an operand of another dtype or shape, or one that asks for a gradient.
        """
        one = self.parts[0]
        x = readable("x", x, (1, sum(step.counts), one.out.out))
        if normed is not None:
            normed = readable("what attention reads", normed, (*x.shape[:2], one.qkv.inputs))
        rooms = x.new_empty(self._rooms(step), *x.shape).unbind()
        return self._over(x, normed, rooms, rope, step)

    def decode(
        self,
        ids: Tensor,
        embeddings: Tensor,
        norm: Norm,
        rope: tuple[Tensor, Tensor],
        step: ForwardPass,
        head: Matrix | None = None,
        before: Before | None = None,
    ) -> Decoded:
        """Run what a decoder is: embeddings, the layers, the last norm, and the head where it is given.

        Args:
            ids: int64, n of them.
            embeddings: bfloat16 [vocab, d].
            norm: one that suits.
            rope: as above.
            before: what is written into the pass's cache first.

        Raises:
            IndexError: a token that is not in the vocabulary, or a position that has no rotation.
            ValueError: embeddings of another dtype or shape.
        """
        n, d = sum(step.counts), self.parts[0].out.out
        ids = ids.reshape(n).to(torch.int64).contiguous()
        table = readable("embeddings", embeddings, (embeddings.shape[0], d))
        x, last, *rooms = table.new_empty(2 + self._rooms(step), 1, n, d).unbind()
        logits = None if head is None else table.new_empty(n, head.out)
        ends = _Ends(
            *(each.data_ptr() for each in (ids, table, norm.weight, last)),
            table.shape[0],
            norm.eps,
            *((None, None) if head is None or logits is None else (head.address, logits.data_ptr())),
        )
        made = self._over(x, None, rooms, rope, step, ends, before)
        return Decoded(x, made, last, logits)

    def _rooms(self, step: ForwardPass) -> int:
        """Return how many layers' states are held at once."""
        return 2 + sum(self.first + i in step.wanted for i in range(len(self.parts) - 1))

    def _over(
        self,
        x: Tensor,
        normed: Tensor | None,
        rooms: Sequence[Tensor],
        rope: tuple[Tensor, Tensor],
        step: ForwardPass,
        ends: _Ends | None = None,
        before: Before | None = None,
    ) -> list[Tensor]:
        """Run the layers over x, states in these rooms, and return what each hands on."""
        one, last = self.parts[0], len(self.parts) - 1
        caches = places(step, range(self.first, self.first + last + 1), one.kv_heads, one.head_dim, x)
        work = step.once((NativeLayers, one.sizes), lambda: Work(step, x, rope, one.sizes[:-1], one.one_way))
        even, odd, *own = rooms
        kept = iter(own)
        made = [
            next(kept) if self.first + i in step.wanted and i < last else odd if (last - i) % 2 else even
            for i in range(last + 1)
        ]
        failed = self._run(
            self._pointers,
            ctypes.byref(work.struct),
            caches,
            None if normed is None else _Pointer(normed.data_ptr()),
            _Pointer(x.data_ptr()),
            (_Pointer * (last + 1))(*(each.data_ptr() for each in made)),
            _Long(last + 1),
            None if ends is None else ctypes.byref(ends),
            None if before is None else ctypes.byref(before.struct),
        )
        if failed:
            raise IndexError("a token is not in the vocabulary" if failed == 1 else NO_ROTATION)
        return made


class Decoded(NamedTuple):
    """What a decoder makes of n tokens.

    Attributes:
        embedded: their embeddings, [1, n, d].
        made: what each layer hands on, [1, n, d].
        last: the last of it under the norm.
        logits: [n, columns]; None where no head was given.
    """

    embedded: Tensor
    made: list[Tensor]
    last: Tensor
    logits: Tensor | None


def as_one(layers: Sequence[NativeLayers | None]) -> NativeLayers | None:
    """Join layers that follow one another into one call; None where one is not the kernels', or of another size."""
    parts = [each for layer in layers if layer is not None for each in layer.parts]
    if not layers or None in layers or len({each.sizes for each in parts}) != 1:
        return None
    return NativeLayers(parts, cast(NativeLayers, layers[0]).first)


def places(step: ForwardPass, layers: range, kv_heads: int, head_dim: int, like: Tensor) -> Any:
    """Return where the keys and values of layers lie, for a pass that writes them."""
    cache = step.cache
    if cache is None:
        raise ValueError("a pass without a cache has no room for keys")
    for index in layers:
        step.note(index)

    def made() -> Any:
        new = like.new_empty(0, kv_heads, 0, head_dim)
        found = [cache.layer(index, new, new) for index in layers]
        return (_Cache * len(found))(*(_Cache(k.data_ptr(), v.data_ptr(), k.shape[2]) for k, v in found))

    return cache.derived((places, layers), made)


class Before:
    """What is written into a cache before layers run; see `NativeContext`.

    Args:
        context: the address of what the kernels read of it.
        work: of its pass.
        features: bfloat16 [n, inputs].
    """

    def __init__(self, context: int, work: Work, features: Tensor):
        self._kept = work, features  # as long as their addresses are in use
        self.struct = _Before(context, ctypes.addressof(work.struct), features.data_ptr())


class Work:
    """What the layers of one pass share: who goes where, who is hidden from whom, and room to work in.

    Args:
        like: of the dtype and device of the room.
        rope: cos and signed sin of each token, [1, n, 1, width], or of each position, [positions, width].
        widths: of the room for what is normed, projected, attended, in between and gated.
    """

    def __init__(
        self,
        step: ForwardPass,
        like: Tensor,
        rope: tuple[Tensor, Tensor],
        widths: Sequence[int],
        one_way: bool,
    ):
        n = sum(step.counts)
        by_position = rope[0].dim() == 2
        cos, sin = rope if by_position else (operand.reshape(n, -1).contiguous() for operand in rope)
        spans = (_Long * (3 * step.requests))(*step.rows, *step.starts, *step.counts)
        hidden, hidden_from = _hidden(step, one_way)
        room = like.new_empty(n * sum(widths))
        # As long as their addresses are in use.
        self._kept = cos, sin, spans, hidden, hidden_from, step.positions, room
        begins = accumulate(widths[:-1], initial=0)
        span = ctypes.addressof(spans)
        self.struct = _Pass(
            n,
            step.requests,
            torch.get_num_threads(),
            step.bidirectional and not one_way,
            cos.shape[1],
            len(cos) if by_position else 0,
            *(span + i * step.requests * ctypes.sizeof(_Long) for i in range(3)),
            None if hidden is None else hidden.data_ptr(),
            None if hidden_from is None else hidden_from.data_ptr(),
            step.positions.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            *(room.data_ptr() + n * begin * room.element_size() for begin in begins),
        )


def _hidden(step: ForwardPass, one_way: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the columns that each token of a pass with a mask does not see, end to end, and where a token's begin.

    Both are int64; None for a pass whose tokens see what stands before them, or all of their request.
    """
    if not step.given_mask:
        return None, None
    columns, counts, first = [], [0], 0
    for row, (start, count) in enumerate(zip(step.starts, step.counts, strict=True)):
        unseen = ~step.visible[row, :count, : start + count]
        if one_way:
            own = step.positions[0, first : first + count]
            unseen[:, start:] |= own > own[:, None]
        token, column = unseen.nonzero().T
        columns.append(column)
        counts += torch.bincount(token, minlength=count).tolist()
        first += count
    return torch.cat(columns).contiguous(), torch.tensor(list(accumulate(counts)))

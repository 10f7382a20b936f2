"""Weights as the kernels read them: in blocks of 16 outputs, by pairs of inputs, in bfloat16 or in 4 bits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.kernels import kernels
from deepspec.target.memory import in_large_pages

LANES = 16  # outputs of a block
SIDE = 4  # blocks side by side, in bfloat16
QUANT = 32  # inputs that share a scale


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    )


class Matrix:
    """A weight [out, in] in the kernels' layout, with a bias [out] or none."""

    def __init__(self, weight: Tensor, bias: Tensor | None, out: int, inputs: int, bits: int):
        self.weight, self.bias, self.out, self.inputs, self.bits = weight, bias, out, inputs, bits
        pointer = None if bias is None else bias.data_ptr()
        self.struct = _Matrix(weight.data_ptr(), pointer, out, inputs, bits)
        self._library = kernels()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy what it is made of; addresses are the copy's own."""
        return Matrix, (self.weight, self.bias, self.out, self.inputs, self.bits)

    @property
    def address(self) -> int:
        """Where the kernels read what it is."""
        return ctypes.addressof(self.struct)

    def product(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """bfloat16 x [..., in] → [..., out]: x Wᵀ + bias + residual, rounded once.

        Raises:
            ValueError: an operand of another dtype or shape, or one that asks for a gradient.
        """
        rows = readable("x", x, (*x.shape[:-1], self.inputs))
        added = None if residual is None else readable("the residual", residual, (*x.shape[:-1], self.out))
        made = rows.new_empty(*x.shape[:-1], self.out)
        pointer = None if added is None else ctypes.c_void_p(added.data_ptr())
        self._call("deepspec_linear", rows, pointer, ctypes.c_void_p(made.data_ptr()))
        return made

    def log_norm(self, x: Tensor) -> Tensor:
        """bfloat16 x [n, in] → float32 [n]: the log-sum-exp of each row's outputs, which are rounded to bfloat16."""
        rows = readable("x", x, (len(x), self.inputs))
        made = rows.new_empty(len(rows), dtype=torch.float32)
        self._call("deepspec_log_norm", rows, ctypes.c_void_p(made.data_ptr()))
        return made

    def _call(self, name: str, rows: Tensor, *rest: ctypes.c_void_p | None) -> None:
        sizes = rows.numel() // self.inputs, torch.get_num_threads()
        getattr(self._library, name)(
            ctypes.byref(self.struct), ctypes.c_void_p(rows.data_ptr()), *rest, *map(ctypes.c_int64, sizes)
        )


def readable(name: str, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor as the kernels read it, which know only where it begins.

    Raises:
        ValueError: another dtype or shape, or one that asks for a gradient, of which they have none.
    """
    if x.dtype != torch.bfloat16 or x.shape != tuple(shape):
        found = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        raise ValueError(f"the kernels read {name} as bfloat16 {list(shape)}, not {found}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} asks for a gradient, which the kernels do not compute")
    return x.contiguous()


def can_hold(weight: Tensor) -> bool:
    """Return whether the kernels are there, and take a weight of this shape."""
    return weight.device.type == "cpu" and weight.shape[1] % 2 == 0 and kernels() is not None


def dense(weight: Tensor, bias: Tensor | None) -> Matrix:
    """Lay out a weight in bfloat16, its outputs padded with zeros to whole groups of blocks."""
    out, inputs = weight.shape
    rows = F.pad(weight.detach(), (0, 0, 0, -out % (SIDE * LANES)))
    packed = rows.view(-1, SIDE, LANES, inputs // 2, 2).permute(0, 3, 1, 2, 4)
    return Matrix(in_large_pages(packed), _taken(bias), out, inputs, 16)


def undone(matrix: Matrix) -> Tensor:
    """Return the weight [out, in] of a matrix in bfloat16, as it came."""
    return matrix.weight.permute(0, 2, 3, 1, 4).reshape(-1, matrix.inputs)[: matrix.out]


def quantised(levels: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> Matrix:
    """Lay out a weight (level − 8)·scale + zero in 4 bits.

    Args:
        levels: 0 to 15, [out, in].
        scales, zeros: of each 32 inputs of an output, [out, in / 32].
    """
    out, inputs = levels.shape
    padding = (0, 0, 0, -out % LANES)
    places = F.pad(levels.to(torch.int32), padding).view(-1, LANES, inputs // QUANT, 4, 4, 2)
    places = places.permute(0, 2, 3, 1, 5, 4)  # [blocks, groups, fours, 16, 2, places in a word]
    words = (places << torch.tensor([0, 4, 8, 12], dtype=torch.int32)).sum(-1, dtype=torch.int32)
    words = torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16).flatten(2)
    ends = torch.stack([F.pad(x.to(torch.bfloat16), padding) for x in (scales, zeros)])  # [2, out, groups]
    ends = ends.view(2, -1, LANES, inputs // QUANT).permute(1, 3, 0, 2).flatten(2)
    packed = torch.cat((words, ends.contiguous().view(torch.int16)), -1)
    return Matrix(in_large_pages(packed), _taken(bias), out, inputs, 4)


def _taken(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.bfloat16).contiguous()

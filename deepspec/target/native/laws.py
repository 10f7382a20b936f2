"""Laws of tokens as one call each: the softmax of a sampler, a draw from it, the likeliest token.

A row's results do not depend on the other rows nor on the number of threads, to the bit.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from deepspec.kernels import kernels

_SHARED = 1 << 15  # numbers from which on threads share the work

_Pointer, _Long, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def can_read(x: Tensor) -> bool:
    """Return whether the kernels are there and take such rows [..., columns]."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not (x.requires_grad and torch.is_grad_enabled())
        and x.numel() > 0
        and kernels() is not None
    )


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Logits [..., columns] that can be read → float32 softmax(logits / temperature)."""
    rows = logits.contiguous()
    made = rows.new_empty(rows.shape, dtype=torch.float32)
    bits = rows.element_size() * 8
    _call("probabilities", rows, _Long(bits), _Pointer(made.data_ptr()), heat=_Float(temperature))
    return made


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """float32 probs [rows, columns] and uniform [rows] in [0, 1) → int64 columns [rows], by inverse CDF."""
    rows, uniforms = probs.contiguous(), uniform.to(torch.float64).contiguous()
    made = rows.new_empty(len(rows), dtype=torch.int64)
    _call("draw", rows, _Pointer(uniforms.data_ptr()), _Pointer(made.data_ptr()))
    return made


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [rows, columns] that can be read → the first likeliest column of each row, int64, and its logit, float32.

    The logit is not a number where a row has one that is none.
    """
    rows = logits.contiguous()
    columns = rows.new_empty(len(rows), dtype=torch.int64)
    values = rows.new_empty(len(rows), dtype=torch.float32)
    bits = rows.element_size() * 8
    _call("best", rows, _Long(bits), _Pointer(columns.data_ptr()), _Pointer(values.data_ptr()))
    return columns, values


def _call(name: str, rows: Tensor, *rest: ctypes._SimpleCData, heat: ctypes.c_float | None = None) -> None:
    columns = rows.shape[-1]
    threads = torch.get_num_threads() if rows.numel() >= _SHARED else 1
    sizes = _Long(rows.numel() // columns), _Long(columns), *(() if heat is None else (heat,)), _Long(threads)
    getattr(kernels(), f"deepspec_{name}")(_Pointer(rows.data_ptr()), *rest, *sizes)

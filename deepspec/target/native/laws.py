"""Laws of tokens as one call each: the softmax of a sampler, a draw from it, the likeliest token.

A row's results do not depend on the other rows nor on the number of threads, to the bit.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from deepspec.kernels import function, kernels
from deepspec.target.native.matrix import readable


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("p", "q", "columns", "tokens", "places", "uniforms")),
        *((name, ctypes.c_int64) for name in ("drafted", "vocab", "width")),
    )


SHARED = 1 << 15  # numbers from which on threads share the work

_Pointer, _Long, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def can_read(x: Tensor) -> bool:
    """Return whether the kernels are there and take such rows [..., columns]."""
    return (
        x.is_cpu
        and x.dtype in (torch.float32, torch.bfloat16)
        and kernels() is not None
        and x.numel() > 0
        and not (x.requires_grad and torch.is_grad_enabled())
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
    rows, uniforms = probs.contiguous(), uniform.to(torch.float64).expand(probs.shape[0]).contiguous()
    made = rows.new_empty(rows.shape[0], dtype=torch.int64)
    _call("draw", rows, _Pointer(uniforms.data_ptr()), _Pointer(made.data_ptr()))
    return made


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [rows, columns] that can be read → the first likeliest column of each row, int64, and its logit, float32.

    The logit is not a number where a row has one that is none.
    """
    rows = logits.contiguous()
    columns = rows.new_empty(rows.shape[0], dtype=torch.int64)
    values = rows.new_empty(rows.shape[0], dtype=torch.float32)
    bits = rows.element_size() * 8
    _call("best", rows, _Long(bits), _Pointer(columns.data_ptr()), _Pointer(values.data_ptr()))
    return columns, values


def log_norm(logits: Tensor) -> Tensor:
    """bfloat16 logits [rows, columns] → their log-sum-exp, float32 [rows], to the bit that of `Matrix.log_norm`."""
    rows = readable("logits", logits, logits.shape)
    made = rows.new_empty(rows.shape[0], dtype=torch.float32)
    _call("log_norm_of", rows, _Pointer(made.data_ptr()))
    return made


def excess(p: Tensor, q: Tensor, columns: Tensor | None, scale: float) -> float:
    """Return Σ (scale·p − q)₊, float32 p [vocab] and q [columns] of these columns, int64, or of all; p sums to 1."""
    whole, own = p.contiguous(), q.contiguous()
    known = None if columns is None else columns.data_ptr()
    mass = ctypes.c_double()
    function("excess")(
        _Pointer(whole.data_ptr()),
        _Pointer(known),
        _Pointer(own.data_ptr()),
        _Long(len(own)),
        _Float(scale),
        ctypes.byref(mass),
    )
    return mass.value


def remainder(p: Tensor, q: Tensor, columns: Tensor | None, scale: float) -> tuple[Tensor, float]:
    """Return (scale·p − q)₊ [vocab] and its sum; operands as those of `excess`."""
    whole, own = p.contiguous(), q.contiguous()
    known = None if columns is None else columns.data_ptr()
    rest, mass = torch.empty_like(whole), ctypes.c_double()
    function("remainder")(
        _Pointer(whole.data_ptr()),
        _Pointer(known),
        _Pointer(own.data_ptr()),
        _Long(len(own)),
        _Long(len(whole)),
        _Float(scale),
        _Pointer(rest.data_ptr()),
        ctypes.byref(mass),
    )
    return rest, mass.value


def block(
    p: Tensor, q: Tensor, columns: Tensor | None, tokens: list[int], places: list[int], uniforms: Tensor
) -> tuple[int, int]:
    """Return how many tokens of a drawn chain stand by block verification, and the one that follows them.

    Args:
        p: float32 [1 + drafted, vocab], the target's laws at the anchor and behind each token.
        q: float32 [drafted or more, columns], the laws that the tokens were drawn from.
        columns: int64, the tokens that q's columns are; None: all.
        places: which column each token is.
        uniforms: float64 [1 + drafted] in [0, 1).
    """
    whole, own = p.contiguous(), q.contiguous()
    asked = torch.tensor([tokens, places])
    kept = None if columns is None else columns.data_ptr()
    drafted = len(tokens)
    struct = _Block(
        whole.data_ptr(),
        own.data_ptr(),
        kept,
        asked.data_ptr(),
        asked.data_ptr() + drafted * asked.element_size(),
        uniforms.data_ptr(),
        drafted,
        p.shape[1],
        q.shape[1],
    )
    accepted, following = ctypes.c_int64(), ctypes.c_int64()
    threads = torch.get_num_threads() if own.numel() >= SHARED else 1
    function("block")(ctypes.byref(struct), ctypes.byref(accepted), ctypes.byref(following), _Long(threads))
    return accepted.value, following.value


def top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """float32 values [rows, columns] that are not below 0 → the `count` largest of each row and their columns, int64.

    The largest come first, of equal ones the first. What is 0 or no number is not among them; where there are fewer,
    0 stands in its place.
    """
    rows = values.contiguous()
    made = rows.new_empty(rows.shape[0], count)
    columns = rows.new_empty(rows.shape[0], count, dtype=torch.int64)
    _call("top", rows, _Pointer(columns.data_ptr()), _Pointer(made.data_ptr()), _Long(count))
    return made, columns


def _call(name: str, rows: Tensor, *rest: ctypes._SimpleCData, heat: ctypes.c_float | None = None) -> None:
    columns = rows.shape[-1]
    threads = torch.get_num_threads() if rows.numel() >= SHARED else 1
    sizes = _Long(rows.numel() // columns), _Long(columns), *(() if heat is None else (heat,)), _Long(threads)
    function(name)(_Pointer(rows.data_ptr()), *rest, *sizes)

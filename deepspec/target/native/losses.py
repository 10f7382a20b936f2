"""Losses of a draft's laws against its target's, and gradients, as one call; the formulas: `training/losses.py`."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.kernels import kernels

_Pointer, _Long, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_COEFFICIENTS = ("ce", "kl", "tv", "lk", "lk_mixed", "decay", "least")


class _Losses(ctypes.Structure):
    _fields_ = (
        ("logits", _Pointer),
        ("bits", _Long),
        ("theirs", _Pointer),
        ("their_bits", _Long),
        *((name, _Pointer) for name in ("log_norms", "places", "labels")),
        *((name, _Long) for name in ("rows", "columns", "measured", "overlap")),
        *((name, _Float) for name in _COEFFICIENTS),
        *((name, _Pointer) for name in ("terms", "alphas", "chances")),
    )


class Coefficients(NamedTuple):
    """How much each term counts; `decay` is the k of λ = exp(−k α), `least` the smallest α that is divided by."""

    ce: float
    kl: float
    tv: float
    lk: float
    lk_mixed: float
    decay: float
    least: float


class Theirs(NamedTuple):
    """The target at n positions: logits [m, V] of m tokens, their log-normalisers [m], places int64 [n] among them.

    Without places each position has a token of its own, in order.
    """

    logits: Tensor
    log_norms: Tensor
    places: Tensor | None


def position_losses(
    logits: Tensor, theirs: Theirs | None, labels: Tensor, by: Coefficients, measured: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return terms [n, 3] (CE, KL and TV), α [n] and q(x*) [n]; logits become ∂loss/∂logits.

    Args:
        logits: [n, V] that can be read (`laws.can_read`), contiguous.
        theirs: logits that can be read too; None where only labels count.
        labels: int64 [n], columns; −1: none of them.
        measured: whether α and TV are asked for, which CE and KL do not need. They are not numbers else.
    """
    n, columns = logits.shape
    terms, alphas, chances = (logits.new_empty(*shape, dtype=torch.float32) for shape in ((n, 3), (n,), (n,)))
    labels = labels.contiguous()
    read = [None if each is None else each.contiguous() for each in theirs or (None, None, None)]
    law, norms, places = (None if each is None else each.data_ptr() for each in read)
    struct = _Losses(
        logits.data_ptr(),
        logits.element_size() * 8,
        law,
        theirs.logits.element_size() * 8 if theirs else 0,
        norms,
        places,
        labels.data_ptr(),
        n,
        columns,
        measured,
        bool(by.tv or by.lk or by.lk_mixed),
        *by,
        *(each.data_ptr() for each in (terms, alphas, chances)),
    )
    library = kernels()
    assert library is not None  # whoever asks has looked
    library.deepspec_losses(ctypes.byref(struct), _Long(torch.get_num_threads()))
    return terms, alphas, chances

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

    Raises:
        IndexError: a label that is no column, or a place that is no token.
        ValueError: logits in another order, or a term that needs the target's without them.
    """
    n, columns = logits.shape
    overlap = bool(by.tv or by.lk or by.lk_mixed)
    if not logits.is_contiguous() or (theirs is None and (overlap or by.kl or measured)):
        raise ValueError("logits are read in order, and all terms but CE need the target's")
    if n and int(labels.max()) >= columns:
        raise IndexError(f"a label is not one of {columns} columns")
    if theirs is not None:
        m, places = len(theirs.logits), theirs.places
        if n and (n != m if places is None else not 0 <= int(places.min()) <= int(places.max()) < m):
            raise IndexError(f"a place is not one of {m} tokens")
        theirs = theirs._replace(log_norms=theirs.log_norms.float())
    terms, alphas, chances = (logits.new_empty(*shape, dtype=torch.float32) for shape in ((n, 3), (n,), (n,)))
    labels = labels.contiguous()
    read = [None if each is None else each.contiguous() for each in theirs or (None, None, None)]
    law, log_norms, of = (None if each is None else each.data_ptr() for each in read)
    struct = _Losses(
        logits.data_ptr(),
        logits.element_size() * 8,
        law,
        theirs.logits.element_size() * 8 if theirs else 0,
        log_norms,
        of,
        labels.data_ptr(),
        n,
        columns,
        measured,
        overlap,
        *by,
        *(each.data_ptr() for each in (terms, alphas, chances)),
    )
    library = kernels()
    assert library is not None  # whoever asks has looked
    library.deepspec_losses(ctypes.byref(struct), _Long(torch.get_num_threads()))
    return terms, alphas, chances

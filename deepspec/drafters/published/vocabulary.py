"""What the columns of a reduced vocabulary stand for: `d2t` holds offsets with most trainers, token ids with some."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.errors import DeepSpecError


def draft_ids(d2t: Tensor | None, t2d: Tensor | None, columns: int, vocab_size: int) -> Tensor:
    """
    Return the target ids of a draft's columns, int64 [columns].

    Args:
        d2t: int64 [columns], id - column (offsets, what engines read) or the ids themselves; None: all tokens in order.
        t2d: bool [vocab_size], whether a token has a column. Where it is given, it decides how `d2t` is read. Else
            `d2t` is read as ids if it rises at every column: as offsets, no two neighbours would then be kept.

    Raises:
        DeepSpecError: neither reading gives each column a token of its own.
    """
    if d2t is None:
        if columns < vocab_size:
            raise DeepSpecError(
                f"the draft has {columns} of {vocab_size} tokens, and no d2t says which (nor can the head be shared)"
            )
        return torch.arange(columns)
    if d2t.shape != (columns,):
        raise DeepSpecError(f"d2t is {list(d2t.shape)}, expected [{columns}]")
    d2t = d2t.long()
    readings = [torch.arange(columns) + d2t, d2t]
    if t2d is None and columns > 1 and bool((d2t[1:] > d2t[:-1]).all()):
        readings.reverse()
    for ids in readings:
        if _one_each(ids, vocab_size) and (t2d is None or _marked(ids, t2d)):
            return ids
    if t2d is not None and any(_one_each(ids, vocab_size) for ids in readings):
        raise DeepSpecError("t2d does not mark the tokens that d2t leads to, neither as offsets nor as ids")
    raise DeepSpecError("d2t leads out of the vocabulary or twice to one token, both as offsets and as ids")


def _one_each(ids: Tensor, vocab_size: int) -> bool:
    inside = int(ids.min()) >= 0 and int(ids.max()) < vocab_size
    return inside and len(ids.unique()) == len(ids)


def _marked(ids: Tensor, t2d: Tensor) -> bool:
    """Whether t2d marks these tokens and no other; some trainers write a mask of ones for a whole vocabulary."""
    known = t2d.bool()
    return (
        len(known) > int(ids.max()) and bool(known[ids].all()) and int(known.sum()) in (len(ids), len(known))
    )

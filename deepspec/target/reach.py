"""Does every layer see as far back as transformers' own, to the token?

In 16 bits a window that is off by one is lost among the errors of rounding: one key in a thousand more. But whether a
token is seen at all is exact in every precision: where it is not, changing it changes no bit. So the states that come
into a layer are turned round over the first tokens, in each layer by itself, and the positions whose outputs change
must be those of transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deepspec.target.layerwise import Layerwise

FIRST, CHANGED = 4, 16  # tokens that are left alone, then tokens that are changed
SEEN = 0.01  # of a state's elements that change where a token is seen beyond doubt
Shares = list[Tensor]  # of each layer [n], of each position: the elements that change


@torch.inference_mode()
def first_difference(both: Layerwise) -> tuple[int, int, bool] | None:
    """Return the first (layer, position, whether ours sees more) where our reach is another than the model's own."""
    runs = zip((both.own, both.ours), both.plain, strict=True)
    theirs, ours = ([_changed(run, plain, both.inputs, turn) for turn in _TURNS] for run, plain in runs)
    for layer in range(len(both.inputs)):
        if any(float(shares[layer][:FIRST].max()) > 0 for shares in (*theirs, *ours)):
            continue  # what comes later changes it: experts that are run together are rounded together
        more = _beyond_doubt(ours, layer) & _nothing(theirs, layer)
        less = _beyond_doubt(theirs, layer) & _nothing(ours, layer)
        if bool((more | less).any()):
            position = int((more | less).nonzero()[0])
            return layer, position, bool(more[position])
    return None


def _beyond_doubt(shares: list[Shares], layer: int) -> Tensor:
    return torch.stack([share[layer] for share in shares]).amin(0) >= SEEN


def _nothing(shares: list[Shares], layer: int) -> Tensor:
    return torch.stack([share[layer] for share in shares]).amax(0) == 0


def _negated(states: Tensor) -> Tensor:
    return -states


def _rolled(states: Tensor) -> Tensor:
    return states.roll(7, -1)


_TURNS: tuple[Callable[[Tensor], Tensor], ...] = (_negated, _rolled)


def _changed(
    run: Callable[[list[Tensor]], list[Tensor]],
    plain: list[Tensor],
    inputs: list[Tensor],
    turn: Callable[[Tensor], Tensor],
) -> Shares:
    """Of each layer, which share of each position's output changes where its first inputs are turned."""
    turned = [states.clone() for states in inputs]
    for states in turned:
        states[FIRST : FIRST + CHANGED] = turn(states[FIRST : FIRST + CHANGED])
    return [(a != b).float().mean(-1).cpu() for a, b in zip(plain, run(turned), strict=True)]

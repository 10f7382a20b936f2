"""Is every layer in 16 bits as near to its exact output as transformers' own?

A scale or a rotation that is wrong by a few percent is lost in 16 bits among the errors that all layers below have
added up. A layer by itself, given the states that transformers' own layer was given, errs by one layer's rounding
alone; and its exact output is known, for transformers' own layer can be run in float32. So our error may be that of
transformers' own layer in 16 bits, and no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepspec.target.layerwise import Layerwise
from deepspec.target.passes import Reference, relative_errors

if TYPE_CHECKING:
    from deepspec.target.model import Target

TIMES = 1.5  # that our error may be of transformers' own; without a fault it is at most 1.1
PARTS = 4  # of the prompt, each by itself: a rotation may be right near the beginning alone
LEAST = 1e-4  # of a layer's doing: an error below it is none
HEAD = 0.01  # of its output, that the rounding of one product makes at most


@dataclass(frozen=True)
class Worse:
    """The first layer that is farther from its exact output than transformers' own."""

    layer: int
    position: int  # the first of the part of the prompt where it is
    ours: float  # median over the part's positions of the error, over the size of what the layer adds
    theirs: float

    def __str__(self) -> str:
        return (
            f"layer {self.layer} is off by {self.ours:.2g} of what it adds from position {self.position} on, where "
            f"rounding in transformers' own makes {self.theirs:.2g}"
        )


@torch.inference_mode()
def first_worse(both: Layerwise) -> Worse | None:
    """Return the first layer whose outputs are beyond the rounding of transformers' own."""
    exact = both.exact()
    theirs, ours = (
        [
            _beside_added(found, right, given)
            for found, right, given in zip(run, exact, both.inputs, strict=True)
        ]
        for run in both.plain
    )
    for layer, errors in enumerate(zip(ours, theirs, strict=True)):
        first = 0
        for mine, own in zip(*(error.chunk(PARTS) for error in errors), strict=True):
            error, rounding = float(mine.median()), float(own.median())
            if not error <= TIMES * max(rounding, LEAST):
                return Worse(layer, first, error, rounding)
            first += len(mine)
    return None


@torch.inference_mode()
def head_error(target: Target, theirs: Reference) -> float:
    """Return how far our head's output is from transformers' own for the same states; the median over positions."""
    found = target.logits(theirs.last.to(target.device)).to(theirs.logits.device)
    return float(relative_errors(found, theirs.logits).median())


def _beside_added(found: Tensor, exact: Tensor, given: Tensor) -> Tensor:
    """Return [n]: how far outputs [n, d] are from the exact ones, over the size of what the layer adds."""
    added = (exact - given.float()).norm(dim=-1)
    return (found.float() - exact).norm(dim=-1) / added.clamp_min(1e-30)

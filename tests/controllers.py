"""Curves and proposals that controllers decide by."""

from __future__ import annotations

import itertools

from deepspec.decoding.cost import CostCurve
from deepspec.decoding.tree import Proposal


def curve(first: float = 1.0, token: float = 0.1, draft: float = 0.2) -> CostCurve:
    """T = first + token · (n − 1), whatever the batch; drafting costs the same for any number."""
    points = [(1, first), (1001, first + 1000 * token)]
    return CostCurve({1: points, 64: points}, {1: draft, 64: draft})


def chain(*chances: float) -> Proposal:
    """A chain whose conditional confidences are `chances`."""
    return Proposal.chain(
        list(range(len(chances))), survival=list(itertools.accumulate(chances, float.__mul__))
    )

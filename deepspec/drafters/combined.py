"""Lookup first: where the context repeats itself the lookup drafter answers, else the trained one.

A lookup costs microseconds, so a long enough match saves the trained draft's whole pass. The choice depends on the
context alone: the proposal stays lossless under the rule of whichever drafter made it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspec.decoding.request import Sampling
from deepspec.drafters.base import Drafter, Proposal
from deepspec.drafters.lookup import LookupDrafter, LookupState


@dataclass
class CombinedState:
    lookup: LookupState
    trained: Any


class LookupFirst(Drafter):
    """Ask `lookup`; what it matches is proposed, anything else is left to `trained`."""

    def __init__(self, lookup: LookupDrafter, trained: Drafter):
        self.lookup = lookup
        self.trained = trained
        self.layers = trained.layers
        self.block_size = max(lookup.block_size, trained.block_size)

    def begin(self) -> CombinedState:
        return CombinedState(self.lookup.begin(), self.trained.begin())

    def extend(self, state: CombinedState, tokens: list[int], features: Tensor | None) -> None:
        self.lookup.extend(state.lookup, tokens, None)
        self.trained.extend(state.trained, tokens, features)

    def propose(
        self, state: CombinedState, anchor: int, sampling: Sampling, rng: torch.Generator
    ) -> Proposal:
        tokens = self.lookup.match(state.lookup, anchor)
        if tokens:
            return Proposal.chain(tokens)
        return self.trained.propose(state.trained, anchor, sampling, rng)

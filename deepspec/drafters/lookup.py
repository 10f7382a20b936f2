"""Lookup: what followed the last time the context ended like this. No training, almost no time.

An n-gram index over the request's own tokens (prompt lookup), kept incrementally: every run of `min_match` tokens maps
to where it last occurred.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepspec.decoding.request import Sampling
from deepspec.drafters.base import Drafter, Proposal

if TYPE_CHECKING:
    from deepspec.config import LookupParams


@dataclass
class LookupState:
    tokens: list[int] = field(default_factory=list)
    last: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram → index just after it


class LookupDrafter(Drafter):
    def __init__(self, block_size: int, min_match: int):
        self.block_size = block_size
        self.min_match = min_match

    @classmethod
    def config(cls, params: LookupParams) -> dict:
        return {
            "architectures": ["DeepSpecLookup"],
            "block_size": params.block_size,
            "min_match": params.min_match,
        }

    def begin(self) -> LookupState:
        return LookupState()

    def extend(self, state: LookupState, tokens: list[int], features: Tensor | None) -> None:
        for token in tokens:
            state.tokens.append(token)
            # A gram is entered one token late, so that the end of the context never finds itself.
            end = len(state.tokens) - 1
            if end >= self.min_match:
                state.last[tuple(state.tokens[end - self.min_match : end])] = end

    def propose(self, state: LookupState, anchor: int, sampling: Sampling, rng: torch.Generator) -> Proposal:
        return Proposal.chain(self.match(state, anchor))

    def match(self, state: LookupState, anchor: int) -> list[int]:
        """γ tokens after the latest match of the end of `tokens + [anchor]`, or none.

        Where the context ends before γ tokens are had, the repetition is taken to go on.
        """
        context = (*state.tokens[len(state.tokens) - self.min_match + 1 :], anchor)
        after = state.last.get(context)
        if after is None:
            return []
        rest = [*state.tokens[after:], anchor]
        return [rest[i % len(rest)] for i in range(self.block_size)]

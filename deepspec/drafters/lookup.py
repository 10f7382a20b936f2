"""Lookup: the continuation of the longest earlier match of the context's end. No training, almost no time.

An n-gram index over the request's own tokens (prompt lookup), kept incrementally: every suffix of length
`min_match` maps to where it last occurred; the match found is then extended backwards, to know how far to trust it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from deepspec.config import LookupParams
from deepspec.decoding.request import Sampling
from deepspec.drafters.base import Drafter, Proposal
from deepspec.target import Target

_TRUSTED = 64  # longer matches are not told apart


@dataclass
class LookupState:
    tokens: list[int] = field(default_factory=list)
    last: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram → index just after it


class LookupDrafter(Drafter):
    def __init__(self, block_size: int, min_match: int):
        self.block_size = block_size
        self.min_match = min_match

    @classmethod
    def load(cls, config: dict, directory: Path, target: Target) -> LookupDrafter:
        return cls(config["block_size"], config["min_match"])

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
        return Proposal.chain(self.match(state, anchor)[0])

    def match(self, state: LookupState, anchor: int) -> tuple[list[int], int]:
        """The continuation (at most γ tokens) after the latest match of `tokens + [anchor]`, and its length."""
        tokens = state.tokens
        context = [*tokens[len(tokens) - self.min_match + 1 :], anchor] if self.min_match > 1 else [anchor]
        after = state.last.get(tuple(context)) if len(context) == self.min_match else None
        if after is None:
            return [], 0
        length, size = self.min_match, len(tokens)
        while length < _TRUSTED and after > length and tokens[after - length - 1] == tokens[size - length]:
            length += 1
        return self._continuation([*tokens[after:], anchor]), length

    def _continuation(self, rest: list[int]) -> list[int]:
        """γ tokens from the match on; where the context ends first, the repetition is taken to go on."""
        return [rest[i % len(rest)] for i in range(self.block_size)]

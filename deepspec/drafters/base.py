"""What a drafter is: it follows the committed tokens of a request and proposes what may come next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deepspec.decoding.request import Sampling


@dataclass(frozen=True)
class Proposal:
    """A token tree below the anchor; node i carries `tokens[i]` under `parents[i]` (-1: the anchor).

    Parents come before their children. A chain is the tree with parents -1, 0, 1, ... A proposal is deterministic
    (a function of the context alone) unless `probs` is given: then it is a chain whose token k was drawn from
    `probs[k]`, over the whole vocabulary or over the target ids `columns`.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probs: Tensor | None = None  # [n, vocab or len(columns)]
    columns: Tensor | None = None  # target id of each column of probs
    vocab_size: int = 0

    @staticmethod
    def chain(tokens: list[int], **extra: Any) -> Proposal:
        return Proposal(tokens, list(range(-1, len(tokens) - 1)), **extra)

    @cached_property
    def depths(self) -> list[int]:
        """1 for a child of the anchor."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def cut(self, depth: int) -> Proposal:
        """Without the nodes deeper than `depth`."""
        if max(self.depths, default=0) <= depth:
            return self
        kept = [i for i, d in enumerate(self.depths) if d <= depth]
        place = {-1: -1} | {node: i for i, node in enumerate(kept)}
        return replace(
            self,
            tokens=[self.tokens[i] for i in kept],
            parents=[place[self.parents[i]] for i in kept],
            probs=None if self.probs is None else self.probs[: len(kept)],
        )

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(-1, len(self.parents) - 1))

    def children(self) -> dict[tuple[int, int], int]:
        """(parent, token) → node."""
        return {
            (parent, token): i
            for i, (parent, token) in enumerate(zip(self.parents, self.tokens, strict=True))
        }

    def law(self, node: int) -> Tensor:
        """The probabilities [vocab] from which node's token was drawn."""
        if self.columns is None:
            return self.probs[node]
        full = self.probs.new_zeros(self.vocab_size)
        full[self.columns] = self.probs[node]
        return full


class Drafter(ABC):
    """Proposes tokens for requests; one state each, made by `begin`.

    Attributes:
        layers: ids of the target layers whose outputs `extend` wants, concatenated in this order.
        block_size: γ, the longest path it proposes.
    """

    layers: tuple[int, ...] = ()
    block_size: int = 0

    @abstractmethod
    def begin(self) -> Any:
        """The state of a fresh request."""

    @abstractmethod
    def extend(self, state: Any, tokens: list[int], features: Tensor | None) -> None:
        """Tokens whose target pass is done were committed; features [len(tokens), len(layers)·d] are theirs."""

    @abstractmethod
    def propose(self, state: Any, anchor: int, sampling: Sampling, rng: torch.Generator) -> Proposal:
        """A proposal to follow `anchor`, the last committed token (its own target pass is yet to come)."""

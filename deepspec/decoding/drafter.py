"""What a drafter is: it follows the committed tokens of requests and proposes what may come next.

A `Drafter` holds weights and may be shared; a `Session` holds what it remembers of the requests in flight, one row
each, the same rows as the engine's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspec.decoding.growths import LawsAtOnce, grow_at_once
from deepspec.decoding.request import Sampling
from deepspec.decoding.shapes import CHAIN, Shape
from deepspec.decoding.tree import DraftLogits, Growth, Parent, Proposal, grow
from deepspec.target.inference import inference
from deepspec.target.model import Target

__all__ = ["DraftRequest", "Drafter", "GrowingSession", "Proposal", "Session", "settle"]


@dataclass(frozen=True)
class DraftRequest:
    """A request for a proposal to follow `anchor`, the row's last committed token (its target pass is yet to come)."""

    row: int
    anchor: int
    sampling: Sampling
    rng: torch.Generator  # the request's own, on the CPU
    room: int  # no path may be longer (>= 1)
    shape: Shape = CHAIN


class Session(ABC):
    """A drafter at work on up to `slots` requests."""

    @abstractmethod
    def begin(self, row: int) -> None:
        """Give the row to a fresh request; what the row held before is forgotten."""

    @abstractmethod
    def extend(self, row: int, tokens: list[int], features: Tensor | None) -> None:
        """Tokens whose target pass is done were committed; features [len(tokens), len(layers)·d] are theirs."""

    def share(self, source: int, row: int, tokens: list[int]) -> bool:
        """Take the first tokens of another row's request for those of a fresh row, as `extend` would have.

        At least one more token of the fresh row comes with features. False, and nothing taken: it wants theirs too.
        """
        return False

    @abstractmethod
    def propose(self, asks: list[DraftRequest]) -> list[Proposal]:
        """One proposal for each ask (possibly empty), in their order; the rows differ."""

    @abstractmethod
    def move(self, source: int, destination: int) -> None:
        """Move the request of row `source` to row `destination`, where it goes on."""


class GrowingSession(Session):
    """A session of a network: what it proposes is grown from its laws, for all requests together.

    Attributes:
        drafter: with the `vocabulary` that its laws are over.
    """

    drafter: Any

    @abstractmethod
    def ready(self, row: int) -> bool:
        """Whether anything can be drafted yet: a one-token prompt has no features, for example."""

    @abstractmethod
    def laws(self, asks: list[DraftRequest], growths: list[Growth]) -> Callable[[list[Parent]], DraftLogits]:
        """Return what `grow` asks for the laws of children; all asks are ready."""

    @inference
    def propose(self, asks: list[DraftRequest]) -> list[Proposal]:
        proposals = [Proposal()] * len(asks)
        ready = [i for i, ask in enumerate(asks) if self.ready(ask.row)]
        if ready:
            drafted = self._grow([asks[i] for i in ready])
            for i, proposal in zip(ready, drafted, strict=True):
                proposals[i] = proposal
        return proposals

    def _grow(self, asks: list[DraftRequest]) -> list[Proposal]:
        drafter = self.drafter
        growths = [
            ask.shape.growth(drafter.vocabulary, ask.sampling, min(ask.room, drafter.block_size), ask.rng)
            for ask in asks
        ]
        anchors, laws = [ask.anchor for ask in asks], self.laws(asks, growths)
        if isinstance(laws, LawsAtOnce) and grow_at_once(growths, anchors, laws):
            return [growth.proposal() for growth in growths]
        return grow(growths, anchors, laws)


class Drafter(ABC):
    """Proposes tokens for the engine to verify.

    Attributes:
        layers: ids of the target layers whose outputs `Session.extend` wants, concatenated in this order.
        block_size: γ, the longest path it proposes.
        vocab_size: of the target it was made for; None fits any.
        looks_up: whether a proposal may be free: found in the text, without a pass of a draft.
        grows_trees: whether a tree of the likeliest paths takes no longer than a chain.
        digest: of its directory; None where it was not loaded from one.
        temperatures: of its confidence at each position, by mode (`decoding.calibration`); None where it has none.
    """

    layers: tuple[int, ...] = ()
    block_size: int = 0
    vocab_size: int | None = None
    looks_up: bool = False
    grows_trees: bool = False
    digest: str | None = None
    temperatures: dict[str, list[float]] | None = None

    @property
    def trained(self) -> Drafter:
        """The draft itself, without a lookup that is asked first."""
        return self

    @abstractmethod
    def session(self, slots: int) -> Session:
        """Start a session for up to `slots` requests at once."""


def settle(shape: Shape, target: Target, drafter: Drafter | None) -> Shape:
    """Return the shape as this drafter grows it for this target."""
    return shape.settled(drafter is not None and drafter.trained.grows_trees and target.verdict.trees)

"""Lookup: what followed the last time the context ended like this. No training, almost no time.

An n-gram index over the request's own tokens (prompt lookup), kept incrementally: every run of `min_match` tokens maps
to where it last occurred. `suffix.py` is the same idea for matches of any length.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from torch import Tensor

from deepspec.decoding.drafter import Drafter, DraftRequest, Proposal, Session
from deepspec.drafters.algorithm import Algorithm
from deepspec.drafters.params import LookupParams
from deepspec.section import Section


class Index(Protocol):
    """What one request's tokens are remembered in."""

    def append(self, token: int) -> None:
        """Take in a token whose target pass is done."""

    def proposal(self, anchor: int, room: int) -> Proposal:
        """At most `room` tokens to follow the tokens appended so far and `anchor`."""


class IndexSession(Session):
    """A session of a drafter that knows nothing but the tokens: an index a row, made by `make`."""

    def __init__(self, make: Callable[[], Index], block_size: int, slots: int):
        self.make = make
        self.block_size = block_size
        self.rows = [make() for _ in range(slots)]

    def begin(self, row: int) -> None:
        self.rows[row] = self.make()

    def extend(self, row: int, tokens: list[int], features: Tensor | None) -> None:
        for token in tokens:
            self.rows[row].append(token)

    def propose(self, asks: list[DraftRequest]) -> list[Proposal]:
        return [self.rows[ask.row].proposal(ask.anchor, self._room(ask)) for ask in asks]

    def move(self, source: int, destination: int) -> None:
        self.rows[destination], self.rows[source] = self.rows[source], self.rows[destination]

    def _room(self, ask: DraftRequest) -> int:
        """Return how long a match may be: one path, whatever shape is asked for, may take all of the shape's nodes."""
        return min(self.block_size, ask.room, ask.shape.nodes or self.block_size)


class NGramIndex:
    """The latest place of every run of `n` tokens."""

    def __init__(self, n: int):
        self.n = n
        self.tokens: list[int] = []
        self.last: dict[tuple[int, ...], int] = {}  # run → index just after it

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if len(self.tokens) >= self.n:
            self.last[tuple(self.tokens[-self.n :])] = len(self.tokens)

    def proposal(self, anchor: int, room: int) -> Proposal:
        # The anchor is not in `tokens` yet, so the end of the context never finds itself.
        end = (*self.tokens[len(self.tokens) - self.n + 1 :], anchor)
        after = self.last.get(end)
        if after is None:
            return Proposal()
        return Proposal.chain(continued(self.tokens, after, anchor, room), free=True)


def continued(tokens: list[int], start: int, anchor: int, count: int) -> list[int]:
    """`count` tokens of `tokens + [anchor]` from `start` on; past the end the repetition is taken to go on."""
    rest = tokens[start : start + count]
    if len(rest) < count:
        rest.append(anchor)
    return [rest[i % len(rest)] for i in range(count)]


class TrainingFreeDrafter(Drafter):
    """Proposes at most `block_size` tokens where at least `min_match` tokens of the context occurred before."""

    architecture: ClassVar[str]  # of config.json
    looks_up = True

    def __init__(self, block_size: int, min_match: int):
        self.block_size = block_size
        self.min_match = min_match

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds: all there is of such a draft."""
        return {
            "architectures": [self.architecture],
            "block_size": self.block_size,
            "min_match": self.min_match,
        }

    @classmethod
    def algorithm(cls, params: type[Section]) -> Algorithm:
        """Its entry in the registry."""
        return Algorithm(
            params,
            (cls.architecture,),
            load=lambda checkpoint, target: cls(
                checkpoint.config["block_size"], checkpoint.config["min_match"]
            ),
            make=lambda section: cls(section.block_size, section.min_match),
        )

    @abstractmethod
    def session(self, slots: int) -> IndexSession: ...


class LookupDrafter(TrainingFreeDrafter):
    """Proposes the `block_size` tokens that followed the last `min_match` ones where they last occurred."""

    architecture = "DeepSpecLookup"

    def session(self, slots: int) -> IndexSession:
        return IndexSession(lambda: NGramIndex(self.min_match), self.block_size, slots)


ALGORITHM = LookupDrafter.algorithm(LookupParams)

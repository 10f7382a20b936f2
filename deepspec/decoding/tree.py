"""Draft trees: what is proposed below an anchor, and how a drafter's laws grow into it.

A tree of any shape (`shapes.py`) grows level by level. At each level the drafter is asked for the laws of all open
nodes at once (`grow`), so a sequential head runs once a depth, however wide the tree and however many the requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from deepspec.decoding.request import Sampling

MAX_NODES = 256  # of a tree


@dataclass(frozen=True)
class Proposal:
    """A token tree below the anchor; node i carries `tokens[i]` under `parents[i]` (-1: the anchor).

    Parents come before their children. A chain is the tree with parents -1, 0, 1, ... A proposal is deterministic
    (a function of the context alone) unless `probs` is given: then the children of a node were drawn one after the
    other, in the order of their indices and without replacement, from the node's draft law.

    `survival[i]` estimates the chance that the whole path down to node i is accepted; it never grows along a path.
    Of a sampled node it must not depend on the node's own token (non-anticipation, see `scheduler.py`).
    A `free` proposal was looked up: it cost no pass of a draft model.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probs: Tensor | None = None  # [laws, vocab or len(columns)]
    laws: list[int] | None = None  # node → the row of `probs` it was drawn from; None: node i from row i
    columns: Tensor | None = None  # target id of each column of probs
    places: list[int] | None = None  # node → the column of its token; None: looked for in `columns`
    vocab_size: int = 0
    survival: list[float] | None = None
    free: bool = False

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
        return self.keep([i for i, d in enumerate(self.depths) if d <= depth])

    def keep(self, nodes: list[int]) -> Proposal:
        """Only `nodes` (ascending; the parent of each is among them)."""
        if len(nodes) == len(self.tokens):
            return self
        place = {-1: -1} | {node: i for i, node in enumerate(nodes)}
        laws = self.laws if self.laws is not None else range(len(self.tokens))
        return replace(
            self,
            tokens=[self.tokens[i] for i in nodes],
            parents=[place[self.parents[i]] for i in nodes],
            laws=None if self.probs is None else [laws[i] for i in nodes],
            places=None if self.places is None else [self.places[i] for i in nodes],
            survival=None if self.survival is None else [self.survival[i] for i in nodes],
        )

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(-1, len(self.parents) - 1))

    @property
    def likeliest_path(self) -> list[int]:
        """The nodes of the chain of first children: of a tree whose siblings stand in order, the likeliest ones."""
        first: dict[int, int] = {}
        for node, parent in enumerate(self.parents):
            first.setdefault(parent, node)
        path, node = [], -1
        while (node := first.get(node, -1)) >= 0:
            path.append(node)
        return path

    def judged(self, accepted: list[int]) -> int:
        """Return how many levels were judged where the path of nodes `accepted` stood: one more if it goes on."""
        last = accepted[-1] if accepted else -1
        return len(accepted) + (last in self.parents)

    def children(self) -> dict[tuple[int, int], int]:
        """(parent, token) → node."""
        return {
            (parent, token): i
            for i, (parent, token) in enumerate(zip(self.parents, self.tokens, strict=True))
        }

    def row(self, node: int) -> Tensor:
        """Return the row of `probs`, [columns], that node's token was drawn from.

        A younger sibling was drawn once its elders were taken out of it.
        """
        if self.probs is None:
            raise ValueError("a deterministic proposal was drawn from no law")
        return self.probs[node if self.laws is None else self.laws[node]]

    def law(self, node: int) -> Tensor:
        """Return the same over the whole vocabulary, [vocab]."""
        row = self.row(node)
        if self.columns is None:
            return row
        full = row.new_zeros(self.vocab_size)
        full[self.columns] = row
        return full

    def chance(self, node: int) -> float:
        """Return the probability that node's token had where it was drawn."""
        if self.places is not None:
            return float(self.row(node)[self.places[node]])
        token = self.tokens[node]
        return float(self.row(node)[token if self.columns is None else self.columns == token])


@dataclass(frozen=True)
class Vocabulary:
    """What the columns of a drafter's logits mean: target ids, all of them or those in `columns`."""

    size: int
    columns: Tensor | None = None  # int64 [columns], on the CPU
    ids: list[int] | None = None  # the same as a list

    def token(self, column: int) -> int:
        return column if self.ids is None else self.ids[column]


class Parent(NamedTuple):
    """A node whose children are asked for."""

    growth: int  # which request
    node: int  # -1: the anchor
    token: int
    depth: int  # 0: the anchor


class DraftLogits(NamedTuple):
    """A drafter's answer for m parents."""

    logits: Tensor  # [m, columns], of the parents' children
    confidence: list[float] | None = (
        None  # chance that a token drawn from the law survives, before it is drawn
    )


class Growth(ABC):
    """One proposal in the making. `frontier` are the nodes whose children are wanted next; none when it is done."""

    def __init__(self, vocabulary: Vocabulary, sampling: Sampling, depth: int):
        self.vocabulary, self.sampling, self.depth = vocabulary, sampling, depth
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.frontier: list[int] = [-1] if depth > 0 else []

    @abstractmethod
    def feed(self, laws: DraftLogits) -> None:
        """Take the laws of the frontier, add children, set the next frontier."""

    @classmethod
    def feed_all(cls, fed: Sequence[tuple[Any, DraftLogits]]) -> None:
        """Feed several growths of this kind, each its laws; a kind that can takes all laws at once."""
        for growth, laws in fed:
            growth.feed(laws)

    @abstractmethod
    def proposal(self) -> Proposal:
        """Return what has grown."""


def grow(
    growths: list[Growth], anchors: list[int], expand: Callable[[list[Parent]], DraftLogits]
) -> list[Proposal]:
    """Grow all proposals together; `expand` is called once a level with the open nodes of all of them."""
    depth = 0
    while parents := [
        Parent(i, node, growth.tokens[node] if node >= 0 else anchors[i], depth)
        for i, growth in enumerate(growths)
        for node in growth.frontier
    ]:
        logits, confidence = expand(parents)
        start = 0
        fed: dict[type[Growth], list[tuple[Growth, DraftLogits]]] = {}
        for growth in growths:
            end = start + len(growth.frontier)
            if end > start:
                laws = DraftLogits(logits[start:end], confidence and confidence[start:end])
                fed.setdefault(type(growth), []).append((growth, laws))
            start = end
        for kind, own in fed.items():
            kind.feed_all(own)
        depth += 1
    return [growth.proposal() for growth in growths]

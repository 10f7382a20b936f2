"""The shapes of draft trees: chain, static, beam, best-first, sampled without replacement, and what is best of them.

They are choices of params.yaml, which is read without torch: `growths.py` has how each of them grows.

Static, beam and best-first trees are functions of the context alone, whatever the temperature: they rank tokens by the
draft's law (that of the request's own sampler at temperature > 0, softmax of the logits at 0), so the walk verifies
them. A node's `survival` is then its path probability. Tokens of probability 0 are never proposed.

Each level of a growth costs one ranking or one drawing for all its open nodes together.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from functools import cached_property
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from deepspec.section import choice, tag

if TYPE_CHECKING:
    import torch

    from deepspec.decoding.request import Sampling
    from deepspec.decoding.tree import Growth, Vocabulary

Size = Annotated[int, Field(ge=1)]
RankPath = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


def _ordered(paths: tuple[RankPath, ...]) -> tuple[RankPath, ...]:
    """Shortest first. Each path's prefixes must be among them, and none twice."""
    known = {(), *paths}
    for i, path in enumerate(paths):
        if path[:-1] not in known:
            found = {"path": list(path), "prefix": list(path[:-1])}
            raise PydanticCustomError("static_tree", "path {path} needs {prefix} beside it", found)
        if path in paths[:i]:
            raise PydanticCustomError("static_tree", "path {path} is given twice", {"path": list(path)})
    return tuple(sorted(paths, key=lambda path: (len(path), path)))


class Shape(ABC):
    """How a tree grows. `nodes` is the most that it can hold, `depth` its longest path (None: the drafter's).

    `draws` says what is drawn from the draft's law at temperature > 0: a "chain", a "tree", or nothing (None).
    """

    draws: str | None = None

    @property
    @abstractmethod
    def depth(self) -> int | None:
        """Return the longest path; None: the drafter's block."""

    @property
    @abstractmethod
    def nodes(self) -> int | None:
        """Return the most nodes; None: as many as the drafter's block allows."""

    def levels(self, most: int) -> int:
        """Levels to grow where at most `most` may be."""
        return most if self.depth is None else min(self.depth, most)

    def settled(self, trees: bool) -> Shape:
        """Return the shape itself, or what it is where trees cannot be verified or cost more than a chain to draft."""
        return self

    @property
    def greedy(self) -> Shape:
        """Return what is drafted at temperature 0, wherever it is drafted."""
        return self

    @abstractmethod
    def growth(self, vocabulary: Vocabulary, sampling: Sampling, depth: int, rng: torch.Generator) -> Growth:
        """Begin a growth of at most `depth` levels."""


@choice
class Chain(Shape):
    """One path: argmax at T = 0, else sampled from the drafter's law through the request's own sampler."""

    type: Literal["chain"] = tag(default="chain", kw_only=True)
    depth: int | None = Field(default=None, ge=1, description="None: the drafter's block size.")

    draws = "chain"

    @property
    def nodes(self) -> int | None:
        return self.depth

    def growth(self, vocabulary: Vocabulary, sampling: Sampling, depth: int, rng: torch.Generator) -> Growth:
        from deepspec.decoding.growths import ChainGrowth

        return ChainGrowth(vocabulary, sampling, self.levels(depth), rng)


CHAIN = Chain()


@choice
class Static(Shape):
    """A tree given by paths of child ranks, as Medusa's choices (arXiv 2401.10774).

    (1, 0) is the likeliest child of the second likeliest child of the anchor.
    """

    type: Literal["static"] = tag(default="static", kw_only=True)
    paths: Annotated[tuple[RankPath, ...], AfterValidator(_ordered)] = Field(
        min_length=1, description="In any order; the prefixes of each must be among them."
    )

    @classmethod
    def likeliest(cls, chances: list[float], nodes: int, depth: int) -> Static:
        """Return the `nodes` best paths where, at every depth, the child of rank r is right with `chances[r]`."""
        paths: list[tuple[int, ...]] = []
        heap: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
        while heap and len(paths) <= nodes:
            chance, path = heapq.heappop(heap)
            paths.append(path)
            if len(path) < depth:
                for rank, own in enumerate(chances):
                    heapq.heappush(heap, (chance * own, (*path, rank)))
        return cls(tuple(paths[1:]))

    @property
    def depth(self) -> int:
        return len(self.paths[-1])

    @property
    def nodes(self) -> int:
        return len(self.paths)

    @cached_property
    def below(self) -> dict[tuple[int, ...], list[int]]:
        """Path → the ranks of its children, ascending; leaves are absent."""
        below: dict[tuple[int, ...], list[int]] = {}
        for path in self.paths:
            below.setdefault(path[:-1], []).append(path[-1])
        return below

    def growth(self, vocabulary: Vocabulary, sampling: Sampling, depth: int, rng: torch.Generator) -> Growth:
        from deepspec.decoding.growths import StaticGrowth

        return StaticGrowth(vocabulary, sampling, self.levels(depth), self.below)


@choice
class Beam(Shape):
    """EAGLE-2's tree (arXiv 2406.16858).

    At each level the `width` likeliest paths are expanded to `width` children each; at the end the `nodes` likeliest
    of all are kept. depth None: the drafter's block.
    """

    type: Literal["beam"] = tag(default="beam", kw_only=True)
    width: Size = 8
    depth: Size | None = None
    nodes: Size = 24

    def growth(self, vocabulary: Vocabulary, sampling: Sampling, depth: int, rng: torch.Generator) -> Growth:
        from deepspec.decoding.growths import RankedGrowth

        depth = self.levels(depth)
        return RankedGrowth(vocabulary, sampling, depth, [self.width] * depth, self.nodes, self.width)


@choice
class BestFirst(Shape):
    """The `nodes` likeliest paths of all whose tokens are among their parents' `width` likeliest children.

    That is the tree which a heap ordered by path probability grows node by node: a child is never likelier than its
    parent. Grown level by level instead, it needs one call of the drafter a depth: a path less likely than `nodes`
    others can be dropped as soon as it is seen, with all that would grow below it. depth None: the drafter's block.
    """

    type: Literal["best_first"] = tag(default="best_first", kw_only=True)
    width: Size = 8
    depth: Size | None = None
    nodes: Size = 24

    def growth(self, vocabulary: Vocabulary, sampling: Sampling, depth: int, rng: torch.Generator) -> Growth:
        from deepspec.decoding.growths import RankedGrowth

        depth = self.levels(depth)
        return RankedGrowth(vocabulary, sampling, depth, [self.width] * depth, self.nodes, self.nodes)


@choice
class Sampled(Shape):
    """`branching[d]` children below each node at depth d, drawn one after the other without replacement.

    They come from the draft's law through the request's own sampler; where that allows fewer tokens, there are fewer
    children. At temperature 0 the likeliest tokens take the place of the drawn ones, and the tree is deterministic.
    """

    type: Literal["sampled"] = tag(default="sampled", kw_only=True)
    branching: tuple[Size, ...] = Field(
        (8, 4, 2, 1), min_length=1, description="Most children a node, by depth."
    )
    budget: Size | None = Field(
        24,
        description="Nodes kept, the likeliest to survive (at temperature 0: the likeliest paths); None: all. With a "
        "wide branching this is a best-first tree of drawn tokens.",
    )

    draws = "tree"

    @property
    def depth(self) -> int:
        return len(self.branching)

    @property
    def nodes(self) -> int:
        whole = sum(accumulate(self.branching, mul))
        return whole if self.budget is None else min(self.budget, whole)

    def growth(self, vocabulary: Vocabulary, sampling: Sampling, depth: int, rng: torch.Generator) -> Growth:
        from deepspec.decoding.growths import RankedGrowth, SampledGrowth

        depth = self.levels(depth)
        if sampling.temperature == 0:
            return RankedGrowth(vocabulary, sampling, depth, self.branching, self.nodes, self.nodes)
        return SampledGrowth(vocabulary, sampling, depth, self.branching, self.nodes, rng)


@choice
class Auto(Shape):
    """At temperature 0 a best-first tree, where the drafter grows one in the time of a chain; else a chain.

    Of such a tree a controller verifies what pays: all of it, its likeliest path, or nothing; and where trees have not
    paid it asks for chains (`Controller.shape`). Where tokens are drawn the likeliest paths would stand less often than
    a drawn chain does.
    """

    type: Literal["auto"] = tag(default="auto", kw_only=True)
    width: Size = 8
    budget: int = Field(default=16, ge=1, le=256, description="Nodes of the tree.")

    draws = "chain"

    @property
    def depth(self) -> None:
        return None

    @property
    def nodes(self) -> None:
        return None  # of a chain, and of what is looked up

    @property
    def greedy(self) -> BestFirst:
        return BestFirst(width=self.width, nodes=self.budget)

    def settled(self, trees: bool) -> Shape:
        return self if trees else CHAIN

    def growth(self, vocabulary: Vocabulary, sampling: Sampling, depth: int, rng: torch.Generator) -> Growth:
        return (CHAIN if sampling.temperature else self.greedy).growth(vocabulary, sampling, depth, rng)


AUTO = Auto()
AnyShape = Annotated[Auto | Chain | Static | Beam | BestFirst | Sampled, Field(discriminator="type")]

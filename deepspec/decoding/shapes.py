"""The shapes of draft trees beside the chain: static, beam, best-first, and sampled without replacement.

All but `Sampled` are functions of the context alone, whatever the temperature: they rank tokens by the draft's law
(that of the request's own sampler at temperature > 0, softmax of the logits at 0), so the walk verifies them. A
node's `survival` is then its path probability. Tokens of probability 0 are never proposed.

Each level of a growth costs one ranking or one drawing for all its open nodes together.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from operator import mul
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from torch import Tensor

from deepspec.decoding.request import Sampling
from deepspec.decoding.sampling import draw, probabilities
from deepspec.decoding.tree import Chain, DraftLogits, Growth, Proposal, Shape, Vocabulary
from deepspec.section import choice, tag

_PLAIN = Sampling(temperature=1.0)
_RUN = 64
_GUESS = 0.5  # the confidence of a law that comes without one, for choosing among nodes


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
        return _StaticGrowth(vocabulary, sampling, self.levels(depth), self.below)


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
        depth = self.levels(depth)
        return _RankedGrowth(vocabulary, sampling, depth, [self.width] * depth, self.nodes, self.width)


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
        depth = self.levels(depth)
        return _RankedGrowth(vocabulary, sampling, depth, [self.width] * depth, self.nodes, self.nodes)


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
        depth = self.levels(depth)
        if sampling.temperature == 0:
            return _RankedGrowth(vocabulary, sampling, depth, self.branching, self.nodes, self.nodes)
        return _SampledGrowth(vocabulary, sampling, depth, self.branching, self.nodes, rng)


class _TreeGrowth(Growth):
    """Nodes with their survival; the children of a level follow one another in their parents' order."""

    def __init__(self, vocabulary: Vocabulary, sampling: Sampling, depth: int):
        super().__init__(vocabulary, sampling, depth)
        self.survival: list[float] = []
        self.level = 0

    def above(self, node: int) -> float:
        return self.survival[node] if node >= 0 else 1.0

    def add(self, parent: int, column: int, survival: float) -> None:
        self.tokens.append(self.vocabulary.token(column))
        self.parents.append(parent)
        self.survival.append(survival)

    def proposal(self) -> Proposal:
        return Proposal(self.tokens, self.parents, survival=self.survival)


class _StaticGrowth(_TreeGrowth):
    def __init__(self, vocabulary: Vocabulary, sampling: Sampling, depth: int, below: dict):
        super().__init__(vocabulary, sampling, depth)
        self.below = below
        self.paths: list[tuple[int, ...]] = []

    def feed(self, laws: DraftLogits) -> None:
        first, self.level = len(self.tokens), self.level + 1
        places = [self.paths[node] if node >= 0 else () for node in self.frontier]
        most = 1 + max(self.below[path][-1] for path in places)
        rows = zip(self.frontier, places, *_likeliest(laws.logits, self.sampling, most), strict=True)
        for parent, path, probs, columns in rows:
            for rank in self.below[path]:
                if rank < len(probs) and probs[rank] > 0:
                    self.paths.append((*path, rank))
                    self.add(parent, columns[rank], self.above(parent) * probs[rank])
        new = range(first, len(self.tokens)) if self.level < self.depth else ()
        self.frontier = [node for node in new if self.paths[node] in self.below]


class _BestGrowth(_TreeGrowth):
    """Keeps the `nodes` of highest survival seen so far.

    Of equal ones the earlier stay, so a parent is always kept with its child, and a child that is dropped would only
    have had children to drop.
    """

    def __init__(self, vocabulary: Vocabulary, sampling: Sampling, depth: int, nodes: int):
        super().__init__(vocabulary, sampling, depth)
        self.nodes = nodes
        self.best: list[int] = []  # highest first

    def close_level(self, first: int, beam: int) -> None:
        """Choose anew once the level from node `first` on is there; expand the `beam` best of its nodes."""
        pool = [*self.best, *range(first, len(self.tokens))]
        self.best = sorted(pool, key=lambda node: (-self.survival[node], node))[: self.nodes]
        self.level += 1
        new = [node for node in self.best if node >= first]
        self.frontier = sorted(new[:beam]) if self.level < self.depth else []

    def proposal(self) -> Proposal:
        return super().proposal().keep(sorted(self.best))


class _RankedGrowth(_BestGrowth):
    """The likeliest paths, with at most `widths[d]` children below a node at depth d."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        sampling: Sampling,
        depth: int,
        widths: Sequence[int],
        nodes: int,
        beam: int,
    ):
        super().__init__(vocabulary, sampling, depth, nodes)
        self.widths, self.beam = widths, beam

    def feed(self, laws: DraftLogits) -> None:
        first = len(self.tokens)
        # What is no likelier than the last of a full set can never enter it.
        floor = self.survival[self.best[-1]] if len(self.best) == self.nodes else 0.0
        rows = zip(
            self.frontier, *_likeliest(laws.logits, self.sampling, self.widths[self.level]), strict=True
        )
        for parent, probs, columns in rows:
            above = self.above(parent)
            for prob, column in zip(probs, columns, strict=True):
                if not above * prob > floor:
                    break
                self.add(parent, column, above * prob)
        self.close_level(first, self.beam)


class _SampledGrowth(_BestGrowth):
    """Gives child j, under a law of confidence c, c·(1 − c)^j of its parent's survival.

    That is as if each draw stood with chance c once its elder siblings fell.
    That knows no token of its own nor of a younger sibling, and is never below that of a younger sibling's subtree.
    So the most surviving nodes can be chosen across a tree without a drawn token deciding on its own verification.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        sampling: Sampling,
        depth: int,
        branching: tuple[int, ...],
        nodes: int,
        rng: torch.Generator,
    ):
        super().__init__(vocabulary, sampling, depth, nodes)
        self.branching, self.rng = branching, rng
        self.probs: list[Tensor] = []  # [open nodes, columns] a level
        self.laws: list[int] = []
        self.known = True  # whether every law came with a confidence

    def feed(self, laws: DraftLogits) -> None:
        first, row = len(self.tokens), sum(map(len, self.probs))
        probs = probabilities(laws.logits, self.sampling)
        drawn = self._draw(probs, self.branching[self.level])
        self.known &= laws.confidence is not None
        chances = laws.confidence or [_GUESS] * len(drawn)
        for i, (parent, columns, chance) in enumerate(zip(self.frontier, drawn, chances, strict=True)):
            for j, column in enumerate(columns):
                self.laws.append(row + i)
                self.add(parent, column, self.above(parent) * chance * (1 - chance) ** j)
        self.probs.append(probs)
        self.close_level(first, self.nodes)

    def _draw(self, probs: Tensor, count: int) -> list[list[int]]:
        """Up to `count` distinct columns for each row of probs [m, columns], in the order of drawing."""
        left = probs.clone()
        drawn: list[list[int]] = [[] for _ in left]
        for _ in range(count):
            uniform = torch.rand(len(left), generator=self.rng, dtype=torch.float64).to(left.device)
            columns = draw(left, uniform)
            possible = left.gather(1, columns[:, None])[:, 0] > 0  # not where nothing is left
            left.scatter_(1, columns[:, None], 0.0)
            for row, column, real in zip(drawn, columns.tolist(), possible.tolist(), strict=True):
                if real:
                    row.append(column)
        return drawn

    def proposal(self) -> Proposal:
        if not self.tokens:
            return Proposal()
        drawn = Proposal(
            self.tokens,
            self.parents,
            probs=torch.cat(self.probs).cpu(),
            laws=self.laws,
            columns=self.vocabulary.columns,
            vocab_size=self.vocabulary.size,
            survival=self.survival if self.known else None,
        )
        return drawn.keep(sorted(self.best))


def _likeliest(logits: Tensor, sampling: Sampling, count: int) -> tuple[list[list[float]], list[list[int]]]:
    """Probabilities and columns of the `count` likeliest tokens of each row of logits [m, columns], descending."""
    probs = probabilities(logits, sampling if sampling.temperature > 0 else _PLAIN)
    values, columns = top(probs, min(count, probs.shape[-1]))
    return values.tolist(), columns.tolist()


def top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `topk` of each row of values [m, columns]: only the `count` runs with the largest maxima can hold them.

    24 rows of 8,192 take 0.14 ms on a CPU core, `topk` alone 0.34.
    """
    m, size = values.shape
    if size % _RUN or size < 4 * _RUN * count:
        return values.topk(count, -1)
    runs = values.view(m, -1, _RUN)
    run = runs.amax(-1).topk(count, -1).indices  # [m, count]
    inside = runs.gather(1, run[..., None].expand(-1, -1, _RUN)).flatten(1)
    best, place = inside.topk(count, -1)
    return best, run.gather(1, place // _RUN) * _RUN + place % _RUN


AnyShape = Annotated[Chain | Static | Beam | BestFirst | Sampled, Field(discriminator="type")]

"""How each shape of `shapes.py` grows into a proposal, level by level.

Each level of a growth costs one ranking or one drawing for all its open nodes together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepspec.decoding.request import Sampling
from deepspec.decoding.sampling import best, draw, probabilities
from deepspec.decoding.tree import DraftLogits, Growth, Parent, Proposal, Vocabulary
from deepspec.target.native.laws import can_read
from deepspec.target.native.laws import top as native_top

_PLAIN = Sampling(temperature=1.0)
_RUN = 64
_GUESS = 0.5  # the confidence of a law that comes without one, for choosing among nodes


class LawsAtOnce(ABC):
    """Laws of requests whose proposals can be grown in one call: chains, and trees of the likeliest paths."""

    @abstractmethod
    def chains(
        self, rows: list[int], depth: int, anchors: list[int], uniforms: Tensor | None, temperature: float
    ) -> tuple[list[list[int]], Tensor | None]:
        """Return columns of tokens, [depth][rows], and the laws [depth, rows, columns] that they were drawn from.

        Args:
            rows: which requests.
            uniforms: float64 [depth, rows]; None takes the likeliest tokens, and returns no laws.
        """

    @abstractmethod
    def trees(
        self, rows: list[int], anchors: list[int], depths: list[int], ranking: Ranking, temperature: float
    ) -> Sequence[tuple[list[int], list[int], list[float]]]:
        """Return columns, parents and survival of a tree for each of `rows`, parents before their children.

        Args:
            depths: levels of each.
        """

    @abstractmethod
    def confidence(self, parent: Parent) -> float:
        """Return the chance that a token drawn below a node survives."""


class Ranking(NamedTuple):
    """Which of the likeliest paths a tree has."""

    widths: tuple[int, ...]  # most children of a node, by depth
    nodes: int
    beam: int  # nodes of a level that are expanded at most


def grow_at_once(growths: Sequence[Growth], anchors: Sequence[int], laws: LawsAtOnce) -> bool:
    """Grow fresh growths to their ends, those alike in one call; False leaves all as they are, where one cannot."""
    for growth in growths:
        cuts = growth.sampling.cuts and growth.sampling.temperature > 0
        if cuts or type(growth) not in (ChainGrowth, RankedGrowth):
            return False
    fresh = [(i, growth) for i, growth in enumerate(growths) if growth.depth]
    if chains := {i: growth for i, growth in fresh if isinstance(growth, ChainGrowth)}:
        ChainGrowth.grow_rows(chains, anchors, laws)
    if trees := {i: growth for i, growth in fresh if isinstance(growth, RankedGrowth)}:
        RankedGrowth.grow_rows(trees, anchors, laws)
    return True


class ChainGrowth(Growth):
    def __init__(self, vocabulary: Vocabulary, sampling: Sampling, depth: int, rng: torch.Generator):
        super().__init__(vocabulary, sampling, depth)
        self.rng = rng
        self.probs: list[Tensor] = []
        self.laws: Tensor | None = None  # all of `probs`, where they came together
        self.places: list[int] = []
        self.survival: list[float] | None = []

    def feed(self, laws: DraftLogits) -> None:
        self.feed_all([(self, laws)])

    @classmethod
    def feed_all(cls, fed: Sequence[tuple[ChainGrowth, DraftLogits]]) -> None:
        """Rank or draw the next token of several chains in one call a sampler."""
        together: dict[Sampling, list[tuple[ChainGrowth, DraftLogits]]] = {}
        for growth, laws in fed:
            together.setdefault(growth.sampling, []).append((growth, laws))
        for sampling, own in together.items():
            logits = own[0][1].logits if len(own) == 1 else torch.cat([laws.logits for _, laws in own])
            chances = [None if laws.confidence is None else laws.confidence[0] for _, laws in own]
            probs: Sequence[Tensor | None] = [None] * len(own)
            if sampling.temperature == 0:
                columns, highest = best(logits)
                if None in chances:
                    own_chances = (highest.float() - logits.float().logsumexp(-1)).exp().tolist()
                    chances = [b if a is None else a for a, b in zip(chances, own_chances, strict=True)]
            else:
                drawn_from = probabilities(logits, sampling)
                uniforms = [torch.rand(1, generator=growth.rng, dtype=torch.float64) for growth, _ in own]
                columns = draw(drawn_from, torch.cat(uniforms).to(drawn_from.device)).tolist()
                probs = drawn_from.unbind()
            for (growth, _), column, law, chance in zip(own, columns, probs, chances, strict=True):
                if law is not None:
                    growth.probs.append(law)
                growth._extend(column, chance)

    @classmethod
    def grow_rows(cls, own: dict[int, ChainGrowth], anchors: Sequence[int], laws: LawsAtOnce) -> None:
        """Grow the chains of some requests, in one call a sampler."""
        together: dict[Sampling, list[int]] = {}
        for i, growth in own.items():
            together.setdefault(growth.sampling, []).append(i)
        for sampling, rows in together.items():
            depth, uniforms = max(own[i].depth for i in rows), None
            if sampling.temperature:
                drawn = [torch.rand(own[i].depth, generator=own[i].rng, dtype=torch.float64) for i in rows]
                # What is drawn behind a chain's end is not looked at.
                uniforms = pad_sequence(drawn) if len(rows) > 1 else drawn[0][:, None]
            columns, probs = laws.chains(
                rows, depth, [anchors[i] for i in rows], uniforms, sampling.temperature
            )
            for place, i in enumerate(rows):
                growth, above = own[i], anchors[i]
                for k in range(growth.depth):
                    growth._extend(columns[k][place], laws.confidence(Parent(i, k - 1, above, k)))
                    above = growth.tokens[-1]
                if probs is not None:
                    growth.laws = probs[: growth.depth, place]

    def _extend(self, column: int, chance: float | None) -> None:
        """Add a token, and the chance that it stands below its parent."""
        self.places.append(column)
        if chance is None or self.survival is None:
            self.survival = None
        else:
            self.survival.append(chance * (self.survival[-1] if self.survival else 1.0))
        self.parents.append(len(self.tokens) - 1)
        self.tokens.append(self.vocabulary.token(column))
        self.frontier = [len(self.tokens) - 1] if len(self.tokens) < self.depth else []

    def proposal(self) -> Proposal:
        laws = torch.stack(self.probs) if self.probs else self.laws
        if laws is None:
            return Proposal.chain(self.tokens, survival=self.survival)
        return Proposal.chain(
            self.tokens,
            probs=laws.cpu(),
            columns=self.vocabulary.columns,
            places=self.places,
            vocab_size=self.vocabulary.size,
            survival=self.survival,
        )


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


class StaticGrowth(_TreeGrowth):
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


class RankedGrowth(_BestGrowth):
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

    @classmethod
    def grow_rows(cls, own: dict[int, RankedGrowth], anchors: Sequence[int], laws: LawsAtOnce) -> None:
        """Grow the trees of some requests, in one call a sampler and size."""
        together: dict[tuple[float, Ranking], list[int]] = {}
        for i, growth in own.items():
            ranking = Ranking(tuple(growth.widths), growth.nodes, growth.beam)
            together.setdefault((ranked_by(growth.sampling).temperature, ranking), []).append(i)
        for (temperature, ranking), rows in together.items():
            depths = [own[i].depth for i in rows]
            trees = laws.trees(rows, [anchors[i] for i in rows], depths, ranking, temperature)
            for i, (columns, parents, survival) in zip(rows, trees, strict=True):
                growth = own[i]
                growth.tokens = [growth.vocabulary.token(column) for column in columns]
                growth.parents, growth.survival = parents, survival
                growth.best, growth.frontier = list(range(len(columns))), []

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

    def proposal(self) -> Proposal:
        return _chain_first(super().proposal())


def _chain_first(ranked: Proposal) -> Proposal:
    """Return the same tree with its likeliest path before the rest: where that stands, no cache is to be compacted."""
    path = ranked.likeliest_path
    order = [*path, *sorted({*range(len(ranked.tokens))} - {*path})]
    place = {-1: -1} | {node: i for i, node in enumerate(order)}
    return replace(
        ranked,
        tokens=[ranked.tokens[node] for node in order],
        parents=[place[ranked.parents[node]] for node in order],
        survival=None if ranked.survival is None else [ranked.survival[node] for node in order],
    )


class SampledGrowth(_BestGrowth):
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
    probs = probabilities(logits, ranked_by(sampling))
    values, columns = top(probs, min(count, probs.shape[-1]))
    return values.tolist(), columns.tolist()


def ranked_by(sampling: Sampling) -> Sampling:
    """Return the sampler by whose law tokens are ranked: at temperature 0 the softmax of the logits."""
    return sampling if sampling.temperature > 0 else _PLAIN


def top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `topk` of each row of probabilities [m, columns].

    Where torch does it, only the `count` runs with the largest maxima can hold them: 24 rows of 8,192 take 0.14 ms on
    a CPU core, `topk` alone 0.34.
    """
    if values.dtype == torch.float32 and can_read(values):
        return native_top(values, count)
    m, size = values.shape
    if size % _RUN or size < 4 * _RUN * count:
        return values.topk(count, -1)
    runs = values.view(m, -1, _RUN)
    run = runs.amax(-1).topk(count, -1).indices  # [m, count]
    inside = runs.gather(1, run[..., None].expand(-1, -1, _RUN)).flatten(1)
    best, place = inside.topk(count, -1)
    return best, run.gather(1, place // _RUN) * _RUN + place % _RUN

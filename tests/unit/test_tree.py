"""The shapes of draft trees against plain implementations of their definitions."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest
import torch

from deepspec.decoding.growths import top
from deepspec.decoding.request import Sampling
from deepspec.decoding.sampling import probabilities
from deepspec.decoding.shapes import Auto, Beam, BestFirst, Chain, Sampled, Static
from deepspec.decoding.tree import DraftLogits, Proposal, Vocabulary, grow
from deepspec.errors import DeepSpecError
from deepspec.kernels import kernels
from tests.enumeration import path_of

GREEDY = Sampling()
DRAWN = Sampling(temperature=1.0)
CUT = Sampling(temperature=0.8, top_k=6, top_p=0.9)
ANCHOR = 4


class Draft:
    """A toy drafter: the logits of a node's children depend on its whole path. Counts its calls."""

    def __init__(self, seed: int, columns: int = 12, spread: float = 2.0):
        self.seed, self.columns, self.spread = seed, columns, spread
        self.calls: list[int] = []

    def logits(self, path: tuple[int, ...]) -> torch.Tensor:
        rng = torch.Generator().manual_seed(hash((self.seed, path)) % (1 << 31))
        return torch.randn(self.columns, generator=rng) * self.spread

    def confidence(self, path: tuple[int, ...]) -> float:
        return random.Random(hash((self.seed, path))).uniform(0.2, 0.95)

    def propose(self, *shapes, sampling=GREEDY, depth=5, confident=False, vocabulary=None, seeds=None):
        """One proposal a shape, grown together."""
        vocabulary = vocabulary or Vocabulary(self.columns)
        seeds = seeds or range(len(shapes))
        growths = [
            shape.growth(vocabulary, sampling, depth, torch.Generator().manual_seed(seed))
            for shape, seed in zip(shapes, seeds, strict=True)
        ]

        def expand(parents):
            self.calls.append(len(parents))
            paths = [path_of(growths[parent.growth], parent.node) for parent in parents]
            assert all(
                parent.token == (ANCHOR, *path)[-1] for parent, path in zip(parents, paths, strict=True)
            )
            assert all(parent.depth == len(path) for parent, path in zip(parents, paths, strict=True))
            laws = torch.stack([self.logits(path) for path in paths])
            return DraftLogits(laws, [self.confidence(path) for path in paths] if confident else None)

        return grow(growths, [ANCHOR] * len(growths), expand)


def paths(tree: Proposal) -> set[tuple[int, ...]]:
    return {path_of(tree, node) for node in range(len(tree.tokens))}


def children(draft: Draft, path: tuple[int, ...], width: int, sampling: Sampling) -> list[tuple[float, int]]:
    """(probability, token) of the `width` likeliest children."""
    law = probabilities(draft.logits(path), sampling if sampling.temperature else DRAWN).tolist()
    ranked = sorted(((p, token) for token, p in enumerate(law) if p > 0), key=lambda pair: -pair[0])
    return ranked[:width]


def heap_tree(draft: Draft, shape: BestFirst, sampling: Sampling, depth: int) -> dict[tuple, float]:
    """Best-first growth as one would write it down: pop the likeliest path, take it, push its children."""
    taken: dict[tuple, float] = {}
    order = itertools.count()
    heap = [(-1.0, next(order), ())]
    while heap and len(taken) <= shape.nodes:
        chance, _, path = heapq.heappop(heap)
        taken[path] = -chance
        if len(path) < depth:
            for p, token in children(draft, path, shape.width, sampling):
                heapq.heappush(heap, (chance * p, next(order), (*path, token)))
    taken.pop(())
    return taken


def beam_tree(draft: Draft, shape: Beam, sampling: Sampling, depth: int) -> dict[tuple, float]:
    level, seen = {(): 1.0}, {}
    for _ in range(depth):
        grown = {
            (*path, token): chance * p
            for path, chance in level.items()
            for p, token in children(draft, path, shape.width, sampling)
        }
        seen |= grown
        level = dict(sorted(grown.items(), key=lambda item: -item[1])[: shape.width])
    return dict(sorted(seen.items(), key=lambda item: (-item[1], len(item[0])))[: shape.nodes])


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, CUT], ids=["greedy", "drawn", "cut"])
@pytest.mark.parametrize(
    "shape", [BestFirst(3, None, 24), BestFirst(8, 3, 10), BestFirst(1, 4, 9), BestFirst(2, 5, 1)]
)
def test_best_first_is_the_tree_that_a_heap_grows(shape, sampling):
    for seed in range(12):
        draft = Draft(seed, spread=1.0 + seed % 4)
        (tree,) = draft.propose(shape, sampling=sampling)
        expected = heap_tree(draft, shape, sampling, shape.levels(5))
        found = {path_of(tree, node): tree.survival[node] for node in range(len(tree.tokens))}
        assert found == pytest.approx(expected, rel=1e-12)
        assert tree.probs is None


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, CUT], ids=["greedy", "drawn", "cut"])
@pytest.mark.parametrize("shape", [Beam(3, None, 24), Beam(4, 3, 10), Beam(2, 4, 30)])
def test_beam_is_the_best_of_each_level_then_the_best_of_all(shape, sampling):
    for seed in range(12):
        draft = Draft(seed, spread=1.0 + seed % 4)
        (tree,) = draft.propose(shape, sampling=sampling)
        expected = beam_tree(draft, shape, sampling, shape.levels(5))
        found = {path_of(tree, node): tree.survival[node] for node in range(len(tree.tokens))}
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [BestFirst(4, None, 17), Beam(4, None, 17)])
def test_equal_chances_leave_no_child_without_its_parent(shape):
    """A certain token gives a child the chance of its parent; a flat law gives all siblings the same."""

    class Flat(Draft):
        def logits(self, path):
            logits = torch.zeros(self.columns)
            if len(path) % 2:
                logits[(sum(path) + 1) % self.columns] = 1e4
            return logits

    (tree,) = Flat(0).propose(shape)
    assert len(tree.tokens) == len(paths(tree)) == 17
    assert all(parent < node for node, parent in enumerate(tree.parents))
    assert all(path[:-1] in paths(tree) | {()} for path in paths(tree))
    if isinstance(shape, BestFirst):
        heap = heap_tree(Flat(0), shape, GREEDY, 5)
        assert sorted(tree.survival) == pytest.approx(sorted(heap.values()))


def test_the_drafter_is_asked_once_a_level_for_all_trees_together():
    draft = Draft(0)
    draft.propose(BestFirst(3, 4, 24), Beam(3, 2, 8), Chain(3), Sampled((2, 2)), sampling=DRAWN)
    assert len(draft.calls) == 4
    assert draft.calls[0] == 4


def test_trees_grown_together_are_those_grown_alone():
    shapes = [BestFirst(3, 4, 24), Sampled((3, 2, 1)), Static(((0,), (1,), (1, 0)))]
    together = Draft(5).propose(*shapes, sampling=DRAWN)
    for i, shape in enumerate(shapes):
        (alone,) = Draft(5).propose(shape, sampling=DRAWN, seeds=[i])
        assert (alone.tokens, alone.parents, alone.survival) == (
            together[i].tokens,
            together[i].parents,
            together[i].survival,
        )


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, CUT])
def test_chains_that_are_ranked_or_drawn_in_one_call_are_to_the_bit_those_of_one_alone(sampling, confident):
    draft = Draft(3, columns=8192)
    shapes = [Chain(3), Chain(), Chain(1)]
    together = draft.propose(*shapes, sampling=sampling, confident=confident)
    for seed, (shape, chain) in enumerate(zip(shapes, together, strict=True)):
        (alone,) = draft.propose(shape, sampling=sampling, confident=confident, seeds=[seed])
        assert (chain.tokens, chain.parents) == (alone.tokens, alone.parents)
        assert chain.survival == alone.survival
        assert (chain.probs is None) == (sampling.temperature == 0)
        assert chain.probs is None or torch.equal(chain.probs, alone.probs)


def test_a_static_tree_has_the_ranks_of_its_paths():
    shape = Static([[1, 2], [0], [1], [0, 0], [0, 0, 1]])
    draft = Draft(1)
    (tree,) = draft.propose(shape)
    expected = set()
    for ranks in shape.paths:
        path: tuple[int, ...] = ()
        for rank in ranks:
            path += (children(draft, path, 12, GREEDY)[rank][1],)
        expected.add(path)
    assert paths(tree) == expected
    assert (shape.depth, shape.nodes) == (3, 5)


def test_a_static_tree_of_rank_chances_takes_the_likeliest_paths():
    shape = Static.likeliest([0.6, 0.2, 0.1], nodes=6, depth=3)
    assert set(shape.paths) == {(0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Static([]), "Static.paths: .*at least 1 item"),
        (lambda: Static([[0], [1, 0]]), r"path \[1, 0\] needs \[1\] beside it"),
        (lambda: Static([[0], [-1]]), r"Static.paths.1.0: .*greater than or equal to 0 \(found -1\)"),
        (lambda: Static([[]]), r"Static.paths.0: .*at least 1 item"),
        (lambda: Static([[0], [0]]), r"path \[0\] is given twice"),
        (lambda: Beam(0, 3, 8), r"Beam.width: .*greater than or equal to 1 \(found 0\)"),
        (lambda: Beam(2, 0, 8), r"Beam.depth: .*greater than or equal to 1 \(found 0\)"),
        (lambda: BestFirst(2, 3, -1), r"BestFirst.nodes: .*greater than or equal to 1 \(found -1\)"),
        (lambda: BestFirst(2.5, 3, 4), r"BestFirst.width: .*valid integer.*\(found 2.5\)"),
        (lambda: Sampled(()), "Sampled.branching: .*at least 1 item"),
        (lambda: Sampled((2, 0)), r"Sampled.branching.1: .*greater than or equal to 1 \(found 0\)"),
        (lambda: Sampled((2, 1), budget=0), r"Sampled.budget: .*greater than or equal to 1 \(found 0\)"),
        (lambda: Beam(widht=3), "Beam has no 'widht'; did you mean 'width'"),
        (lambda: Static(), "Static needs 'paths'"),
        (lambda: Chain(0), r"Chain.depth: .*greater than or equal to 1 \(found 0\)"),
    ],
)
def test_shapes_that_cannot_be_are_refused(make, message):
    with pytest.raises(DeepSpecError, match=message):
        make()


SHAPES = [
    Chain(),
    Static.likeliest([0.5, 0.3], 12, 4),
    Beam(3, None, 20),
    BestFirst(3, None, 20),
    Sampled((2, 2, 1, 1)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, CUT], ids=["greedy", "drawn", "cut"])
def test_what_every_tree_keeps(shape, sampling):
    for seed in range(6):
        (tree,) = Draft(seed).propose(shape, sampling=sampling, depth=3, confident=True)
        assert max(tree.depths) <= 3
        assert all(parent < node for node, parent in enumerate(tree.parents))
        assert len(paths(tree)) == len(tree.tokens) <= (shape.nodes or 3)
        above = [tree.survival[parent] if parent >= 0 else 1.0 for parent in tree.parents]
        assert all(0 <= own <= most for own, most in zip(tree.survival, above, strict=True))
        drawn = sampling.temperature > 0 and shape.draws is not None
        assert (tree.probs is not None) == drawn
        assert all(tree.law(node)[tree.tokens[node]] > 0 for node in range(len(tree.tokens)) if drawn)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=lambda shape: type(shape).__name__)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_impossible_tokens_are_never_proposed(shape, sampling):
    class Narrow(Draft):
        """Two possible tokens at the anchor, one everywhere else."""

        def logits(self, path):
            logits = torch.full((self.columns,), float("-inf"))
            logits[[7, 9] if not path else [2]] = 0.0
            return logits

    (tree,) = Narrow(0).propose(shape, sampling=sampling, depth=3)
    assert paths(tree) <= {(7,), (9,), (7, 2), (9, 2), (7, 2, 2), (9, 2, 2)}
    assert {(7,), (9,), (7, 2)} <= paths(tree)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=lambda shape: type(shape).__name__)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_draft_that_is_not_finite_proposes_nothing(shape, sampling):
    class Broken(Draft):
        def logits(self, path):
            return torch.full((self.columns,), float("nan"))

    (tree,) = Broken(0).propose(shape, sampling=sampling)
    assert tree.tokens == []


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
def test_columns_are_turned_into_target_ids(shape):
    ids = torch.arange(12) * 3 + 100
    vocabulary = Vocabulary(200, ids, ids.tolist())

    class Reduced(Draft):
        def logits(self, path):
            return super().logits(tuple((token - 100) // 3 for token in path))

    (full,) = Draft(3).propose(shape, sampling=DRAWN)
    (tree,) = Reduced(3).propose(shape, sampling=DRAWN, vocabulary=vocabulary)
    assert tree.tokens == [100 + 3 * token for token in full.tokens]
    if tree.probs is not None:
        assert tree.law(0).shape == (200,) and float(tree.law(0)[tree.tokens[0]]) > 0


def test_children_are_drawn_from_the_draft_without_replacement():
    """The law of (first, second) child over 4,000 trees against q(a)·q(b)/(1 − q(a))."""
    draft = Draft(2, columns=4, spread=1.0)
    law = draft.logits(()).softmax(-1).double()
    count = 4000
    trees = draft.propose(*[Sampled((2,))] * count, sampling=DRAWN)
    statistic = 0.0
    for a, b in itertools.permutations(range(4), 2):
        expected = count * float(law[a] * law[b] / (1 - law[a]))
        found = sum(tree.tokens == [a, b] for tree in trees)
        statistic += (found - expected) ** 2 / expected
    assert statistic < 24.7  # chi-square of 11 degrees of freedom, p = 0.01


def test_siblings_share_the_law_that_they_were_drawn_from():
    draft = Draft(6)
    (tree,) = draft.propose(Sampled((3, 2, 1)), sampling=CUT)
    for node, parent in enumerate(tree.parents):
        expected = probabilities(draft.logits(path_of(tree, parent)), CUT)
        assert torch.allclose(tree.law(node), expected)
    assert len(tree.probs) == len(set(tree.laws)) == len(set(tree.parents))
    part = tree.cut(2)
    assert all(torch.equal(part.law(i), tree.law(i)) for i in range(len(part.tokens)))


def test_survival_of_a_drawn_node_knows_its_past_only():
    """Trees of many seeds: equal parents give equal survivals, whatever was drawn below them."""
    seen: dict[tuple, set[float]] = {}
    tokens: dict[tuple, set[int]] = {}
    for tree in Draft(8, columns=4).propose(*[Sampled((2, 2))] * 60, sampling=DRAWN, confident=True):
        for node, parent in enumerate(tree.parents):
            elder = sum(other == parent for other in tree.parents[:node])
            above = (path_of(tree, parent), tree.survival[parent] if parent >= 0 else 1.0, elder)
            seen.setdefault(above, set()).add(tree.survival[node])
            tokens.setdefault(above, set()).add(tree.tokens[node])
    assert all(len(survivals) == 1 for survivals in seen.values())
    assert max(len(drawn) for drawn in tokens.values()) == 4


def test_a_budget_buys_the_nodes_likeliest_to_survive():
    whole, part = Sampled((3, 3, 2), None), Sampled((3, 3, 2), budget=10)
    assert (whole.nodes, part.nodes) == (3 + 9 + 18, 10)
    for seed in range(6):
        draft = Draft(seed)
        (tree,) = draft.propose(part, sampling=DRAWN, confident=True)
        assert len(tree.tokens) == 10 and max(draft.calls) <= 9
        assert all(path[:-1] in paths(tree) | {()} for path in paths(tree))
        # Whatever could have been drawn instead is no likelier to survive than the least of what was kept.
        for node in range(-1, 10):
            path = path_of(tree, node)
            drawn = tree.parents.count(node)
            if len(path) < 3 and drawn < part.branching[len(path)]:
                chance = draft.confidence(path)
                above = tree.survival[node] if node >= 0 else 1.0
                assert above * chance * (1 - chance) ** drawn <= min(tree.survival) + 1e-12


def test_at_temperature_0_a_sampled_tree_with_a_budget_is_best_first():
    draft = Draft(3)
    (tree,) = draft.propose(Sampled((3, 3, 3, 3), budget=12))
    (best,) = draft.propose(BestFirst(3, 4, 12))
    assert (tree.tokens, tree.parents, tree.survival) == (best.tokens, best.parents, best.survival)


def test_without_confidences_a_sampled_tree_claims_no_survival():
    (tree,) = Draft(8).propose(Sampled((2, 2)), sampling=DRAWN)
    assert tree.survival is None


def test_the_fast_ranking_is_topk():
    rng = torch.Generator().manual_seed(0)
    for size, count in ((8192, 8), (49152, 4), (4096, 16), (100, 7), (64, 64)):
        values = torch.rand(5, size, generator=rng)
        best, columns = top(values, count)
        assert torch.equal(best, values.topk(count).values)
        assert torch.equal(values.gather(1, columns), best)


@pytest.mark.skipif(kernels() is None, reason="this CPU has none of our kernels")
def test_the_ranking_of_the_kernels_takes_the_first_of_equals_and_nothing_that_cannot_come():
    values = torch.zeros(4, 100)
    values[0, [70, 3, 40, 99]] = 0.25
    values[1, 17], values[2, :50] = 1.0, torch.nan
    values[2, 60], values[3] = 0.5, torch.linspace(0, 1, 100)
    best, columns = top(values, 3)
    assert columns[0].tolist() == [3, 40, 70] and best[0].tolist() == [0.25] * 3
    assert (best[1].tolist(), columns[1, 0]) == ([1.0, 0.0, 0.0], 17)
    assert (best[2].tolist(), columns[2, 0]) == ([0.5, 0.0, 0.0], 60)
    assert columns[3].tolist() == [99, 98, 97]


class TestAuto:
    """The default shape: a tree where nothing is drawn, and only where a tree can be had for a chain's price."""

    def test_it_ranks_paths_at_temperature_0_and_draws_a_chain_else(self):
        draft = Draft(3)
        (tree,) = draft.propose(Auto(width=3, budget=7))
        (best,) = draft.propose(BestFirst(3, None, 7))
        assert (tree.tokens, tree.parents, tree.survival) == (best.tokens, best.parents, best.survival)
        (drawn,) = Draft(3).propose(Auto(), sampling=DRAWN, seeds=[5])
        (chain,) = Draft(3).propose(Chain(), sampling=DRAWN, seeds=[5])
        assert drawn.is_chain and drawn.tokens == chain.tokens and torch.equal(drawn.probs, chain.probs)

    def test_it_is_a_chain_where_trees_cost_more_or_are_not_verified(self):
        assert Auto().settled(True) == Auto() and Auto().settled(False) == Chain()
        assert Auto(budget=9).greedy == BestFirst(nodes=9) and Chain(3).greedy == Chain(3)
        assert Auto(budget=9).nodes is None  # what is looked up may be longer
        assert BestFirst().settled(False) == BestFirst()  # who asks for a tree gets it, or an error

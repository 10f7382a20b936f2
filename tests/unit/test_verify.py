"""The law of every verification rule, by enumerating all drafts and all decisions on a small vocabulary."""

from __future__ import annotations

import itertools

import pytest
import torch

from deepspec.decoding import growths, verify
from deepspec.decoding.request import Sampling
from deepspec.decoding.shapes import Beam, BestFirst, Chain, Sampled, Static
from deepspec.decoding.tree import DraftLogits, Proposal, Vocabulary, grow
from deepspec.decoding.verify import block, check_rule, drawn_walk, recursive, rule_for, standard, traversal
from deepspec.errors import DeepSpecError
from tests.enumeration import VOCAB, Branching, Tables, enumerate_runs, path_of


def proposed(shape, tables: Tables, temperature: float, depth: int = 3) -> Proposal:
    """What grows from the tables q."""
    growth = shape.growth(Vocabulary(VOCAB), Sampling(temperature), depth, torch.Generator())

    def expand(parents):
        return DraftLogits(
            torch.stack([tables("q", path_of(growth, parent.node)) for parent in parents]).log()
        )

    return grow([growth], [0], expand)[0]


def drawn_trees(branching: tuple[int, ...], tables: Tables, monkeypatch) -> list[tuple[float, Proposal]]:
    """Every tree that the real `Sampled` can draw, with its probability."""

    def run(decisions: Branching) -> Proposal:
        def draw(probs, uniform):
            return torch.tensor([decisions.pick(row) if row.sum() > 0 else 0 for row in probs])

        monkeypatch.setattr(growths, "draw", draw)
        return proposed(Sampled(branching), tables, temperature=1.0)

    return enumerate_runs(run)


def drawn_chains(gamma: int, tables: Tables) -> list[tuple[float, Proposal]]:
    def run(decisions: Branching) -> Proposal:
        tokens: list[int] = []
        for _ in range(gamma):
            tokens.append(decisions.pick(tables("q", tuple(tokens))))
        return Proposal.chain(
            tokens, probs=torch.stack([tables("q", tuple(tokens[:k])) for k in range(gamma)])
        )

    return enumerate_runs(run)


def verified(rule, proposal: Proposal, tables: Tables) -> list[tuple[float, tuple[int, ...]]]:
    """Every (probability, committed tokens) of a rule on one proposal."""

    def run(decisions: Branching) -> tuple[int, ...]:
        accepted, last = rule(
            proposal,
            lambda node: tables("p", path_of(proposal, node)).clone(),
            decisions.uniform,
            decisions.pick,
        )
        assert [proposal.parents[node] for node in accepted] == [-1, *accepted][: len(accepted)]
        return (*(proposal.tokens[node] for node in accepted), last)

    return enumerate_runs(run)


def outcomes(rule, proposals, tables: Tables) -> list[tuple[float, tuple[int, ...]]]:
    return [
        (drawn * decided, committed)
        for drawn, proposal in proposals
        for decided, committed in verified(rule, proposal, tables)
    ]


def largest_error(results, tables: Tables, length: int) -> float:
    """How far the law of the first `length` tokens (committed, then the target's own) is from the target's."""
    assert sum(probability for probability, _ in results) == pytest.approx(1, abs=1e-12)
    worst = 0.0
    for sequence in itertools.product(range(VOCAB), repeat=length):
        found = sum(
            probability * tables.target(sequence, len(committed))
            for probability, committed in results
            if sequence[: len(committed)] == committed[:length]
        )
        worst = max(worst, abs(found - tables.target(sequence)))
    return worst


def tau(results) -> float:
    return sum(probability * len(committed) for probability, committed in results)


@pytest.mark.parametrize("gamma", [1, 2, 3])
@pytest.mark.parametrize("rule", [standard, block, recursive, traversal])
@pytest.mark.parametrize("sparse", [False, True])
def test_every_rule_preserves_the_target_law_on_sampled_chains(rule, gamma, sparse):
    for seed in range(4):
        tables = Tables(seed, sparse)
        results = outcomes(rule, drawn_chains(gamma, tables), tables)
        assert largest_error(results, tables, gamma + 1) < 1e-12


@pytest.mark.parametrize("rule", [standard, block, recursive, traversal])
def test_a_reduced_vocabulary_decides_as_the_whole_one(rule):
    tables, columns = Tables(5, False), torch.tensor([2, 0])  # in no order
    q = torch.zeros(2, VOCAB, dtype=torch.float64)
    q[:, columns] = torch.tensor([[0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)
    for tokens in itertools.product(columns.tolist(), repeat=2):
        whole = Proposal.chain(list(tokens), probs=q)
        reduced = Proposal.chain(list(tokens), probs=q[:, columns], columns=columns, vocab_size=VOCAB)
        assert reduced.chance(1) == whole.chance(1) == float(q[1, tokens[1]])
        assert totals(verified(rule, reduced, tables)) == pytest.approx(totals(verified(rule, whole, tables)))


@pytest.mark.parametrize("gamma", [1, 2, 3])
@pytest.mark.parametrize("rule", [standard, block])
def test_a_reduced_vocabulary_in_single_precision_preserves_the_target_law(rule, gamma):
    tables, columns = Tables(7), torch.tensor([2, 0])

    def rows(tokens: list[int]) -> torch.Tensor:
        kept = tables("q", tuple(tokens))[columns]
        return (kept / kept.sum()).float()

    def run(decisions: Branching) -> Proposal:
        tokens: list[int] = []
        places: list[int] = []
        for _ in range(gamma):
            places.append(decisions.pick(rows(tokens)))
            tokens.append(int(columns[places[-1]]))
        probs = torch.stack([rows(tokens[:k]) for k in range(gamma)])
        return Proposal.chain(tokens, probs=probs, columns=columns, places=places, vocab_size=VOCAB)

    def single(proposal, law, uniform, pick):
        return rule(proposal, lambda node: law(node).float(), uniform, pick)

    results = outcomes(single, enumerate_runs(run), tables)
    assert largest_error(results, tables, gamma + 1) < 1e-6


@pytest.mark.parametrize("rule", [standard, block])
def test_a_draft_whose_law_has_no_numbers_decides_nothing(rule):
    law = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    proposal = Proposal.chain([1, 1], probs=torch.full((2, VOCAB), torch.nan, dtype=torch.float64))
    accepted, _ = rule(proposal, lambda node: law, lambda: 0.5, lambda weights: int(weights.argmax()))
    assert accepted == []


def totals(results) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], float] = {}
    for probability, committed in results:
        found[committed] = found.get(committed, 0.0) + probability
    return found


@pytest.mark.parametrize("branching", [(2,), (3,), (2, 1), (1, 2), (2, 2), (3, 2), (2, 1, 1), (1, 2, 1)])
@pytest.mark.parametrize("rule", [recursive, traversal])
@pytest.mark.parametrize("sparse", [False, True])
def test_tree_rules_preserve_the_target_law_on_sampled_trees(rule, branching, sparse, monkeypatch):
    tables = Tables(sum(branching), sparse)
    results = outcomes(rule, drawn_trees(branching, tables, monkeypatch), tables)
    assert largest_error(results, tables, len(branching) + 1) < 1e-12


DETERMINISTIC = {
    "chain": Chain(3),
    "static": Static(((0,), (1,), (2,), (0, 0), (0, 2), (1, 0), (0, 2, 0), (0, 2, 1))),
    "beam": Beam(2, 3, 6),
    "best-first": BestFirst(3, 3, 7),
    "rank tree": Sampled((2, 2, 1)),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("sparse", [False, True])
def test_the_walk_preserves_the_target_law_on_every_deterministic_tree(name, sparse):
    for seed in range(4):
        tables = Tables(seed, sparse)
        tree = proposed(DETERMINISTIC[name], tables, temperature=0.0)
        assert tree.probs is None and (sparse or max(tree.depths) == 3)
        results = outcomes(rule_for(tree, None), [(1.0, tree)], tables)
        assert largest_error(results, tables, 4) < 1e-12


@pytest.mark.parametrize(
    "shape", [DETERMINISTIC["static"], DETERMINISTIC["beam"], DETERMINISTIC["best-first"]]
)
def test_trees_of_the_context_alone_are_walked_at_any_temperature(shape):
    tables = Tables(7)
    tree = proposed(shape, tables, temperature=0.6)
    assert rule_for(tree, "traversal") is drawn_walk
    assert largest_error(outcomes(drawn_walk, [(1.0, tree)], tables), tables, 4) < 1e-12


@pytest.mark.parametrize("rule", [standard, block, recursive, traversal, drawn_walk])
def test_nothing_proposed_is_plain_decoding(rule):
    tables = Tables(3)
    assert largest_error(outcomes(rule, [(1.0, Proposal())], tables), tables, 2) < 1e-12


def test_the_walk_accepts_the_target_probability_of_the_trees_paths():
    tables = Tables(1)
    tree = proposed(BestFirst(3, 3, 7), tables, temperature=0.0)
    mass = sum(tables.target(path_of(tree, node)) for node in range(len(tree.tokens)))
    assert tau(outcomes(drawn_walk, [(1.0, tree)], tables)) == pytest.approx(1 + mass, abs=1e-12)


def test_block_verification_commits_at_least_as_much_as_the_standard_rule():
    gains = []
    for seed in range(20):
        tables = Tables(seed)
        chains = drawn_chains(3, tables)
        gains.append(tau(outcomes(block, chains, tables)) - tau(outcomes(standard, chains, tables)))
    assert min(gains) > -1e-9
    assert max(gains) > 0.01


def test_traversal_commits_at_least_as_much_as_recursive_rejection(monkeypatch):
    gains = []
    for seed in range(12):
        tables = Tables(seed)
        trees = drawn_trees((2, 1), tables, monkeypatch)
        gains.append(tau(outcomes(traversal, trees, tables)) - tau(outcomes(recursive, trees, tables)))
    assert min(gains) > -1e-9
    assert max(gains) > 0.01


def test_a_second_child_is_worth_more_than_block_verification_of_one_path(monkeypatch):
    tables = Tables(0)
    one = tau(outcomes(block, drawn_chains(2, tables), tables))
    two = tau(outcomes(traversal, drawn_trees((2, 1), tables, monkeypatch), tables))
    assert two > one + 0.1


def test_traversal_of_a_chain_is_block_verification():
    for seed in range(5):
        tables = Tables(seed)
        for _, chain in drawn_chains(3, tables):
            difference: dict[tuple[int, ...], float] = {}
            for rule, sign in ((block, 1), (traversal, -1)):
                for probability, committed in verified(rule, chain, tables):
                    difference[committed] = difference.get(committed, 0.0) + sign * probability
            assert max(map(abs, difference.values())) < 1e-12


def test_resampling_from_the_target_instead_of_the_rest_is_caught(monkeypatch):
    """The classical mistake, in every rule."""

    def broken(proposal, law, uniform, pick):
        accepted, _ = standard(proposal, law, uniform, lambda weights: -1)
        return accepted, pick(law(len(accepted) - 1))

    tables = Tables(0)
    assert largest_error(outcomes(broken, drawn_chains(2, tables), tables), tables, 3) > 0.01
    trees = drawn_trees((2, 1), tables, monkeypatch)
    monkeypatch.setattr(verify, "_excess", lambda p, q, r=1.0: (p, float((r * p - q).clamp(min=0).sum())))
    for rule in (recursive, traversal):
        assert largest_error(outcomes(rule, trees, tables), tables, 3) > 0.01


def test_a_draft_law_that_keeps_the_fallen_siblings_mass_is_caught(monkeypatch):
    tables = Tables(0)
    trees = drawn_trees((2, 1), tables, monkeypatch)

    def not_renormalised(q, token):
        q = q.clone()
        q[token] = 0
        return q

    monkeypatch.setattr(verify, "_without", not_renormalised)
    for rule in (recursive, traversal):
        assert largest_error(outcomes(rule, trees, tables), tables, 3) > 0.01


def test_traversal_with_the_update_of_public_code_is_caught(monkeypatch):
    """r(u) ← S instead of S / (S + 1 − r(u))."""
    tables = Tables(0)
    trees = drawn_trees((2, 2), tables, monkeypatch)
    lose = verify._Stop.lose

    def broken(self, token):
        mass = float((self.r * self.p - self.q).clamp(min=0).sum())
        lose(self, token)
        self.r = mass

    assert largest_error(outcomes(traversal, trees, tables), tables, 3) < 1e-12
    monkeypatch.setattr(verify._Stop, "lose", broken)
    assert largest_error(outcomes(traversal, trees, tables), tables, 3) > 0.01


class TestNonAnticipation:
    """DSpark's appendix A: looking at a drawn token before deciding whether to verify it biases the output.

    Two tokens, p(A) = 0.7, and q(A) = 0.5 drafts one token. Token by token the chance to survive, min(1, p/q), is 1
    for A and 0.6 for B; before the draw it is 0.5·1 + 0.5·0.6 = 0.8.
    """

    p = torch.tensor([0.7, 0.3], dtype=torch.float64)
    q = torch.tensor([0.5, 0.5], dtype=torch.float64)

    def chance_of_a(self, rule, is_verified) -> float:
        """P(first token = A) where only drafts with `is_verified(token)` go to the target."""

        def run(decisions: Branching) -> int:
            token = decisions.pick(self.q)
            proposal = Proposal.chain([token], probs=self.q[None])
            if not is_verified(token):
                proposal = proposal.keep([])
            accepted, last = rule(proposal, lambda node: self.p.clone(), decisions.uniform, decisions.pick)
            return token if accepted else last

        return sum(probability for probability, first in enumerate_runs(run) if first == 0)

    @pytest.mark.parametrize("rule", [standard, block, recursive, traversal])
    def test_a_decision_by_the_drawn_token_gives_085_instead_of_070(self, rule):
        own_chance = (self.p / self.q).clamp(max=1).tolist()
        assert self.chance_of_a(rule, lambda token: own_chance[token] >= 0.7) == pytest.approx(
            0.85, abs=1e-12
        )

    @pytest.mark.parametrize("rule", [standard, block, recursive, traversal])
    @pytest.mark.parametrize("threshold", [0.7, 0.9])
    def test_a_decision_from_before_the_draw_leaves_070(self, rule, threshold):
        expected = float(torch.minimum(self.p, self.q).sum())
        assert self.chance_of_a(rule, lambda token: expected >= threshold) == pytest.approx(0.7, abs=1e-12)

    def trees(self, shape: Sampled, tables: Tables, monkeypatch) -> list[tuple[float, Proposal]]:
        """All that the shape can draw where confidences differ from node to node."""

        def confidence(path: tuple[int, ...]) -> float:
            return 0.3 + 0.6 * ((7 * sum(path) + 3 * len(path)) % 5) / 5

        def run(decisions: Branching) -> Proposal:
            monkeypatch.setattr(
                growths, "draw", lambda probs, _: torch.tensor([decisions.pick(row) for row in probs])
            )
            growth = shape.growth(Vocabulary(VOCAB), Sampling(1.0), 3, torch.Generator())

            def expand(parents):
                paths = [path_of(growth, parent.node) for parent in parents]
                logits = torch.stack([tables("q", path) for path in paths]).log()
                return DraftLogits(logits, [confidence(path) for path in paths])

            return grow([growth], [0], expand)[0]

        return enumerate_runs(run)

    def cut(self, trees, score) -> list[tuple[float, Proposal]]:
        """Each tree cut to its three nodes of the highest `score(tree, node)` (equal ones: the elder)."""
        return [
            (
                chance,
                tree.keep(sorted(sorted(range(len(tree.tokens)), key=lambda i: (-score(tree, i), i))[:3])),
            )
            for chance, tree in trees
        ]

    @pytest.mark.parametrize("rule", [recursive, traversal])
    @pytest.mark.parametrize("shape", [Sampled((2, 2), budget=3), Sampled((2, 2, 1), budget=3)])
    def test_a_budget_spent_by_survival_keeps_the_law(self, shape, rule, monkeypatch):
        tables = Tables(2)
        trees = self.trees(shape, tables, monkeypatch)
        assert len({tuple(tree.parents) for _, tree in trees}) > 1
        assert {len(tree.tokens) for _, tree in trees} == {3}
        assert largest_error(outcomes(rule, trees, tables), tables, shape.depth + 1) < 1e-12

    @pytest.mark.parametrize("rule", [recursive, traversal])
    def test_so_does_cutting_a_whole_tree_by_survival(self, rule, monkeypatch):
        tables = Tables(2)
        trees = self.cut(
            self.trees(Sampled((2, 2)), tables, monkeypatch), lambda tree, node: tree.survival[node]
        )
        assert largest_error(outcomes(rule, trees, tables), tables, 3) < 1e-12

    @pytest.mark.parametrize("rule", [recursive, traversal])
    def test_cutting_it_by_what_was_drawn_does_not(self, rule, monkeypatch):
        tables = Tables(2)

        def path_probability(tree: Proposal, node: int) -> float:
            above = path_probability(tree, tree.parents[node]) if tree.parents[node] >= 0 else 1.0
            return above * float(tree.law(node)[tree.tokens[node]])

        trees = self.cut(self.trees(Sampled((2, 2)), tables, monkeypatch), path_probability)
        assert largest_error(outcomes(rule, trees, tables), tables, 3) > 0.01


def test_the_best_rule_is_taken_for_what_was_drawn():
    probs = torch.full((3, VOCAB), 1 / VOCAB)
    chain = Proposal.chain([0, 1, 2], probs=probs)
    tree = Proposal([0, 1, 2], [-1, -1, 0], probs=probs, laws=[0, 0, 1])
    assert rule_for(chain, None) is block
    assert rule_for(tree, None) is traversal
    assert rule_for(Proposal([0, 1], [-1, -1]), None) is drawn_walk
    assert rule_for(chain, "standard") is standard
    assert rule_for(chain, "traversal") is traversal
    assert rule_for(tree, "recursive") is recursive
    assert rule_for(tree, standard) is standard  # a rule of one's own is taken as it is
    with pytest.raises(DeepSpecError, match="a tree was drawn"):
        rule_for(tree, "block")


def test_rules_that_cannot_fit_are_refused():
    check_rule(None, BestFirst(2, 2, 4))
    check_rule("block", None)
    check_rule("traversal", Chain())
    check_rule("recursive", Sampled())
    check_rule(standard, Chain())
    with pytest.raises(DeepSpecError, match="unknown verification rule 'blok'; did you mean 'block'"):
        check_rule("blok", None)
    with pytest.raises(DeepSpecError, match="'standard' verifies chains only; use recursive or traversal"):
        check_rule("standard", Sampled())
    with pytest.raises(DeepSpecError, match="BestFirst trees are not drawn"):
        check_rule("traversal", BestFirst(2, 2, 4))


def test_draft_probabilities_over_a_part_of_the_vocabulary_are_scattered():
    proposal = Proposal.chain(
        [4], probs=torch.tensor([[0.25, 0.75]]), columns=torch.tensor([1, 4]), vocab_size=6
    )
    assert proposal.law(0).tolist() == [0, 0.25, 0, 0, 0.75, 0]

"""Controllers: what they verify, when they pause, and that none of it touches the output's law."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch

from deepspec.decoding.cost import CostCurve
from deepspec.decoding.engine import generate
from deepspec.decoding.params import CONTROLLERS, make_controller
from deepspec.decoding.scheduler import (
    Controller,
    CostStop,
    Fixed,
    PrefixScheduler,
    Threshold,
    first_drop,
    global_best,
)
from deepspec.decoding.shapes import Auto, BestFirst, Chain
from deepspec.decoding.tree import Proposal
from deepspec.decoding.verify import block, standard
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.errors import DeepSpecError
from deepspec.target.model import load_target
from tests.controllers import chain, curve
from tests.enumeration import VOCAB, Branching, Tables, enumerate_runs
from tests.tiny import cached_target


def test_the_base_controller_verifies_everything_in_every_round():
    proposals = [chain(0.1, 0.1), Proposal()]
    controller = Controller()
    assert controller.select(proposals) is proposals
    assert controller.pacer() is None


def test_fixed_verifies_the_first_levels():
    tree = Proposal([1, 2, 3, 4], [-1, -1, 0, 2])
    assert Fixed(2).select([tree, chain(0.1)]) == [Proposal([1, 2, 3], [-1, -1, 0]), chain(0.1)]
    assert Fixed().select([tree]) == [tree]


def test_the_threshold_cuts_a_path_at_its_first_doubtful_position():
    (kept,) = Threshold(0.6).select([chain(0.9, 0.7, 0.5, 0.99)])
    assert kept == chain(0.9, 0.7)


def test_the_threshold_is_one_of_the_position_and_not_of_the_path():
    (kept,) = Threshold(0.6).select([chain(0.7, 0.7, 0.7)])
    assert len(kept.tokens) == 3 and kept.survival[-1] < 0.6


def test_the_threshold_cuts_each_path_of_a_tree():
    tree = Proposal([1, 2, 3, 4], [-1, -1, 1, 0], survival=[0.6, 0.3, 0.29, 0.5])
    (kept,) = Threshold(0.5).select([tree])
    assert kept == Proposal([1, 4], [-1, 0], survival=[0.6, 0.5])


def test_nodes_are_admitted_while_the_rate_rises():
    for search in (first_drop, global_best):
        assert search([0.9, 0.5, 0.2, 0.1], 1.0, lambda n: 1 + 0.25 * n) == 2
        assert search([0.9, 0.5, 0.2, 0.1], 1.0, lambda n: 1 + 0.01 * n) == 4
        assert search([0.9], 1.0, lambda n: 1 + n) == 0
        assert search([], 1.0, lambda n: 1.0) == 0


def test_on_the_hull_the_first_drop_is_the_global_best():
    rng = random.Random(3)
    for _ in range(200):
        times = list(itertools.accumulate(rng.random() ** 3 for _ in range(12)))
        hull = CostCurve({1: [(n, 0.5 + time) for n, time in enumerate(times)]}).convex()
        chances = sorted((rng.random() for _ in range(11)), reverse=True)
        counts = [search(chances, 1.0, partial(hull.verify, 1)) for search in (first_drop, global_best)]
        assert counts[0] == counts[1]


def test_the_cost_stop_verifies_all_where_tokens_are_free_and_nothing_where_they_are_dear():
    proposals = [chain(0.9, 0.8, 0.7)]
    assert CostStop(curve(token=0.001)).select(proposals) == proposals
    assert CostStop(curve(token=5.0)).select(proposals) == [Proposal(survival=[])]


def test_the_cost_stop_keeps_the_best_nodes_of_a_tree_and_their_parents():
    tree = Proposal([1, 2, 3, 4, 5], [-1, -1, 0, 1, 2], survival=[0.6, 0.35, 0.5, 0.05, 0.45])
    (kept,) = CostStop(curve(token=0.15)).select([tree])
    assert kept.tokens == [1, 2, 3, 5] and kept.parents == [-1, -1, 0, 2]


def test_nodes_of_equal_survival_keep_their_parents():
    tree = Proposal([1, 2, 3, 4], [-1, 0, 1, 2], survival=[0.5, 0.5, 0.5, 0.5])
    for token in (0.01, 0.1, 0.2, 0.5, 1.0):
        (kept,) = CostStop(curve(token=token)).select([tree])
        assert kept.is_chain


def test_the_scheduler_gives_the_budget_to_whoever_is_confident():
    sure, doubtful = chain(0.95, 0.95, 0.95, 0.95), chain(0.3, 0.3, 0.3, 0.3)
    kept = PrefixScheduler(curve(token=0.15)).select([doubtful, sure])
    assert len(kept[1].tokens) == 4 and len(kept[0].tokens) <= 1


def test_the_scheduler_finds_the_best_budget_of_all():
    rng = random.Random(5)
    for _ in range(50):
        proposals = [chain(*(rng.random() for _ in range(4))) for _ in range(3)]
        costs = curve(token=rng.random() / 2, draft=rng.random() / 2)
        best = max(
            (3 + sum(sum(p.survival[:n]) for p, n in zip(proposals, lengths, strict=True)))
            / (costs.draft(3) + costs.verify(3, 3 + sum(lengths)))
            for lengths in itertools.product(range(5), repeat=3)
        )
        kept = PrefixScheduler(costs).select(proposals)
        expected = 3 + sum(sum(p.survival) for p in kept)
        seconds = costs.draft(3) + costs.verify(3, 3 + sum(len(p.tokens) for p in kept))
        assert expected / seconds == pytest.approx(best)


def test_the_budget_of_a_request_falls_as_the_batch_grows():
    costs = curve(token=0.06)
    proposal = chain(*[0.85] * 12)
    budgets = [len(PrefixScheduler(costs).select([proposal] * n)[0].tokens) for n in (1, 4, 16, 64)]
    assert budgets == sorted(budgets, reverse=True) and budgets[0] > 2 * max(budgets[-1], 1)


@pytest.mark.parametrize("sampled", [True, False])
def test_a_step_in_the_curve_does_not_end_the_search(sampled):
    """Two tokens cost what eight do: a single one never pays, seven do."""
    stepped = CostCurve({1: [(1, 1.0), (2, 2.0), (8, 2.0), (9, 3.0)]})
    proposal = chain(*[0.9] * 8)
    if sampled:
        proposal = replace(proposal, probs=torch.full((8, 8), 1 / 8))
    (kept,) = CostStop(stepped).select([proposal])
    assert len(kept.tokens) == 7


def test_one_sampled_proposal_is_enough_to_end_the_search_at_the_first_drop(monkeypatch):
    # On a hull the first drop is the best of all.
    monkeypatch.setattr(CostCurve, "convex", lambda costs: costs)
    drafted = chain(0.9, 0.99, 0.99)
    sampled = replace(drafted, probs=torch.full((3, 3), 1 / 3))  # who draws says from what
    scheduler = PrefixScheduler(CostCurve({1: [(1, 1.0), (2, 1.05), (3, 1.9), (4, 1.91)]}))
    assert verified(scheduler.select([drafted])) == 3
    assert verified(scheduler.select([sampled])) == 1
    assert verified(scheduler.select([drafted, drafted])) == 6
    assert verified(scheduler.select([drafted, sampled])) == 0


def verified(selected: list[Proposal]) -> int:
    return sum(len(proposal.tokens) for proposal in selected)


def test_proposals_without_an_estimate_get_what_such_ones_had_before():
    controller = CostStop(curve(token=0.4))
    lookup = Proposal.chain([1, 2, 3])
    assert lookup.survival is None
    for _ in range(60):
        controller.observe(lookup, [0])
    survival = controller.survival(lookup)
    assert survival[0] > 0.95 and survival[1] < 0.05
    assert len(controller.select([lookup])[0].tokens) == 1
    controller.reset()
    assert controller.survival(lookup)[0] == pytest.approx(0.8)


def test_estimates_of_a_proposals_own_are_left_alone():
    controller = CostStop(curve())
    controller.observe(chain(0.9, 0.9), [])
    assert controller.survival(Proposal.chain([1]))[0] == pytest.approx(0.8)


def test_the_nodes_of_a_level_share_its_chance():
    survival = Controller().survival(Proposal([1, 2, 3], [-1, -1, 0]))
    assert survival == pytest.approx([0.4, 0.4, 0.4])  # the deepest is no likelier than its parent


@pytest.mark.parametrize("controller", [CostStop, PrefixScheduler])
def test_fewer_tokens_are_verified_where_their_verdicts_take_time(controller):
    """Only those of drawn ones do."""
    free = controller(replace(curve(token=0.01, draft=0.0), verdict=0.3))
    lengths = []
    for law in (None, torch.ones(5, 9) / 9, None):
        free.round(1)
        lengths.append(len(free.select([replace(chain(0.9, 0.8, 0.7, 0.6, 0.5), probs=law)])[0].tokens))
    assert lengths[0] == lengths[2] == 5 and 0 < lengths[1] < 5


@pytest.mark.parametrize("controller", [CostStop, PrefixScheduler])
def test_fewer_tokens_are_verified_behind_a_longer_context(controller):
    """There a token more costs more."""
    costs = replace(curve(token=0.01), context=100, slopes=[(1, 1e-5), (6, 20e-5)])
    chosen = []
    for context in (100, 5_000, 50_000):
        free = controller(costs)
        free.round(1, context)
        chosen.append(len(free.select([chain(0.9, 0.8, 0.7, 0.7, 0.7)])[0].tokens))
    assert chosen[0] > chosen[1] > chosen[2], chosen


class TestShape:
    """Trees or chains, by what trees have been worth for so many requests."""

    costs = CostCurve(
        {1: [(1, 1.0), (16, 1.15)], 8: [(8, 1.5), (128, 6.0)]},
        {1: 0.23, 8: 0.9},
        chain_drafts={1: 0.2, 8: 0.5},
    )
    tree = Proposal(list(range(6)), [-1, 0, 1, -1, 0, 3], survival=[0.5, 0.25, 0.1, 0.3, 0.15, 0.2])

    @pytest.mark.parametrize("controller", [CostStop, PrefixScheduler])
    def test_it_drafts_trees_where_they_are_worth_it(self, controller):
        free = controller(self.costs)
        for _ in range(9):
            free.round(1)
            assert free.shape(Auto()) == Auto()
            (kept,) = free.select([self.tree])
            assert len(kept.tokens) == 6

    def test_a_tree_that_costs_a_little_more_is_tried_and_given_up_where_it_is_not_worth_it(self):
        costs = CostCurve({1: [(1, 1.0), (16, 4.0)]}, {1: 0.3}, chain_drafts={1: 0.2})
        free, shapes = CostStop(costs), []
        for _ in range(70):
            free.round(1)
            shapes.append(free.shape(Auto()))
            free.select([self.tree if shapes[-1] == Auto() else chain(0.5, 0.5)])
        assert shapes[0] == shapes[65] == Auto() and shapes.count(Auto()) == 2

    @pytest.mark.parametrize("controller", [CostStop, PrefixScheduler])
    def test_it_drafts_chains_where_trees_cost_more_and_tries_again(self, controller):
        free, shapes = controller(self.costs), []
        for _ in range(200):
            free.round(8)
            shapes.append(free.shape(Auto()))
            free.select([self.tree if shapes[-1] == Auto() else chain(0.5, 0.5)] * 8)
        assert shapes[0] == Chain() and 2 <= shapes.count(Auto()) <= 3
        free.reset()
        free.round(1)
        assert free.shape(Auto()) == Auto()  # one request is another matter

    def test_what_was_asked_for_is_drafted_where_there_is_no_choice(self):
        free = CostStop(self.costs)
        free.round(8)
        assert free.shape(BestFirst()) == BestFirst() and free.shape(Chain(3)) == Chain(3)
        assert CostStop(curve()).shape(Auto()) == Auto()  # whose costs are not known apart
        assert Controller().shape(Auto()) == Auto()

    def test_a_chain_is_priced_as_one(self):
        free = CostStop(self.costs)
        free.round(1)
        free.select([chain(0.5)])
        assert free.cost == pytest.approx(1.2 + 0.01)
        free.select([self.tree])
        assert free.cost == pytest.approx(1.23 + 0.06)


def test_a_level_that_another_branch_alone_has_was_not_judged():
    tree = Proposal([1, 2, 3], [-1, 0, -1], survival=[0.5, 0.2, 0.3])
    assert [tree.judged(path) for path in ([], [0], [0, 1], [2])] == [1, 2, 2, 1]
    assert Proposal().judged([]) == 0
    scheduler = PrefixScheduler(curve())
    scheduler.reset()
    before = scheduler._stood, scheduler._judged
    scheduler.observe(tree, [2])
    assert (scheduler._stood - before[0], scheduler._judged - before[1]) == (1, 1)


# --- non-anticipation -------------------------------------------------------------------------------------------


class TestTheCounterexample:
    """DSpark's appendix A. Token A (0) or B (1); p(A) = 0.7, the draft says 0.5. After A the next level is sure to
    stand, after B it never does. One level alone does not pay, two sure ones do."""

    target: ClassVar = {(): [0.7, 0.3], (0,): [0.5, 0.5], (1,): [1.0, 0.0]}
    draft: ClassVar = {(): [0.5, 0.5], (0,): [0.5, 0.5], (1,): [0.0, 1.0]}
    costs = CostCurve({1: [(1, 1.0), (2, 1.9), (3, 2.0)]})

    def law(self, select) -> dict[tuple[int, ...], float]:
        """Probability of the first two tokens under the standard rule."""

        def tensor(values):
            return torch.tensor(values, dtype=torch.float64)

        def run(branching: Branching) -> tuple[int, ...]:
            first = branching.pick(tensor(self.draft[()]))
            second = branching.pick(tensor(self.draft[first,]))
            laws = torch.stack([tensor(self.draft[()]), tensor(self.draft[first,])])
            drafted = Proposal.chain([first, second], probs=laws, survival=[0.8, [0.8, 0.0][first]])
            proposal = select(drafted)
            prefixes = [(), (first,), (first, second)]
            nodes, last = standard(
                proposal,
                lambda node: tensor(self.target.get(prefixes[node + 1], [0.5, 0.5])),
                branching.uniform,
                branching.pick,
            )
            committed = (*(proposal.tokens[node] for node in nodes), last)
            if len(committed) == 1:
                return (*committed, branching.pick(tensor(self.target[committed])))
            return committed[:2]

        law: dict[tuple[int, ...], float] = {}
        for probability, tokens in enumerate_runs(run):
            law[tokens] = law.get(tokens, 0.0) + probability
        return law

    def first(self, select) -> float:
        return sum(chance for tokens, chance in self.law(select).items() if tokens[0] == 0)

    def test_a_global_search_is_biased(self):
        def best_prefix(proposal: Proposal) -> Proposal:
            def rate(n: int) -> float:
                return (1 + sum(proposal.survival[:n])) / self.costs.verify(1, 1 + n)

            return proposal.cut(max(range(3), key=rate))

        assert self.first(best_prefix) == pytest.approx(0.85, abs=1e-12)

    @pytest.mark.parametrize("controller", [CostStop, PrefixScheduler])
    @pytest.mark.parametrize("convex", [True, False])
    def test_the_first_drop_is_not(self, controller, convex):
        scheduler = controller(self.costs)
        if not convex:
            scheduler.hull = self.costs
        law = self.law(lambda proposal: scheduler.select([proposal])[0])
        assert law == pytest.approx({(0, 0): 0.35, (0, 1): 0.35, (1, 0): 0.3}, abs=1e-12)


def drafted_chain(tables: Tables, branching: Branching, gamma: int) -> Proposal:
    """Drawn from q, with DSpark's perfect confidences: c_k = Σ min(p, q) before its token is drawn."""
    tokens, laws, survival, chance = [], [], [], 1.0
    for _ in range(gamma):
        p, q = tables("p", tuple(tokens)), tables("q", tuple(tokens))
        chance *= float(torch.minimum(p, q).sum())
        survival.append(chance)
        laws.append(q)
        tokens.append(branching.pick(q))
    return Proposal.chain(tokens, probs=torch.stack(laws), survival=survival)


@pytest.mark.parametrize("rule", [standard, block])
@pytest.mark.parametrize("name", ["fixed", "threshold", "cost", "scheduler"])
@pytest.mark.parametrize("seed", [0, 3, 4])
def test_no_controller_touches_the_law_of_a_sampled_chain(rule, name, seed):
    """Two requests are scheduled together; all their drafts and decisions are enumerated, and the first's law
    compared with the target's."""
    options = {"fixed": {"length": 1}, "threshold": {"least": 0.5}}.get(name, {})
    controller = make_controller(name, curve(token=0.3), **options)
    mine, other = Tables(seed), Tables(seed + 50)
    lengths = set()

    def run(branching: Branching) -> tuple[int, ...]:
        drafts = [drafted_chain(mine, branching, 2), drafted_chain(other, branching, 1)]
        proposal = controller.select(drafts)[0]
        lengths.add(len(proposal.tokens))
        nodes, last = rule(
            proposal,
            lambda node: mine("p", tuple(proposal.tokens[: node + 1])).clone(),
            branching.uniform,
            branching.pick,
        )
        return (*(proposal.tokens[node] for node in nodes), last)

    outcomes = enumerate_runs(run)
    for sequence in itertools.product(range(VOCAB), repeat=3):
        found = sum(
            probability * mine.target(sequence, len(tokens))
            for probability, tokens in outcomes
            if tokens == sequence[: len(tokens)]
        )
        assert found == pytest.approx(mine.target(sequence), abs=1e-12)
    assert len(lengths) > 1 or name == "fixed", "the controller never had to decide"


# --- in the engine, and by name ---------------------------------------------------------------------------------

PROMPTS = [[33, 2, 33, 2, 33, 2, 33], [5, 9, 14, 3, 77, 20], [7] * 30]


OPTIONS = [
    (name, {"fixed": {"length": 2}, "threshold": {"least": 0.9}}.get(name, {}))
    for name in sorted(CONTROLLERS)
]


@pytest.mark.parametrize(
    ("name", "options"), [*OPTIONS, ("cost", {"corrected": True}), ("scheduler", {"corrected": True})]
)
@pytest.mark.parametrize("requests", [1, 3])
def test_no_controller_changes_a_greedy_token(name, options, requests):
    target = load_target(cached_target("llama"))
    plain = generate(target, None, PROMPTS[:requests], 40)
    controller = make_controller(name, curve(token=0.4, draft=0.5), **options)
    runs = generate(target, LookupDrafter(5, 1), PROMPTS[:requests], 40, controller=controller)
    assert [run.tokens for run in runs] == [run.tokens for run in plain]
    limit = {"fixed": 2, "threshold": 0}.get(name, 5)
    assert all(max(run.stats.verified) <= limit for run in runs)


def test_names_and_options_are_checked():
    assert make_controller("fixed", length=3).length == 3
    assert isinstance(make_controller("scheduler", curve()), PrefixScheduler)
    with pytest.raises(DeepSpecError, match=r"unknown controller 'sheduler'.*did you mean 'scheduler'"):
        make_controller("sheduler")
    with pytest.raises(DeepSpecError, match="cost controller needs a measured cost curve"):
        make_controller("cost")
    with pytest.raises(DeepSpecError, match=r"no 'lenght'; did you mean 'length'.; known: length"):
        make_controller("fixed", lenght=3)
    with pytest.raises(DeepSpecError, match="no 'length'; known: corrected"):
        make_controller("scheduler", curve(), length=3)
    with pytest.raises(DeepSpecError, match="needs 'least'"):
        make_controller("threshold")
    with pytest.raises(DeepSpecError, match=r"least: .*less than or equal to 1 \(found 1.5\)"):
        make_controller("threshold", least=1.5)
    with pytest.raises(DeepSpecError, match=r"length: .*greater than or equal to 1 \(found 0\)"):
        make_controller("fixed", length=0)

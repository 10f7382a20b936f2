"""Controllers: what they verify, when they pause, and that none of it touches the output's law."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch

from deepspec.decoding.cost import CostCurve
from deepspec.decoding.engine import generate
from deepspec.decoding.params import CONTROLLERS, make_controller
from deepspec.decoding.round_times import RoundTimes
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
from tests.enumeration import VOCAB, Branching, Tables, enumerate_runs
from tests.tiny import cached_target


def curve(first: float = 1.0, token: float = 0.1, draft: float = 0.2) -> CostCurve:
    """T = first + token · (n − 1), whatever the batch; drafting costs the same for any number."""
    points = [(1, first), (1001, first + 1000 * token)]
    return CostCurve({1: points, 64: points}, {1: draft, 64: draft})


def chain(*chances: float) -> Proposal:
    """A chain whose conditional confidences are `chances`."""
    return Proposal.chain(
        list(range(len(chances))), survival=list(itertools.accumulate(chances, float.__mul__))
    )


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


def test_one_sampled_proposal_is_enough_to_end_the_search_at_the_first_drop():
    drafted = chain(0.9, 0.99, 0.99)
    sampled = replace(drafted, probs=torch.full((3, 3), 1 / 3))  # who draws says from what
    scheduler = PrefixScheduler(CostCurve({1: [(1, 1.0), (2, 1.05), (3, 1.9), (4, 1.91)]}))
    scheduler.hull = scheduler.curve
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


# --- when drafting pauses ---------------------------------------------------------------------------------------


def play(controller, rounds: int, committed: int, requests: int = 1, chance: float = 0.9) -> int:
    """Rounds as the engine runs them; returns how many drafted."""
    paces = [controller.pacer() for _ in range(requests)]
    drafted = 0
    for _ in range(rounds):
        controller.round(requests)
        drafts = [pace.drafts() for pace in paces]
        selected = controller.select([chain(*[chance] * 3) if draft else Proposal() for draft in drafts])
        drafted += any(drafts)
        for pace, proposal in zip(paces, selected, strict=True):
            pace.observe(committed if proposal.tokens else 1)
    return drafted


@pytest.mark.parametrize("controller", [CostStop, PrefixScheduler])
@pytest.mark.parametrize("requests", [1, 5])
def test_drafting_pauses_where_it_fails(controller, requests):
    assert play(controller(curve()), 60, 1, requests) < 15


@pytest.mark.parametrize("controller", [CostStop, PrefixScheduler])
def test_a_draft_that_is_never_worth_verifying_is_paused(controller):
    """It knows that it is poor, so nothing of it is verified; its own time is lost all the same."""
    assert play(controller(curve(token=0.3)), 100, 1, 2, chance=0.05) < 30


@pytest.mark.parametrize("controller", [CostStop, PrefixScheduler])
def test_a_lookup_that_finds_nothing_is_asked_again(controller):
    """It costs nothing."""
    free = controller(curve(draft=0.0))
    pace = free.pacer()
    for _ in range(50):
        free.round(1)
        assert pace.drafts()
        free.select([Proposal()])
        pace.observe(1)


@pytest.mark.parametrize("controller", [CostStop, PrefixScheduler])
def test_drafting_goes_on_where_it_pays(controller):
    assert play(controller(curve()), 60, 3, 4) == 60


def test_drafting_resumes_where_it_pays_again():
    controller = CostStop(curve())
    pace = controller.pacer()
    controller.select([chain(0.9, 0.9)])
    for _ in range(60):
        pace.observe(1)
    while not pace.drafts():
        pace.observe(1)
    for _ in range(8):
        pace.observe(4)
    assert all(pace.drafts() or pace.observe(4) for _ in range(3))


@pytest.mark.parametrize("controller", [CostStop, PrefixScheduler])
def test_bad_luck_alone_hardly_pauses_a_draft_that_pays(controller):
    """Each token stands with chance 0.4, so whole blocks gain a third; 0.99 of that is left."""
    gained = []
    for seed in range(300):
        chances, tokens, seconds = random.Random(seed), 0, 0.0
        free = controller(curve(draft=0.25, token=0.0))
        pace = free.pacer()
        while tokens < 96:
            free.round(1)
            drafts = pace.drafts()
            stood = 0
            while drafts and stood < 5 and chances.random() < 0.4:
                stood += 1
            free.select([chain(0.4, 0.16, 0.064, 0.03, 0.01) if drafts else Proposal()])
            pace.observe(1 + stood)
            tokens, seconds = tokens + 1 + stood, seconds + (1.25 if drafts else 1.0)
        gained.append(tokens / seconds)
    whole = sum(0.4**i for i in range(6)) / 1.25
    assert sum(gained) / len(gained) > 0.99 * whole


def test_the_requests_of_the_scheduler_pause_together():
    controller = PrefixScheduler(curve())
    first, second = controller.pacer(), controller.pacer()
    for _ in range(10):
        controller.round(2)
        if not first.drafts():
            break
        controller.select([chain(0.9), chain(0.9)])
        first.observe(1)
        second.observe(1)
    assert not first.drafts() and not second.drafts() and not controller.pacer().drafts()
    controller.reset()
    assert controller.pacer().drafts()


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


def test_a_lone_drafter_owes_the_time_of_all_who_wait():
    """Two tokens a round pay for one request; seven others would have to wait for them."""
    drafted = {}
    for companions in (0, 7):
        controller = CostStop(curve())
        pace = controller.pacer()
        drafted[companions] = 0
        for _ in range(60):
            drafts = pace.drafts()
            drafted[companions] += drafts
            controller.select([chain(0.9, 0.9) if drafts else Proposal()] + [Proposal()] * companions)
            pace.observe(2 if drafts else 1)
    assert drafted[0] == 60 and drafted[7] < 15


def test_a_poor_draft_is_paused_sooner_in_a_larger_batch():
    """Sixteen requests that fail together are evidence enough, and cost sixteen rounds."""
    rounds = {n: play(PrefixScheduler(curve(token=0.02)), 16, 1, n) for n in (1, 16)}
    assert rounds[16] < rounds[1] < 16


BATCHES = CostCurve(  # verified tokens are nearly free for one request and four, and dear for sixteen
    {
        1: [(1, 1.0), (6, 1.1)],
        4: [(4, 1.4), (24, 1.8)],
        16: [(16, 2.4), (96, 8.0)],
    },
    {1: 0.2, 4: 0.3, 16: 0.9},
)
ACCEPTS = 0.5  # the chance of each drafted token, as the draft itself has it


def throughput(requests: int, rounds: int, seed: int = 0) -> tuple[float, int]:
    """Tokens a second over those of plain decoding, by the curve's own seconds, and rounds that drafted."""
    rng = random.Random(seed)
    scheduler = PrefixScheduler(BATCHES)
    pace = scheduler.pacer()
    seconds, tokens, drafted = 0.0, 0, 0
    for _ in range(rounds):
        scheduler.round(requests)
        drafts = pace.drafts()
        drafted += drafts
        selected = scheduler.select([chain(*[ACCEPTS] * 5) if drafts else Proposal()] * requests)
        verified = sum(len(proposal.tokens) for proposal in selected)
        seconds += BATCHES.verify(requests, requests + verified) + drafts * BATCHES.draft(requests)
        for proposal in selected:
            stood = list(itertools.takewhile(lambda _: rng.random() < ACCEPTS, proposal.tokens))
            pace.observe(1 + len(stood))
            tokens += 1 + len(stood)
    return tokens / seconds * BATCHES.verify(requests, requests) / requests, drafted


@pytest.mark.parametrize(("requests", "least"), [(1, 1.4), (4, 1.2), (16, 0.98)])
def test_the_scheduler_gains_where_drafting_pays_and_loses_next_to_nothing_elsewhere(requests, least):
    for rounds in (32, 200):
        rates, drafted = zip(*(throughput(requests, rounds, seed) for seed in range(20)), strict=True)
        assert sum(rates) / len(rates) > least
        assert requests < 16 or max(drafted) <= 1 + rounds // 64


def test_what_cannot_pay_is_not_even_tried_by_a_drafter_that_looks_nothing_up():
    """Sixteen tokens more cost what sixteen requests do, and the draft is to be paid too."""
    curve = CostCurve({1: [(1, 1.0), (6, 1.1)], 16: [(16, 2.4), (96, 9.6)]}, {1: 0.2, 16: 0.9})
    for looks_up in (True, False):
        scheduler = PrefixScheduler(curve)
        scheduler.looks_up = looks_up
        scheduler.reset()
        pace = scheduler.pacer()
        for requests, tried in ((16, looks_up), (16, False), (1, True)):
            scheduler.round(requests)
            assert pace.drafts() == tried
            scheduler.select([chain(0.1) if tried else Proposal()] * requests)


def test_a_draft_that_has_not_paid_is_tried_again_only_once_that_is_long_ago():
    """If four of five tokens stood it would pay; of these hardly any does, of which one round tells enough."""
    curve = CostCurve({16: [(16, 2.4), (96, 4.0)]}, {16: 0.9})
    scheduler = PrefixScheduler(curve)
    pace = scheduler.pacer()
    drafted = []
    for i in range(1500):
        scheduler.round(16)
        if drafting := pace.drafts():
            drafted.append(i)
        selected = scheduler.select([chain(0.6, 0.3) if drafting else Proposal()] * 16)
        for proposal in selected:
            if proposal.tokens:
                scheduler.observe(proposal, [])
            pace.observe(1)
    assert drafted[0] == 0
    assert len(drafted) > 1 and min(b - a for a, b in itertools.pairwise(drafted)) > 200


def test_a_draft_better_than_hoped_for_is_found_some_time_and_one_without_numbers_is_no_evidence():
    """It pays only where nine of ten tokens stand; they do, but for what is first said of them."""
    curve = CostCurve({16: [(16, 2.4), (96, 8.4)]}, {16: 0.9})
    scheduler = PrefixScheduler(curve)
    scheduler.looks_up = False
    scheduler.reset()
    pace = scheduler.pacer()
    scheduler.select([chain(float("nan")), chain(0.01)] + [Proposal()] * 14)
    drafted = 0
    for _ in range(3000):
        scheduler.round(16)
        drafts = pace.drafts()
        drafted += drafts
        selected = scheduler.select([chain(*[0.97**k for k in range(1, 6)]) if drafts else Proposal()] * 16)
        for proposal in selected:
            if proposal.tokens:
                scheduler.observe(proposal, list(range(len(proposal.tokens))))
            pace.observe(1 + len(proposal.tokens))
    assert drafted > 500


@pytest.mark.parametrize("free", [False, True])
def test_nothing_is_drafted_that_could_not_pay_if_most_of_it_stood(free):
    """Sixteen tokens more cost what sixteen requests do; a lookup costs no draft, and four requests are cheaper."""
    curve = CostCurve({1: [(1, 1.0), (6, 1.1)], 16: [(16, 2.4), (96, 9.6)]}, {1: 0.2, 16: 0.9})
    scheduler = PrefixScheduler(curve)
    pace = scheduler.pacer()

    def drafts(requests: int) -> bool:
        scheduler.round(requests)
        drafting = pace.drafts()
        proposal = Proposal.chain([1, 2], free=free, survival=[0.1, 0.01]) if drafting else Proposal()
        scheduler.select([proposal] * requests)
        for _ in range(requests):
            pace.observe(1)
        return drafting

    tried = [drafts(16) for _ in range(300)]
    assert tried[0] and any(tried[1:]) == free
    assert any(drafts(1) for _ in range(70))


def test_a_pause_ends_where_half_of_the_requests_have_gone():
    scheduler = PrefixScheduler(BATCHES)
    pace = scheduler.pacer()

    def one_round(requests: int) -> bool:
        scheduler.round(requests)
        drafts = pace.drafts()
        scheduler.select([chain(*[ACCEPTS] * 5) if drafts else Proposal()] * requests)
        for _ in range(requests):
            pace.observe(1)
        return drafts

    assert [one_round(16) for _ in range(4)] == [True, False, False, False]
    assert not one_round(9) and one_round(8)


@pytest.mark.parametrize("controller", [CostStop, PrefixScheduler])
def test_a_round_that_a_lookup_answers_costs_no_draft(controller):
    """Half a plain round of drafting pays where a draft was made, not where the match was free."""
    costs = controller(curve(draft=0.5))
    drafted = chain(0.9, 0.9)
    costs.select([drafted])
    with_draft = costs.cost
    costs.select([replace(drafted, free=True)])
    assert costs.cost == pytest.approx(with_draft - 0.5)


def test_one_good_request_keeps_the_shared_draft_going():
    controller = PrefixScheduler(curve())
    paces = [controller.pacer() for _ in range(2)]
    for _ in range(30):
        controller.round(2)
        assert paces[0].drafts()
        controller.select([chain(0.9, 0.9, 0.9), chain(0.9, 0.9, 0.9)])
        paces[0].observe(4)
        paces[1].observe(1)


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


# --- a curve that is no longer true ------------------------------------------------------------------------------


def rounds_of(times: RoundTimes, rounds: Iterable[float], pace: float, surcharge: float) -> None:
    """Rounds that the curve has at so many plain ones, on a machine of this pace and surcharge; 1 is plain."""
    for cost in rounds:
        times.observe(cost == 1, 1.0, cost, pace * (1 + surcharge * (cost - 1)))


MIXED = [1.0, *[1.2] * 20] * 20


@pytest.mark.parametrize("pace", [0.2, 1.0, 30.0])
@pytest.mark.parametrize("surcharge", [0.5, 1.0, 3.0])
def test_rounds_tell_what_drafting_costs_whatever_the_pace(pace, surcharge):
    times = RoundTimes()
    rounds_of(times, MIXED, pace, surcharge)
    assert times.surcharge == pytest.approx(surcharge, rel=0.1)


@pytest.mark.parametrize("slow", [0, 1, 200])
def test_a_round_in_which_something_else_ran_says_little(slow):
    """The first pass of a width makes kernels, and any may wait for another program."""
    times = RoundTimes()
    rounds = [1.0, *[1.2] * 4, 1.0, *[1.2] * 4, 1.0, *MIXED]
    for number, cost in enumerate(rounds):
        times.observe(cost == 1, 1.0, cost, 200.0 if number == slow else cost)
    assert times.surcharge == pytest.approx(1, rel=0.2)


def test_a_plain_round_is_due_soon_while_little_is_known_and_seldom_later():
    times, due = RoundTimes(), []
    for number in range(400):
        pace = 1 if number < 200 else 2  # all of the machine is slower
        plain = times.plain_is_due
        due += [number] * plain
        times.observe(plain, 1.0, 1.0 if plain else 1.2, pace * (1.0 if plain else 1.2))
    assert due[:4] == [4, 9, 14, 79]
    assert sum(200 <= number < 225 for number in due) >= 2 and sum(number >= 300 for number in due) <= 2
    assert times.surcharge == pytest.approx(1, rel=0.5)


@pytest.mark.parametrize("fall", [1.0, 0.9])
def test_what_is_verified_for_nothing_is_no_plain_round(fall):
    """A curve may be flat there, or noise may let it fall."""
    times = RoundTimes()
    for _ in range(200):
        plain = times.plain_is_due
        times.observe(plain, 1.0, 1.0 if plain else fall, 1.0 if plain else 2.0)
    assert times.surcharge == 16.0


def simulated(controller: CostStop, truth: CostCurve, requests: int = 4, rounds: int = 200) -> list[int]:
    """Tokens verified in each round where rounds take what `truth` has, a third of the drafted tokens standing."""
    pace, verified, rng = controller.pacer(), [], random.Random(0)
    for _ in range(rounds):
        controller.round(requests)
        drafts = pace.drafts()
        selected = controller.select([chain(0.5, 0.4, 0.3) if drafts else Proposal()] * requests)
        verified.append(sum(len(proposal.tokens) for proposal in selected))
        for proposal in selected:
            stood = len(list(itertools.takewhile(lambda _: rng.random() < 0.35, proposal.tokens)))
            pace.observe(1 + stood)
        controller.took(
            7 * (drafts * truth.draft(requests) + truth.verify(requests, requests + verified[-1]))
        )
    return verified


def test_a_corrected_curve_stops_what_costs_more_than_was_measured():
    measured, truth = curve(token=0.005, draft=0.02), curve(token=0.05, draft=0.2)
    whole = simulated(PrefixScheduler(measured), truth)
    right = simulated(PrefixScheduler(truth), truth)
    found = simulated(PrefixScheduler(measured, corrected=True), truth)
    assert sum(whole[100:]) > 10 * sum(right[100:])
    assert sum(found[100:]) < 2 * sum(right[100:]) + sum(whole[100:]) // 10


def test_what_rounds_took_outlives_the_engine_and_waits_for_a_round_of_its_own():
    measured, truth = curve(token=0.005, draft=0.02), curve(token=0.05, draft=0.2)
    controller = PrefixScheduler(measured, corrected=True)
    first = simulated(controller, truth, rounds=60)
    controller.reset()
    controller.took(1.0)  # of an engine without a drafter, which asks it nothing
    assert sum(simulated(controller, truth, rounds=60)) < sum(first)


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

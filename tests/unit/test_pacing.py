"""When drafting pauses and is tried again, and how rounds correct the curve that says so."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from deepspec.decoding.cost import CostCurve
from deepspec.decoding.round_times import RoundTimes
from deepspec.decoding.scheduler import CostStop, PrefixScheduler
from deepspec.decoding.tree import Proposal
from tests.controllers import chain, curve


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


def throughput(requests: int, rounds: int, seed: int = 0) -> tuple[float, float]:
    """Tokens a second over those of plain decoding, by the curve's own seconds, and rounds in which all drafted."""
    rng = random.Random(seed)
    scheduler = PrefixScheduler(BATCHES)
    pace = scheduler.pacer()
    seconds, tokens, drafted = 0.0, 0, 0.0
    for _ in range(rounds):
        scheduler.round(requests)
        drafts = [pace.drafts() for _ in range(requests)]
        drafted += sum(drafts) / requests
        selected = scheduler.select([chain(*[ACCEPTS] * 5) if draft else Proposal() for draft in drafts])
        verified = sum(len(proposal.tokens) for proposal in selected)
        seconds += BATCHES.verify(requests, requests + verified)
        seconds += BATCHES.draft(sum(drafts)) if any(drafts) else 0.0
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
            drafts = [pace.drafts() for _ in range(requests)]
            assert any(drafts) == tried
            scheduler.select([chain(0.3) if draft else Proposal() for draft in drafts])


def test_a_draft_that_has_not_paid_is_tried_again_only_once_that_is_long_ago():
    """If four of five tokens stood it would pay; of these hardly any does, of which one round tells enough."""
    curve = CostCurve({16: [(16, 2.4), (96, 4.0)]}, {16: 0.9})
    scheduler = PrefixScheduler(curve)
    pace = scheduler.pacer()
    drafted = []
    for i in range(1500):
        scheduler.round(16)
        drafts = [pace.drafts() for _ in range(16)]
        if any(drafts):
            drafted.append(i)
        for proposal in scheduler.select([chain(0.6, 0.3) if draft else Proposal() for draft in drafts]):
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
        drafts = [pace.drafts() for _ in range(requests)]
        selected = controller.select([chain(0.5, 0.4, 0.3) if draft else Proposal() for draft in drafts])
        verified.append(sum(len(proposal.tokens) for proposal in selected))
        for proposal in selected:
            stood = len(list(itertools.takewhile(lambda _: rng.random() < 0.35, proposal.tokens)))
            pace.observe(1 + stood)
        draft_s = truth.draft(sum(drafts)) if any(drafts) else 0.0
        controller.took(7 * (draft_s + truth.verify(requests, requests + verified[-1])))
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

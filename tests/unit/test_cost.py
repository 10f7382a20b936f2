"""The cost curve: how it interpolates, how it is measured, and when a stored one is taken."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from deepspec.decoding import pass_times, profiles
from deepspec.decoding.cost import CostCurve
from deepspec.decoding.profiles import load_or_measure
from deepspec.decoding.shapes import Auto, Chain
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.errors import DeepSpecError
from deepspec.evaluation.parts import RoundCosts
from deepspec.evaluation.runs import Run
from deepspec.evaluation.summarise import pass_costs
from deepspec.target.model import load_target

CURVE = CostCurve({1: [(1, 10.0), (3, 12.0), (5, 20.0)], 4: [(4, 16.0), (12, 32.0)]}, {1: 1.0, 4: 4.0})


def test_it_is_linear_between_measured_points_and_beyond_them():
    assert CURVE.verify(1, 3) == 12.0
    assert CURVE.verify(1, 2) == 11.0
    assert CURVE.verify(1, 4) == 16.0
    assert CURVE.verify(1, 7) == 28.0
    assert CURVE.verify(4, 2) == 12.0


def test_it_is_linear_between_measured_batches():
    assert CURVE.verify(2, 4) == pytest.approx(16.0)  # both say 16
    assert CURVE.verify(2, 3) == pytest.approx(12 + (14 - 12) / 3)
    assert CURVE.draft(2) == pytest.approx(2.0)


def test_beyond_the_largest_batch_its_own_line_goes_on():
    assert CURVE.verify(9, 20) == CURVE.verify(4, 20) == 48.0
    assert CURVE.draft(8) == pytest.approx(8.0)


def test_a_single_point_is_flat():
    curve = CostCurve({2: [(2, 5.0)]})
    assert curve.verify(1, 9) == curve.verify(7, 1) == 5.0
    assert curve.draft(3) == 0.0


def test_the_hull_lies_below_the_curve_and_meets_it_at_its_corners():
    curve = CostCurve({1: [(1, 1.0), (2, 1.9), (4, 1.8), (8, 2.0), (9, 3.0)]})
    hull = curve.convex()
    assert [x for x, _ in hull.passes[1]] == [1, 8, 9]
    assert all(hull.verify(1, n) <= curve.verify(1, n) + 1e-12 for n in range(1, 12))


def test_a_curve_survives_json():
    assert CostCurve.from_json(json.loads(json.dumps(CURVE.to_json()))) == CURVE
    for broken in ({}, {"passes": {"1": [[1, -2.0]]}, "drafts": {}, "identity": {}}, {"passes": 3}):
        with pytest.raises(DeepSpecError, match="not a cost curve"):
            CostCurve.from_json(broken)
    with pytest.raises(DeepSpecError, match="at least one measured pass"):
        CostCurve({})


@pytest.fixture(scope="module")
def target(tiny_target):
    return load_target(tiny_target)


class Trained(LookupDrafter):
    """A drafter with an identity, and features to read."""

    layers = (0, 1)
    digest = "abc"


@pytest.fixture
def measured(monkeypatch):
    """Few and small passes, and a count of how often something was measured."""
    counts = {"passes": [], "drafts": []}
    passes, drafts = pass_times.measure_passes, pass_times.measure_drafts

    def count_passes(target, batches, **options):
        counts["passes"].append(tuple(batches))
        return passes(target, batches, (1, 2, 4), 8, **options)

    def count_drafts(target, drafter, batches, **options):
        counts["drafts"].append(tuple(batches))
        return drafts(target, drafter, batches, 8, **options)

    monkeypatch.setattr(profiles, "measure_passes", count_passes)
    monkeypatch.setattr(profiles, "measure_slopes", lambda _: [(1, 1e-6), (4, 2e-6)])
    monkeypatch.setattr(profiles, "measure_verdict", lambda _: 0.01)
    monkeypatch.setattr(profiles, "measure_drafts", count_drafts)
    return counts


def test_real_passes_are_measured(target):
    seen = []
    passes = pass_times.measure_passes(
        target, (1, 3), (2, 1), 16, watch=lambda *progress: seen.append(progress)
    )
    assert {requests: [x for x, _ in points] for requests, points in passes.items()} == {1: [1, 2], 3: [3, 6]}
    assert all(0 < seconds < 1 for points in passes.values() for _, seconds in points)
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted(done for done, _ in seen)


class TestContexts:
    """A pass over many tokens costs more where there is much to attend to."""

    curve = CostCurve({1: [(1, 0.010), (8, 0.012)]}, {}, {}, 256, [(1, 1e-6), (8, 8e-6)])

    def test_each_further_token_adds_by_the_new_tokens_of_its_request(self):
        assert self.curve.verify(1, 8) == self.curve.at(256).verify(1, 8) == 0.012
        assert self.curve.at(1256).verify(1, 8) == pytest.approx(0.012 + 1000 * 8e-6)
        assert self.curve.at(56).verify(1, 1) == pytest.approx(0.010 - 200 * 1e-6)
        assert CostCurve({1: [(1, 0.010)]}).at(5000).verify(1, 1) == 0.010  # where that was not measured
        double = CostCurve({2: [(2, 0.010)]}, {}, {}, 256, [(1, 1e-6)])
        assert double.at(1256).verify(2, 2) == pytest.approx(0.010 + 2 * 1000 * 1e-6)

    @pytest.mark.parametrize("steep", [1, 5, 100])
    def test_behind_little_context_more_tokens_never_cost_less(self, steep):
        slopes = [(width, steep * seconds) for width, seconds in self.curve.slopes]
        near = CostCurve(self.curve.passes, {}, {}, 256, slopes).at(0)
        points = [near.verify(1, n) for n in range(1, 9)]
        assert points == sorted(points) and points[0] >= 0.005
        hull = near.convex()
        steps = [hull.verify(1, n + 1) - hull.verify(1, n) for n in range(1, 9)]
        assert all(b >= a - 1e-12 for a, b in itertools.pairwise(steps))

    def test_it_is_kept_in_files(self):
        assert CostCurve.from_json(self.curve.to_json()) == self.curve
        before = {
            key: value for key, value in self.curve.to_json().items() if key not in ("context", "slopes")
        }
        assert CostCurve.from_json(before).at(9999).verify(1, 8) == 0.012

    @pytest.mark.parametrize("slow", [False, True])
    def test_it_is_measured_beside_passes_with_less_context(self, target, monkeypatch, slow):
        machine = Machine(monkeypatch, {1: 0.010, 4: 0.011, 8: 0.012})
        machine.passes = 150 if slow else 10_000
        monkeypatch.setattr(pass_times, "CONTEXT", 16)
        monkeypatch.setattr(pass_times, "FARTHER", 48)

        def took(target, cache, context, requests, width):
            machine.spend(machine.costs[width] + 1e-5 * width * (context - 16))

        monkeypatch.setattr(pass_times, "_pass", took)
        slopes = pass_times.measure_slopes(target, (1, 4, 8))
        assert slopes == [(1, pytest.approx(1e-3)), (4, pytest.approx(4e-3)), (8, pytest.approx(8e-3))]

    def test_trees_and_chains_are_timed_apart_where_either_may_be_drafted(self, target, measured, tmp_path):
        drafter = Trained(4, 1)
        assert load_or_measure(target, drafter, tmp_path, (1,), shape=Auto()).chain_drafts == {}
        drafter.grows_trees = True
        curve = load_or_measure(target, drafter, tmp_path, (1,), shape=Auto())
        assert curve.drafts.keys() == curve.chain_drafts.keys() == {1} and len(measured["drafts"]) == 2
        assert curve.draft(1, chains=True) == curve.chain_drafts[1]
        assert CostCurve.from_json(curve.to_json()) == curve

    def test_it_is_kept_beside_the_passes(self, target, measured, tmp_path):
        first, second = (load_or_measure(target, None, tmp_path, (1,)) for _ in range(2))
        plain_s = first.verify(1, 1)
        assert first.slopes == [(1, 1e-6 * plain_s), (4, 2e-6 * plain_s)] and first == second
        assert first.context == pass_times.CONTEXT and measured["passes"] == [(1,)]

    def test_a_drawn_token_costs_its_verdict_too(self, target, measured, tmp_path):
        curve = replace(self.curve, verdict=0.001)
        assert curve.drawn().verify(1, 1) == 0.010
        assert curve.drawn().verify(1, 8) == pytest.approx(0.019)
        assert curve.drawn().at(1256).verify(1, 8) == pytest.approx(curve.at(1256).drawn().verify(1, 8))
        between = CostCurve({1: [(1, 1.0)], 3: [(3, 1.0)]}, verdict=0.1).drawn()
        assert between.verify(2, 2) == 1.0
        assert CostCurve.from_json(curve.to_json()) == curve and curve.drawn().drawn() == curve.drawn()
        kept = load_or_measure(target, None, tmp_path, (1,))
        assert kept.verdict == pytest.approx(0.01 * kept.verify(1, 1))

    def test_what_a_drawn_token_costs_is_measured_beside_passes(self, target, monkeypatch):
        """Eight tokens are judged; what likeliest ones take is no part of it."""
        machine = Machine(monkeypatch, {1: 0.010})

        def judged(turns, logits, rule):
            assert len(logits) == 9 and len(turns[0].proposal.tokens) == 8
            machine.spend(0.003 if turns[0].proposal.probs is None else 0.005)

        monkeypatch.setattr(pass_times, "judge", judged)
        assert pass_times.measure_verdict(target) == pytest.approx(0.002 / 8 / 0.010)

    def test_verdicts_of_real_proposals_are_measured(self, target):
        assert 0 < pass_times.measure_verdict(target) < 10

    def test_none_is_measured_where_there_are_too_few_positions(self, target, monkeypatch):
        monkeypatch.setattr(target, "max_length", 300)
        assert pass_times.measure_slopes(target, (1, 4)) == []


class Machine:
    """A clock, and passes that take what a width costs times the speed of the moment."""

    def __init__(self, monkeypatch, costs, draft=0.0):
        self.now, self.passes, self.costs, self.draft = 0.0, 0, costs, draft
        monkeypatch.setattr(pass_times.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(pass_times, "_pass", lambda *shape: self.spend(self.costs[shape[-1]]))

    def spend(self, seconds):
        """Between the 200th and the 400th piece of work the machine is at a third of its speed."""
        self.now += seconds * (3.0 if 200 <= self.passes < 400 else 1.0)
        self.passes += 1


@pytest.mark.parametrize("slow", [False, True])
def test_a_machine_that_does_other_work_is_named(target, monkeypatch, caplog, slow):
    machine = Machine(monkeypatch, {1: 0.010, 2: 0.011})
    machine.passes = 160 if slow else 10_000
    pass_times.measure_passes(target, (1,), (1, 2), 16)
    assert ("the same pass took 10.0 to 30.0 ms" in caplog.text) == slow


def test_a_slow_minute_does_not_bend_the_curve(target, monkeypatch):
    costs = {1: 0.010, 2: 0.0104, 4: 0.0106, 8: 0.011, 16: 0.0117}
    Machine(monkeypatch, costs)
    points = pass_times.measure_passes(target, (1,), (1, 2, 4, 8, 16), 16)[1]
    assert {x: seconds / points[0][1] for x, seconds in points} == pytest.approx(
        {width: seconds / costs[1] for width, seconds in costs.items()}, rel=1e-6
    )


def test_more_tokens_never_cost_less(target, monkeypatch):
    Machine(monkeypatch, {1: 0.010, 2: 0.012, 4: 0.011, 8: 0.020})
    points = pass_times.measure_passes(target, (1,), (1, 2, 4, 8), 16)[1]
    assert [round(seconds, 6) for _, seconds in points] == [0.010, 0.0115, 0.0115, 0.020]


def test_a_draft_is_timed_in_passes_of_the_same_moments(target, monkeypatch):
    machine = Machine(monkeypatch, {1: 0.010})

    class Drafting(Trained):
        def session(self, slots):
            session = super().session(slots)
            propose = session.propose
            monkeypatch.setattr(
                session, "propose", lambda asks: (machine.spend(0.0017), propose(asks))[1], raising=False
            )
            return session

    machine.passes = 150  # the slow minute comes after the first turns
    ratios = pass_times.measure_drafts(target, Drafting(4, 1), (1,), 16)
    assert ratios[1] == pytest.approx(0.17, rel=1e-6)


def test_a_curve_has_both_parts(target, tmp_path):
    curve = load_or_measure(target, Trained(4, 1), tmp_path, (1, 2))
    assert curve.verify(1, 1) > 0 and curve.draft(2) > 0
    assert curve.identity["drafter"] == "abc"
    assert load_or_measure(target, None, tmp_path, (1,)).draft(1) == 0


def test_a_curve_is_measured_once(target, measured, tmp_path):
    first = load_or_measure(target, Trained(4, 1), tmp_path, (1, 2))
    second = load_or_measure(target, Trained(4, 1), tmp_path, (1, 2))
    assert first == second
    assert json.dumps(first.to_json()) == json.dumps(second.to_json()), "1 and 1.0 make two keys of one curve"
    assert measured == {"passes": [(1, 2)], "drafts": [(1, 2)]}


def test_only_what_is_missing_is_measured(target, measured, tmp_path):
    small = load_or_measure(target, Trained(4, 1), tmp_path, (1,))
    more = load_or_measure(target, Trained(4, 1), tmp_path, (1, 2))
    assert measured["passes"] == [(1,), (2,)] and measured["drafts"] == [(1,), (2,)]
    assert more.passes[1] == small.passes[1]
    load_or_measure(target, Trained(4, 1), tmp_path, (1,), shape=Chain(2))
    assert measured["passes"] == [(1,), (2,)] and measured["drafts"] == [(1,), (2,), (1,)]


def test_a_drafter_without_an_identity_is_timed_each_time(target, measured, tmp_path):
    for _ in range(2):
        load_or_measure(target, LookupDrafter(4, 1), tmp_path, (1,))
    assert measured == {"passes": [(1,)], "drafts": [(1,), (1,)]}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"identity": 1}', "foreign", "empty"])
def test_a_corrupt_or_foreign_file_is_measured_again(target, measured, tmp_path, content):
    load_or_measure(target, None, tmp_path, (1,))
    (file,) = tmp_path.glob("*.json")
    if content == "foreign":
        content = file.read_text().replace(target.digest, "another")
    if content == "empty":
        content = json.dumps(json.loads(file.read_text()) | {"measured": {"0": [], "1": []}})
    file.write_text(content)
    load_or_measure(target, None, tmp_path, (1,))
    load_or_measure(target, None, tmp_path, (1,))
    assert measured["passes"] == [(1,), (1,)]


def test_force_measures_anew(target, measured, tmp_path):
    for _ in range(2):
        load_or_measure(target, None, tmp_path, (1,), force=True)
    assert measured["passes"] == [(1,), (1,)]


def test_a_folder_that_cannot_be_written_is_no_error(target, measured, tmp_path):
    (tmp_path / "file").touch()
    assert load_or_measure(target, None, tmp_path / "file" / "profiles", (1,)).verify(1, 1) > 0


def test_curves_live_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profiles.profiles_folder() == tmp_path / "deepspec" / "profiles"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert profiles.profiles_folder().parts[-3:] == (".cache", "deepspec", "profiles")


def test_a_target_with_no_room_for_a_pass_is_refused(target, monkeypatch):
    monkeypatch.setattr(target, "max_length", 8)
    with pytest.raises(DeepSpecError, match="8 positions are too few"):
        pass_times.measure_passes(target, (1,), (8,), 16)


def test_a_record_says_what_passes_cost_by_the_curve_and_in_fact():
    costs = RoundCosts(identity={}, passes={"1": [(1, 10.0), (5, 14.0)]}, drafts={})
    plain = Run(verify_s=4 * 0.02, accepted=[[0, 0], [0, 0]], verified=[[0, 0], [0, 0]])
    drafted = Run(verify_s=2 * 0.03, accepted=[[1], [0]], verified=[[4], [2]])
    results = {("sums", 0.0): [{"plain": plain, "draft": drafted}] * 2}
    (found,) = (pass_costs(results, costs) or {}).values()
    assert found.by_curve == pytest.approx(1.3)  # of 14 and 12 over 10
    assert found.measured == pytest.approx(1.5)
    assert pass_costs(results, None) is None
    costs = costs.model_copy(update={"context": 100, "slopes": [(1, 0.1), (5, 0.2)]})
    plain.prompt_tokens, drafted.prompt_tokens = [90, 100], [109, 100]
    (found,) = (pass_costs(results, costs) or {}).values()
    assert found.by_curve == pytest.approx((15.8 + 12.0) / 2 / ((9.05 + 10.05) / 2))
    sampled = {("sums", 1.0): results["sums", 0.0]}
    (found,) = (pass_costs(sampled, costs.model_copy(update={"slopes": None, "verdict": 0.5})) or {}).values()
    assert found.by_curve == pytest.approx(1.3 + 0.5 * 3 / 10)
    for run in (plain, drafted):
        run.verified = []  # as kept before
    assert pass_costs(results, costs) is None

"""What a metric may differ by: exact where everything is the same, else a stated tolerance, never a silent pass."""

from __future__ import annotations

import copy

import pytest

from deepspec.errors import DeepSpecError
from deepspec.evaluation.record import Record
from deepspec.report.inputs import Inputs, metrics
from deepspec.reproduce.tolerance import Figures, compare, differences, flatten, parse
from tests.records import record

PASSES = {"1": [[1.0, 0.02], [2.0, 0.021]]}


def measured(**changes) -> dict:
    """A record with all that decides whether another one must be the same."""
    made = record() | {
        "device": "A CPU, 2 threads",
        "dtype": "bfloat16",
        "target_digest": "t",
        "draft_digest": "d",
    }
    made["round_costs"] = {"passes": PASSES, "drafts": {"1": 0.003}}
    made["provenance"] = {"packages": {"python": "3.11.2", "torch": "2.13.0"}, "cpu": "x86_64 Maker 25 17 1"}
    return copy.deepcopy(made) | changes


def figures(made: dict, **altered) -> Figures:
    """A record with its metrics; `altered` ones by their last two words, joined by `__`."""
    shown = Record.parse(record() | {key: made[key] for key in ("tasks", "summary")}, "made up")
    inputs = Inputs({"good": shown}, {"good": [{"heldout_tau": 1.5}]}, {}, {}, {})
    flat = metrics(inputs)
    for name, value in altered.items():
        flat["good." + name.replace("__", ".")] = value
    return Figures(flat, {"good": made})


def verdicts(then: Figures, now: Figures, recomputed=False, chosen=None) -> dict[str, str]:
    return {row.metric: row.verdict for row in compare(then, now, recomputed, chosen)}


def failing(*args, **options) -> set[str]:
    return {name for name, verdict in verdicts(*args, **options).items() if verdict == "DIFFERS"}


def test_the_same_twice_is_the_same_everywhere():
    then = figures(measured())
    found = verdicts(then, figures(measured()))
    assert set(found.values()) == {"same"}
    assert set(then.metrics) < set(found)


def test_tau_is_exact_where_everything_is_the_same():
    assert failing(figures(measured()), figures(measured(), tau=2.5001)) == {"good.tau"}


@pytest.mark.parametrize(
    "change",
    [
        {"device": "Another CPU, 2 threads"},
        {"dtype": "float32"},
        {"draft_digest": "e"},
        {"round_costs": {"passes": {"1": [[1, 0.02], [2, 0.03]]}, "drafts": {"1": 0.003}}},
        {"provenance": {"packages": {"torch": "2.14.0"}}},
        {"provenance": {"packages": {}, "cpu": "x86_64 Maker 25 1 1"}},
    ],
)
def test_where_something_differs_tau_has_its_interval(change):
    """[2.3, 2.7] in the record; and a tenth, which is more here."""
    then = figures(measured())
    assert not failing(then, figures(measured(**change), tau=2.26))
    assert failing(then, figures(measured(**change), tau=2.2)) == {"good.tau"}


def test_a_wide_interval_lets_tau_be_further_off_than_a_tenth():
    then, now = measured(), measured(draft_digest="e")
    then["summary"] |= {"tau_ci95": [1.5, 3.5]}
    assert not failing(figures(then), figures(now, tau=1.6))


def test_another_patch_of_python_and_another_notation_of_the_same_curve_change_nothing():
    now = measured(round_costs={"passes": {"1": [[1, 0.02], [2, 0.021]]}, "drafts": {"1": 0.003}})
    now["provenance"]["packages"]["python"] = "3.11.9"
    (fact,) = differences(measured(), now)
    assert (fact.name, fact.then, fact.now, fact.decides) == ("python", "3.11.2", "3.11.9", False)
    assert failing(figures(measured()), figures(now, tau=2.51)) == {"good.tau"}


@pytest.mark.parametrize(("controller", "decides"), [("fixed", False), ("threshold", False), ("cost", True)])
def test_a_curve_that_no_controller_asks_changes_nothing(controller, decides):
    decode = {"controller": {"type": controller}}
    other = {"passes": {"1": [[1, 0.02], [2, 0.03]]}, "drafts": {"1": 0.003}}
    then, now = measured(decode=decode), measured(decode=decode, round_costs=other)
    assert [fact.decides for fact in differences(then, now)] == [decides]
    assert failing(figures(then), figures(now, tau=2.5001)) == (set() if decides else {"good.tau"})


def test_a_curve_that_rounds_corrected_is_never_the_same():
    made = measured(decode={"controller": {"type": "cost", "corrected": True}})
    assert [fact.decides for fact in differences(made, made)] == [True]
    assert failing(figures(made), figures(made, tau=2.5001)) == set()


def test_what_only_one_record_says_is_no_difference():
    old = measured()
    del old["provenance"]["cpu"], old["round_costs"]
    assert differences(old, measured()) == differences(measured(), old) == []


def test_a_draft_that_was_trained_again_need_not_be_the_same():
    then, now = figures(measured()), figures(measured(), heldout_tau=1.4)
    assert failing(then, now) == {"good.heldout_tau"}
    assert not failing(then, now, recomputed=True)
    found = verdicts(then, now, recomputed=True)
    assert found["good.sums@T=0.outputs"] == found["good.sums@T=0.acceptance"] == "not compared"
    assert failing(then, figures(measured(), heldout_tau=1.3), recomputed=True) == {"good.heldout_tau"}


def test_lossless_is_exact_whatever_else_differs():
    now = figures(measured(device="Another"), lossless=0)
    assert failing(figures(measured()), now, recomputed=True) == {"good.lossless"}


def test_other_tokens_and_other_acceptance_are_told():
    now = measured()
    now["tasks"]["sums@T=0"]["output_hashes"][3] = "x"
    now["tasks"]["talk@T=1"]["accept_rate_by_position"] = [0.8, 0.4]
    assert failing(figures(measured()), figures(now)) == {"good.sums@T=0.outputs", "good.talk@T=1.acceptance"}


def test_a_speed_up_may_move_by_its_tolerance_or_within_the_intervals():
    then = figures(measured())
    assert not failing(then, figures(measured(), speedup=2.5))
    assert not failing(then, figures(measured(), speedup=3.0)), "the interval in the record still overlaps"
    now = measured()
    now["summary"]["speedup_ci95"] = [2.9, 3.1]
    assert failing(then, figures(now, speedup=3.0)) == {"good.speedup"}


def test_rates_are_compared_at_the_pace_of_the_hour():
    """All at half the pace: a slow hour. One alone: something else."""
    then = figures(measured())
    rates = [name for name in then.metrics if name.endswith("tokens_per_second")]
    slow = Figures(dict(then.metrics) | {name: then.metrics[name] / 2 for name in rates}, then.records)
    assert not failing(then, slow)
    odd = Figures(dict(then.metrics) | {rates[0]: then.metrics[rates[0]] / 2}, then.records)
    assert failing(then, odd) == {rates[0]}


def test_no_time_is_compared_between_devices():
    found = verdicts(figures(measured()), figures(measured(device="Another"), speedup=9.0))
    timed = {name for name in found if "speedup" in name or "tokens_per_second" in name}
    assert timed and {found[name] for name in timed} == {"not compared"}


def test_a_metric_that_is_gone_differs_and_a_new_one_is_no_claim():
    then = figures(measured())
    now = Figures(
        {"extra": 1.0} | {k: v for k, v in then.metrics.items() if k != "good.speedup"}, then.records
    )
    assert failing(then, now) == {"good.speedup"}
    assert "extra" not in verdicts(then, now)


def test_a_tolerance_of_ones_own_takes_the_place_of_the_tables():
    then, now = figures(measured()), figures(measured(), tau=2.6)
    assert not failing(then, now, chosen={"*.tau": 0.1})
    assert failing(then, now, chosen={"*.tau": 0.01}) == {"good.tau"}


def test_metrics_without_a_record_follow_all_records():
    then, now = Figures({"table.a": 2.0}, {"x": measured()}), Figures({"table.a": 2.1}, {"x": measured()})
    assert failing(then, now) == {"table.a"}
    assert not failing(then, Figures({"table.a": 2.1}, {"x": measured(draft_digest="e")}))


def test_a_metric_with_its_own_interval_is_judged_by_overlap():
    """A tenth of a ratio would let the order of two drafters turn."""

    def table(ratio: float, half: float = 0.02) -> Figures:
        return Figures({"a.ratio": ratio, "a.low": ratio - half, "a.high": ratio + half}, {})

    assert failing(table(1.03), table(1.031)) == {"a.ratio", "a.low", "a.high"}
    assert not failing(table(1.03), table(1.06), recomputed=True)
    assert verdicts(table(1.03), table(1.06), recomputed=True)["a.low"] == "not compared"
    assert failing(table(1.03), table(0.98), recomputed=True) == {"a.ratio"}
    assert failing(table(1.03), Figures({"a.ratio": 1.03}, {}), recomputed=True) == {
        "a.low",
        "a.high",
        "a.ratio",
    }


@pytest.mark.parametrize("word", ["tau", "*.tau=", "*.tau=much", "=0.1", "*.tau=-1"])
def test_a_tolerance_that_cannot_be_read_is_one_line(word):
    with pytest.raises(DeepSpecError, match="expected PATTERN=SHARE"):
        parse([word])


def test_a_pattern_may_hold_an_equals_sign():
    assert parse(["*@T=0.tau=0.05"]) == {"*@T=0.tau": 0.05}


def test_nested_metrics_get_dotted_names():
    assert flatten({"a": {"b": 1, "c": {"d": 2.0}}, "e": "x"}) == {"a.b": 1, "a.c.d": 2.0, "e": "x"}

"""The gate's rules: what passes, and for each rule a challenger that fails it and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepspec.evaluation.record import EVAL_VERSION, task_key
from deepspec.report.compare import load
from deepspec.tracking.gate import COMPARABLE, FIGURES, RULES, Evidence, device_class, judge, passes
from deepspec.tracking.params import PromoteParams
from tests.records import entry, prompt_lines, record

PARAMS = PromoteParams()
CPU = "AMD EPYC, 2 threads, Linux, torch 2.13.0"
NAMES = [rule.__name__ for rule in (*RULES, *COMPARABLE)] + list(FIGURES.values())


def export(passed: bool = True, parity: bool = True, draft: str = "d0") -> dict:
    engines = {"vllm": {"parity": {"passed": parity}}, "tgi": {"refused": "no such head"}}
    return {"draft_digest": draft, "passed": passed, "engines": engines}


EXPORT = export()
OTHER_PROMPTS = {name: task | {"prompts_digest": "p1"} for name, task in record()["tasks"].items()}


@pytest.fixture
def make(tmp_path: Path):
    """Evidence whose record and prompts lie in files."""

    def evidence(
        gain: float = 2.0, accepted: int = 2, speedup: float | None = 2.0, exported=EXPORT, **changes
    ) -> Evidence:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        written = record(speedup=speedup, **{"device": CPU} | changes)
        path.write_text(json.dumps(written))
        lines = [
            line
            for line in prompt_lines(gain, accepted)
            if task_key(line["task"], line["temperature"]) in written["tasks"]
        ]
        path.with_suffix(".prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return Evidence("7", "d0", load(path), exported)

    return evidence


def failed(verdicts) -> list[str]:
    return [verdict.rule for verdict in verdicts if verdict.passed is False]


def test_an_equal_challenger_passes_every_rule(make):
    verdicts = judge(make(), make(), PARAMS)
    assert [verdict.rule for verdict in verdicts] == NAMES
    assert all(verdict.passed for verdict in verdicts) and passes(verdicts)


def test_the_first_champion_needs_only_the_rules_that_stand_for_themselves(make):
    verdicts = judge(make(), None, PARAMS)
    assert [verdict.passed for verdict in verdicts] == [True] * len(RULES) + [None] * 6
    assert passes(verdicts)


@pytest.mark.parametrize(
    ("rule", "changes", "says"),
    [
        ("evidence_of_this_draft", {"draft_digest": "d1"}, "draft d0, evidence of d0, d1"),
        ("evidence_of_this_draft", {"exported": export(draft="d2")}, "evidence of d0, d2"),
        ("export_passed", {"exported": None}, "there is none"),
        ("export_passed", {"exported": export(passed=False, parity=False)}, "parity failed for vllm"),
        ("export_passed", {"exported": export() | {"engines": {"tgi": {"refused": "x"}}}}, "no engine"),
        ("fast_enough", {"speedup": 0.9}, "0.900; at least 1"),
        ("same_eval_version", {"eval_version": "1"}, f"{EVAL_VERSION} of the champion, 1 of the challenger"),
        (
            "same_target",
            {"target_digest": "xyz"},
            "96 of the champion, target_digest xyz, dtype",
        ),
        (
            "same_target",
            {"dtype": "float32"},
            "abc, dtype float32, seed 0, max_new_tokens 96 of the challenger",
        ),
        ("same_target", {"max_new_tokens": 8}, "seed 0, max_new_tokens 8 of the challenger"),
        ("same_device_class", {"device": "AMD EPYC, 64 threads, Linux, torch 2.13.0"}, "64 threads"),
        ("same_tasks", {"tasks": {"sums@T=0": entry(0.0, 2.0)}}, "they differ on sums@T=1, talk@T=0"),
        ("same_tasks", {"tasks": OTHER_PROMPTS}, "they differ on sums@T=0, sums@T=1, talk@T=0, talk@T=1"),
        ("tau_not_worse", {"accepted": 1}, "T=0 0.667 (0.667–0.667)"),
        ("speedup_not_worse", {"gain": 1.9}, "T=0 0.950 (0.950–0.950)"),
    ],
)
def test_a_challenger_that_breaks_one_rule_fails_it_alone(make, rule, changes, says):
    verdicts = judge(make(**changes), make(), PARAMS)
    assert failed(verdicts) == [rule]
    assert not passes(verdicts)
    assert says in next(verdict.found for verdict in verdicts if verdict.rule == rule)


def test_a_challenger_that_changes_a_token_is_refused_whatever_its_speed(make):
    verdicts = judge(make(speedup=None, gain=9.0), make(), PARAMS)
    assert failed(verdicts) == ["lossless", "fast_enough", "speedup_not_worse"]
    assert "lossless" in failed(judge(make(speedup=None), None, PARAMS))


def test_the_margin_and_the_export_are_as_params_say(make):
    assert passes(judge(make(gain=1.9), make(), PromoteParams(margin=0.06)))
    assert passes(judge(make(exported=None), make(), PromoteParams(require_export=False)))
    assert failed(judge(make(speedup=1.2), None, PromoteParams(min_speedup=1.5))) == ["fast_enough"]


def test_afresh_passes_over_a_champion_that_cannot_be_compared_with_and_no_other(make):
    elsewhere = make(device="NVIDIA H100, CUDA 12.8, Linux, torch 2.13.0", gain=1.0)
    assert passes(judge(elsewhere, make(), PARAMS, afresh=True))
    assert failed(judge(make(gain=1.0), make(), PARAMS, afresh=True)) == ["speedup_not_worse"]
    assert failed(judge(make(device="x", exported=None), make(), PARAMS, afresh=True)) == ["export_passed"]


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (CPU, "AMD EPYC, 2 threads"),
        ("AMD EPYC, 2 threads, Darwin, torch 2.14.1+cpu", "AMD EPYC, 2 threads"),
        ("NVIDIA H100 80GB HBM3, CUDA 12.8, Linux, torch 2.13.0+cu128", "NVIDIA H100 80GB HBM3"),
    ],
)
def test_a_device_class_is_the_chip_and_its_threads(device, expected):
    assert device_class(device) == expected

"""`benchmarks.verification` and `benchmarks.identity` on tiny models: what they assemble and how they judge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import identity, verification
from benchmarks.identity import judge
from benchmarks.verification import Count, compare, expected_accepted, interval
from deepspec.decoding.engine import generate
from deepspec.decoding.tree import Proposal
from deepspec.decoding.verify import block, recursive, standard, traversal
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.target.model import load_target
from tests.enumeration import Tables
from tests.tiny import cached_target

DRAFT = Path(__file__).parents[1] / "fixtures" / "dspark-vanilla-tiny"


@pytest.fixture(scope="module")
def target_dir():
    """A target of the draft's shape; its own weights do not matter here."""
    return cached_target("qwen3", vocab=512, layers=6)


@pytest.fixture
def flags(target_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"turns": ["What is the sum?"]}\n{"turns": ["Why?", "How?"]}\n')
    common = ["--target", str(target_dir), "--prompts", "prompts.jsonl", "--nodes", "6", "--width", "2"]
    return [*common, "--max-new-tokens", "8", "--output", str(tmp_path / "reports")]


def test_the_verification_benchmark_compares_rules_and_shapes(flags, tmp_path, capsys):
    assert verification.main([*flags, "--drafter", str(DRAFT), "--seeds", "1", "--branching", "2", "1"]) == 0
    written = json.loads((tmp_path / "reports" / "verification.json").read_text())
    names = [row["name"] for row in written["comparisons"]]
    assert "block / standard, same drafts, T = 1" in names
    assert "traversal / recursive, same drafts, T = 1" in names
    assert {"best-first / chain, T = 0", "best-first / chain, T = 1"} <= set(names)
    for row in written["comparisons"]:
        assert row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"]
    assert all(setting["tau"]["value"] >= 1 for setting in written["settings"].values())
    assert "| best-first / chain, T = 0 |" in capsys.readouterr().out
    assert not list((tmp_path / ".deepspec" / "benchmarks").iterdir())  # the work file is of no more use


def test_a_killed_verification_benchmark_goes_on(flags, tmp_path, monkeypatch):
    decoded = []
    run = verification.run

    def dies(target, drafter, setting, *rest):
        if len(decoded) == 7:
            raise KeyboardInterrupt
        decoded.append(setting.name)
        return run(target, drafter, setting, *rest)

    options = [*flags, "--drafter", str(DRAFT), "--seeds", "1"]
    monkeypatch.setattr(verification, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        verification.main(options)
    decoded.clear()
    monkeypatch.setattr(verification, "run", lambda *given: decoded.append(given[2].name) or run(*given))
    assert verification.main(options) == 0
    assert len(decoded) == 2 * 12 - 7  # prompts × settings


def test_the_identity_benchmark_finds_no_difference(flags, tmp_path, capsys):
    assert identity.main([*flags, "--drafters", str(DRAFT), "--batch-sizes", "1", "2"]) == 0
    assert "**0 differences**" in capsys.readouterr().out
    written = json.loads((tmp_path / "reports" / "identity.json").read_text())
    assert len(written["settings"]) == 1 + 2 * 2 + 2 * 4 * 2
    assert "suffix or dspark-vanilla-tiny, best-first, batch 2" in written["settings"]


def test_the_identity_benchmark_fails_on_a_real_difference(flags, tmp_path, monkeypatch, capsys):
    decode = identity.decode

    def one_token_off(target, setting, prompts, tokens):
        for run in decode(target, setting, prompts, tokens):
            if setting.drafter_name == "suffix":
                run.tokens[3] = (run.tokens[3] + 1) % 512
            yield run

    monkeypatch.setattr(identity, "decode", one_token_off)
    assert identity.main([*flags, "--batch-sizes", "1"]) == 1
    assert "**2 differences**" in capsys.readouterr().out
    parted = json.loads((tmp_path / "reports" / "identity.json").read_text())["settings"][
        "suffix, chain, batch 1"
    ]
    assert [verdict["tokens"] for verdict in parted] == [3, 3]


def test_mistakes_are_named_in_one_line(flags, capsys):
    assert verification.main([*flags, "--drafter", "nowhere"]) == 2
    assert capsys.readouterr().err == "error: nowhere: not a draft directory: config.json is missing\n"
    assert identity.main([*flags, "--prompts", "humanevl"]) == 2
    assert "did you mean 'humaneval'" in capsys.readouterr().err


def test_only_a_gap_below_rounding_is_a_tie(target_dir, monkeypatch):
    target = load_target(target_dir, dtype="float32")
    (run,) = generate(target, LookupDrafter(4, 1), [5, 9, 5, 9], 6)
    assert not judge(run.tokens, run, str(target_dir)).parted
    other = replace(run, tokens=[*run.tokens[:2], (run.tokens[2] + 1) % 512, *run.tokens[3:]])
    verdict = judge(run.tokens, other, str(target_dir))
    assert (verdict.tokens, verdict.different) == (2, True)
    monkeypatch.setattr(identity, "top_two_gap", lambda path, ids: 5e-5 * (len(ids) == 6))
    assert judge(run.tokens, other, str(target_dir)).tie
    ended = judge(run.tokens, replace(run, tokens=run.tokens[:4]), str(target_dir))
    assert ended.different  # one run just ends before the other: rounding does not do that


@pytest.mark.parametrize("rule", [standard, block, recursive, traversal])
def test_expected_acceptance_is_exact(rule):
    """One token that is accepted with min(1, p/q)."""
    tables = Tables(0)
    for token in range(3):
        proposal = Proposal.chain([token], probs=tables("q", ())[None])
        expected = min(1.0, float(tables("p", ())[token] / tables("q", ())[token]))
        found = expected_accepted(
            rule, proposal, lambda node, token=token: tables("p", (token,) * (node + 1))
        )
        assert found == pytest.approx(expected, abs=1e-12)


def test_intervals_are_paired_by_prompt():
    """Ours commits twice as much on every prompt, however much prompts differ: the ratio has no spread."""
    theirs = [Count(float(n), 10) for n in (11, 25, 60, 13)]
    ours = [Count(2 * count.tokens, 10) for count in theirs]
    row = compare("ours / theirs", ours, theirs)
    assert (row.ratio.low, row.ratio.value, row.ratio.high) == pytest.approx((2, 2, 2))
    assert row.difference.low < row.difference.value < row.difference.high
    table = np.array([[3.0, 1.0]] * 5)
    assert interval(table, lambda sums: sums[..., 0] / sums[..., 1]).high == 3

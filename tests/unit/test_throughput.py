"""benchmarks/throughput.py: one small run from the flags to the report."""

from __future__ import annotations

import json

import pytest

from benchmarks import throughput
from benchmarks.throughput import main, report
from deepspec.decoding.cost import CostCurve
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.evaluation.throughput import BatchRun, Setting, best_fixed, groups_of

FLAT = [(1, 1.0), (1000, 1.1)]


def test_a_small_run_writes_table_and_figures(tiny_target, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "load_drafter", lambda path, target: LookupDrafter(3, 1))
    monkeypatch.setattr(
        throughput, "load_or_measure", lambda *_, **__: CostCurve({1: FLAT, 2: FLAT}, {}, {"target": "t"})
    )
    monkeypatch.setattr(throughput, "WORK_DIR", tmp_path / "work")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [f"count {i} {i} {i} {i}"]}) + "\n" for i in range(3)))
    flags = ["--target", str(tiny_target), "--drafter", str(tmp_path), "--prompts", str(prompts)]
    flags += ["--batches", "1,2", "--lengths", "1", "--groups", "2", "--max-new-tokens", "12"]
    assert main([*flags, "--reports", str(tmp_path / "out")]) == 0
    data = json.loads((tmp_path / "out" / "throughput.json").read_text())
    names = [(e["temperature"], e["batch"], e["name"]) for e in data["results"]]
    assert len(names) == len(set(names)) == 2 * 2 * 5
    assert {name for _, _, name in names} == {
        "plain",
        "fixed 1",
        "fixed 3",
        "scheduler",
        "scheduler, corrected",
    }
    for entry in data["results"]:
        assert entry["tokens_per_second"] > 0 and entry["tau"] >= 1
        assert entry["verified_per_request"] is None or entry["name"] != "plain"
    table = (tmp_path / "out" / "throughput.md").read_text()
    assert table in capsys.readouterr().out and "T=1, batch 2, scheduler" in table
    assert not list((tmp_path / "work").glob("*")), "the work file outlived the report"


def test_a_mistake_is_one_line(tiny_target, tmp_path, capsys):
    assert main(["--drafter", str(tmp_path), "--target", str(tiny_target), "--lengths", "two"]) == 2
    assert capsys.readouterr().err.startswith("error: --lengths takes numbers like 0,1, found 'two'")


def test_the_best_fixed_length_is_the_fastest():
    runs = {
        "plain": [BatchRun(10, 0.1, 10, None)],
        "fixed 2": [BatchRun(10, 2.0, 5, 2.0)],
        "fixed 5": [BatchRun(10, 1.0, 5, 5.0)],
        "scheduler": [BatchRun(10, 0.5, 5, 3.0)],
    }
    assert best_fixed(runs) == "fixed 5"
    _, data = report({Setting(0.0, 1): runs})
    scheduler = data["results"][-1]
    assert scheduler["against_best_fixed"]["value"] == pytest.approx(2.0)
    assert scheduler["speedup"]["value"] == pytest.approx(0.2)


def test_groups_reuse_prompts_only_where_there_are_too_few():
    prompts = [[i] for i in range(5)]
    first, second = groups_of(prompts, 2, 2, seed=0)
    assert len({tuple(ids) for ids in first + second}) == 4
    assert len(groups_of(prompts, 8, 1, seed=0)[0]) == 8

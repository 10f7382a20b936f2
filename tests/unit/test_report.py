"""The report says what was measured, and nothing that was not."""

from __future__ import annotations

import json

import pytest

from deepspec.errors import DeepSpecError
from deepspec.evaluation import report
from deepspec.stages.report import show


def entry(temperature: float, speedup: float | None, lossless: bool = True, ties: int = 0) -> dict:
    return {
        "category": "math",
        "temperature": temperature,
        "prompts": 8,
        "tau": 2.5,
        "accept_rate_by_position": [0.8, 0.5],
        "tokens_per_second": 50.0,
        "baseline_tokens_per_second": 25.0,
        "speedup": speedup,
        "speedup_ci95": None if speedup is None else [speedup - 0.1, speedup + 0.1],
        "lossless": lossless,
        "ties": ties,
    }


def record(lossless: bool = True) -> dict:
    speed = 2.0 if lossless else None
    mean = {"tau": 2.5, "speedup": speed, "speedup_ci95": [1.9, 2.1] if lossless else None}
    return {
        "eval_version": "1",
        "target": "embedded:x",
        "target_digest": "abc",
        "device": "a machine",
        "dtype": "bfloat16",
        "seed": 0,
        "tasks": {"sums@T=0": entry(0.0, speed, lossless, ties=1), "sums@T=1": entry(1.0, speed, lossless)},
        "summary": {
            **mean,
            "speedup_vs_hf": 3.0 if lossless else None,
            "lossless": lossless,
            "by_temperature": {"0": mean, "1": mean},
        },
    }


@pytest.fixture
def root(tmp_path):
    (tmp_path / "reports/eval").mkdir(parents=True)
    (tmp_path / "reports/train").mkdir()
    (tmp_path / "data/distill").mkdir(parents=True)
    (tmp_path / "reports/eval/good.json").write_text(json.dumps(record()))
    (tmp_path / "reports/eval/bad.json").write_text(json.dumps(record(lossless=False)))
    lines = [
        {"step": 1, "loss": 3.0, "lr": 0.1},
        {"step": 1, "heldout_tau": 1.5},
        {"step": 2, "heldout_tau": 1.4},
    ]
    (tmp_path / "reports/train/good.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "reports/validation.json").write_text('{"passed": true}')
    (tmp_path / "data/distill/manifest.json").write_text('{"rows": 123}')
    return tmp_path


def test_metrics_are_flat_numbers_without_what_was_not_measured(root):
    flat = report.metrics(report.load_inputs(["good", "bad"], root))
    assert flat["good.speedup"] == 2.0
    assert flat["good.sums@T=0.tau"] == 2.5
    assert flat["good.heldout_tau"] == 1.5
    assert (flat["good.lossless"], flat["bad.lossless"]) == (1, 0)
    assert "bad.speedup" not in flat
    assert "bad.heldout_tau" not in flat
    assert all(type(value) in (int, float) for value in flat.values())


def test_table_has_a_row_per_task_and_temperature_and_a_mean(root):
    rows = report.table(report.load_inputs(["good", "bad"], root))
    assert [(row.cells[0], row.cells[1], row.cells[2], row.macro) for row in rows[:4]] == [
        ("good", "sums", "0", False),
        ("good", "mean of tasks", "0", True),
        ("good", "sums", "1", False),
        ("good", "mean of tasks", "1", True),
    ]
    assert rows[0].cells[3:] == ("2.50", "25.0", "50.0", "2.00× (1.90–2.10)", "yes (1 tie)")
    assert rows[4].cells[6:] == ("–", "NO")


def test_markdown_names_machine_target_data_and_places(root):
    text = report.markdown(report.load_inputs(["good"], root))
    for expected in ("| good | sums | 0 | 2.50 |", "**2.00× (1.90–2.10)**", "a machine", "embedded:x", "123"):
        assert expected in text
    assert "Data checks: passed" in text
    assert "against `transformers.generate`: 3.00×" in text
    assert "`data/drafts`" in text


def test_plots_hold_one_row_a_point_with_the_drafters_name(root):
    files = report.plots(report.load_inputs(["good", "bad"], root))
    assert files["training.csv"] == "drafter,step,loss,lr\ngood,1,3.0,0.1\n"
    assert files["heldout.csv"].splitlines()[1:] == ["good,1,1.5", "good,2,1.4"]
    assert files["acceptance.csv"].splitlines()[1:3] == ["good,sums@T=0,1,0.8", "good,sums@T=0,2,0.5"]
    assert files["speedup.csv"].splitlines()[1:] == ["good,sums@T=0,2.5,2.0", "good,sums@T=1,2.5,2.0"]


def test_a_drafter_without_training_log_validation_or_manifest_is_reported_all_the_same(root):
    for path in ("reports/train/good.jsonl", "reports/validation.json", "data/distill/manifest.json"):
        (root / path).unlink()
    text = report.markdown(report.load_inputs(["good"], root))
    assert "| good | sums | 0 | 2.50 |" in text
    assert "Data checks" not in text


def test_a_missing_or_broken_record_is_one_clear_line(root):
    with pytest.raises(DeepSpecError, match=r"absent\.json: no such record"):
        report.load_inputs(["absent"], root)
    (root / "reports/eval/good.json").write_text("{")
    with pytest.raises(DeepSpecError, match=r"good\.json: not JSON"):
        report.load_inputs(["good"], root)


def test_the_terminal_table_shows_every_row_whole_in_a_pipe(root, capsys):
    show(report.table(report.load_inputs(["good", "bad"], root)), report.COLUMNS, "a machine")
    out = capsys.readouterr().out
    assert "2.00× (1.90–2.10)" in out
    assert "mean of tasks" in out
    assert "NO" in out

"""The report says what was measured, and nothing that was not."""

from __future__ import annotations

import csv
import io

import pytest

from deepspec.errors import DeepSpecError
from deepspec.report import inputs as report
from deepspec.report import page
from deepspec.report.inputs import unmeasured
from deepspec.report.tables import COLUMNS, tables, to_csv
from deepspec.stages.report import show
from tests.records import record, write


@pytest.fixture
def inputs(tmp_path):
    return write(tmp_path, {"good": record(), "bad": record("bad", None)})


def read(figure: str, inputs) -> list[dict[str, str]]:
    """A figure's CSV as `dvc plots` reads it."""
    return list(csv.DictReader(io.StringIO(to_csv(figure, tables(inputs)[figure]))))


def test_metrics_are_flat_numbers_without_what_was_not_measured(inputs):
    flat = report.metrics(inputs)
    assert flat["good.speedup"] == 2.0
    assert flat["good.sums@T=0.tau"] == 2.5
    assert flat["good.heldout_tau"] == 1.6
    assert (flat["good.lossless"], flat["bad.lossless"]) == (1, 0)
    assert "bad.speedup" not in flat
    assert all(type(value) in (int, float) for value in flat.values())


def test_table_has_a_row_per_task_and_temperature_and_a_mean(inputs):
    rows = report.table(inputs)
    assert [(row.cells[0], row.cells[1], row.cells[2], row.macro) for row in rows[:6]] == [
        ("good", "sums", "0", False),
        ("good", "talk", "0", False),
        ("good", "mean of tasks", "0", True),
        ("good", "sums", "1", False),
        ("good", "talk", "1", False),
        ("good", "mean of tasks", "1", True),
    ]
    assert rows[0].cells[3:] == ("2.50", "25.0", "50.0", "2.00× (1.90–2.10)", "yes (1 tie)")
    assert rows[6].cells[6:] == ("–", "NO")


def test_one_prompt_a_task_is_reported_without_an_interval(tmp_path):
    alone = record()
    for entry in (*alone["tasks"].values(), alone["summary"], *alone["summary"]["by_temperature"].values()):
        entry["speedup_ci95"] = entry["tau_ci95"] = None
    inputs = write(tmp_path, {"good": alone})
    assert report.table(inputs)[0].cells[6] == "2.00×"
    assert read("speedup", inputs)[0]["low"] == ""
    lead = page.render(inputs, []).split('<p class="lead">')[1].split("</p>")[0]
    assert "2.00 times" in lead and "(" not in lead


def test_ties_and_checked_tokens_are_counted_once_whatever_the_temperatures(tmp_path):
    both = record()
    sampled = record(tasks={key: entry for key, entry in both["tasks"].items() if entry["temperature"] == 1})
    for found in (both, sampled):
        inputs = write(tmp_path, {"good": found})
        headline = page._headline(inputs)
        assert (headline["ties"], headline["prompts"], headline["tokens"]) == (1, 8, 384)
        assert page.leaderboard(inputs)[0]["ties"] == 1


def test_markdown_names_machine_target_data_warnings_and_places(inputs):
    text = report.markdown(inputs)
    for expected in ("| good | sums | 0 | 2.50 |", "**2.00× (1.90–2.10)**", "a machine", "embedded:x", "123"):
        assert expected in text
    assert "Data checks: passed" in text
    assert "against `transformers.generate`: 3.00×" in text
    assert "Warning, bad: not_lossless: the output changed on sums" in text
    assert "`data/drafts`" in text and "`reports/report.html`" in text


def test_what_was_not_measured_is_said(tmp_path):
    assert unmeasured(write(tmp_path, {"good": record()}).records["good"]) == []
    short = record(throughput=None, plain_new_tokens=32)
    short["sweeps"]["computed"] = True
    for entry in short["tasks"].values():
        del entry["beside"]["fixed"]
        entry["beside"]["lookup"]["computed"] = True
    for mean in short["summary"]["by_temperature"].values():
        mean["beside"].pop("fixed", None)
    inputs = write(tmp_path, {"good": short})
    remarks = unmeasured(inputs.records["good"])
    assert remarks[0] == "not measured: other controllers, full batches"
    assert remarks[1].startswith("computed, not decoded: the lookup alone, sweeps over lengths and trees (")
    assert remarks[2] == "plain runs end after 32 tokens where no later turn follows"
    assert "deepspec evaluate --full" in remarks[3]
    assert all(f"- good: {remark}\n" in report.markdown(inputs) for remark in remarks)
    marked = {row["way"]: row["computed"] for row in page.leaderboard(inputs)}
    assert marked == {"good": False, "lookup alone": True, "plain decoding": False}
    html = page.render(inputs, [])
    assert "<small>computed</small>" in html and remarks[0] in html


def test_every_figure_has_rows_and_every_csv_its_columns(inputs):
    for figure, columns in COLUMNS.items():
        rows = read(figure, inputs)
        assert rows and set(rows[0]) == set(columns), figure
        assert all(row[columns[0]] for row in rows), f"{figure}: a row without a value"


def test_rows_carry_the_figures_of_the_records(inputs):
    (first, *_) = read("speedup", inputs)
    assert (first["way"], first["task"], first["tau"], first["speedup"], first["low"]) == (
        "good",
        "sums",
        "2.5",
        "2.0",
        "1.9",
    )
    ways = {row["way"] for row in read("speedup", inputs)}
    assert ways == {"good", "lookup beside good", "good, fixed", "bad", "lookup beside bad", "bad, fixed"}
    assert [row["accept_rate"] for row in read("acceptance", inputs)[:3]] == [
        "0.7",
        "0.6",
        "0.5",
    ]  # the draft alone
    assert {row["speedup"] for row in read("sweeps", inputs) if row["drafter"] == "bad"} == {""}
    drafted = [row for row in read("throughput", inputs) if row["name"] == "plain"]
    assert drafted and all(row["verified_per_request"] == "" for row in drafted)


def test_a_drafter_that_was_not_trained_shows_its_acceptance_as_it_is_deployed(tmp_path):
    inputs = write(tmp_path, {"lookup": record("lookup", trained=False)})
    rows = read("acceptance", inputs)
    assert [row["accept_rate"] for row in rows[:2]] == ["0.8", "0.5"]
    assert read("training", inputs) == read("sweeps", inputs) == read("reliability", inputs) == []


def test_a_drafter_without_training_log_validation_or_manifest_is_reported_all_the_same(tmp_path):
    write(tmp_path, {"good": record()})
    for path in ("reports/train/good.jsonl", "reports/validation.json", "data/distill/manifest.json"):
        (tmp_path / path).unlink()
    text = report.markdown(report.load_inputs(["good"], tmp_path))
    assert "| good | sums | 0 | 2.50 |" in text
    assert "Data checks" not in text


def test_a_missing_broken_or_old_record_is_one_clear_line(tmp_path):
    write(tmp_path, {"good": record()})
    with pytest.raises(DeepSpecError, match=r"absent\.json: no such record"):
        report.load_inputs(["absent"], tmp_path)
    (tmp_path / "reports/eval/good.json").write_text('{"eval_version": "1"}')
    with pytest.raises(DeepSpecError, match=r"good\.json: of evaluation version 1, not 3; evaluate it again"):
        report.load_inputs(["good"], tmp_path)
    (tmp_path / "reports/eval/good.json").write_text("{")
    with pytest.raises(DeepSpecError, match=r"good\.json: not JSON"):
        report.load_inputs(["good"], tmp_path)


def test_the_terminal_table_shows_every_row_whole_in_a_pipe(inputs, capsys):
    show(report.table(inputs), report.COLUMNS, "a machine")
    out = capsys.readouterr().out
    assert "2.00× (1.90–2.10)" in out
    assert "mean of tasks" in out
    assert "NO" in out

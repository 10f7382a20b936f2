"""`benchmarks/gpu` keeps what it found and tells what failed; `tests/e2e/test_gpu_benchmark.py` runs its steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.checks import passed
from benchmarks.gpu.findings import Findings, OutOfTime, Setting
from benchmarks.gpu.page import section


def test_a_step_goes_on_where_it_was_cut_short(tmp_path):
    calls = []

    def piece(findings: Findings, key: str) -> None:
        findings.piece(key, lambda: calls.append(key) or {"ms": 1.0})

    cut = Findings(Setting(True, tmp_path, seconds=60), 9, "a step")
    piece(cut, "first")
    cut.seconds = 0
    with pytest.raises(OutOfTime):
        piece(cut, "second")
    again = Findings(Setting(True, tmp_path, seconds=60), 9, "a step")
    for key in ("first", "second"):
        piece(again, key)
    assert calls == ["first", "second"]


def test_a_failed_piece_is_told_and_tried_again(tmp_path):
    findings = Findings(Setting(True, tmp_path), 9, "a step")
    findings.piece("broken", lambda: {"ms": 1 / 0})
    findings.piece("whole", lambda: {"ms": 2.0})
    findings.finish()
    assert not findings.complete
    notes = section(findings.record).notes
    assert any("broken: ZeroDivisionError" in note for note in notes)
    again = Findings(Setting(True, tmp_path), 9, "a step")
    again.piece("broken", lambda: {"ms": 3.0})
    again.finish()
    assert again.complete


def test_a_check_that_does_not_hold_is_told_with_its_line(tmp_path):
    def check(directory: Path, folder: Path, device: str) -> None:
        assert device == "another"

    with pytest.raises(AssertionError, match='assert device == "another"'):
        passed(check, tmp_path, tmp_path / "folder", "cpu")


def test_another_devices_findings_are_not_added_to(tmp_path, capsys):
    record = {"device": "another one", "dry": True, "pieces": {}, "seconds": 0, "finished": False, "when": ""}
    (tmp_path / "step-3.json").write_text(json.dumps(record))
    assert main(["--dry-run", "--output", str(tmp_path), "--steps", "3"]) == 2
    assert "give another --output" in capsys.readouterr().err

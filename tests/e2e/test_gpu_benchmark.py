"""`benchmarks/gpu`: every step runs at a small size on the CPU, keeps what it found, and shows it on one page."""

from __future__ import annotations

import json
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import STEPS, main
from benchmarks.gpu.page import DRY

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
# What a bare machine lacks of the project's packages.
MISSING = ("prefect", "mlflow", "dvc", "datasets", "great_expectations", "fastapi", "sqlalchemy", "pytest")


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """Of a dry run of every step, in one process of its own: accelerate keeps its state in the process."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--here", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("number", STEPS)
def test_every_piece_of_a_step_is_found_in_a_dry_run(output, number):
    record = json.loads((output / f"step-{number}.json").read_text())
    assert record["finished"] and record["dry"]
    assert record["pieces"] and not [key for key, piece in record["pieces"].items() if "error" in piece]


def test_a_finished_step_is_not_run_again(output, capsys):
    before = (output / "step-3.json").read_text()
    assert main(["--dry-run", "--output", str(output), "--steps", "3"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert (output / "step-3.json").read_text() == before


def test_the_page_names_the_device_and_says_that_it_was_a_dry_run(output, tmp_path):
    assert main(["--output", str(output), "--report", str(tmp_path)]) == 0
    device = json.loads((output / "step-1.json").read_text())["device"]
    for name in ("gpu.md", "gpu.html"):
        text = unescape((tmp_path / name).read_text())
        assert device in text and DRY in text
        assert all(f"{number}. {title}" in text for number, (_, title) in STEPS.items())


def test_a_dry_run_is_refused_where_reports_are_kept(output, tmp_path, capsys):
    assert main(["--output", str(output), "--report", str(tmp_path / "reports" / "gpu")]) == 2
    assert "a dry run is no report of a device" in capsys.readouterr().err


def test_the_steps_import_nothing_that_a_bare_machine_lacks():
    modules = ", ".join(f"benchmarks.gpu.{name}" for name, _ in STEPS.values())
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({MISSING!r})); import {modules}, benchmarks.gpu.page"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

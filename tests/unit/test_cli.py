"""`deepspec ...` for people: quick help, each stage under its name, one line for a mistake."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deepspec.cli import STAGES, app

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a command line in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["deepspec"])
    return lambda *words, stdin=None: CliRunner().invoke(app, list(words), input=stdin)


def test_help_lists_every_stage_and_tool(run):
    result = run("--help")
    assert result.exit_code == 0
    for name in (*STAGES, "chat", "doctor"):
        assert f" {name} " in result.output


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_module_of_its_name_that_the_cli_runs_with_the_parameters(run, name):
    needed = {"train": ["--drafter", "dspark"], "export": ["--drafter", "dspark"]}
    result = run(name, "--params", "nowhere.yaml", *needed.get(name, []))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: nowhere.yaml: no such file")


LIGHT = ["deepspec.cli", "deepspec.config", *(f"deepspec.stages.{name}" for name in STAGES)]
REPORTS = ["deepspec.report.page", "deepspec.report.compare", "deepspec.reproduce.run"]


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [(LIGHT, {"torch", "transformers", "datasets", "numpy"}), (REPORTS, {"torch", "transformers"})],
    ids=["flags and parameters", "reports"],
)
def test_nothing_heavy_is_imported_where_it_is_not_needed(modules, heavy):
    code = f"import sys, {', '.join(modules)}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_doctor_refuses_a_target_in_one_line(run, tiny_target, tmp_path):
    copy = shutil.copytree(tiny_target, tmp_path / "target")
    (copy / "tokenizer.json").unlink()
    for source, words in (
        (str(copy), "the target has no tokenizer"),
        ("./nowhere", "no such target directory"),
    ):
        result = run("doctor", "--target", source)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {source}: {words}") and result.stderr.count("\n") == 1


def test_a_stage_shows_its_own_flags(run):
    result = run("evaluate", "--help")
    assert result.exit_code == 0
    assert "usage: deepspec evaluate" in result.output
    assert "--drafter" in result.output


def test_a_users_mistake_is_one_line_and_exit_status_2(run):
    result = run("report")
    assert result.exit_code == 2
    assert (
        result.stderr == "error: params.yaml: no such file; run from the repository's root or pass --params\n"
    )


def test_an_unknown_drafter_is_named_with_the_nearest(run):
    result = run("evaluate", "--drafter", "dsprk", "--params", str(ROOT / "params.smoke.yaml"))
    assert result.exit_code == 2
    assert result.stderr == "error: unknown drafter 'dsprk'; did you mean 'dspark'?\n"


def test_evaluate_without_a_drafter_takes_those_of_the_pipeline(run):
    result = run("evaluate", "--params", str(ROOT / "params.smoke.yaml"), "--drafts", "elsewhere")
    assert result.exit_code == 2
    assert "elsewhere/lookup: no such draft" in result.stderr


def test_a_draft_that_is_not_trained_yet_says_how_to_get_it(run):
    result = run("evaluate", "--drafter", "dspark", "--params", str(ROOT / "params.smoke.yaml"))
    assert result.exit_code == 2
    assert "data/drafts/dspark: no such draft" in result.stderr

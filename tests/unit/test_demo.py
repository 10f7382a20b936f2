"""`deepspec demo` follows the stages by their channel and says what a newcomer wants to know."""

from __future__ import annotations

import io
import json
import sys
import textwrap
from types import SimpleNamespace

import pytest
from rich.console import Console

from deepspec import following
from deepspec.commands import demo
from deepspec.commands.demo import View, follow, run, stages_of
from deepspec.errors import DeepSpecError
from deepspec.following import Count

DVC = """
stages:
  prompts: {desc: Training prompts.}
  train: {desc: One drafter., matrix: {drafter: "${pipeline}"}}
  report: {desc: The page.}
"""
WORK = """
import sys, time
from deepspec.progress import Progress, send

send({"stage": "train@a"})
with Progress("steps", 4) as progress:
    for _ in range(4):
        progress.advance()
        progress._sent = 0.0
print("loss 2.1")
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "dvc.yaml").write_text(DVC)
    (tmp_path / "params.yaml").write_text("pipeline: [a, b]\n")
    (tmp_path / "work.py").write_text(textwrap.dedent(WORK))
    return tmp_path


def view_of(root, terminal=False):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, highlight=False)
    return View(stages_of(root), console), out


def test_a_matrix_has_a_row_for_each_drafter(root):
    assert list(stages_of(root)) == ["prompts", "train@a", "train@b", "report"]
    assert stages_of(root)["train@b"].what == "One drafter"


def test_a_log_has_the_stages_and_their_words_but_no_counts(root, monkeypatch):
    monkeypatch.setattr(following, "POLL_S", 0.01)
    view, out = view_of(root)
    follow([sys.executable, "work.py", "0"], root, view)
    said = out.getvalue()
    assert "train@a: One drafter" in said and "loss 2.1" in said
    assert "4/4" not in said  # a count a minute, and this took none
    assert view.stages["train@a"].ended is not None and view.stages["train@b"].began is None


def test_a_minute_later_a_line_says_how_far_it_is(root):
    view, out = view_of(root)
    view.stage("train@a")
    view.count(Count("steps", 3, 4, 90.0))
    view.tick()
    assert "3/4" not in out.getvalue()
    view.told -= demo.LINE_S
    view.tick()
    view.tick()
    assert out.getvalue().count("train@a: steps 3/4, 90 s left") == 1


def test_a_terminal_has_a_table_that_moves(root):
    view, out = view_of(root, terminal=True)
    with view.shown():
        view.stage("prompts")
        view.stage("train@a")
        view.count(Count("steps", 3, 4))
        view.live.refresh()
    said = out.getvalue()
    assert "steps 3/4" in said and "done in 0 s" in said and "The page" in said


def test_a_failed_stage_fails_the_demo_with_its_own_words(root):
    view, _ = view_of(root)
    with pytest.raises(DeepSpecError, match=r"work\.py 3 exited with 3"):
        follow([sys.executable, "work.py", "3"], root, view)
    with pytest.raises(DeepSpecError, match=r"^no such drafter$"):
        code = "from deepspec.progress import send; send({'error': 'no such drafter'}); raise SystemExit(2)"
        follow([sys.executable, "-c", code], root, view)


def test_the_first_figure_comes_after_the_prompts_and_only_once(root, monkeypatch):
    ran = []
    monkeypatch.setattr(
        demo.subprocess, "run", lambda *words, **options: SimpleNamespace(stdout="", stderr="")
    )
    monkeypatch.setattr(demo, "follow", lambda words, root, view: ran.append(words[2:]))
    view, _ = view_of(root)
    run(root, view)
    assert ran == [
        ["dvc", "repro", "target"],
        ["dvc", "repro", "prompts"],
        ["deepspec.stages.glance"],
        ["dvc", "repro"],
        ["deepspec.stages.report"],
    ]
    assert list(view.stages)[:2] == ["prompts", "glance"]
    ran.clear()
    (root / "data/distill").mkdir(parents=True)
    run(root, view_of(root)[0])
    assert ran == [["dvc", "repro"], ["deepspec.stages.report"]]


PLAN = {"target": 20, "prompts": 60, "generate": 500, "features": 200, "train a": 400, "evaluate": 900}


def test_the_time_is_told_before_the_long_stages_by_the_plan(root, monkeypatch):
    told = json.dumps({"stages": [{"stage": name, "seconds": s} for name, s in PLAN.items()]})
    monkeypatch.setattr(demo, "follow", lambda words, root, view: None)
    monkeypatch.setattr(
        demo.subprocess, "run", lambda *words, **options: SimpleNamespace(stdout=told, stderr="")
    )
    view, out = view_of(root)
    run(root, view)
    assert "About 11 min more" in out.getvalue()  # 60 + 200 + 400: the features come with the first training
    assert view.stages["train@a"].expected == 600 and view.stages["train@b"].expected is None


def test_a_plan_that_fails_delays_nothing(root, monkeypatch):
    monkeypatch.setattr(demo, "follow", lambda words, root, view: None)
    failed = SimpleNamespace(stdout="", stderr="error: no such drafter\n")
    monkeypatch.setattr(demo.subprocess, "run", lambda *words, **options: failed)
    view, out = view_of(root)
    run(root, view)
    assert "no estimate of the time: error: no such drafter" in out.getvalue()
    assert "Finished in 0 s." in out.getvalue()


def test_a_place_without_a_pipeline_is_one_line(tmp_path):
    with pytest.raises(DeepSpecError, match=r"dvc\.yaml: cannot be read"):
        stages_of(tmp_path)

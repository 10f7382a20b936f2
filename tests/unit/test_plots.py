"""`deepspec plots`: what DVC draws, in a page that asks nobody."""

from __future__ import annotations

from pathlib import Path

import pytest
from dvc.repo import Repo

from deepspec.commands.plots import run
from deepspec.errors import DeepSpecError
from tests.dvc_here import make_repository
from tests.repositories import commit

DVC_YAML = """
stages:
  measure: {cmd: "true", outs: [{loss.csv: {cache: false}}]}
plots:
  - loss.csv: {x: step, y: loss, title: Loss}
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    make_repository(tmp_path)
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / "loss.csv").write_text("step,loss\n1,3.0\n2,2.0\n")
    (tmp_path / ".gitignore").write_text("/.deepspec/\n/dvc_plots/\n")
    commit(tmp_path, "first")
    return tmp_path


def test_the_page_draws_without_a_network(repository: Path, browser):
    asked: list[str] = []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    (repository / "loss.csv").write_text("step,loss\n1,3.0\n2,1.0\n")
    for revisions in ((), ("HEAD",)):
        path = run(revisions, repository)
        page.goto(path.resolve().as_uri())
        page.locator(".vega-embed canvas, .vega-embed svg.marks").first.wait_for(timeout=10_000)
        assert page.get_by_text("Something went wrong").count() == 0
    assert all(url.startswith("file://") for url in asked)


def test_the_pipeline_that_is_named_is_not_drowned_by_another_one(repository: Path, monkeypatch):
    """`dvc status dvc.yaml` of the documents: without a name, DVC tells of paper/dvc.yaml too."""
    (repository / "paper").mkdir()
    (repository / "paper/dvc.yaml").write_text(DVC_YAML.split("plots:")[0])
    monkeypatch.chdir(repository)
    with Repo(repository) as repo:
        assert set(repo.status()) == {"measure", "paper/dvc.yaml:measure"}
        assert set(repo.status(targets=["dvc.yaml"])) == {"measure"}


def test_an_unknown_revision_is_one_line(repository: Path):
    with pytest.raises(DeepSpecError, match=r"dvc plots diff: .*nope"):
        run(("nope",), repository)

"""Results by name: from a bare clone of the main branch, without tags and without anybody's remote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from deepspec.cli import app
from deepspec.errors import DeepSpecError
from deepspec.reproduce import draft as drafts
from deepspec.reproduce.checkout import Settings
from deepspec.reproduce.milestones import read_milestones, small_data, take_files
from deepspec.reproduce.run import RESULT, run
from tests.dvc_here import make_repository
from tests.repositories import commit, sh, succeed

pytestmark = pytest.mark.usefixtures("dvc_here")
ROOT = Path(__file__).parents[2]
DVC_YAML = """
stages:
  prompts:
    cmd: python make.py prompts
    deps: [make.py]
    outs: [data/prompts.txt]
  train:
    matrix: {drafter: [a, b]}
    cmd: python make.py train ${item.drafter}
    deps: [data/prompts.txt]
    outs:
      - "data/drafts/${item.drafter}"
      - "reports/train/${item.drafter}.jsonl": {cache: false}
  evaluate:
    cmd: python make.py evaluate
    deps: [data/drafts/a, data/drafts/b]
    outs:
      - reports/eval: {cache: false}
  table:
    cmd: python make.py table
    deps: [reports/eval, data/prompts.txt]
    metrics:
      - metrics.json: {cache: false}
"""
MAKE = """
import hashlib, json, os, pathlib, sys, time
what, *names = sys.argv[1:]
log = pathlib.Path("ran.log"); log.open("a").write(" ".join([what, *names]) + "\\n")
if os.environ.get("SLOW"): pathlib.Path("started").touch(); time.sleep(60)
def put(path, text):
    path = pathlib.Path(path); path.parent.mkdir(parents=True, exist_ok=True); path.write_text(text)
if what == "prompts": put("data/prompts.txt", "Why?")
if what == "train":
    put(f"data/drafts/{names[0]}/model.safetensors", names[0] + os.environ.get("LUCK", ""))
    put(f"data/drafts/{names[0]}/deepspec.json", json.dumps(time.time()))
    loss = 1.0 + float(os.environ.get("LOSS", 0))
    put(f"reports/train/{names[0]}.jsonl", json.dumps({"step": 1, "loss": loss, "heldout_tau": 1.5}) + "\\n")
if what == "evaluate":
    for name in "ab":
        weights = hashlib.sha256(pathlib.Path(f"data/drafts/{name}/model.safetensors").read_bytes()).hexdigest()
        digest = hashlib.sha256(f"model.safetensors {weights}\\n".encode()).hexdigest()[:16]
        made = {"cpu": os.environ.get("THE_CPU", "this one"), "packages": {"torch": "2"}}
        record = {"eval_version": "1", "drafter": name, "tasks": {}, "summary": {}}
        put(f"reports/eval/{name}.json", json.dumps(record | {"draft_digest": digest, "provenance": made}))
if what == "table": put("metrics.json", json.dumps({"tau": 2.5}))
"""


def milestone(commit: str, **changes) -> dict:
    ways = [
        {"run": "--stages table", "takes": "a moment", "needs": "records"},
        {"run": "", "takes": "hours", "needs": "a remote", "remote": True},
    ]
    said = {"result": "a table", "exactly": "all of it", "within": "nothing", "ways": ways}
    return {"commit": commit, "pipeline": "dvc.yaml", **said, **changes}


@pytest.fixture(scope="module")
def main(tmp_path_factory) -> Path:
    """A bare clone of a main branch: no tags, and a remote that nobody else has."""
    root = tmp_path_factory.mktemp("author") / "repository"
    root.mkdir()
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "make.py").write_text(MAKE)
    (root / ".gitignore").write_text("ran.log\n/.deepspec/\n/data/\n")
    make_repository(root)
    succeed(root, "remote", "add", "--default", "local", "/nowhere/of/mine")
    succeed(root, "repro")
    first = commit(root, "the result")
    sh(root, "git", "tag", "v1")
    (root / "milestones/first/data").mkdir(parents=True)
    (root / "milestones/first/data/prompts.txt").write_text("Why?")
    (root / "milestones/wrong/data").mkdir(parents=True)
    (root / "milestones/wrong/data/prompts.txt").write_text("What?")
    known = {name: milestone(first) for name in ("first", "wrong")}
    known["bare"] = milestone(first)  # without small data
    known["gone"] = milestone(40 * "0")
    known["v1"] = milestone(40 * "1")  # a tag of the same name goes first
    (root / "milestones.yaml").write_text(yaml.safe_dump(known))
    (root / "make.py").write_text(MAKE.replace("2.5", "9.9"))
    commit(root, "later work")
    bare = root.parent / "main.git"
    sh(root.parent, "git", "clone", "--quiet", "--bare", "--no-tags", "--single-branch", str(root), str(bare))
    return bare


@pytest.fixture
def settings(main, tmp_path):
    return lambda name, **changes: Settings(name, str(main), tmp_path / "clone", **changes)


def ran(chosen: Settings) -> list[str]:
    return (chosen.directory / "ran.log").read_text().splitlines()


def rows(chosen: Settings) -> dict[str, dict]:
    return {row["metric"]: row for row in json.loads((chosen.directory / RESULT).read_text())["metrics"]}


def refused(chosen: Settings) -> str:
    with pytest.raises(DeepSpecError) as caught:
        run(chosen)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_table_comes_back_from_committed_records_and_the_small_data_in_git(main, settings):
    chosen = settings("first", stages=("table",))
    assert run(chosen) is True
    assert ran(chosen) == ["table"]
    assert rows(chosen)["tau"]["now"] == 2.5  # by the code of then
    assert run(chosen) is True  # gone on with, under the same name


def test_a_tag_goes_before_a_milestone_of_its_name(main, tmp_path):
    tagged = Settings("v1", str(main.parent / "repository"), tmp_path / "clone", recompute=True)
    assert run(tagged) is True
    assert "lacks the commit 1111111 of v1" in refused(Settings("v1", str(main), tmp_path / "other"))


def test_what_cannot_be_had_ends_with_what_works(settings):
    said = refused(settings("first"))
    assert "the remote lacks data of first (there is no directory /nowhere/of/mine)" in said
    assert said.endswith("`deepspec reproduce first --stages table` (a moment)")
    said = refused(settings("first", remote="/not/there"))
    assert "there is no directory /not/there" in said and "--stages table" in said


def test_a_commit_without_a_milestone_says_what_works_too(main, settings):
    commit = read_milestones(main)["first"].commit
    assert refused(settings(commit)).endswith(f"`deepspec reproduce {commit} --recompute`")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", "milestones/wrong/data/prompts.txt: not the file that dvc.lock of wrong names"),
        ("gone", "lacks the commit 0000000 of gone; it is on the main branch: `git fetch --unshallow`"),
        (
            "frist",
            "has no tag 'frist'; did you mean 'first'? (tags: none; milestones: bare, first, gone, v1, wrong)",
        ),
    ],
)
def test_each_mistake_is_one_line(settings, name, message):
    assert message in refused(settings(name, stages=("table",)))


def test_one_draft_is_trained_again_and_judged_by_its_weights(settings, monkeypatch):
    monkeypatch.setattr(drafts, "provenance", lambda: {"cpu": "this one", "packages": {"torch": "2"}})
    chosen = settings("bare", recompute=True, drafter="b")
    assert run(chosen) is True
    assert ran(chosen) == ["prompts", "train b"]
    found = rows(chosen)
    assert {name: row["verdict"] for name, row in found.items()} == {
        "data/prompts.txt": "same",
        "b.weights": "same",
        "b.heldout_tau": "same",
        "b.loss": "same",
    }


@pytest.mark.parametrize(
    ("cpu", "luck", "loss", "passed", "verdicts"),
    [
        ("this one", "!", "0", False, ("DIFFERS", "same")),
        ("another", "!", "0.05", True, ("not compared", "within")),
        ("another", "!", "0.5", False, ("not compared", "DIFFERS")),
    ],
)
def test_other_weights_fail_on_the_same_machine_alone(
    settings, monkeypatch, cpu, luck, loss, passed, verdicts
):
    monkeypatch.setattr(drafts, "provenance", lambda: {"cpu": cpu, "packages": {"torch": "2"}})
    monkeypatch.setenv("LUCK", luck)
    monkeypatch.setenv("LOSS", loss)
    chosen = settings("first", recompute=True, drafter="a")
    assert run(chosen) is passed
    assert tuple(rows(chosen)[name]["verdict"] for name in ("a.weights", "a.loss")) == verdicts


def test_an_unknown_draft_and_one_that_is_only_pulled_are_refused(settings):
    assert "no draft 'c' (drafts: a, b)" in refused(settings("first", recompute=True, drafter="c"))
    assert "--drafter goes without --stages" in refused(settings("first", drafter="a", stages=("table",)))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_draft_is_trained_from_the_data_in_git_without_making_them_again(settings, caplog, recompute):
    caplog.set_level("INFO", "deepspec")
    chosen = settings("first", drafter="a", recompute=recompute)
    assert run(chosen) is True
    assert ran(chosen) == ["train a"] and "from git: data/prompts.txt" in caplog.text
    assert rows(chosen)["a.weights"]["verdict"] == "same"


def test_all_is_made_again_but_the_data_in_git_which_are_made_where_they_are_named(main, tmp_path):
    whole = Settings("first", str(main), tmp_path / "whole", recompute=True)
    assert run(whole) is True
    assert ran(whole) == ["train a", "train b", "evaluate", "table"]
    named = Settings("first", str(main), tmp_path / "named", recompute=True, stages=("prompts",))
    assert run(named) is True
    assert ran(named) == ["prompts"]


@pytest.mark.parametrize(
    ("damage", "taken"),
    [
        (lambda folder: None, ["folder"]),
        (
            lambda folder: (folder / "a").unlink(),
            [],
        ),  # a part of it, as the manifest of a data set may be alone
        (lambda folder: (folder / "a").write_text("other"), []),
        (lambda folder: (folder / "more").write_text("more"), []),
    ],
)
def test_a_folder_in_git_is_taken_if_it_is_all_that_dvc_lock_names(tmp_path, damage, taken):
    make_repository(tmp_path)
    small = tmp_path / "milestones/it/folder"
    (small / "deep").mkdir(parents=True)
    for name in ("b", "a", "deep/c"):
        (small / name).write_text(name)
    succeed(tmp_path, "add", str(small))
    md5 = yaml.safe_load((tmp_path / "milestones/it/folder.dvc").read_text())["outs"][0]["md5"]
    (tmp_path / "milestones/it/.gitignore").unlink()
    damage(small)
    commit(tmp_path, "small data")
    assert take_files(tmp_path, "it", {"folder": md5}) == taken
    assert (tmp_path / "folder/deep/c").exists() == bool(taken)


def test_an_interrupted_stage_shows_no_traceback(main, tmp_path, monkeypatch):
    """Ctrl-C reaches the command alone; the stage is told to end by a signal, with all that it started."""
    words = ["reproduce", "first", "--recompute", "--repo", str(main), "--into", str(tmp_path / "clone")]
    process = subprocess.Popen(
        [sys.executable, "-m", "deepspec.cli", *words],
        cwd=ROOT, env=os.environ | {"SLOW": "1"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "clone/started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; run again to continue" in err and "Traceback" not in out + err


def test_the_list_says_what_there_is_and_how_it_comes_back(main):
    for repo in (str(main), str(main.parent / "repository"), main.as_uri()):
        found = CliRunner().invoke(app, ["reproduce", "--list", "--repo", repo])
        assert found.exit_code == 0, found.output
        assert (
            "first: a table" in found.output and "deepspec reproduce first --stages table\n" in found.output
        )
    assert "name a tag" in CliRunner().invoke(app, ["reproduce"]).output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {commit: abc}", "milestones.yaml: a.commit"),
        ("a: [", "milestones.yaml: while parsing"),
        ("a: {comit: x}", "milestones.yaml: a"),
    ],
)
def test_a_broken_list_is_one_line(tmp_path, text, message):
    sh(tmp_path, "git", "init", "--quiet")
    (tmp_path / "milestones.yaml").write_text(text)
    commit(tmp_path, "broken")
    with pytest.raises(DeepSpecError, match=message):
        read_milestones(tmp_path)


def test_the_projects_milestones_are_commits_of_this_history_with_their_pipelines():
    for name, found in read_milestones(ROOT).items():
        if sh(ROOT, "git", "rev-parse", "--is-shallow-repository").strip() == "true":
            pytest.skip("a shallow clone")
        assert sh(ROOT, "git", "merge-base", "--is-ancestor", found.commit, "HEAD") == ""
        assert found.ways[0].remote is False
        pipeline = Path(found.pipeline)
        lock = yaml.safe_load(sh(ROOT, "git", "show", f"{found.commit}:{pipeline.with_suffix('.lock')}"))
        written = {
            str(pipeline.parent / out["path"]): out["md5"]
            for stage in lock["stages"].values()
            for out in stage["outs"]
        }
        for folder in ("data/prompts", "data/distill"):
            path = str(pipeline.parent / folder)
            assert small_data(ROOT, name, path, written[path]), path  # what that commit's dvc.lock names

"""The loop that runs without its author, with real servers on loopback: schedules, retries, refusals, kills."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
import yaml

from tests.dvc_here import make_repository
from tests.e2e.browser import look
from tests.e2e.clone import make_clone
from tests.e2e.servers import Servers, servers, wait_for

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def stack():
    home = Path(tempfile.mkdtemp(prefix="deepspec-flows-"))
    home.chmod(0o755)  # PostgreSQL runs as a user of its own
    with servers(home) as started:
        yield started
    shutil.rmtree(home, ignore_errors=True)


def git(root: Path, *words: str) -> str:
    author = ("-c", "user.name=Test", "-c", "user.email=test@localhost")
    return subprocess.run(
        ["git", *author, *words], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


def repository(root: Path, stages: dict, params: dict) -> Path:
    """A small pipeline of shell commands, committed. Each stage writes down that it ran, in `<root>.<stage>`."""
    root.mkdir()
    make_repository(root)
    for name, stage in stages.items():
        stage["cmd"] = f"echo ran >> {root}.{name}; {stage['cmd']}"
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "A pipeline")
    return root


def times(root: Path, stage: str) -> int:
    path = Path(f"{root}.{stage}")
    return path.read_text().count("ran") if path.exists() else 0


DATA = {"cmd": "seq ${rows} > data.txt", "params": ["rows"], "outs": ["data.txt"]}

REGISTRY = """
import sys

print({
    "track": "a: tracked: run 1, http://127.0.0.1:1/run",
    "register": "a: version 1 registered",
    "promote": "refused: a: lossless: a token changed\\nb: version 1 is the champion, the first",
}[sys.argv[1]])
sys.exit(sys.argv[1] == "promote")
"""


def test_a_scheduled_run_executes_the_pipeline_in_a_clone_and_its_draft_becomes_the_champion(
    stack: Servers, tmp_path: Path
):
    clone = make_clone(tmp_path / "user", "llama")
    for key, value in {
        "pipeline": ["lookup"],
        "evaluate.tasks": ["word_problems"],
        "evaluate.temperatures": [0.0],
        "evaluate.sweeps": None,
        "evaluate.throughput": None,
        "promote.min_speedup": 0.0,  # a tiny target gains nothing
    }.items():
        clone.set(key, value)
    git(clone.root, "add", "--all")
    git(clone.root, "commit", "--quiet", "--message", "Smoke profile")
    nightly = stack.ask("deployments/name/pipeline/nightly")
    assert nightly["schedules"][0]["schedule"]["cron"] == "0 2 * * *"
    soon = datetime.now(UTC) + timedelta(seconds=20)  # one that is past when it is made comes a day later
    overrides = {"target.source": str(clone.root / "data/smoke-target"), "seed": 7}
    same = ("flow_id", "work_pool_name", "entrypoint", "path", "pull_steps")
    made = stack.ask("deployments/", {
        **{key: nightly[key] for key in same},
        "name": "soon",
        "parameters": {"repository": str(clone.root), "overrides": overrides},
        "schedules": [{"schedule": {"interval": 86400, "anchor_date": soon.isoformat()}, "active": True}],
    })  # fmt: skip

    def finished() -> dict | None:
        runs = stack.flow_runs(deployments={"id": {"any_": [made["id"]]}})
        return next((run for run in runs if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED")), None)

    run = wait_for(finished, 900)
    assert run["state_type"] == "COMPLETED", stack.log(run)
    head = git(clone.root, "rev-parse", "HEAD")
    assert run["name"] == f"smoke-target lookup {head[:7]}"
    stages = {"target", "prompts", "generate", "validate", "report"}
    stages |= {f"{stage}@lookup" for stage in ("train", "evaluate", "export")}
    assert stages <= set(stack.tasks(run))
    assert "> python -m deepspec.stages.generate" in stack.log(run)
    artifacts = stack.artifacts(run)
    assert "passed" in artifacts["validation"]["data"]
    assert "| lookup |" in artifacts["report"]["data"]
    assert "lookup.lossless" in artifacts["metrics"]["data"]
    assert artifacts["progress-generate"]["data"] == 100.0

    branch = f"runs/{run['id']}"
    assert yaml.safe_load(git(clone.root, "show", f"{branch}:params.yaml"))["seed"] == 7
    assert "-S seed=7" in git(clone.root, "log", "-1", "--format=%B", branch)
    assert git(clone.root, "ls-tree", "--name-only", branch, "dvc.lock", "reports/metrics.json")
    assert git(clone.root, "status", "--porcelain") == ""
    assert not (clone.root / "data/distill").exists()
    link = re.search(r"\((http://\S+)\)", artifacts["mlflow-lookup"]["data"])[1]
    assert link.startswith(stack.places.url("mlflow"))
    prefect = f"{stack.places.url('prefect')}/runs/flow-run/{run['id']}"
    look(prefect, "prefect-run", [run["name"], "Completed", "evaluate@lookup"])
    look(link, "mlflow-run", ["lookup"])

    log = stack.run("promote", repository=str(clone.root), ref=branch, drafter="lookup")
    promoted = stack.flow_runs()[0]
    assert (promoted["flow_id"] != run["flow_id"], promoted["state_type"]) == (True, "COMPLETED"), log
    model = "deepspec-smoke-target-lookup"
    assert promoted["state"]["message"] == f"{model}: version 1 is the champion, the first"
    look(f"{stack.places.url('mlflow')}/#/models/{model}", "mlflow-model", [model, "champion"])


def test_a_stage_that_fails_twice_is_tried_a_third_time(stack: Servers, tmp_path: Path):
    guarded = "python -c 'import socket; socket.socket.connect.__code__'"  # the built-in one has none
    flaky = {
        "cmd": f"test $(wc -l < {tmp_path}/repo.flaky) -ge 3 && {guarded} && touch out.txt",
        "outs": ["out.txt"],
    }
    root = repository(tmp_path / "repo", {"flaky": flaky}, {"rows": 1})
    log = stack.run(repository=str(root), retry_delay_s=0.1)
    run = stack.flow_runs()[0]
    assert run["state_type"] == "COMPLETED", log
    assert stack.tasks(run)["flaky"]["run_count"] == 3 == times(root, "flaky")


def test_a_run_is_tracked_and_a_refused_promotion_fails_with_the_rule(stack: Servers, tmp_path: Path):
    """With a registry that only says what ours says."""
    root = repository(tmp_path / "repo", {"data": dict(DATA)}, {"rows": 1})
    (root / "deepspec/tracking").mkdir(parents=True)
    (root / "deepspec/tracking/__init__.py").touch()
    (root / "deepspec/cli.py").write_text(REGISTRY)
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "A registry")
    log = stack.run(repository=str(root))
    run = stack.flow_runs()[0]
    assert run["state_type"] == "COMPLETED", log
    assert "http://127.0.0.1:1/run" in stack.artifacts(run)["mlflow-a"]["data"]

    log = stack.run("promote", repository=str(root), ref=f"runs/{run['id']}", drafter="a")
    refused = stack.flow_runs()[0]
    assert refused["state_type"] == "FAILED", log
    assert refused["state"]["message"] == "a: lossless: a token changed"
    assert set(stack.tasks(refused)) == {"deepspec register", "deepspec promote"}


def test_a_failing_validation_stops_what_follows_and_says_why(stack: Servers, tmp_path: Path):
    message = "the distillation data is not fit to train on: 2 rows, at least 3 wanted"
    validate = {
        "cmd": f"echo '# 2 rows' > fit.md; test ${{rows}} -ge 3 || {{ echo 'error: {message}' >&2; exit 2; }}",
        "params": ["rows"],
        "deps": ["data.txt"],
        "outs": [{"fit.md": {"cache": False}}],
    }
    train = {"cmd": "cp data.txt draft.txt", "deps": ["data.txt", "fit.md"], "outs": ["draft.txt"]}
    root = repository(
        tmp_path / "repo", {"data": dict(DATA), "validate": validate, "train": train}, {"rows": 2}
    )
    stack.run(repository=str(root))
    run = stack.flow_runs()[0]
    tasks = stack.tasks(run)
    assert (run["state_type"], run["state"]["message"]) == ("FAILED", f"validate: {message}")
    assert message in tasks["validate"]["state"]["message"]
    assert times(root, "validate") == 1
    assert times(root, "train") == 0
    assert tasks["train"]["state_name"] == "NotReady"
    assert stack.artifacts(run)["fit"]["data"] == "# 2 rows\n"


def test_runs_at_once_neither_corrupt_nor_block_each_other(stack: Servers, tmp_path: Path):
    """Two with the same settings take turns in one clone; a third with others has its own."""
    train = {
        "cmd": "sleep 1; cp data.txt ${item.name}.txt",
        "deps": ["data.txt"],
        "outs": ["${item.name}.txt"],
    }
    stages = {"data": dict(DATA), "train": {"matrix": {"name": ["a", "b"]}, **train}}
    root = repository(tmp_path / "repo", stages, {"rows": 2})
    started = [stack.start(repository=str(root), overrides=overrides) for overrides in ({}, {}, {"rows": 5})]
    logs = [process.communicate(timeout=300)[0] for process in started]
    runs = stack.flow_runs(limit=3)
    assert [run["state_type"] for run in runs] == ["COMPLETED"] * 3, "\n".join(logs)
    assert times(root, "data") == 2
    assert times(root, "train") == 4
    lengths = []
    branches = git(root, "branch", "--list", "--format=%(refname:short)", "runs/*").split()
    assert len(branches) == 2  # the second of the same settings changed nothing, and names the first's
    for branch in branches:
        lock = yaml.safe_load(git(root, "show", f"{branch}:dvc.lock"))
        assert set(lock["stages"]) == {"data", "train@a", "train@b"}
        lengths.append(lock["stages"]["train@a"]["outs"][0]["size"])
    assert sorted(lengths) == [4, 10]


def test_the_run_after_a_killed_one_goes_on_where_it_stopped(stack: Servers, tmp_path: Path):
    """`kill -9` of a worker, its run and the stage in it. The stage keeps its work beside DVC's outputs, as ours do."""
    slow = {
        "cmd": "for i in $(seq 6); do test -e .work/$i || { mkdir -p .work; touch .work/$i; echo ran >> ROOT.step; "
        "test $i != 3 -o -e ROOT.killed || sleep 100; }; done; cp data.txt report.txt",
        "deps": ["data.txt"],
        "outs": ["report.txt"],
    }
    slow["cmd"] = slow["cmd"].replace("ROOT", str(tmp_path / "repo"))
    root = repository(tmp_path / "repo", {"data": dict(DATA), "report": slow}, {"rows": 2})
    (root / ".gitignore").write_text("/.work/\n")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "Work is not tracked")

    first = stack.start(repository=str(root))
    wait_for(lambda: times(root, "step") == 3)
    family = [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]
    for process in family:
        with suppress(psutil.NoSuchProcess):  # a command of the shell's loop that has ended since
            process.send_signal(signal.SIGKILL)
    first.wait()
    Path(f"{root}.killed").touch()
    killed = stack.flow_runs()[0]
    assert killed["state_type"] == "RUNNING"

    log = stack.run(repository=str(root))
    assert stack.flow_runs()[0]["state_type"] == "COMPLETED", log
    assert times(root, "data") == 1
    assert times(root, "report") == 2
    assert times(root, "step") == 6
    assert stack.ask(f"flow_runs/{killed['id']}")["state_type"] == "CRASHED"

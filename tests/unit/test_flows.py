"""The parts of flows that need no server: DVC's graph, lines of progress, why a command failed, overrides, clones."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from deepspec.errors import DeepSpecError
from deepspec.files import write_json
from deepspec.following import Count
from flows import postgres
from flows.command import (
    CommandFailed,
    Thinned,
    UserMistake,
    environment,
    failure,
    follow,
)
from flows.graph import Stage, describe, read_graph
from flows.keeping import DAY_S, old_branches, old_clones
from flows.pipeline import tracked
from flows.process import Process
from flows.progress import ProgressArtifact
from flows.serve import parse
from flows.services import CHOSEN, PORTS, ROOT, Places, Service, check_port, database_of, servers, up
from flows.workspace import (
    AUTHOR,
    _is_whole,
    git,
    literal,
    metrics_before,
    override,
    publish,
    remember,
    uncommitted,
    workspace,
)
from tests.dvc_here import dvc, make_repository

pytestmark = pytest.mark.usefixtures("dvc_here")
PIPELINE = """
stages:
  data: {cmd: "seq ${n} > data.txt", params: [n], outs: [data.txt]}
  train:
    matrix: {name: "${pipeline}"}
    cmd: cp data.txt ${item.name}.txt; echo x > ${item.name}.md
    deps: [data.txt]
    outs: ["${item.name}.txt", "${item.name}.md": {cache: false}]
  report:
    cmd: "echo '{\\"rows\\": ${n}}' > metrics.json"
    params: [pipeline]
    deps: [a.txt]
    metrics: [metrics.json: {cache: false}]
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    make_repository(root)
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / "params.yaml").write_text("# kept\nn: 3\npipeline: [a]\ntarget:\n  source: embedded:tiny\n")
    (root / "other").mkdir()
    (root / "other/dvc.yaml").write_text("stages: {else: {cmd: touch x, params: [m], outs: [x]}}\n")
    (root / "other/params.yaml").write_text("m: 1\n")
    commit(root)
    return root


def commit(root: Path) -> str:
    git(root, "add", "--all")
    git(root, *AUTHOR, "commit", "--quiet", "--message", "x")
    return git(root, "rev-parse", "HEAD")


def clone_of(repository: Path, overrides: dict | None = None, run: str = "1", ref: str = "HEAD"):
    return workspace(
        str(repository), ref, overrides or {}, run, repository.parent / "runs", say=lambda _: None
    )


def repro(root: Path, stage: str) -> str:
    done = dvc(root, "repro", "--single-item", stage)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_graph_is_that_of_dvc_matrix_and_all(repository: Path):
    override(repository / "params.yaml", {"pipeline": ["a", "b"]})
    graph = {stage.name: stage for stage in read_graph(repository)}
    assert set(graph) == {"data", "train@a", "train@b", "report"}
    assert graph["train@b"].after == ("data",)
    assert graph["report"].after == ("train@a",)
    assert graph["train@a"].outputs(".md") == ["a.md"]
    assert list(graph).index("data") < list(graph).index("train@a") < list(graph).index("report")


def test_a_run_is_named_by_target_drafters_and_commit(repository: Path):
    assert describe(repository, "project", "0123456789") == "tiny a 0123456"


def test_the_project_s_own_stages_are_read_and_those_that_compute_are_limited():
    heavy = {stage.name.split("@")[0] for stage in read_graph(Path(__file__).parents[2]) if stage.heavy}
    assert {"prompts", "generate", "train", "evaluate"} <= heavy
    assert not {"target", "validate", "report"} & heavy
    assert Stage("a-new-one", ()).heavy


def test_a_bar_is_thinned_and_plain_lines_are_not():
    thinned = Thinned()
    bar = [f"Map: {i}%|#| {i}/100 [00:01]\r" for i in range(1, 100)] + ["Map: 100%|#| 100/100\n"]
    assert [line for line in bar if thinned.keep(line)] == [bar[0], bar[-1]]
    assert all(thinned.keep(f"generate: {i}/9, 1s left\n") for i in range(9))


CHANNEL_STAGE = """
import time
from pathlib import Path
from deepspec.entry import guarded
from deepspec.errors import DeepSpecError
from deepspec.files import write_json
from deepspec.progress import Progress

def main():
    with Progress("train", 4, done=1) as progress:
        end = time.monotonic() + 30
        while not Path("counted").exists() and time.monotonic() < end:  # nothing is printed, yet the count comes
            progress.advance(3)
            time.sleep(0.01)
        print("told", flush=True)
    raise DeepSpecError("no such draft")

raise SystemExit(min(guarded(main), 1))
"""


def test_counts_and_the_mistake_come_through_the_channel_and_not_from_the_text(tmp_path: Path):
    (tmp_path / "stage.py").write_text(CHANNEL_STAGE)
    (tmp_path / "deepspec").symlink_to(ROOT / "deepspec")
    seen: list[Count | str] = []

    def count(progress: Count) -> None:
        seen.append(progress)
        (tmp_path / "counted").touch()

    words = ["sh", "-c", f"echo 'other: 7/9, 1s left'; {sys.executable} -m stage 2>/dev/null"]
    with pytest.raises(UserMistake, match=r"^no such draft$"):
        follow(words, tmp_path, seen.append, count)
    counts = [entry for entry in seen if isinstance(entry, Count)]
    assert counts[-1] == Count("train", 4, 4) and {found.label for found in counts} == {"train"}
    assert (tmp_path / "counted").exists() and seen.index("told") > seen.index(Count("train", 1, 4))


def test_a_line_in_the_channel_that_is_not_ours_stops_nothing(tmp_path: Path):
    words = [
        "sh",
        "-c",
        'echo "half a line" >> "$DEEPSPEC_PROGRESS"; echo 7 >> "$DEEPSPEC_PROGRESS"; echo done',
    ]
    assert follow(words, tmp_path, lambda _: None) == ["done"]


ERROR = "ERROR: failed to reproduce 'x': failed to run: python -m x, exited with {}"


@pytest.mark.parametrize(("status", "lines", "kind", "reason"), [
    (255, ["error: params.yaml: unknown key", ERROR.format(2)], UserMistake, "params.yaml: unknown key"),
    (255, ["error: no such draft", ERROR.format(1)], UserMistake, "no such draft"),  # through accelerate
    (255, ["Traceback (most recent call last):", "error: x", "OSError: gone", ERROR.format(1)], CommandFailed,
     "failed to reproduce 'x': failed to run: python -m x, exited with 1"),
    (255, ["working", ERROR.format(-9)], CommandFailed,
     "failed to reproduce 'x': failed to run: python -m x, exited with -9"),
    (255, ["ERROR: '/a/data.txt' is busy, it is being blocked by:"], CommandFailed,
     "'/a/data.txt' is busy, it is being blocked by:"),
    (2, [], UserMistake, "exited with 2"),
    (1, ["refused: a version 2: lossless: no", "b: version 1 is the champion, the first"], CommandFailed,
     "a version 2: lossless: no"),
])  # fmt: skip
def test_only_a_user_s_mistake_is_not_tried_again(status: int, lines: list[str], kind: type, reason: str):
    found = failure(status, lines)
    assert (type(found), str(found)) == (kind, reason)


def test_lines_come_as_they_are_printed_and_the_clone_s_code_is_run(tmp_path: Path):
    (tmp_path / "told.py").write_text("print('a'); print('\\x1b[31mred\\x1b[0m\\rlast', end='')")
    lines: list[str] = []
    follow([sys.executable, "-m", "told"], tmp_path, lines.append)
    assert lines == ["a", "red", "last"]


def test_a_command_that_never_ends_is_stopped(tmp_path: Path):
    with pytest.raises(CommandFailed, match="stopped after"):
        follow(["sh", "-c", "sleep 600 & wait"], tmp_path, lambda _: None, hours=0.0001)


def test_overrides_are_those_of_dvc_and_keep_comments(repository: Path):
    path = repository / "params.yaml"
    override(path, {"pipeline": ["a", "b-2"], "target.source": "x: y, {z}", "n": None})
    assert yaml.safe_load(path.read_text()) == {
        "n": None, "pipeline": ["a", "b-2"], "target": {"source": "x: y, {z}"},
    }  # fmt: skip
    assert path.read_text().startswith("# kept")
    assert literal({"a": [1, 2.5, True]}) == "{a:[1,2.5,true]}"


def test_an_override_of_no_parameter_is_refused_by_name(repository: Path):
    with pytest.raises(UserMistake, match=r"target.sorce=1: .*; did you mean 'target.source'\?"):
        override(repository / "params.yaml", {"target.sorce": 1})
    with pytest.raises(UserMistake, match="lrr=1: "):
        override(repository / "params.yaml", {"train.lrr": 1})


def test_a_run_is_pushed_to_its_branch_and_the_checkout_stays(repository: Path):
    before = git(repository, "rev-parse", "HEAD")
    with clone_of(repository, {"n": 5}) as work:
        for stage in ("data", "train@a", "report"):
            repro(work.root, stage)
        assert metrics_before(work) == [{"metric": "rows", "last": None, "this": 5, "change": None}]
        publish(work, "a title", {"n": 5})
        remember(work)
        assert [row["last"] for row in metrics_before(work)] == [5]
    assert git(repository, "rev-parse", "HEAD") == before
    assert git(repository, "status", "--porcelain") == ""
    assert yaml.safe_load(git(repository, "show", "runs/1:params.yaml"))["n"] == 5
    assert "-S n=5" in git(repository, "log", "-1", "--format=%B", "runs/1")


def test_a_run_that_changed_nothing_pushes_nothing_and_says_where_its_results_are(repository: Path):
    with clone_of(repository, {"n": 5}) as work:
        for stage in ("data", "train@a", "report"):
            repro(work.root, stage)
        assert publish(work, "a title", {"n": 5}) is None
    before = git(repository, "log", "--all", "--format=%H")
    for run in "23":
        with clone_of(repository, {"n": 5}, run=run) as work:
            assert publish(work, "again", {"n": 5}) == "runs/1"
    assert git(repository, "log", "--all", "--format=%H") == before
    git(repository, "branch", "-D", "runs/1")  # which nobody wanted to keep
    with clone_of(repository, {"n": 5}, run="4") as work:
        assert publish(work, "again", {"n": 5}) is None
    assert git(repository, "show", "runs/4:dvc.lock")
    git(repository, "checkout", "--quiet", "--detach", "runs/4")
    with clone_of(repository, run="5") as work:
        assert publish(work, "the committed result", {}) == work.base


def test_clones_and_branches_of_runs_are_kept_by_count_and_age(repository: Path):
    for run in "12345":
        with clone_of(repository, {"n": int(run)}, run=run) as work:
            publish(work, "a title", {"n": int(run)})
    home, old = work.root.parent, time.time() - 30 * DAY_S
    for lock in home.glob("*.lock"):
        os.utime(lock, (old, old))
    with clone_of(repository, {"n": 5}, run="6") as work:
        assert old_branches(work, 2) == []  # five are there, all of today
        removed = old_clones(home, 2, besides=work.root.name)
        assert len(removed) == 3 and work.root.exists()
    assert len(list(home.glob("*.lock"))) == 2


def test_branches_older_than_the_days_go_but_not_what_somebody_has_committed_to(
    repository: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GIT_COMMITTER_DATE", "2020-01-01T00:00:00+0000")
    for run in "1234":
        with clone_of(repository, {"n": int(run)}, run=run) as work:
            publish(work, "a title", {"n": int(run)})
    git(repository, "checkout", "--quiet", "runs/2")
    git(
        repository,
        "-c",
        "user.name=u",
        "-c",
        "user.email=u@example.org",
        "commit",
        "--allow-empty",
        "-qm",
        "x",
    )
    git(repository, "checkout", "--quiet", "--detach")
    monkeypatch.delenv("GIT_COMMITTER_DATE")
    with clone_of(repository, {"n": 9}, run="9") as work:
        publish(work, "new", {"n": 9})
        gone = old_branches(work, 1)
    assert "runs/2" not in gone and "runs/9" not in gone and len(gone) == 3


def test_a_clone_for_a_ref_that_is_none_does_not_stay(repository: Path):
    with pytest.raises(UserMistake, match="no ref 'nope'"), clone_of(repository, ref="nope"):
        pass
    assert not list(repository.parent.rglob("nope-*/.git"))


def test_a_result_that_is_not_committed_is_told_with_what_it_means(repository: Path, tmp_path: Path):
    """`make demo`, then `make up`: the night made everything again."""
    assert uncommitted(tmp_path) is None and uncommitted(repository) is None
    repro(repository, "data")
    assert "dvc.lock is not committed" in (said := str(uncommitted(repository)))
    assert 'git commit -m "The result" dvc.lock' in said


@pytest.mark.parametrize("document", ["README.md", "docs/operations.md"])
def test_after_the_commit_that_the_documents_name_a_run_finds_everything_done(
    repository: Path, document: str, monkeypatch: pytest.MonkeyPatch
):
    line = re.search(r"^    (git commit -m \"[^\n]*?reports)\b", (ROOT / document).read_text(), re.M)
    assert line
    (repository / "reports").mkdir()
    (repository / "reports/table.md").write_text("")
    commit(repository)
    (repository / "reports/table.md").write_text("of the run")
    repro(repository, "data")
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "u")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "u@example.org")
    git(repository, "add", "dvc.lock")  # in the project it is there since the first run
    subprocess.run(["sh", "-c", line[1]], cwd=repository, check=True, capture_output=True)
    assert uncommitted(repository) is None
    with clone_of(repository) as work:
        assert "didn't change" in repro(work.root, "data")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("dspark: tracked: run 1f, http://h:5/#/experiments/1/runs/1f", ("dspark", "http://h:5/#/experiments/1/runs/1f")),
        ("dspark: tracked before; nothing was changed: run 1f, http://h/1f", ("dspark", "http://h/1f")),
        ("🏃 View run dspark 17885f3 at: http://h:5/#/experiments/1/runs/1f", None),
        ("all runs: http://h:5/#/experiments/1/runs", None),
        ("dspark: tracked: run 1f, mlruns/mlflow.db", None),
    ],
)  # fmt: skip
def test_only_the_lines_of_track_become_links(line, found):
    assert tracked(line) == found


def test_results_are_kept_until_the_ref_brings_newer_ones(repository: Path):
    with clone_of(repository) as work:
        repro(work.root, "data")
        root = work.root
    (repository / "README").write_text("a new commit")
    commit(repository)
    with clone_of(repository, run="2") as work:
        assert (work.root, work.previous) == (root, "1")
        assert (root / "README").exists()
        assert "didn't change" in repro(root, "data")
    (repository / "dvc.lock").write_text("schema: '2.0'\n")
    commit(repository)
    with clone_of(repository, run="3"):
        assert (root / "dvc.lock").read_text() == "schema: '2.0'\n"


@pytest.mark.parametrize("which", ["branch", "tag", "commit", "abbreviated"])
def test_a_ref_may_be_a_branch_a_tag_or_a_commit(repository: Path, which: str):
    old = git(repository, "rev-parse", "HEAD")
    git(repository, "branch", "branch")
    git(repository, "tag", "tag")
    (repository / "README").write_text("newer")
    commit(repository)
    with clone_of(repository, ref={"commit": old, "abbreviated": old[:8]}.get(which, which)) as work:
        assert work.base == old


@pytest.mark.parametrize(
    "rest", ["", "schema: '2.0'\nstages:\n  data:\n    cmd: [", "schema: '2.0'\nstages:\n  data:\n"]
)
def test_what_a_killed_dvc_was_writing_stops_no_run(repository: Path, rest: str):
    with clone_of(repository) as work:
        repro(work.root, "data")
        (work.root / ".dvc/tmp").mkdir(exist_ok=True)
        (work.root / ".dvc/tmp/rwlock").write_text("")
        (work.root / "dvc.lock").write_text(rest)
    with clone_of(repository, run="2") as work:
        repro(work.root, "data")
        assert _is_whole(work.root / "dvc.lock")


def test_a_killed_git_and_the_user_s_own_git_settings_stop_no_run(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with clone_of(repository) as work:
        (work.root / ".git/index.lock").touch()
        (work.root / ".git/refs/heads/x.lock").touch()
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in ("pre-commit", "pre-push"):
        (hooks / name).write_text("#!/bin/sh\nexit 1\n")
        (hooks / name).chmod(0o755)
    settings = {"commit.gpgsign": "true", "gpg.program": "false", "core.hooksPath": str(hooks)}
    monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(settings)))
    for i, (key, value) in enumerate(settings.items()):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{i}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{i}", value)
    with clone_of(repository, run="2") as work:
        (work.root / "params.yaml").write_text("n: 4\npipeline: [a]\n")
        publish(work, "by hand", {})
    assert git(repository, "show", "runs/2:params.yaml").startswith("n: 4")


def test_git_s_reason_is_told_and_not_its_advice(tmp_path: Path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / ".git/index.lock").touch()
    (tmp_path / "a").touch()
    with pytest.raises(UserMistake, match=r"Unable to create '.*index.lock': File exists"):
        git(tmp_path, "add", "a")


def test_a_remote_that_git_does_not_keep_is_the_clone_s_too(repository: Path):
    assert dvc(repository, "remote", "add", "--local", "--default", "team", "../remote").returncode == 0
    with clone_of(repository) as work:
        listed = dvc(work.root, "remote", "list").stdout
    assert str(repository.parent / "remote") in listed


def test_a_ref_that_is_not_there_is_a_mistake(repository: Path):
    with pytest.raises(UserMistake, match="no ref 'nowhere'"), clone_of(repository, ref="nowhere"):
        pass


def test_a_second_run_waits_for_the_clone_and_gives_up_in_time(repository: Path):
    said: list[str] = []
    home = repository.parent / "runs"
    with clone_of(repository):
        with pytest.raises(CommandFailed, match="held by run 1"):  # noqa: SIM117
            with workspace(str(repository), "HEAD", {}, "2", home, patience_h=0, say=said.append):
                pass
        started = threading.Event()
        second: list[str] = []

        def work() -> None:
            tell = lambda line: (said.append(line), started.set())  # noqa: E731
            with workspace(str(repository), "HEAD", {}, "2", home, say=tell) as found:
                second.append(found.previous)

        thread = threading.Thread(target=work)
        thread.start()
        assert started.wait(60)
        assert "waiting for run 1, which works in the same clone" in said
    thread.join(60)
    assert second == ["1"]


def test_the_clone_is_held_as_long_as_any_of_the_run_s_commands_lives(tmp_path: Path):
    import fcntl

    with (tmp_path / "lock").open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        child = subprocess.Popen(["sleep", "600"], pass_fds=[held.fileno()])
    with (tmp_path / "lock").open("a+") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.kill()
        child.wait()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_serve_reads_settings_as_yaml():
    assert parse(["train.lr=1e-3", "pipeline=[a, b]"]) == {"train.lr": "1e-3", "pipeline": ["a", "b"]}
    with pytest.raises(DeepSpecError, match="expected key=value"):
        parse(["train.lr"])
    with pytest.raises(DeepSpecError, match="-S: not YAML"):
        parse(["pipeline=[a"])


def test_a_process_is_started_once_and_stopped_with_its_children(tmp_path: Path, monkeypatch):
    """Of which one, left alone by the shell that started it, is killed once the time to stop is over."""
    monkeypatch.setattr("flows.process.STOP_S", 1.0)
    process = Process(tmp_path, "one")
    assert process.pid() is None
    assert not process.terminate()
    process.start(["sh", "-c", "echo hello; sleep 600 & wait"], tmp_path, dict(os.environ))
    assert Process(tmp_path, "one").pid() == process.pid() is not None
    while process.last_line() != "hello":  # the test's own time limit ends this
        time.sleep(0.01)
    while not (family := psutil.Process(process.pid()).children(recursive=True)):  # `sleep` comes after
        time.sleep(0.01)
    process.terminate()
    process.wait()
    assert process.pid() is None
    assert family and not any(
        child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in family
    )
    assert process.last_line() == "hello"
    process.file.write_text(f"{os.getpid()} 1.0")  # an id given out again
    assert process.pid() is None


def test_servers_listen_on_loopback_alone_and_tell_no_password(tmp_path: Path):
    places = Places.of(tmp_path, {"DEEPSPEC_MLFLOW_PORT": "5005"})
    for service in servers(places, lambda name, driver, _: f"postgresql+{driver}://u:secret@h/{name}"):
        assert service.command[service.command.index("--host") + 1] == "127.0.0.1"
        assert "secret" not in " ".join(service.command)
    assert "localhost:5005,127.0.0.1:5005" in service.command
    assert places.client["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5005"


def test_a_taken_port_is_named_with_its_setting(tmp_path: Path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as other:
        places = Places.of(tmp_path, {"DEEPSPEC_PREFECT_PORT": str(other.getsockname()[1])})
        with pytest.raises(DeepSpecError, match="DEEPSPEC_PREFECT_PORT"):
            check_port(places, "prefect")


def test_without_postgresql_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(postgres, "binaries", lambda folder: None)
    assert postgres.unusable(tmp_path) == "PostgreSQL is not installed"


def test_a_postgresql_that_is_about_to_stop_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("psycopg")
    (tmp_path / "db").mkdir()
    (tmp_path / "db/PG_VERSION").touch()
    (tmp_path / "db.password").write_text("secret")
    monkeypatch.setattr(postgres, "runs", lambda folder: True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DeepSpecError, match=rf"does not answer at 127\.0\.0\.1:{port}; ") as caught:
        postgres.start(tmp_path / "db", "127.0.0.1", port, ("prefect",))
    assert "\n" not in str(caught.value)


def test_a_history_in_postgresql_is_not_begun_anew_in_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(postgres, "binaries", lambda folder: None)
    places = Places.of(tmp_path, {})
    assert "SQLite" in database_of(places)[1]
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres/PG_VERSION").write_text("15\n")
    with pytest.raises(DeepSpecError, match="has the history of runs, but PostgreSQL is not installed"):
        database_of(places)


def test_a_cluster_is_served_by_its_own_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(postgres, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(postgres.shutil, "which", lambda name: None)
    for version in ("9", "15", "17"):
        (tmp_path / f"debian/{version}/bin").mkdir(parents=True)
        (tmp_path / f"debian/{version}/bin/pg_ctl").touch()
    assert postgres.binaries(tmp_path) == tmp_path / "debian/17/bin"
    (tmp_path / "PG_VERSION").write_text("15\n")
    assert postgres.binaries(tmp_path) == tmp_path / "debian/15/bin"


def test_chosen_ports_are_remembered(tmp_path: Path):
    """`make status` after `DEEPSPEC_PREFECT_PORT=4300 make up` looked at another project's server."""
    write_json(tmp_path / CHOSEN, Places.of(tmp_path, {"DEEPSPEC_PREFECT_PORT": "4300"}).ports)
    assert Places.of(tmp_path, {}).ports["prefect"] == 4300
    assert Places.of(tmp_path, {"DEEPSPEC_PREFECT_PORT": "4400"}).ports["prefect"] == 4400
    (tmp_path / CHOSEN).write_text("{")
    assert Places.of(tmp_path, {}).ports["prefect"] == 4200


def test_what_an_up_that_fails_has_started_is_stopped_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(postgres, "binaries", lambda folder: None)
    sleeper = Service("prefect", [sys.executable, "-c", "import time; time.sleep(600)"], lambda: True)
    broken = Service("mlflow", [sys.executable, "-c", "raise SystemExit('no room')"], lambda: False)
    monkeypatch.setattr("flows.services.servers", lambda places, database: [sleeper, broken])
    places = Places(tmp_path, dict.fromkeys(PORTS, 1))
    with pytest.raises(DeepSpecError, match="mlflow ended: no room"):
        up(places)
    assert Process(tmp_path, "prefect").pid() is None
    assert not (tmp_path / CHOSEN).exists()


def test_a_folder_that_cannot_be_written_or_has_no_room_is_one_line(tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeepSpecError, match="services: cannot be written: Not a directory; choose another"):
        up(Places(tmp_path / "file/services", PORTS))
    monkeypatch.setattr("flows.services.ROOM", 1 << 60)
    with pytest.raises(DeepSpecError, match="MB are free on its disk, and the services want"):
        up(Places(tmp_path, PORTS))


@pytest.mark.parametrize("port", ["abc", "0", "70000", "-1"])
def test_a_port_that_is_none_is_one_line(tmp_path: Path, port: str):
    with pytest.raises(DeepSpecError, match=f"DEEPSPEC_MLFLOW_PORT={port}: not a port"):
        Places.of(tmp_path, {"DEEPSPEC_MLFLOW_PORT": port})
    assert Places.of(tmp_path, {"DEEPSPEC_MLFLOW_PORT": ""}).ports["mlflow"] == 5000


def test_no_promotion_into_a_registry_of_the_clone_s_own(monkeypatch: pytest.MonkeyPatch):
    from flows.promote import promote

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    state = promote.fn(repository="nowhere")
    assert state.is_failed() and "MLFLOW_TRACKING_URI is not set" in state.message


def test_a_store_named_relatively_is_that_of_the_flow_not_of_the_clone(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlruns/mlflow.db")
    assert environment(tmp_path / "clone")["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlruns/mlflow.db"


def test_a_clone_runs_its_own_code_and_what_the_user_has_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("/site", str(ROOT), "")))
    assert environment(tmp_path)["PYTHONPATH"] == os.pathsep.join((str(tmp_path), "/site"))


def test_a_server_that_is_away_stops_no_stage(monkeypatch: pytest.MonkeyPatch, caplog):
    def away(*args, **options):
        raise ConnectionError("no route to the server")

    monkeypatch.setattr("flows.progress.create_progress_artifact", away)
    ProgressArtifact("train")(Count("step", 80, 640))
    assert "not shown: progress of train (no route to the server)" in caplog.text

"""Where a run works: a clone of its own, so that nobody's checkout is touched.

There is one clone for each (repository, ref, overrides), under `.deepspec/runs`. It is moved to the ref's newest commit
when a run begins and stays when the run ends, with the unfinished work that the stages keep in its `.deepspec`: the
next run of the same kind goes on from there. All clones share one DVC cache.
A run holds its clone by a file lock, which the kernel lets go when the last process of the run is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deepspec.errors import DeepSpecError, nearest
from deepspec.files import digest, write_text
from deepspec.git import git as run_git
from deepspec.git import reason
from deepspec.reproduce.checkout import remote_of, set_remote
from flows.command import CommandFailed, UserMistake, environment
from flows.graph import read_graph

LAST = "refs/deepspec/last"  # in the clone: the commit of the last finished run
LAST_BRANCH = "deepspec.branch"  # in the clone's git config: the branch that it was pushed to
BASE = "refs/deepspec/base"  # the commit that the clone was last moved to
AUTHOR_EMAIL = "deepspec@localhost"
AUTHOR = ("-c", "user.name=DeepSpec", "-c", f"user.email={AUTHOR_EMAIL}")
OURS_ALONE = ("--no-verify", "--no-gpg-sign")  # hooks and signatures are for what a person commits
POLL_S = 2.0


@dataclass(frozen=True)
class Workspace:
    root: Path
    name: str  # of the repository
    base: str  # the commit of the ref
    branch: str  # of the origin, where the results go
    lock: int  # the open file that holds the clone
    previous: str | None  # id of the run that held it before
    shares_cache: bool  # with the origin


@contextlib.contextmanager
def workspace(
    repository: str,
    ref: str,
    overrides: dict[str, Any],
    run_id: str,
    home: Path,
    patience_h: float = 24.0,
    say: Callable[[str], None] = print,
) -> Iterator[Workspace]:
    """The clone for these settings, at the ref's newest commit, with the overrides in its params.yaml.

    Raises:
        UserMistake: no such repository or ref, or an override that params.yaml does not have.
        CommandFailed: another run has held the clone for `patience_h` hours.
    """
    origin = str(Path(repository).resolve()) if Path(repository).exists() else repository
    name = f"{re.sub(r'[^A-Za-z0-9.]+', '-', ref)}-{digest(json.dumps([origin, ref, overrides], sort_keys=True))[:8]}"
    home.mkdir(parents=True, exist_ok=True)
    root = (home / name).resolve()
    with _held(home / f"{name}.lock", run_id, patience_h, say) as (lock, previous):
        for left in (root / ".git").rglob("*.lock"):  # of a git that was killed: nobody else works here
            left.unlink(missing_ok=True)
        (root / ".dvc/tmp/rwlock").unlink(missing_ok=True)  # of a DVC that was killed: it may be half written
        cache = _cache_of(Path(origin))
        base = _move(root, origin, ref, cache or (home / "cache").resolve())
        override(root / "params.yaml", overrides)
        _restore(root, say)
        yield Workspace(
            root,
            re.sub(r"(/?\.git)?/?$", "", origin).split("/")[-1],
            base,
            f"runs/{run_id}",
            lock,
            previous,
            cache is not None,
        )


@contextlib.contextmanager
def _held(
    path: Path, run_id: str, patience_h: float, say: Callable[[str], None]
) -> Iterator[tuple[int, str | None]]:
    """An exclusive lock on `path`, which names its holder; also the name of the holder before."""
    with path.open("a+") as file:
        deadline, told = time.monotonic() + patience_h * 3600, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CommandFailed(
                        f"{path}: held by run {path.read_text()} for {patience_h:g} hours"
                    ) from None
                if not told:
                    say(f"waiting for run {path.read_text()}, which works in the same clone")
                    told = True
                time.sleep(POLL_S)
        file.seek(0)
        previous = file.read() or None
        file.truncate(0)
        file.write(run_id)
        file.flush()
        yield file.fileno(), previous


def _move(root: Path, origin: str, ref: str, cache: Path) -> str:
    """Make the clone if need be and move it to the ref; the commit."""
    made = not root.exists()
    if made:
        part = root.with_name(f"{root.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        git(part.parent, "clone", "--quiet", "--no-checkout", origin, str(part))
        os.replace(part, root)
    try:
        git(root, "fetch", "--quiet", "--no-tags", "origin", ref)
        commit = git(root, "rev-parse", "FETCH_HEAD^{commit}")
    except UserMistake:  # an abbreviated commit, which a server is not asked for
        git(root, "fetch", "--quiet", "origin")
        try:
            commit = git(
                root,
                "rev-parse",
                "--verify",
                "--quiet",
                f"{ref}^{{commit}}",
                failing=f"{origin}: no ref {ref!r}",
            )
        except UserMistake:
            if made:
                shutil.rmtree(root, ignore_errors=True)
            raise
    _check_out(root, commit)
    write_text(root / ".dvc/config.local", f"[core]\n    autostage = true\n[cache]\n    dir = {cache}\n")
    set_remote(root, remote_of(Path(origin)))
    return commit


def _check_out(root: Path, commit: str) -> None:
    """The commit's files, with the results of this clone's last run among them, finished or not, and their dvc.lock.

    DVC tells by dvc.lock which stages still hold, so that nothing is made twice. DVC's own run cache would not bring
    them back: it leaves out every stage with an output that git keeps. Results newer than ours, which are there if
    dvc.lock was committed since, take their place.
    """
    ours: list[str] = []
    before = git(root, "rev-parse", "--verify", "--quiet", BASE, failing=None)
    if before and not git(root, "diff", "--name-only", before, commit, "--", "dvc.lock"):
        _commit(root, "What the last run left")
        changed = git(root, "diff", "--name-only", "--diff-filter=d", "-z", before, "HEAD").split("\0")
        ours = [name for name in changed if name and name != "params.yaml"]
        if "dvc.lock" in ours and not _is_whole(root / "dvc.lock"):
            ours.remove("dvc.lock")
    left = git(root, "rev-parse", "HEAD")
    git(root, "checkout", "--quiet", "--force", "--detach", commit)
    git(root, "clean", "--quiet", "-d", "--force")  # not what is ignored: data/ and .deepspec stay
    if ours:
        git(root, "checkout", left, "--", *ours)
    git(root, "update-ref", BASE, commit)


def _is_whole(lock: Path) -> bool:
    """Does DVC take this dvc.lock? One that was being written when DVC was killed it may not."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    try:
        COMPILED_LOCKFILE_SCHEMA(yaml.safe_load(lock.read_text()))
    except (ValueError, yaml.YAMLError, Invalid):
        return False
    return True


def _commit(root: Path, message: str) -> None:
    """Commit all that is there.

    `read-tree` drops git's stat cache, so that every file is read. DVC stages through an index of its own, which misses
    a change within the second of the checkout that keeps a file's size (racy git), as an override of params.yaml may.
    """
    git(root, "read-tree", "HEAD")
    git(root, "add", "--all")
    git(root, *AUTHOR, "commit", *OURS_ALONE, "--quiet", "--allow-empty", "--message", message)


def _cache_of(origin: Path) -> Path | None:
    """The cache of a repository on this machine."""
    if not (origin / ".dvc").is_dir():
        return None
    return (origin / dvc(origin, "cache", "dir").strip()).resolve()


def _restore(root: Path, say: Callable[[str], None]) -> None:
    """Bring back what dvc.lock names, as far as cache and remote have it; stages make the rest."""
    for words in ([["fetch", "--run-cache"]] if _has_remote(root) else []) + [
        ["checkout", "--force", "--allow-missing"]
    ]:
        done = ask_dvc(root, *words)
        if done.returncode:
            say(f"dvc {words[0]}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")


def _has_remote(root: Path) -> bool:
    return bool(ask_dvc(root, "config", "core.remote").stdout.strip())


def override(path: Path, overrides: dict[str, Any]) -> None:
    """Change `path` as `dvc exp run -S key=value` would, with DVC's own code.

    Raises:
        UserMistake: a key that the file does not have.
    """
    if not overrides:
        return
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides

    for key, value in overrides.items():
        try:
            apply_overrides(str(path), [f"{key}={literal(value)}"])
        except DvcException as error:
            cause = str(error.__cause__ or error).splitlines()[0].rstrip(".")
            hint = nearest(key, _dotted(yaml.safe_load(path.read_text())))
            raise UserMistake(f"override {key}={literal(value)}: {cause}{hint}") from error


def _dotted(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in section.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")


def uncommitted(repository: str | Path) -> str | None:
    """Return what runs of this checkout's HEAD will not see of its last `dvc repro`, or None."""
    if not (Path(repository) / "dvc.lock").is_file():
        return None
    changed = git(Path(repository), "status", "--porcelain", "--", "dvc.lock", failing=None)
    if not changed:
        return None
    return (
        "dvc.lock is not committed, and runs work from the last commit: they will make everything again; "
        'first: git commit -m "The result" dvc.lock params.yaml reports'
    )


def literal(value: Any) -> str:
    """A JSON value in the grammar of `-S`."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def publish(work: Workspace, title: str, overrides: dict[str, Any]) -> str | None:
    """Commit what the run changed (dvc.lock, params.yaml, reports) and push it to its branch.

    Return where it lies already, if the run changed nothing: the branch of the last one, or the commit it began from.

    Data go to the DVC remote, if there is one and the origin is no repository of this machine, whose cache has them.
    """
    settings = "".join(f"-S {key}={literal(value)}\n" for key, value in overrides.items())
    _commit(work.root, f"Run: {title}\n\n{settings}")
    if there := _there_already(work):
        return there
    if not work.shares_cache and _has_remote(work.root):
        dvc(work.root, "push", "--quiet")
    git(work.root, "push", "--quiet", "--no-verify", "--force", "origin", f"HEAD:refs/heads/{work.branch}")
    git(work.root, "config", LAST_BRANCH, work.branch)
    return None


def _there_already(work: Workspace) -> str | None:
    """Return what of the origin has the same files as HEAD: the commit of the ref, or the branch of the last run."""
    if not git(work.root, "diff", "--name-only", work.base, "HEAD"):
        return work.base
    branch = git(work.root, "config", LAST_BRANCH, failing=None)
    pushed = branch and git(work.root, "ls-remote", "origin", f"refs/heads/{branch}", failing=None)
    if not branch or not pushed:
        return None
    last = pushed.split()[0]
    if not git(work.root, "cat-file", "-t", last, failing=None):  # somebody has committed to it since
        return None
    return None if git(work.root, "diff", "--name-only", last, "HEAD") else branch


def remember(work: Workspace) -> None:
    """This run is the last one from now on."""
    git(work.root, "update-ref", LAST, "HEAD")


def metrics_before(work: Workspace) -> list[dict[str, Any]]:
    """Every metric beside its value in the last run of this clone, or in the commit that it started from."""
    last = git(work.root, "rev-parse", "--verify", "--quiet", LAST, failing=None) or work.base
    found = json.loads(dvc(work.root, "metrics", "diff", "--all", "--json", last) or "{}")
    own = {out for stage in read_graph(work.root) for out in stage.outs}  # not of another pipeline beside it
    return [
        {"metric": name, "last": values.get("old"), "this": values.get("new"), "change": values.get("diff")}
        for file, metrics in found.get("diff", found).items()
        if file in own
        for name, values in metrics.items()
    ]


def git(root: Path, *words: str, failing: str | None = "") -> str:
    """Return what git prints. `failing` is what to say, or None for nothing at all, if it fails."""
    try:
        return run_git(root, *words, env=environment(root))
    except DeepSpecError as error:
        if failing is None:
            return ""
        raise UserMistake(failing or str(error)) from None


def dvc(root: Path, *words: str) -> str:
    """Return what `dvc <words>` prints."""
    done = ask_dvc(root, *words)
    if done.returncode:
        raise UserMistake(reason(done) or f"dvc {' '.join(words)} failed")
    return done.stdout.strip()


def ask_dvc(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `dvc <words>` in a directory, whatever comes of it."""
    command = [sys.executable, "-m", "dvc", *words]
    return subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True)

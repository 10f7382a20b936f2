"""What runs leave behind, kept by count and age: clones in `.deepspec/runs`, branches `runs/<id>` of the origin."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from flows.workspace import AUTHOR_EMAIL, Workspace, git

DAY_S = 86_400.0


def tidy(work: Workspace, home: Path, keep: int, say: Callable[[str], None]) -> None:
    """Remove clones and branches that are neither among the newest `keep` nor younger than as many days.

    Only branches whose last commit is a run's own go: what somebody has committed to since stays. Data stay in the
    cache.
    """
    if gone := [*old_clones(home, keep, besides=work.root.name), *old_branches(work, keep)]:
        say(f"kept are {keep} and the last {keep} days; removed: {', '.join(gone)}")


def old_clones(home: Path, keep: int, besides: str) -> list[str]:
    """Remove old clones that no run holds; return their names."""
    locks = sorted(home.glob("*.lock"), key=lambda path: path.stat().st_mtime, reverse=True)
    removed = []
    for lock in locks[keep:]:
        young = time.time() - lock.stat().st_mtime < keep * DAY_S
        if young or lock.stem == besides:
            continue
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(home / lock.stem, ignore_errors=True)
            lock.unlink()
            removed.append(lock.stem)
    return removed


def old_branches(work: Workspace, keep: int) -> list[str]:
    """Delete old branches of runs in the origin; return their names."""
    git(work.root, "fetch", "--quiet", "--prune", "origin", "+refs/heads/runs/*:refs/remotes/origin/runs/*")
    form = "%(refname:lstrip=3)%09%(committerdate:unix)%09%(committeremail)"
    listed = git(
        work.root, "for-each-ref", "--sort=-committerdate", f"--format={form}", "refs/remotes/origin/runs/"
    )
    removed = []
    for line in listed.splitlines()[keep:]:
        name, date, email = line.split("\t")
        if email == f"<{AUTHOR_EMAIL}>" and time.time() - float(date) > keep * DAY_S and name != work.branch:
            git(work.root, "push", "--quiet", "--no-verify", "origin", "--delete", f"refs/heads/{name}")
            removed.append(name)
    return removed

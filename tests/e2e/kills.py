"""`kill -9` at random moments of a scheduled smoke run: the next ends as an unbroken one, no branch is half pushed.

    python -m tests.e2e.kills --home DIR --moments 20 --seed 0

One line a moment, which is also appended to DIR/moments.jsonl: called again with the same flags it goes on there. Each
moment has a repository of its own, so that nothing of the moment before is found done. Servers and worker are those of
`make up`; flow, DVC and stages are forked from a process that has imported what they need (tests/e2e/warm.py), without
which a run takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from deepspec.entry import TELEMETRY_OFF
from flows.process import Process
from tests.e2e.clone import make_clone
from tests.e2e.servers import Servers, wait_for
from tests.e2e.warm import warm
from tests.tiny import make_target

VICTIMS = ("stage", "dvc", "git push", "flow", "worker", "server", "everything")
SERVICES = {"worker": "worker", "server": "prefect"}
STAGES = {"target", "prompts", "generate", "validate", "report"} | {
    f"{name}@dspark" for name in ("train", "evaluate", "export")
}
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
SETTINGS = {
    "pipeline": ["dspark"],
    "generate.batch_size": 2,
    "train.steps": 40,
    "train.save_every": 4,
    "train.eval_every": 8,
    "evaluate.tasks": ["word_problems"],
    "evaluate.temperatures": [0.0],
    "evaluate.sweeps": None,
    "evaluate.throughput": None,
}
GIT = """#!/bin/sh
case " $* " in *" push "*)
  if mv {armed} {armed}.$$ 2>/dev/null; then
    read delay who <{armed}.$$
    setsid {git} "$@" & pushed=$!
    sleep $delay
    [ $who = all ] && kill -9 -$pushed || kill -9 $pushed
    wait $pushed
    exit
  fi;;
esac
exec {git} "$@"
"""


@dataclass(frozen=True)
class Outcome:
    """What a run leaves that may not depend on whether it was broken off."""

    digests: dict[str, str]  # of the files of data/: prompts, rows, weights
    steps: list[list[float]]  # of training: step, held-out τ

    def others(self, than: Outcome) -> list[str]:
        """Return what is not the same."""
        names = self.digests.keys() | than.digests.keys()
        found = sorted(name for name in names if self.digests.get(name) != than.digests.get(name))
        return found if self.steps == than.steps else [*found, "the steps of training"]


@dataclass(frozen=True)
class Moment:
    number: int
    victim: str
    after_s: float  # since the process of the run began
    killed: str
    first: str  # state of the run that was hit
    next: str  # state of the run after it
    others: list[str]  # what is not as in an unbroken run
    branches: int
    broken: list[str]  # what of the branches is not whole
    seconds: float


class Loop:
    """Servers, worker and deployment, and repositories to run."""

    def __init__(self, home: Path, servers: Servers, programs: Path) -> None:
        self.home, self.servers, self.programs = home, servers, programs
        self.armed = home / "kill-push"
        git = programs / "git"
        git.write_text(GIT.format(armed=self.armed, git=shutil.which("git")))
        git.chmod(0o755)

    def deploy(self) -> str:
        """Return the id of a deployment whose runs are started by the warm Python."""
        nightly = self.servers.ask("deployments/name/pipeline/nightly")
        same = ("flow_id", "work_pool_name", "entrypoint", "path", "pull_steps")
        command = f"{self.programs / 'python'} -m prefect.engine"
        made = self.servers.ask(
            "deployments/",
            {**{key: nightly[key] for key in same}, "name": "kills", "job_variables": {"command": command}},
        )
        return made["id"]

    def start(self, deployment: str, repository: Path) -> dict:
        chosen = {"repository": str(repository), "track": False, "retry_delay_s": 0.5}
        body = {"parameters": chosen, "state": {"type": "SCHEDULED"}}
        return self.servers.ask(f"deployments/{deployment}/create_flow_run", body)

    def ended(self, run: dict) -> dict | None:
        found = self.servers.ask(f"flow_runs/{run['id']}")
        return found if found["state_type"] in ENDED else None

    def processes(self, *words: str) -> list[tuple[int, list[str]]]:
        """Return the programs of the warm Python whose words contain these, oldest first."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if str(self.programs) in " ".join(command[:3]) and all(
                    any(word in part for part in command) for word in words
                ):
                    found.append((int(entry.name), command[3:-1]))
        return sorted(found)

    def kill(self, victim: str) -> str:
        """Kill what stands for a victim; return what it was, or nothing if there is none now."""
        if victim in SERVICES:
            process = Process(self.servers.places.home, SERVICES[victim])
            if (pid := process.pid()) is None:
                return ""
            os.kill(pid, signal.SIGKILL)
            return victim
        if victim == "everything":
            services = [Process(self.servers.places.home, name).pid() for name in SERVICES.values()]
            ours = self.processes()
            for pid in [*filter(None, services), *(pid for pid, _ in ours)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return f"{len(ours)} processes, worker and server" if ours else ""
        words = {"stage": ("deepspec.stages.",), "dvc": ("dvc",), "flow": ("prefect.engine",)}[victim]
        for pid, command in reversed(self.processes(*words)):
            if victim != "dvc" or command[:2] == ["-m", "dvc"]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    return " ".join(command)[:60]
        return ""


def origin(root: Path, target: Path) -> Path:
    """Make the repository that every moment gets a copy of."""
    clone = make_clone(root, "llama")
    for key, value in {**SETTINGS, "target.source": str(target)}.items():
        clone.set(key, value)
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "Smoke profile")
    return root


def git(root: Path, *words: str) -> str:
    author = ("-c", "user.name=Test", "-c", "user.email=test@localhost")
    done = subprocess.run(["git", *author, *words], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def outcome(repository: Path, run: dict) -> Outcome:
    """Return what a finished run left on its branch, or on the one that it names."""
    branch = re.search(r"runs/[0-9a-f-]{36}", run["state"]["message"])[0]
    stages = yaml.safe_load(git(repository, "show", f"{branch}:dvc.lock"))["stages"]
    digests = {}
    for out in (out for stage in stages.values() for out in stage["outs"]):
        if out["path"].startswith(("data/prompts", "data/distill", "data/drafts")):
            listed = json.loads(cached(repository, out["md5"]).read_text())
            digests |= {f"{out['path']}/{file['relpath']}": file["md5"] for file in listed}
    history = map(json.loads, git(repository, "show", f"{branch}:reports/train/dspark.jsonl").splitlines())
    return Outcome(
        {
            name: digest for name, digest in digests.items() if not name.endswith("/deepspec.json")
        },  # has times
        [[line["step"], line.get("heldout_tau")] for line in history],
    )


def cached(repository: Path, digest: str) -> Path:
    return repository / ".dvc/cache/files/md5" / digest[:2] / digest[2:]


def broken_branches(repository: Path) -> tuple[int, list[str]]:
    """Return how many branches of runs there are, and what of them is not whole."""
    checked = subprocess.run(["git", "fsck", "--no-dangling"], cwd=repository, capture_output=True, text=True)
    wrong = checked.stderr.splitlines() if checked.returncode else []
    branches = git(repository, "for-each-ref", "--format=%(refname:short)", "refs/heads/runs").split()
    for branch in branches:
        files = set(git(repository, "ls-tree", "-r", "--name-only", branch).splitlines())
        if "dvc.lock" not in files:
            wrong.append(f"{branch} has no dvc.lock")
            continue
        lock = yaml.safe_load(git(repository, "show", f"{branch}:dvc.lock"))["stages"]
        wrong += [f"{branch} lacks {stage}" for stage in sorted(STAGES - set(lock))]
        for out in (out for stage in lock.values() for out in stage["outs"]):
            if out["path"].startswith("data/"):
                there = cached(repository, out["md5"]).exists()
            else:
                there = any(file == out["path"] or file.startswith(f"{out['path']}/") for file in files)
            wrong += [] if there else [f"{branch}: {out['path']} is not there"]
    return len(branches), wrong


def strike(loop: Loop, run: dict, victim: str, after_s: float, within_s: float) -> tuple[float, str]:
    """Kill a victim so many seconds after the run's process began, or as soon as there is one after that."""
    wait_for(lambda: loop.processes("prefect.engine"), 120)
    begun = time.monotonic()
    if victim == "git push":
        delay, who = 0.08 * after_s / within_s, "all" if after_s % 2 > 1 else "git"
        loop.armed.write_text(f"{delay:.4f} {who}\n")
        wait_for(lambda: not loop.armed.exists() or not loop.processes("prefect.engine"), 900)
        if loop.armed.exists():
            return 0.0, ""
        return time.monotonic() - begun, f"git push after {1000 * delay:.0f} ms" + (
            ", and what it had started" if who == "all" else ""
        )
    time.sleep(after_s)
    while loop.processes("prefect.engine"):
        if killed := loop.kill(victim):
            return time.monotonic() - begun, killed
        time.sleep(0.003)
    return 0.0, ""


def moment(
    loop: Loop,
    deployment: str,
    number: int,
    rng: random.Random,
    unbroken: Outcome,
    within_s: float,
    first: Path,
) -> Moment | None:
    """Break one run off and let the next one end; None if there was nothing left to kill."""
    started = time.monotonic()
    repository = loop.home / f"repository-{number}"
    shutil.rmtree(repository, ignore_errors=True)
    shutil.copytree(first, repository, symlinks=True)
    victim = VICTIMS[number % len(VICTIMS)]
    run = loop.start(deployment, repository)
    after_s, killed = strike(loop, run, victim, rng.uniform(0, within_s), within_s)
    if victim in (*SERVICES, "everything") and killed:
        loop.servers.services("up")
    again = loop.start(deployment, repository)  # at once: what is left of the first is waited for
    ended = wait_for(lambda: loop.ended(again), 900)
    first_ended = wait_for(lambda: loop.ended(run), 60)
    wait_for(lambda: not loop.processes(), 60)
    if not killed:
        return None
    completed = ended["state_type"] == "COMPLETED"
    others = outcome(repository, ended).others(unbroken) if completed else [ended["state"]["message"]]
    branches, broken = broken_branches(repository)
    if not others and not broken:
        shutil.rmtree(repository)
    return Moment(
        number,
        victim,
        round(after_s, 2),
        killed,
        first_ended["state_name"],
        ended["state_name"],
        others,
        branches,
        broken,
        round(time.monotonic() - started, 1),
    )


def table(moments: list[dict[str, Any]]) -> str:
    """Return the moments as a table in Markdown."""
    head = (
        "| | killed | after | that run | the next | the same rows, steps, digests | branches |\n"
        + 7 * "|---"
        + "|"
    )
    rows = [
        f"| {one['number']} | {one['victim']}: {one['killed']} | {one['after_s']} s | {one['first']} | {one['next']} | "
        f"{', '.join(one['others']) or 'yes'} | {one['branches']}, {'; '.join(one['broken']) or 'whole'} |"
        for one in moments
    ]
    return "\n".join([head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, required=True, help="a folder outside the project")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    home: Path = flags.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o755)  # PostgreSQL runs as a user of its own
    file = home / "moments.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    servers = Servers(home)
    with warm(home / "bin", servers.environment | TELEMETRY_OFF) as programs:
        first, target = home / "repository", make_target(home / "target")
        if not (first / ".git/refs/heads").exists():
            shutil.rmtree(first, ignore_errors=True)
            origin(first, target)
        loop = Loop(home, servers, programs)
        try:
            loop.servers.services("up")
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "flows.setup",
                    "--gpu-slots",
                    "4",
                ],  # a killed run's lease lasts a minute
                env=loop.servers.environment,
                check=True,
            )
            deployment = loop.deploy()
            unbroken, within_s = whole_run(loop, deployment, first)
            print(f"an unbroken run takes {within_s:.0f} s", flush=True)
            while len(done) < flags.moments:
                number = len(done)
                for attempt in range(5):
                    rng = random.Random(f"{flags.seed} {number} {attempt}")
                    if made := moment(loop, deployment, number, rng, unbroken, within_s, first):
                        break
                else:
                    sys.exit(f"moment {number}: nothing to kill in five runs")
                done.append(asdict(made))
                with file.open("a") as out:
                    out.write(json.dumps(done[-1]) + "\n")
                print(json.dumps(done[-1]), flush=True)
        finally:
            loop.servers.services("down")
    print(table(done))
    if any(one["others"] or one["broken"] for one in done):
        sys.exit(1)


def whole_run(loop: Loop, deployment: str, first: Path) -> tuple[Outcome, float]:
    """Run without a blow; return what came of it and the seconds that its process took."""
    repository = loop.home / "repository-unbroken"
    shutil.rmtree(repository, ignore_errors=True)
    shutil.copytree(first, repository, symlinks=True)
    run = loop.start(deployment, repository)
    wait_for(lambda: loop.processes("prefect.engine") or loop.ended(run), 120)
    begun = time.monotonic()
    ended = wait_for(lambda: loop.ended(run), 600)
    if ended["state_type"] != "COMPLETED":
        sys.exit(f"the unbroken run: {ended['state']['message']}\n{loop.servers.log(run)}")
    return outcome(repository, ended), time.monotonic() - begun


if __name__ == "__main__":
    main()

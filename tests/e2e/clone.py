"""A copy of the repository in which the pipeline runs as a user runs it: smoke profile, tiny random target."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import yaml
from click.testing import Result
from typer.testing import CliRunner

from deepspec.cli import app
from tests.e2e.stages import ENVIRONMENT, alone, planned, reproduce, run_module
from tests.network import GUARD, REACHED
from tests.tiny import make_target

ROOT = Path(__file__).parents[2]


@dataclass
class Clone:
    """A copy of the repository with a tiny target and the smoke profile."""

    root: Path
    runs: list[list[str]] = field(default_factory=list)  # the stages that ran, of each run

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | ENVIRONMENT | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(map(str, (self.root, GUARD))),
            REACHED: str(self.reached),
        }  # fmt: skip

    @property
    def reached(self) -> Path:
        """Where a process of this clone says which other machine it reached for."""
        return self.root / ".deepspec-reached"

    def run(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=self.root,
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=1000,
        )
        assert not self.reached.exists(), f"{words[0]} reached for {self.reached.read_text()}"
        return done

    def kill_repro(self, *stages: str, when: Callable[[], bool]) -> None:
        """Start `repro` in a process of its own and `kill -9` it, stage and all, as soon as `when()` holds."""
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.stages", str(self.root), *stages],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 300
        while not when():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline, "it never came to be killed"
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def repro_in_processes(self) -> list[str]:
        """Run `dvc repro`, which must succeed; the names of the stages that ran, each in a process as a user's."""
        done = self.run("dvc", "repro")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return re.findall(r"Running stage '(.+?)'", done.stdout)

    def repro(self, *stages: str) -> list[str]:
        """The same with every stage in this process, where torch is imported already."""
        return reproduce(self.root, *stages)

    def planned(self) -> list[str]:
        """The names of the stages that `repro` would run."""
        return planned(self.root)

    def call(self, module: str, *flags: str) -> int:
        """`python -m MODULE FLAG ...` in this process; its exit status."""
        with alone(), chdir(self.root):
            return run_module(module, *flags)

    def ask(self, *words: str, stdin: str = "") -> Result:
        """`deepspec WORD ...` in this process; what it starts is in the clone's environment."""
        with mock.patch.dict(os.environ, self.environment), alone(), chdir(self.root):
            found = CliRunner().invoke(app, list(words), input=stdin)
        assert not self.reached.exists(), f"{words[0]} reached for {self.reached.read_text()}"
        return found

    def set(self, dotted: str, value: object) -> None:
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text())
        *parents, last = dotted.split(".")
        section = params
        for name in parents:
            section = section[name]
        section[last] = value
        path.write_text(yaml.safe_dump(params, sort_keys=False))

    def report(self, path: str) -> dict:
        return json.loads((self.root / path).read_text())


def make_clone(root: Path, family: str) -> Clone:
    """The tracked files and the new ones that git would take, as a repository of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock" and not name.startswith("reports/"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    shutil.copy(root / "params.smoke.yaml", root / "params.yaml")
    make_target(root / "data/smoke-target", family)
    return Clone(root)

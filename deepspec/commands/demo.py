"""`deepspec demo`: what `make demo` runs, `dvc repro` with its stages in view and a first figure after the prompts.

On a terminal a table of the stages moves; elsewhere a line tells each stage's beginning and, once a minute, how far it
is. Both follow the stages' channel (`following.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from deepspec.errors import DeepSpecError
from deepspec.following import Channel, Count, lines_of
from deepspec.progress import CHANNEL, TEXT

FIRST = "prompts"  # the stage after which the lookup can be tried
ANSWERED = Path("data/distill")
LINE_S = 60.0  # between two lines that say how far a stage is


@dataclass
class Stage:
    """One row: a stage of dvc.yaml, for one drafter where it is made for each.

    Args:
        expected: seconds, where they were estimated.
        began, ended: on the monotonic clock; None before.
    """

    name: str
    what: str
    expected: float | None = None
    began: float | None = None
    ended: float | None = None
    count: Count | None = None

    @property
    def state(self) -> str:
        """Return how far it is, in a few words."""
        if self.began is None:
            return ""
        if self.ended is not None:
            return f"done in {spell(self.ended - self.began)}"
        if self.count is None:
            return f"running for {spell(time.monotonic() - self.began)}"
        left = self.count.seconds_left
        rest = f", {spell(left)} left" if left is not None else ""
        return f"{self.count.label} {self.count.done}/{self.count.total}{rest}"


@dataclass
class View:
    """What is shown of a run: rows by name, and what the stages say."""

    stages: dict[str, Stage]
    console: Console = field(default_factory=lambda: Console(highlight=False, emoji=False, soft_wrap=True))
    running: Stage | None = None
    told: float = 0.0
    live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the table while the block runs, on a terminal."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, get_renderable=self.table, refresh_per_second=2) as self.live:
            yield
        self.live = None

    def table(self) -> Table:
        """Return the stages as they stand."""
        grid = Table(box=None, pad_edge=False)
        for title in ("stage", "does", "about", ""):
            grid.add_column(title, justify="right" if title == "about" else "left")
        for stage in self.stages.values():
            about = spell(stage.expected) if stage.expected else ""
            style = "bold" if stage is self.running else "dim" if stage.ended else None
            grid.add_row(stage.name, stage.what, about, stage.state, style=style)
        return grid

    def say(self, line: str) -> None:
        """Print a line of the stages' own."""
        self.console.print(line, markup=False)

    def stage(self, name: str) -> None:
        """Take in that a stage begins."""
        self.finish()
        self.running = self.stages.setdefault(name, Stage(name, ""))
        self.running.began, self.told = time.monotonic(), time.monotonic()
        if self.live is None:
            about = f", about {spell(self.running.expected)}" if self.running.expected else ""
            self.say(f"{time.strftime('%H:%M')} {name}: {self.running.what}{about}")

    def count(self, count: Count) -> None:
        """Take in how far the running stage is."""
        if self.running is not None:
            self.running.count = count

    def tick(self) -> None:
        """Say how far the running stage is, once a minute, where no table does."""
        if self.live is None and self.running is not None and time.monotonic() - self.told >= LINE_S:
            self.told = time.monotonic()
            self.say(f"{time.strftime('%H:%M')} {self.running.name}: {self.running.state}")

    def finish(self) -> None:
        """Take in that the running stage has ended."""
        if self.running is not None:
            self.running.ended = time.monotonic()
            self.running = None


def run(root: Path = Path(), view: View | None = None) -> None:
    """Run the pipeline of dvc.yaml and say what came of it.

    Raises:
        DeepSpecError: a stage failed; its own words were shown.
    """
    began = time.monotonic()
    view = view or View(stages_of(root))
    first = not (root / ANSWERED).exists()
    if first:
        view.stages = _with_glance(view.stages)
    view.say(
        f"{len(view.stages)} stages. What is up to date is not made again; Ctrl-C stops, the next run goes on."
    )
    view.say("At the end: the table here, and the page reports/report.html.")
    with view.shown():
        dvc = [sys.executable, "-m", "dvc", "repro"]
        if first:
            follow([*dvc, "target"], root, view)
            _estimate(root, view)
            follow([*dvc, FIRST], root, view)
            follow([sys.executable, "-m", "deepspec.stages.glance"], root, view)
        follow(dvc, root, view)
        if view.stages["report"].began is None:  # nothing had changed: the table all the same
            follow([sys.executable, "-m", "deepspec.stages.report"], root, view)
    view.say(f"Finished in {spell(time.monotonic() - began)}.")


def _estimate(root: Path, view: View) -> None:
    """Measure this machine for some seconds, and say how long the stages will take by `deepspec plan`."""
    words = [sys.executable, "-m", "deepspec.cli", "plan", "--json"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True)
    try:
        planned = {stage["stage"]: float(stage["seconds"]) for stage in json.loads(done.stdout)["stages"]}
    except (ValueError, KeyError, TypeError):
        view.say(f"no estimate of the time: {(done.stderr.strip() or 'no plan').splitlines()[-1]}")
        return
    for name, stage in view.stages.items():
        stage.expected = _expected(name, planned, list(view.stages))
    rest = sum(stage.expected or 0.0 for stage in view.stages.values() if stage.began is None)
    view.say(
        f"About {spell(rest)} more, as this machine was measured just now (`deepspec plan` has the derivation)."
    )


def _expected(name: str, planned: Mapping[str, float], stages: Sequence[str]) -> float | None:
    """Return the seconds of a stage in a plan, whose `features` are part of the first training."""
    stage, _, drafter = name.partition("@")
    if stage == "train":
        first = name == next(each for each in stages if each.startswith("train@"))
        return planned.get(f"train {drafter}", 0.0) + (planned.get("features", 0.0) if first else 0.0) or None
    if stage == "evaluate":  # of all drafters together
        return planned.get(stage, 0.0) / sum(each.startswith("evaluate@") for each in stages) or None
    return planned.get(stage)


def stages_of(root: Path) -> dict[str, Stage]:
    """Return the stages of dvc.yaml by name, those for each drafter of the pipeline as `train@dspark`."""
    declared = _read(root / "dvc.yaml")["stages"]
    drafters = _read(root / "params.yaml").get("pipeline") or []
    found = {}
    for name, stage in declared.items():
        for each in [f"{name}@{drafter}" for drafter in drafters] if "matrix" in stage else [name]:
            found[each] = Stage(each, stage.get("desc", "").removesuffix("."))
    return found


def _with_glance(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """Return the stages with the first figure after the one that it needs."""
    glance = Stage("glance", "A first figure: the lookup alone, which needs no training")
    return {
        name: row
        for known, stage in stages.items()
        for name, row in ([(known, stage), ("glance", glance)] if known == FIRST else [(known, stage)])
    }


def follow(words: Sequence[str], root: Path, view: View) -> None:
    """Run a command to its end; the view gets its lines, stages and counts.

    Raises:
        DeepSpecError: it failed.
    """
    with tempfile.NamedTemporaryFile(prefix="deepspec-demo-") as file:
        channel = Channel(Path(file.name), view.count, view.stage)
        process = subprocess.Popen(
            words,
            cwd=root,
            env=_environment(channel.path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        try:
            for line in lines_of(process.stdout):
                channel.poll()
                if line := line.rstrip():
                    view.say(line)
                view.tick()
        finally:
            if process.poll() is None:
                process.terminate()
        channel.poll(now=True)
        view.finish()
    if status := process.wait():
        raise DeepSpecError(
            channel.mistake or f"{' '.join(words[1:])} exited with {status}; its words are above"
        )


def _environment(channel: Path) -> Mapping[str, str]:
    return os.environ | {CHANNEL: str(channel), TEXT: "off", "PYTHONUNBUFFERED": "1"}


def spell(seconds: float) -> str:
    """Return a duration in minutes, or in seconds where it is shorter than two."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _read(path: Path) -> dict:
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise DeepSpecError(f"{path}: cannot be read ({error}); run it where dvc.yaml is") from None
    if not isinstance(found, dict):
        raise DeepSpecError(f"{path}: holds no settings")
    return found

"""A Python environment of an engine's own, made once in the user's cache.

An unfinished environment has no `.ready`: the next run goes on where the last one stopped, since pip skips what is
installed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from deepspec.errors import DeepSpecError

logger = logging.getLogger(__name__)

ENGINES = Path.home() / ".cache" / "deepspec" / "engines"
READY = ".ready"
Step = tuple[str, ...]  # words for pip


def build(directory: Path, steps: Sequence[Step], run: Callable[[list[str], str], None]) -> Path:
    """Make the environment, or go on with it; return its Python. `run` takes a command and what it does."""
    python = directory / "bin" / "python"
    if not (directory / "bin" / "pip").exists():  # what venv makes last
        run([sys.executable, "-m", "venv", "--clear", str(directory)], "make an environment")
    for number, (verb, *words) in enumerate(steps, 1):
        logger.info("[%d/%d] pip %s %s", number, len(steps), verb, " ".join(words))
        run([str(python), "-m", "pip", verb, *words], f"{verb} {words[-1]}")
    return python


def install(command: list[str], what: str, engine: str) -> None:
    """Run a command; pip's own progress is shown on a terminal.

    Raises:
        DeepSpecError: it failed.
    """
    shown = sys.stderr.isatty()
    quiet = [] if shown or "pip" not in command else ["--quiet"]
    done = subprocess.run(
        [*command, *quiet],
        stdout=sys.stderr if shown else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DeepSpecError(f"cannot {what} for {engine}: {reason}; run again to go on")


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold the lock of the set-up: one process sets up; others wait and find it done."""
    with directory.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

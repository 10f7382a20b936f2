"""One command at a time: its output line by line as it comes, its progress, and why it failed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deepspec.entry import TELEMETRY_OFF

BAR_INTERVAL_S = 30.0
SQLITE = "sqlite:///"
STOP_S = 20.0  # a trainer told to stop saves its state first
KEPT = 200  # last lines, among which the reason of a failure is looked for

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_COUNTED = re.compile(r"^(?P<label>[A-Za-z][^:|]*?)[: ]\s*(?P<done>\d+)/(?P<total>\d+)(?=[,\s]|$)")
_BAR = re.compile(r"^(?P<label>[^|%]*?):?\s*(?:\d+%\|.*?\||[━╸╺]+)\s*(?P<done>\d+)/(?P<total>\d+)\b")
_EXITED = re.compile(r"exited with (-?\d+)")

_running: set[subprocess.Popen] = set()
_lock = threading.Lock()
_cancelled = threading.Event()


class CommandFailed(Exception):
    """A command that may succeed when it is run again: a server away, a killed process, a busy lock."""


class UserMistake(CommandFailed):
    """A command that fails again until somebody changes something. Its message is the command's own line."""


class Cancelled(UserMistake):
    """Somebody stopped the run."""


@dataclass(frozen=True)
class Progress:
    label: str
    done: int
    total: int
    bar: bool = False  # drawn over and over: not every line is worth keeping

    @property
    def percent(self) -> float:
        return 100.0 * self.done / self.total


def parse_progress(line: str) -> Progress | None:
    """How far a line says its job is: `magpie: 12/360, ...`, `step 80/640 ...`, a bar of tqdm or rich."""
    found = _BAR.match(line)
    bar = found is not None
    found = found or _COUNTED.match(line)
    if not found or not 0 <= int(found["done"]) <= int(found["total"]) > 0:
        return None
    return Progress(found["label"].strip() or "progress", int(found["done"]), int(found["total"]), bar)


@dataclass
class Thinned:
    """Lets every line through but those of bars: of these the first, the last and one every 30 s."""

    said: dict[str, float] = field(default_factory=dict)

    def keep(self, progress: Progress | None) -> bool:
        if progress is None or not progress.bar:
            return True
        last, now = self.said.get(progress.label), time.monotonic()
        if last is None or progress.done == progress.total or now - last >= BAR_INTERVAL_S:
            self.said[progress.label] = now
            return True
        return False


def python_path(first: Path) -> str:
    """`first`, then what the user has on PYTHONPATH, but not the code of this flow: a clone has its own."""
    here = Path(__file__).parents[1]
    users = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join([str(first), *(path for path in users if Path(path).resolve() != here)])


def environment(root: Path) -> dict[str, str]:
    """That of a command in the clone at `root`: its own code, this Python, no telemetry, no buffer."""
    own = os.environ | TELEMETRY_OFF | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": python_path(root),
        "PYTHONUNBUFFERED": "1",
        "GIT_TERMINAL_PROMPT": "0",
    }  # fmt: skip
    store = own.get("MLFLOW_TRACKING_URI", "")
    if store.startswith(SQLITE):  # relative to where the flow was started, not to the clone
        own["MLFLOW_TRACKING_URI"] = SQLITE + str(Path(store.removeprefix(SQLITE)).absolute())
    return own


def follow(
    words: Sequence[str],
    root: Path,
    say: Callable[[str], None],
    progress: Callable[[Progress], None] = lambda _: None,
    hours: float = 24.0,
    keep_open: Sequence[int] = (),
) -> list[str]:
    """Run a command to its end and return its last lines.

    Args:
        say: gets every line worth keeping, `progress` every count, as they are printed.
        hours: after which the command is stopped.
        keep_open: file descriptors the command holds on to, such as the lock of its clone.

    Raises:
        UserMistake: it said what is wrong, on a line that begins with `error:`, or exited with 2.
        Cancelled: `cancel` was called.
        CommandFailed: it failed in any other way.
    """
    lines: deque[str] = deque(maxlen=KEPT)
    thinned = Thinned()
    if _cancelled.is_set():
        raise Cancelled("the run was cancelled")
    process = subprocess.Popen(
        words,
        cwd=root,
        env=environment(root),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        pass_fds=tuple(keep_open),
    )
    with _lock:
        _running.add(process)
    if _cancelled.is_set():  # since it was asked above
        stop(process)
    expired = threading.Event()
    late = threading.Timer(hours * 3600, lambda: (expired.set(), stop(process)))
    late.daemon = True
    late.start()
    try:
        for raw in process.stdout:
            line = _ESCAPES.sub("", raw).rstrip()
            found = parse_progress(line)
            if found:
                progress(found)
            if line and thinned.keep(found):
                lines.append(line)
                say(line)
        status = process.wait()
    finally:
        late.cancel()
        stop(process)
        with _lock:
            _running.discard(process)
    if _cancelled.is_set():
        raise Cancelled("the run was cancelled")
    if expired.is_set():
        raise CommandFailed(f"{' '.join(words)}: stopped after {hours:g} hours")
    if status:
        raise failure(status, list(lines))
    return list(lines)


def failure(status: int, lines: list[str]) -> CommandFailed:
    """Why a command failed: the exception to raise.

    DVC turns a stage's status into its own and says it in words; accelerate turns 2 into 1. The stages' one line
    that begins with `error:` survives both, and only a mistake is told that way. What the gate refuses it says on
    lines that begin with `refused:`, among those of drafters that it does not refuse.
    """
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if any(line.startswith("Traceback ") for line in lines):
        told = []
    exits = [int(code) for line in lines for code in _EXITED.findall(line)]
    mistake = bool(told) or 2 in exits or (not exits and status == 2)
    dvc = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    refused = [line.removeprefix("refused: ") for line in lines if line.startswith("refused: ")]
    reason = "; ".join(refused) or (told or dvc or lines or [f"exited with {status}"])[-1]
    return (UserMistake if mistake else CommandFailed)(reason)


def stop(process: subprocess.Popen) -> None:
    """End a command and all that it started: politely, then not."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
            process.wait(STOP_S)
        except (ProcessLookupError, PermissionError):
            return
        except subprocess.TimeoutExpired:
            continue


def cancel() -> None:
    """Stop every command of this process and start no more: a cancelled run's tasks wait for them in other threads."""
    _cancelled.set()
    with _lock:
        running = list(_running)
    for process in running:
        stop(process)

"""One command at a time: its output line by line as it comes, its progress, and why it failed.

Progress and mistakes come as JSON lines in the file that `DEEPSPEC_PROGRESS` names (`deepspec/progress.py`), not from
the text.
"""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from deepspec.entry import TELEMETRY_OFF
from deepspec.following import Channel, Count, lines_of
from deepspec.progress import CHANNEL

BAR_INTERVAL_S = 30.0
SQLITE = "sqlite:///"
STOP_S = 20.0  # a trainer told to stop saves its state first
KEPT = 200  # last lines, among which the reason of a failure is looked for

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
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


class Thinned:
    """Lets every line through but those that a bar draws over (they end in a carriage return): one every 30 s."""

    def __init__(self) -> None:
        self._kept: float | None = None

    def keep(self, raw: str) -> bool:
        if not raw.endswith("\r"):
            return True
        now = time.monotonic()
        if self._kept is not None and now - self._kept < BAR_INTERVAL_S:
            return False
        self._kept = now
        return True


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
    progress: Callable[[Count], None] = lambda _: None,
    hours: float = 24.0,
    keep_open: Sequence[int] = (),
) -> list[str]:
    """Run a command to its end and return its last lines.

    Args:
        say: gets every line worth keeping as it is printed, `progress` every count of the channel.
        hours: after which the command is stopped.
        keep_open: file descriptors the command holds on to, such as the lock of its clone.

    Raises:
        UserMistake: it said what is wrong, in the channel or on a line that begins with `error:`, or exited with 2.
        Cancelled: `cancel` was called.
        CommandFailed: it failed in any other way.
    """
    if _cancelled.is_set():
        raise Cancelled("the run was cancelled")
    with tempfile.NamedTemporaryFile(prefix="deepspec-progress-") as file:
        channel = Channel(Path(file.name), progress)
        process = _start(words, root, channel.path, keep_open)
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            stop(process)

        late = threading.Timer(hours * 3600, expire)
        late.daemon = True
        late.start()
        try:
            lines = _listen(process, channel, say)
            status = process.wait()
        finally:
            late.cancel()
            stop(process)
            with _lock:
                _running.discard(process)
        channel.poll(now=True)
    if _cancelled.is_set():
        raise Cancelled("the run was cancelled")
    if expired.is_set():
        raise CommandFailed(f"{' '.join(words)}: stopped after {hours:g} hours")
    if status:
        raise UserMistake(channel.mistake) if channel.mistake else failure(status, lines)
    return lines


def _start(
    words: Sequence[str], root: Path, channel: Path, keep_open: Sequence[int]
) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        words,
        cwd=root,
        env=environment(root) | {CHANNEL: str(channel)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=tuple(keep_open),
    )
    with _lock:
        _running.add(process)
    if _cancelled.is_set():  # since it was asked before
        stop(process)
    return process


def _listen(process: subprocess.Popen[bytes], channel: Channel, say: Callable[[str], None]) -> list[str]:
    """Tell every line and count of a command until it closes its output; return its last lines.

    `say` and `progress` are called from this thread.
    """
    assert process.stdout is not None
    output = io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline="")
    lines: deque[str] = deque(maxlen=KEPT)
    thinned = Thinned()
    for raw in lines_of(output):
        channel.poll()
        line = _ESCAPES.sub("", raw).rstrip()
        if line and thinned.keep(raw):
            lines.append(line)
            say(line)
    return list(lines)


def failure(status: int, lines: list[str]) -> CommandFailed:
    """Return why a command failed that said nothing in the channel: git, DVC itself, another project's stages.

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

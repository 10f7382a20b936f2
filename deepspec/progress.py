"""How far a long job is: a live bar in a terminal, a plain line now and then elsewhere.

Programs follow a job without reading its text: where `DEEPSPEC_PROGRESS` names a file (`/dev/fd/3` for a descriptor),
JSON lines are appended to it, one a second at most. Three kinds:

    {"label": "generate", "done": 412, "total": 900, "tokens_per_second": 145.0, "seconds_left": 750.0,
     "state": "running", "time": 1767225600.0}
    {"stage": "train@dspark", "time": 1767225600.0}
    {"error": "params.yaml: unknown key 'lrr'", "time": 1767225600.0}

`state` is `running`, `finished` or, where an exception ended the job, `stopped`; what is not known is null. An error is
the user's mistake that ended the process: running it again changes nothing. Who follows may switch the plain lines off
with `DEEPSPEC_PROGRESS_TEXT=off`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)

CHANNEL, TEXT = "DEEPSPEC_PROGRESS", "DEEPSPEC_PROGRESS_TEXT"
PLAIN_INTERVAL_S = 15.0
CHANNEL_INTERVAL_S = 1.0
T = TypeVar("T")


class Progress:
    """Items done of a total, tokens a second and the time that is left, on stderr and in the channel.

    Args:
        done: items that an earlier run finished; they count as done but not towards the speed.
        shown: False keeps it silent (all processes but the main one).
    """

    def __init__(self, label: str, total: int, done: int = 0, shown: bool = True) -> None:
        self.label, self.total, self.done = label, total, done
        self._at_start = done
        self._tokens = 0
        self._started = self._said = self._sent = time.monotonic()
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._shown = shown
        self._lines = shown and os.environ.get(TEXT) != "off"
        self._bar: RichProgress | None = None
        if shown and self._console.is_terminal:
            columns = [TextColumn("{task.description}", markup=False), BarColumn()]
            columns.append(TextColumn("{task.fields[state]}", markup=False))
            self._bar = RichProgress(*columns, console=self._console)
            self._bar.add_task(label, total=total, completed=done, state="")

    def __enter__(self) -> Progress:
        self._send("running")
        if self._bar:
            self._bar.start()
        elif self._lines:
            self._say()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._send("stopped" if kind else "finished")
        if self._bar:
            self._bar.stop()
        elif self._lines and self._said != self._started:
            self._say()

    def advance(self, items: int = 1) -> None:
        """Count items as done; never more than the total."""
        self.done = min(self.done + items, self.total)
        self._show()

    def tokens(self, count: int) -> None:
        """Count tokens towards the speed."""
        self._tokens += count
        self._show()

    def note(self, text: str) -> None:
        """Show figures of the job, such as a loss, on a line that stays."""
        if self._shown:
            self._say(text)

    def state(self) -> str:
        """Return `412/900, 145 tokens/s, 12m30s left`; no speed where no tokens are counted."""
        speed, left = self.tokens_per_second(), self.seconds_left()
        parts = [f"{self.done}/{self.total}"]
        parts += [f"{speed:.0f} tokens/s"] if speed is not None else []
        parts += [f"{_clock(left) if left is not None else '?'} left"]
        return ", ".join(parts)

    def tokens_per_second(self) -> float | None:
        """Return the speed since the start; None where no tokens were counted."""
        elapsed = time.monotonic() - self._started
        return self._tokens / max(elapsed, 1e-9) if self._tokens else None

    def seconds_left(self) -> float | None:
        """Return how long the rest takes at the pace so far; None before the first item."""
        new = self.done - self._at_start
        return (time.monotonic() - self._started) / new * (self.total - self.done) if new else None

    def _show(self) -> None:
        if time.monotonic() - self._sent >= CHANNEL_INTERVAL_S:
            self._send("running")
        if self._bar:
            self._bar.update(TaskID(0), completed=self.done, state=self.state())
        elif self._lines and time.monotonic() - self._said >= PLAIN_INTERVAL_S:
            self._say()

    def _say(self, note: str = "") -> None:
        self._said = time.monotonic()
        self._console.print("; ".join(filter(None, (f"{self.label}: {self.state()}", note))), soft_wrap=True)

    def _send(self, state: str) -> None:
        if self._shown:
            self._sent = time.monotonic()
            send({
                "label": self.label,
                "done": self.done,
                "total": self.total,
                "tokens_per_second": self.tokens_per_second(),
                "seconds_left": self.seconds_left(),
                "state": state,
            })  # fmt: skip


def send(entry: dict[str, Any]) -> None:
    """Append a line to the channel, with the time; nothing happens where there is none or it cannot be written."""
    path = os.environ.get(CHANNEL)
    if not path:
        return
    line = json.dumps({**entry, "time": round(time.time(), 3)}, ensure_ascii=False) + "\n"
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode())  # one call, so that lines of several processes do not mix
        finally:
            os.close(file)
    except OSError as error:  # nobody's work ends because nobody can watch it
        logger.warning("%s=%s: %s", CHANNEL, path, error)
        del os.environ[CHANNEL]


def watched(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield the items while progress is shown."""
    with Progress(what, len(items)) as progress:
        for item in items:
            yield item
            progress.advance()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"

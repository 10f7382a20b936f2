"""How far a long job is: a live bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

PLAIN_INTERVAL_S = 15.0


class Progress:
    """Items done of a total, tokens a second and the time that is left, on stderr.

    Args:
        done: items that an earlier run finished; they count as done but not towards the speed.
        shown: False keeps it silent (all processes but the main one).
    """

    def __init__(self, label: str, total: int, done: int = 0, shown: bool = True) -> None:
        self.label, self.total, self.done = label, total, done
        self._at_start = done
        self._tokens = 0
        self._started = self._said = time.monotonic()
        console = Console(stderr=True)
        self._shown = shown
        self._bar = self._task = None
        if shown and console.is_terminal:
            columns = (TextColumn(label), BarColumn(), TextColumn("{task.fields[state]}"))
            self._bar = RichProgress(*columns, console=console)
            self._task = self._bar.add_task(label, total=total, completed=done, state="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        elif self._shown:
            self._say()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()
        elif self._shown and self._said != self._started:
            self._say()

    def advance(self, items: int = 1) -> None:
        self.done = min(self.done + items, self.total)
        self._show()

    def tokens(self, count: int) -> None:
        self._tokens += count
        self._show()

    def state(self) -> str:
        """`412/900, 145 tokens/s, 12m30s left`; no speed where no tokens are counted."""
        elapsed = time.monotonic() - self._started
        new = self.done - self._at_start
        left = _clock(elapsed / new * (self.total - self.done)) if new else "?"
        speed = f"{self._tokens / max(elapsed, 1e-9):.0f} tokens/s, " if self._tokens else ""
        return f"{self.done}/{self.total}, {speed}{left} left"

    def _show(self) -> None:
        if self._bar:
            self._bar.update(self._task, completed=self.done, state=self.state())
        elif self._shown and time.monotonic() - self._said >= PLAIN_INTERVAL_S:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        print(f"{self.label}: {self.state()}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"

"""Follow a command: how far it is and which mistake ended it, from the file that `DEEPSPEC_PROGRESS` names.

The writing side, and what a line holds, is `progress.py`.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POLL_S = 0.5


@dataclass(frozen=True)
class Count:
    """How far one job of a command is; seconds as it estimates them, None while it knows nothing."""

    label: str
    done: int
    total: int
    seconds_left: float | None = field(default=None, compare=False)

    @property
    def percent(self) -> float:
        return 100.0 * self.done / self.total


class Channel:
    """The file in which a command says how far it is and which mistake ended it.

    Args:
        progress: gets every count.
        stage: gets the name of each stage that begins, `train@dspark`, before its counts.
    """

    def __init__(
        self,
        path: Path,
        progress: Callable[[Count], None],
        stage: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.path, self.mistake = path, ""
        self._progress, self._stage = progress, stage
        self._read, self._due = 0, 0.0

    def poll(self, now: bool = False) -> None:
        """Hand over what came since the last time: of each job its newest count. At most twice a second, or `now`."""
        if not now and time.monotonic() < self._due:
            return
        self._due = time.monotonic() + POLL_S
        newest: dict[str, Count] = {}
        for entry in self._entries():
            if "error" in entry:
                self.mistake = entry["error"]
            elif "stage" in entry:
                newest.clear()  # of the stage before
                self._stage(entry["stage"])
            elif entry.get("total"):
                left = entry.get("seconds_left")
                newest[entry["label"]] = Count(entry["label"], entry["done"], entry["total"], left)
        for found in newest.values():
            self._progress(found)

    def _entries(self) -> list[dict[str, Any]]:
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._read += whole
        found = []
        for line in data[:whole].splitlines():
            with suppress(ValueError):  # not ours: it stops no stage
                found.append(json.loads(line))
        return [entry for entry in found if isinstance(entry, dict)]


def lines_of(output: Iterable[str]) -> Iterator[str]:
    """Yield each line of an output as it comes, and an empty string when none came for `POLL_S`.

    A thread reads, so that counts can be polled while nothing is printed.
    """
    waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            for line in output:
                waiting.put(line)
        finally:
            waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = waiting.get(timeout=POLL_S)
        except queue.Empty:
            yield ""
            continue
        if line is None:
            return
        yield line

"""JSON-lines files of finished pieces of work, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

_BLOCK = 1 << 16  # bytes


class Journal:
    """Appends JSON lines to a file; a half-written last line, left by a kill, is dropped when the file is opened.

    Args:
        fsync: each line is on the disk when `append` returns, not only with the system.
    """

    def __init__(self, path: str | Path, fsync: bool = False) -> None:
        self.path, self.fsync = Path(path), fsync
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        self._file.truncate(_whole_lines(self.path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def append(self, entry: dict[str, Any]) -> int:
        """Write one line, whole, and return the offset at which it begins."""
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        if self.fsync:
            os.fsync(self._file.fileno())
        return offset

    def close(self) -> None:
        """Close the file; what was appended stays."""
        self._file.close()


def read_journal(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every whole line of a journal with the offset at which it begins; the file need not be there.

    What is no JSON object is left out, since work that was not kept well is done again.
    """
    if not Path(path).exists():
        return
    offset = 0
    with Path(path).open("rb") as file:
        for line in file:
            entry = _parse(line)
            if entry is not None:
                yield offset, entry
            offset += len(line)


def read_entry(path: str | Path, offset: int) -> dict[str, Any]:
    """Return the line of a journal that begins at an offset that `append` or `read_journal` gave."""
    with Path(path).open("rb") as file:
        file.seek(offset)
        return json.loads(file.readline())


class WorkLog:
    """Results by key in a journal. A result is written before `add` returns."""

    def __init__(self, path: str | Path) -> None:
        self._done = read_log(path)
        self._journal = Journal(path)
        self.path = self._journal.path

    def get(self, key: str) -> Any | None:
        """Return the result of this key, or None."""
        return self._done.get(key)

    def add(self, key: str, result: Any) -> None:
        """Keep a result, which must be JSON."""
        self._done[key] = result
        self._journal.append({"key": key, "result": result})

    def close(self) -> None:
        """Close the file; the results stay."""
        self._journal.close()

    def remove(self) -> None:
        """Delete the file; to be called once the results are safe elsewhere."""
        self.close()
        self.path.unlink(missing_ok=True)


def read_log(path: str | Path) -> dict[str, Any]:
    """Return the finished results of a work file, by key; the file stays as it is."""
    return {entry["key"]: entry["result"] for _, entry in read_journal(path)}


def _whole_lines(path: Path) -> int:
    """Return how many bytes of a file are whole lines; only its end is read."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(end - _BLOCK, 0)
            file.seek(start)
            if (at := file.read(end - start).rfind(b"\n")) >= 0:
                return start + at + 1
            end = start
    return 0


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None

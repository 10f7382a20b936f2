"""A JSON-lines file of finished pieces of work, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class WorkLog:
    """Results by key. A result is written before `add` returns; a half-written last line is dropped."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._done, whole = _read(self.path)
        self._file = self.path.open("ab")
        self._file.truncate(whole)

    def get(self, key: str) -> Any | None:
        return self._done.get(key)

    def add(self, key: str, result: Any) -> None:
        self._done[key] = result
        self._file.write(json.dumps({"key": key, "result": result}).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """To be called once the results are safe elsewhere."""
        self.close()
        self.path.unlink(missing_ok=True)


def read_log(path: Path) -> dict[str, Any]:
    """Read the finished results of a work file, by key; the file stays as it is."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Any], int]:
    """Return the results by key, and how many bytes of the file are whole lines."""
    done: dict[str, Any] = {}
    whole = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        entry = _parse(line)
        if entry is None:
            break
        done[entry["key"]] = entry["result"]
        whole += len(line)
    return done, whole


def _parse(line: bytes) -> dict | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None

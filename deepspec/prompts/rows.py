"""The prompts that were let through, as lines of a file that is gone when it is closed: a few bytes each in memory."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload


class Rows(Sequence[dict[str, Any]]):
    """Rows by number, read from their lines.

    Args:
        directory: where the file lies; one that is on a disk, since it grows to the size of all prompts.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        self._offsets = array("Q")
        self._end = 0

    def append(self, line: bytes) -> None:
        """Keep a row, given as a line of JSON."""
        self._file.seek(self._end)
        self._offsets.append(self._end)
        self._end += self._file.write(line)

    def shuffle(self, seed: int) -> None:
        """Put the rows in an order drawn from a seed."""
        random.Random(seed).shuffle(self._offsets)  # type: ignore[arg-type]

    def lines(self) -> Iterator[bytes]:
        """Yield the line of every row."""
        for offset in self._offsets:
            yield self._line(offset)

    def digest(self) -> str:
        """Return the identity of all lines, as `deepspec.files.digest` has it of their text."""
        state = hashlib.sha256()
        for line in self.lines():
            state.update(line)
        return state.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(i, slice):
            return [json.loads(self._line(offset)) for offset in self._offsets[i]]
        return json.loads(self._line(self._offsets[i]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _line(self, offset: int) -> bytes:
        self._file.seek(offset)
        return self._file.readline()

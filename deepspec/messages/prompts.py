"""The prompts of a file, of which only ids and places are held: a line is read when its prompt is asked for."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, overload

from deepspec.errors import DeepSpecError
from deepspec.messages.prompt import Prompt, check_prompt, parse_prompt, plain_line


class Prompts(Sequence[Prompt]):
    """Prompts by number or by id, some of a file's or all, in any order. Processes may be forked while it is open.

    Args:
        file: that they are read from.
        ids: of all prompts of the file.
        spans: offset and end of each line, one behind the other.
        order: numbers of the prompts that it has; None: all of the file.
    """

    def __init__(
        self, file: IO[bytes], ids: list[str], spans: array[int], order: array[int] | None = None
    ) -> None:
        self._file, self._ids, self._spans = file, ids, spans
        self._order = array("L", range(len(ids))) if order is None else order
        self._numbers: dict[str, int] = {}

    @property
    def ids(self) -> list[str]:
        """Return the ids, in order."""
        return [self._ids[number] for number in self._order]

    def arranged(self, places: Iterable[int]) -> Prompts:
        """Return those at some places, in that order."""
        return Prompts(self._file, self._ids, self._spans, array("L", (self._order[i] for i in places)))

    def get(self, id: str) -> Prompt | None:
        """Return the prompt of an id, or None."""
        number = self._number(id)
        return None if number is None else self._read(number)

    def written_as(self, id: str, source: str, turns: Sequence[str]) -> bool:
        """Return whether the line of an id is the one that these user turns alone are written as."""
        number = self._number(id)
        return number is not None and self._line(number) == plain_line(id, source, turns)

    def _number(self, id: str) -> int | None:
        if not self._numbers:
            self._numbers = {self._ids[number]: number for number in self._order}
        return self._numbers.get(id)

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, i: int) -> Prompt: ...
    @overload
    def __getitem__(self, i: slice) -> Prompts: ...
    def __getitem__(self, i: int | slice) -> Prompt | Prompts:
        if isinstance(i, slice):
            return Prompts(self._file, self._ids, self._spans, self._order[i])
        return self._read(self._order[i])

    def _read(self, number: int) -> Prompt:
        return parse_prompt(self._line(number), self._ids[number])

    def _line(self, number: int) -> bytes:
        start, end = self._spans[2 * number : 2 * number + 2]
        return os.pread(self._file.fileno(), end - start, start)


def read_prompts(path: str | Path) -> Prompts:
    """Read every prompt of a file once, so that all of them are known to be prompts, in its order.

    Raises:
        DeepSpecError: the file is missing or empty, a line is not a prompt (its number is named), or an id
            appears twice.
    """
    path = Path(path)
    if not path.is_file():
        raise DeepSpecError(f"{path}: no such prompt file; run the prompts stage first")
    name = str(path)
    known: set[str] = set()
    ids: list[str] = []
    spans = array("Q")
    file = path.open("rb")
    end = 0
    for number, line in enumerate(file, start=1):
        start, end = end, end + len(line)
        if not line.strip():
            continue
        id = check_prompt(line, f"{name}:{number}")
        if id in known:
            raise DeepSpecError(f"{name}:{number}: the id {id!r} was used by an earlier line")
        known.add(id)
        ids.append(id)
        spans.extend((start, end))
    if not ids:
        raise DeepSpecError(f"{path}: no prompt in the file")
    return Prompts(file, ids, spans)

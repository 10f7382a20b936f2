"""The distillation data as a trainer sees it: token sequences and which of their tokens count.

Rows lie in flat arrays, a `Chunk` for every few thousand. `deepspec.features.read` makes them from a data set, in a
file that is mapped into memory, so that of a million conversations a trainer holds a few bytes each.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import numpy.typing as npt

ROWS = 4096  # of a chunk, at most
LOOKS = 64  # at rows, after which their pages are let go of
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sequence:
    """A row's tokens; of each, whether it is part of an answer and whether it is to be learnt.

    `conversation` is the id of the conversation of which the row is one generation; empty: the row is a conversation.
    """

    ids: list[int]
    answer: list[int]
    learnt: list[int]
    conversation: str = ""


@dataclass(frozen=True)
class Chunk:
    """Some rows, one after the other.

    offsets int32 [rows + 1]: where each begins in ids int32, answer uint8 and learnt uint8 [tokens].
    learnt: None: all but the first tokens of each row.
    conversations: of each row; None: every row is one.
    known: int32 [rows]: how many these first ones are.
    """

    offsets: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int32]
    answer: npt.NDArray[np.uint8]
    learnt: npt.NDArray[np.uint8] | None
    conversations: SequenceOf[str] | None = None
    known: npt.NDArray[np.int32] | None = None

    @classmethod
    def of(cls, rows: SequenceOf[Sequence]) -> Chunk:
        """Return rows given as lists."""
        lengths = [len(row.ids) for row in rows]
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)

        def flat(name: str, kind: Any) -> npt.NDArray[Any]:
            return np.fromiter((value for row in rows for value in getattr(row, name)), kind, offsets[-1])

        several = any(row.conversation for row in rows)
        return cls(
            offsets,
            flat("ids", np.int32),
            flat("answer", np.uint8),
            flat("learnt", np.uint8),
            [row.conversation for row in rows] if several else None,
        )

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets).astype(np.int64)

    def all_learnt(self) -> npt.NDArray[np.uint8]:
        """Return of each token whether it is to be learnt, [tokens]."""
        if self.known is None:
            assert self.learnt is not None
            return self.learnt
        lengths = self.lengths
        known = np.minimum(self.known, lengths)
        return np.repeat(
            np.tile(np.array([0, 1], np.uint8), len(lengths)), np.stack((known, lengths - known), 1).ravel()
        )

    def learnt_of(self, row: int, here: slice) -> npt.NDArray[np.uint8]:
        """Return of each token of a row whether it is to be learnt; `here` is its place."""
        if self.known is None:
            assert self.learnt is not None
            return self.learnt[here]
        found = np.ones(here.stop - here.start, np.uint8)
        found[: self.known[row]] = 0
        return found

    def marked(self, mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Return whether each row has a mark from its third token on: nothing is predicted before."""
        late = mask.astype(bool)
        for place in (0, 1):
            early = self.offsets[:-1] + place
            late[early[early < self.offsets[1:]]] = False
        sums = np.concatenate(([0], np.cumsum(late)))
        return sums[self.offsets[1:]] > sums[self.offsets[:-1]]


class Sequences(SequenceOf[Sequence]):
    """Rows in chunks; a row is handed out as lists, or its parts as arrays that share the chunk's memory.

    Args:
        chunks: none of them empty.
        let_go: called behind every chunk where all are looked at, and after some rows: what lies in a file need not
            stay in memory. A look at a row can map two mebibytes of the file round it.

    Attributes:
        lengths: tokens of each row, int64 [rows].
    """

    def __init__(self, chunks: SequenceOf[Chunk], let_go: Callable[[], None] | None = None):
        self.chunks, self._let_go, self._looked = chunks, let_go, 0
        self.lengths: Ints = np.concatenate(
            [np.zeros(0, np.int64), *(chunk.lengths for chunk in self._scan())]
        )
        rows = np.cumsum([0, *(len(chunk.offsets) - 1 for chunk in chunks)])
        self._starts: list[int] = rows.tolist()  # of each chunk its first row

    @classmethod
    def of(cls, rows: Iterable[Sequence]) -> Sequences:
        """Return rows given as lists; what has the form already, as it is."""
        if isinstance(rows, Sequences):
            return rows
        given = list(rows)
        return cls([Chunk.of(given[start : start + ROWS]) for start in range(0, len(given), ROWS)])

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, i: int) -> Sequence: ...
    @overload
    def __getitem__(self, i: slice) -> Sequences: ...
    def __getitem__(self, i: int | slice) -> Sequence | Sequences:
        if isinstance(i, slice):
            return Sequences.of(self[row] for row in range(*i.indices(len(self))))
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = bisect_right(self._starts, i) - 1
        names = self.chunks[number].conversations
        conversation = "" if names is None else names[i - self._starts[number]]
        return Sequence(self.ids(i).tolist(), self.answer(i).tolist(), self.learnt(i).tolist(), conversation)

    def ids(self, i: int) -> npt.NDArray[np.int32]:
        """Return the tokens of row i, [tokens]."""
        chunk, _, here = self._at(i)
        return chunk.ids[here]

    def answer(self, i: int) -> npt.NDArray[np.uint8]:
        """Return of each token of row i whether it is part of an answer, [tokens]."""
        chunk, _, here = self._at(i)
        return chunk.answer[here]

    def learnt(self, i: int) -> npt.NDArray[np.uint8]:
        """Return of each token of row i whether it is to be learnt, [tokens]."""
        chunk, row, here = self._at(i)
        return chunk.learnt_of(row, here)

    def _at(self, i: int) -> tuple[Chunk, int, slice]:
        self._looked += 1
        if self._let_go and self._looked % LOOKS == 0:
            self._let_go()
        number = bisect_right(self._starts, i) - 1
        chunk, row = self.chunks[number], i - self._starts[number]
        return chunk, row, slice(int(chunk.offsets[row]), int(chunk.offsets[row + 1]))

    def _scan(self) -> Iterator[Chunk]:
        """Yield every chunk, and let go of it."""
        for chunk in self.chunks:
            yield chunk
            if self._let_go:
                self._let_go()

    @cached_property
    def teaches(self) -> npt.NDArray[np.bool_]:
        """Return whether each row has a token to predict that is to be learnt, [rows]."""
        return np.concatenate(
            [np.zeros(0, bool), *(chunk.marked(chunk.all_learnt()) for chunk in self._scan())]
        )

    @cached_property
    def answered(self) -> npt.NDArray[np.bool_]:
        """Return whether each row has a token to predict that is part of an answer, [rows]."""
        return np.concatenate([np.zeros(0, bool), *(chunk.marked(chunk.answer) for chunk in self._scan())])

    @cached_property
    def groups(self) -> Ints:
        """Return the number of each row's conversation, in the order in which they begin, [rows]."""
        if all(chunk.conversations is None for chunk in self.chunks):
            return np.arange(len(self))
        numbers: dict[str, int] = {}
        found, new = np.empty(len(self), np.int64), 0
        for i, name in enumerate(self._conversations()):
            number = numbers.get(name, new) if name else new
            if number == new:
                new += 1
                if name:
                    numbers[name] = number
            found[i] = number
        return found

    def _conversations(self) -> Iterator[str]:
        for chunk in self.chunks:
            yield from chunk.conversations or [""] * (len(chunk.offsets) - 1)

    def learnt_counts(self, rows: Ints, vocab_size: int) -> Ints:
        """Return how often each token is to be learnt in some rows, [vocab_size]."""
        chosen = np.zeros(len(self), bool)
        chosen[rows] = True
        counts = np.zeros(vocab_size, np.int64)
        for start, chunk in zip(self._starts, self._scan(), strict=False):
            of_rows = chosen[start : start + len(chunk.offsets) - 1]
            counted = chunk.all_learnt().astype(bool) & np.repeat(of_rows, chunk.lengths)
            counts += np.bincount(chunk.ids[counted], minlength=vocab_size)[:vocab_size]
        return counts

    @cached_property
    def digest(self) -> str:
        """Return the identity of all tokens, 16 hexadecimal digits."""
        state = hashlib.sha256(self.lengths.tobytes())
        for chunk in self._scan():
            state.update(np.ascontiguousarray(chunk.ids).data)
        return state.hexdigest()[:16]

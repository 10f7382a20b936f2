"""Judges many stored rows at once: which are text with nothing wrong, and what a flat row says of those.

Whatever else is there, a row with tools or with a fault of any kind, is told apart from them and looked at by itself
(`deepspec.guard.flatten`), which says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deepspec.answers.shards import OPTIONAL
from deepspec.features.lists import Lists

Flags = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
KNOWN = ("user", "assistant", "system", "developer")  # roles of text


@dataclass(frozen=True)
class Plain:
    """Rows of a batch.

    Attributes:
        fine: of each row whether what follows holds of it, bool [rows].
        columns: of the flat rows.
        turns: texts of all user turns, one row after the other.
        begins: where each row's begin in them, and the end of the last, [rows + 1].
    """

    fine: Flags
    columns: dict[str, Any]
    turns: list[str]
    begins: Ints

    def turns_of(self, row: int) -> list[str]:
        """Return the texts of a row's user turns."""
        return self.turns[self.begins[row] : self.begins[row + 1]]


def plain_rows(
    batch: pa.RecordBatch, stop_ids: frozenset[int], vocab_size: int, opening: Sequence[int]
) -> Plain | None:
    """Judge the rows of a batch; None where its columns have holes or not as many mask values as tokens.

    Args:
        stop_ids: of the target.
        opening: tokens that its template puts before every answer.
    """
    ids, mask = _numbers(batch, "input_ids"), _numbers(batch, "loss_mask")
    messages, reasons = batch.column("messages"), batch.column("finish_reasons")
    struct, ends = _inside(messages), _inside(reasons)
    role, content = (struct.field(name) for name in ("role", "content"))
    holes = any(part.null_count for part in (messages, reasons, struct, role, content, ends))
    if ids is None or mask is None or holes or not len(ends) or not len(role):
        return None
    if not np.array_equal(ids.offsets, mask.offsets) or not _within(mask.values, 2):
        return None
    if not _within(ids.values, vocab_size):
        return None
    rows, lengths = batch.num_rows, np.diff(ids.offsets)
    answers = _Answers.of(mask.values.astype(bool), ids.offsets)
    expected = _counts(reasons)
    fine = _filled(batch) & (answers.counts(rows) == expected)
    fine &= _ended_well(ids, answers, ends, reasons, stop_ids, opening)

    speakers = _counts(messages)
    row_of = np.repeat(np.arange(rows), speakers)
    said = {name: _flags(pc.equal(role, name)) for name in KNOWN}
    count = {name: np.bincount(row_of[flags], minlength=rows) for name, flags in said.items()}
    fine &= (
        (np.sum(list(count.values()), 0) == speakers) & (count["user"] > 0) & (count["assistant"] >= expected)
    )
    fine &= ~_given(batch, "chat")
    thought = np.zeros(rows, bool)
    thinking = _flags(pc.match_substring(content.filter(pa.array(said["assistant"])), "</think>"))
    thought[row_of[said["assistant"]][thinking]] = True
    starts = np.concatenate(([0], np.cumsum(speakers)))
    roles = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), role.cast(pa.string()))
    generation = _given(batch, "prompt")
    columns = {
        "id": batch.column("id").to_pylist(),
        "asked": _asked(batch, generation),
        "generation": generation,
        "target": batch.column("target").to_pylist(),
        "roles": pc.binary_join(roles, " ").to_pylist(),
        "last_role": role.take(pa.array(np.maximum(starts[1:] - 1, 0))).to_pylist(),
        "tokens": lengths,
        "answer_tokens": answers.tokens(rows),
        "truncated": _any(_flags(pc.equal(ends, "length")), expected),
        "logprob": _floats(batch, "logprob"),
        "surprise": _floats(batch, "surprise"),
        "source": batch.column("source").to_pylist(),
        "system": (count["system"] + count["developer"]) > 0,
        "thinks": thought,
    }
    turns = content.filter(pa.array(said["user"])).to_pylist()
    return Plain(fine, columns, turns, np.concatenate(([0], np.cumsum(count["user"]))))


@dataclass(frozen=True)
class _Answers:
    """Unbroken runs of masked tokens, as places in all tokens: [answers] each."""

    row: Ints
    starts: Ints
    ends: Ints

    @classmethod
    def of(cls, marks: Flags, offsets: Ints) -> _Answers:
        """Find the runs; none goes over the end of a row."""
        filled = np.diff(offsets) > 0
        before, behind = np.zeros(len(marks), bool), np.zeros(len(marks), bool)
        before[1:], behind[:-1] = marks[:-1], marks[1:]
        before[offsets[:-1][filled]] = False
        behind[offsets[1:][filled] - 1] = False
        starts = np.flatnonzero(marks > before)
        rows = np.searchsorted(offsets, starts, side="right") - 1
        return cls(rows, starts, np.flatnonzero(marks > behind) + 1)

    def counts(self, rows: int) -> Ints:
        return np.bincount(self.row, minlength=rows)

    def tokens(self, rows: int) -> Ints:
        return np.bincount(self.row, self.ends - self.starts, minlength=rows).astype(np.int64)


def _ended_well(
    ids: Lists,
    answers: _Answers,
    ends: pa.Array,
    reasons: pa.Array,
    stop_ids: frozenset[int],
    opening: Sequence[int],
) -> Flags:
    """Return of each row whether its answers start where the template opens one and end as their reasons say."""
    rows, counts = len(reasons), answers.counts(len(reasons))
    stops = np.zeros(len(ids.values), bool)
    for token in stop_ids:
        stops |= ids.values == token
    at = np.flatnonzero(stops)
    of = np.searchsorted(answers.starts, at, side="right") - 1
    inside = (of >= 0) & (at < answers.ends[of]) if len(answers.ends) else np.zeros(len(at), bool)
    stopped = np.bincount(of[inside], minlength=len(answers.starts))
    firsts = np.concatenate(([0], np.cumsum(counts)))[answers.row]
    begins = np.concatenate(([0], np.cumsum(_counts(reasons))))[answers.row]
    reason = np.minimum(begins + np.arange(len(answers.row)) - firsts, len(ends) - 1)
    ended, cut = (_flags(pc.equal(ends, name))[reason] for name in ("stop", "length"))
    good = (ended & (stopped == 1) & stops[answers.ends - 1]) | (cut & (stopped == 0))
    good &= answers.starts - ids.offsets[answers.row] >= len(opening)
    for place, token in enumerate(reversed(opening), start=1):
        good &= ids.values[np.maximum(answers.starts - place, 0)] == token
    return np.bincount(answers.row[~good], minlength=rows) == 0


def _numbers(batch: pa.RecordBatch, name: str) -> Lists | None:
    column = batch.column(name)
    return None if column.null_count or _inside(column).null_count else Lists.of(column)


def _within(values: npt.NDArray[Any], limit: int) -> bool:
    """Return whether all are from 0 to below a limit."""
    return not len(values) or bool(values.min() >= 0 and values.max() < limit)


def _inside(lists: pa.Array) -> pa.Array:
    """Return the values of a column of lists."""
    offsets = lists.offsets
    first, last = offsets[0].as_py(), offsets[-1].as_py()
    return lists.values.slice(first, last - first)


def _counts(lists: pa.Array) -> Ints:
    return np.diff(lists.offsets.to_numpy()).astype(np.int64)


def _flags(found: pa.Array) -> Flags:
    return found.fill_null(False).to_numpy(zero_copy_only=False)


def _any(flags: Flags, counts: Ints) -> npt.NDArray[np.float64]:
    """Return 1.0 of each list with a flag that is set, else 0.0."""
    row = np.repeat(np.arange(len(counts)), counts)
    return (np.bincount(row[flags], minlength=len(counts)) > 0).astype(np.float64)


def _filled(batch: pa.RecordBatch) -> Flags:
    """Return of each row whether no value that must be there is null, "" or []."""
    found = np.ones(batch.num_rows, bool)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name in OPTIONAL:
            continue
        found &= _flags(column.is_valid())
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            found &= _flags(pc.greater(pc.binary_length(column), 0))
        elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            found &= _flags(pc.greater(pc.list_value_length(column), 0))
    return found


def _given(batch: pa.RecordBatch, name: str) -> Flags:
    """Return of each row whether an optional text is there and not empty."""
    if name not in batch.schema.names:
        return np.zeros(batch.num_rows, bool)
    return _flags(pc.greater(pc.binary_length(batch.column(name)), 0))


def _asked(batch: pa.RecordBatch, generation: Flags) -> list[str]:
    ids = batch.column("id")
    if not generation.any():
        return ids.to_pylist()
    return pc.if_else(pa.array(generation), batch.column("prompt").cast(ids.type), ids).to_pylist()


def _floats(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.float64]:
    """Return an optional column of numbers; NaN where there is none."""
    if name not in batch.schema.names:
        return np.full(batch.num_rows, np.nan)
    return batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)

"""Read a distillation data set as token sequences, a few thousand rows at a time.

The rows are cut, marked and written to an Arrow file once, which is mapped into memory from then on: a second drafter,
a second process and a run that goes on read nothing of the data set.
"""

from __future__ import annotations

import json
import mmap
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepspec.errors import DeepSpecError
from deepspec.features.sequences import ROWS, Chunk, Sequences
from deepspec.files import digest, replacing
from deepspec.lineage import code_digest

_COLUMNS = 512  # compared at once for the common beginning


def read_sequences(
    directory: Path, max_length: int, supervise: str, work: Path | None = None
) -> tuple[Sequences, str]:
    """Read the conversations of a distillation data set, cut to `max_length`, and the data's digest.

    `supervise="answer"` learns the answers alone, `"all"` also the prompts: the target's law is as valid there. What
    all conversations begin with (the template, a system prompt) is never learnt, nor again what an earlier row of the
    same conversation begins with.

    Args:
        work: directory of the file that the rows are mapped from; None: they are held in memory.

    Raises:
        DeepSpecError: no data set there, or no token to learn from.
    """
    path = directory / "train.parquet"
    if not path.exists():
        raise DeepSpecError(f"{path}: no such data set; run the generate stage first")
    data_digest = json.loads((directory / "manifest.json").read_text())["digest"]
    if work is None:
        sequences = Sequences(list(_chunks(path, max_length, supervise)))
    else:
        state = path.stat()
        what = (data_digest, state.st_size, state.st_mtime_ns, max_length, supervise, code_digest(__name__))
        file = work / f"{digest(repr(what))}.arrow"
        if not file.exists():
            _write(file, _chunks(path, max_length, supervise))
        sequences = Sequences(*_mapped(file))
    if not sequences.teaches.any():
        raise DeepSpecError(f"{path}: no token to learn from in {len(sequences)} conversations")
    return sequences, data_digest


@dataclass(frozen=True)
class _Lists:
    """A column of lists: where each begins in `values`."""

    offsets: npt.NDArray[np.int64]
    values: npt.NDArray[Any]

    @classmethod
    def of(cls, column: Any) -> _Lists:
        offsets = column.offsets.to_numpy().astype(np.int64)
        values = column.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
        return cls(offsets - offsets[0], values)

    def cut(self, length: int) -> _Lists:
        """Return the first `length` values of each list."""
        lengths = np.diff(self.offsets)
        if lengths.max(initial=0) <= length:
            return self
        kept = np.concatenate(([0], np.cumsum(np.minimum(lengths, length))))
        return _Lists(kept, self.values[self.places() < length])

    def places(self) -> npt.NDArray[np.int64]:
        """Return of each value its place in its list."""
        return np.arange(self.offsets[-1]) - np.repeat(self.offsets[:-1], np.diff(self.offsets))

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


def _chunks(path: Path, max_length: int, supervise: str) -> Iterator[Chunk]:
    import pyarrow.parquet

    names = pyarrow.parquet.read_schema(path).names
    names = ["input_ids", "loss_mask", *(["prompt"] if "prompt" in names else [])]
    start = _common_start(path, max_length) if supervise == "all" else 0
    last: tuple[str | None, npt.NDArray[Any]] = (None, np.zeros(0, np.int32))  # the row before
    first = 0
    for batch in _batches(path, names):
        ids, mask = (_Lists.of(batch.column(name)).cut(max_length) for name in names[:2])
        if not np.array_equal(ids.offsets, mask.offsets):
            row = first + int(np.argmax(np.diff(ids.offsets) != np.diff(mask.offsets)))
            raise DeepSpecError(
                f"{path}: row {row} has not as many mask values as tokens; run generate again"
            )
        prompts = batch.column("prompt").to_pylist() if len(names) > 2 else [None] * batch.num_rows
        answer = mask.values.astype(np.uint8)
        learnt = answer
        if supervise == "all":
            known = _known(ids, prompts, start, last)
            learnt = (ids.places() >= np.repeat(known, np.diff(ids.offsets))).astype(np.uint8)
        last = prompts[-1], ids[batch.num_rows - 1]
        first += batch.num_rows
        yield Chunk(
            ids.offsets.astype(np.int32),
            ids.values.astype(np.int32),
            answer,
            learnt,
            [prompt or "" for prompt in prompts] if any(prompts) else None,
        )


def _batches(path: Path, names: list[str]) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:  # else all that was read is kept
        yield from (batch for batch in file.iter_batches(ROWS, columns=names) if batch.num_rows)


def _known(
    ids: _Lists, prompts: list[str | None], start: int, last: tuple[str | None, npt.NDArray[Any]]
) -> npt.NDArray[np.int64]:
    """Return how many first tokens of each row are not learnt: those of all, or of the row of its conversation before.

    Args:
        start: tokens that all rows begin with.
        last: conversation and tokens of the row before the first one.
    """
    known = np.full(len(prompts), start)
    for row, prompt in enumerate(prompts):
        before, tokens = (prompts[row - 1], ids[row - 1]) if row else last
        if prompt and prompt == before:
            known[row] = max(start, _shared(tokens, ids[row]))
    return known


def _shared(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> int:
    """Return how many first values two arrays share."""
    n = min(len(one), len(other))
    same = one[:n] == other[:n]
    return n if same.all() else int(np.argmin(same))


def _common_start(path: Path, max_length: int) -> int:
    """Return how many tokens all rows begin with; 0 of a single row."""
    import pyarrow.parquet

    if pyarrow.parquet.read_metadata(path).num_rows < 2:
        return 0
    common: npt.NDArray[Any] | None = None
    for batch in _batches(path, ["input_ids"]):
        ids = _Lists.of(batch.column("input_ids"))
        common = ids[0][:max_length] if common is None else common
        common = common[: np.diff(ids.offsets).min()]
        for at in range(0, len(common), _COLUMNS):
            part = common[at : at + _COLUMNS]
            rows = ids.values[ids.offsets[:-1, None] + np.arange(at, at + len(part))]  # [rows, part]
            same = (rows == part).all(0)
            if not same.all():
                common = common[: at + int(np.argmin(same))]
                break
        if not len(common):
            break
    return 0 if common is None else len(common)


def _write(file: Path, chunks: Iterator[Chunk]) -> None:
    """Write chunks as the record batches of an Arrow file."""
    import pyarrow as pa

    marks = pa.list_(pa.uint8())
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("answer", marks),
            ("learnt", marks),
            ("conversation", pa.string()),
        ]
    )
    with replacing(file) as scratch, pa.ipc.new_file(str(scratch), schema) as writer:
        for chunk in chunks:
            parts = (chunk.ids, chunk.answer, chunk.learnt)
            offsets = pa.array(chunk.offsets)
            columns = [pa.ListArray.from_arrays(offsets, pa.array(part)) for part in parts]
            rows = len(chunk.offsets) - 1
            names = [None] * rows if chunk.conversations is None else list(chunk.conversations)
            writer.write_batch(pa.record_batch([*columns, pa.array(names, pa.string())], schema=schema))


def _mapped(file: Path) -> tuple[list[Chunk], Callable[[], None]]:
    """Return the chunks of a file that `_write` wrote, in memory that is the file's, and what lets go of its pages."""
    import pyarrow as pa

    with file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    reader = pa.ipc.open_file(pa.py_buffer(pages))
    found = []
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        ids, answer, learnt = (batch.column(name) for name in ("input_ids", "answer", "learnt"))
        names = batch.column("conversation")
        found.append(
            Chunk(
                ids.offsets.to_numpy(),
                ids.values.to_numpy(),
                answer.values.to_numpy(),
                learnt.values.to_numpy(),
                names.to_pylist() if names.null_count < batch.num_rows else None,
            )
        )
        _let_go(pages)
    return found, partial(_let_go, pages)


def _let_go(pages: mmap.mmap) -> None:
    """Take a file's pages off this process; they are read from the file again when they are looked at."""
    if hasattr(mmap, "MADV_DONTNEED") and sys.platform == "linux":
        pages.madvise(mmap.MADV_DONTNEED)

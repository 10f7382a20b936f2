"""Read a distillation data set as token sequences, a few thousand rows at a time.

The rows are cut, marked and written to an Arrow file once, which is mapped into memory from then on: a second drafter,
a second process and a run that goes on read nothing of the data set.
"""

from __future__ import annotations

import json
import mmap
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepspec.errors import DeepSpecError
from deepspec.features.lists import Lists
from deepspec.features.sequences import ROWS, Chunk, Sequences
from deepspec.files import digest, replacing
from deepspec.lineage import code_digest

_COLUMNS = 512  # compared at once for the common beginning
_START = "start"  # in the metadata of the file's last batch: tokens that all rows begin with


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
        start = _Start()
        chunks = list(_chunks(path, max_length, supervise, start))
        sequences = Sequences([_begun(chunk, start.length) for chunk in chunks])
    else:
        state = path.stat()
        what = (data_digest, state.st_size, state.st_mtime_ns, max_length, supervise, code_digest(__name__))
        file = work / f"{digest(repr(what))}.arrow"
        if not file.exists():
            start = _Start()
            _write(file, _chunks(path, max_length, supervise, start), start)
        sequences = Sequences(*_mapped(file))
    if not sequences.teaches.any():
        raise DeepSpecError(f"{path}: no token to learn from in {len(sequences)} conversations")
    return sequences, data_digest


class _Start:
    """What all rows begin with, narrowed as they are read."""

    def __init__(self) -> None:
        self.rows = 0
        self.common: npt.NDArray[Any] = np.zeros(0, np.int32)

    @property
    def length(self) -> int:
        """Return how many tokens all rows begin with; 0 of a single row."""
        return len(self.common) if self.rows > 1 else 0

    def narrow(self, ids: Lists) -> None:
        common = self.common if self.rows else ids[0]
        self.rows += len(ids.offsets) - 1
        common = common[: np.diff(ids.offsets).min()]
        for at in range(0, len(common), _COLUMNS):
            part = common[at : at + _COLUMNS]
            same = (ids.values[ids.offsets[:-1, None] + np.arange(at, at + len(part))] == part).all(0)
            if not same.all():
                common = common[: at + int(np.argmin(same))]
                break
        self.common = common.copy()


def _chunks(path: Path, max_length: int, supervise: str, start: _Start) -> Iterator[Chunk]:
    """Yield the rows; what all of them begin with is known, in `start`, when the last was taken."""
    import pyarrow.parquet

    names = pyarrow.parquet.read_schema(path).names
    names = ["input_ids", "loss_mask", *(["prompt"] if "prompt" in names else [])]
    last: tuple[str | None, npt.NDArray[Any]] = (None, np.zeros(0, np.int32))  # the row before
    first = 0
    for batch in _batches(path, names):
        ids, mask = (Lists.of(batch.column(name)).cut(max_length) for name in names[:2])
        if not np.array_equal(ids.offsets, mask.offsets):
            row = first + int(np.argmax(np.diff(ids.offsets) != np.diff(mask.offsets)))
            raise DeepSpecError(
                f"{path}: row {row} has not as many mask values as tokens; run generate again"
            )
        prompts = batch.column("prompt").to_pylist() if len(names) > 2 else [None] * batch.num_rows
        known = None
        if supervise == "all":
            start.narrow(ids)
            known = _known(ids, prompts, last)
        last = prompts[-1], ids[batch.num_rows - 1]
        first += batch.num_rows
        answer = mask.values.astype(np.uint8, copy=False)
        yield Chunk(
            ids.offsets.astype(np.int32),
            ids.values.astype(np.int32, copy=False),
            answer,
            answer if known is None else None,
            [prompt or "" for prompt in prompts] if any(prompts) else None,
            known,
        )


def _begun(chunk: Chunk, start: int) -> Chunk:
    """Return a chunk of which what all rows begin with is known, where that is never learnt."""
    return chunk if chunk.known is None else replace(chunk, known=np.maximum(chunk.known, start))


def _batches(path: Path, names: list[str]) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:  # else all that was read is kept
        yield from (batch for batch in file.iter_batches(ROWS, columns=names) if batch.num_rows)


def _known(
    ids: Lists, prompts: list[str | None], last: tuple[str | None, npt.NDArray[Any]]
) -> npt.NDArray[np.int32]:
    """Return how many first tokens of each row are those of the row of its conversation before.

    Args:
        last: conversation and tokens of the row before the first one.
    """
    known = np.zeros(len(prompts), np.int32)
    if any(prompts):
        for row, prompt in enumerate(prompts):
            before, tokens = (prompts[row - 1], ids[row - 1]) if row else last
            if prompt and prompt == before:
                known[row] = _shared(tokens, ids[row])
    return known


def _shared(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> int:
    """Return how many first values two arrays share."""
    n = min(len(one), len(other))
    same = one[:n] == other[:n]
    return n if same.all() else int(np.argmin(same))


def _write(file: Path, chunks: Iterator[Chunk], start: _Start) -> None:
    """Write chunks as the record batches of an Arrow file; an empty one behind them says what all rows begin with."""
    import pyarrow as pa

    marks = pa.list_(pa.uint8())
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("answer", marks),
            ("known", pa.int32()),
            ("conversation", pa.string()),
        ]
    )
    with replacing(file) as scratch, pa.ipc.new_file(str(scratch), schema) as writer:
        for chunk in chunks:
            offsets, rows = pa.array(chunk.offsets), len(chunk.offsets) - 1
            lists = [pa.ListArray.from_arrays(offsets, pa.array(part)) for part in (chunk.ids, chunk.answer)]
            known = pa.nulls(rows, pa.int32()) if chunk.known is None else pa.array(chunk.known)
            names = [None] * rows if chunk.conversations is None else list(chunk.conversations)
            writer.write_batch(pa.record_batch([*lists, known, pa.array(names, pa.string())], schema=schema))
        writer.write_batch(
            pa.RecordBatch.from_pylist([], schema), custom_metadata={_START: str(start.length)}
        )


def _mapped(file: Path) -> tuple[list[Chunk], Callable[[], None]]:
    """Return the chunks of a file that `_write` wrote, in memory that is the file's, and what lets go of its pages."""
    import pyarrow as pa

    with file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    reader = pa.ipc.open_file(pa.py_buffer(pages))
    last = reader.num_record_batches - 1
    start = int(reader.get_batch_with_custom_metadata(last).custom_metadata[_START])
    found = []
    for number in range(last):
        batch = reader.get_batch(number)
        ids, answer, known, names = (batch.column(name) for name in batch.schema.names)
        marks = answer.values.to_numpy()
        whole = known.null_count > 0
        chunk = Chunk(
            ids.offsets.to_numpy(),
            ids.values.to_numpy(),
            marks,
            marks if whole else None,
            names.to_pylist() if names.null_count < batch.num_rows else None,
            None if whole else known.to_numpy(),
        )
        found.append(_begun(chunk, start))
        _let_go(pages)
    return found, partial(_let_go, pages)


def _let_go(pages: mmap.mmap) -> None:
    """Take a file's pages off this process; they are read from the file again when they are looked at."""
    if hasattr(mmap, "MADV_DONTNEED") and sys.platform == "linux":
        pages.madvise(mmap.MADV_DONTNEED)

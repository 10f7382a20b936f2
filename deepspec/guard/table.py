"""The flat table of a data set: all cores share the row groups of its file, and of a row it has a few hundred bytes.

Where all rows are sampled each is flattened by itself. Of a larger set those with nothing wrong are told apart many at
once (`deepspec.guard.plain`), and what they ask is compared by numbers; the table is the same but for what is sampled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas
import pyarrow as pa
from pyarrow import parquet

from deepspec.guard.flatten import Flattener, prompt_problem, short_key
from deepspec.guard.plain import Plain, plain_rows
from deepspec.messages.prompts import Prompts
from deepspec.parallel import ALONE, ordered_map
from deepspec.progress import Progress
from deepspec.prompts.filters import chat_key
from deepspec.prompts.words import Numbers, listed, words_of

BATCH_ROWS = 512
NO_FAULT = ("missing", "prompt_problem", "mask_problem", "template_problem", "tool_problem", "overlap")
FAULTLESS: dict[str, Any] = dict.fromkeys((*NO_FAULT, "prompt", "script")) | {
    "repetition": np.nan,
    "tools": False,
    "calls": False,
}
Columns = dict[str, list[Any]]


def flat_table(path: Path, sample: npt.NDArray[np.bool_], flattener: Flattener) -> pandas.DataFrame:
    """Return the flat rows of a data set, of which a few are held as stored at a time.

    Args:
        sample: of each row whether `deepspec.guard.flatten.SAMPLED` is found too, [rows].

    Returns:
        A table with a column `sampled` besides those of a flat row.
    """
    metadata = parquet.read_metadata(path)
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    starts = np.cumsum([0, *sizes])
    flatten = _by_row if sample.all() else _together

    def group(number: int) -> pandas.DataFrame:
        columns: Columns = {}
        row = int(starts[number])
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[number], use_threads=False):
                whole = sample[row : row + len(batch)]
                row += len(batch)
                for name, values in (flatten(batch, whole, flattener) | {"sampled": whole.tolist()}).items():
                    columns.setdefault(name, []).extend(values)
        return pandas.DataFrame(columns)

    parts: list[pandas.DataFrame] = []
    with Progress("validation", sum(sizes), shown=len(sizes) > ALONE) as progress:
        for part in ordered_map(group, range(len(sizes))):
            parts += [part] if len(part) else []
            progress.advance(len(part))
    table = pandas.concat(parts, ignore_index=True) if parts else pandas.DataFrame()
    if len(table):
        again = table["generation"] & table["asked"].duplicated()
        if "key" in table:
            table["prompt"] = _keys(table, again, flattener)
            del table["key"]
        table.loc[again, "prompt"] = None
    return table


def _by_row(batch: pa.RecordBatch, whole: npt.NDArray[np.bool_], flattener: Flattener) -> Columns:
    columns: Columns = {}
    for row, sampled in zip(batch.to_pylist(), whole.tolist(), strict=True):
        for name, value in flattener.flat(row, sampled).items():
            columns.setdefault(name, []).append(value)
    return columns


def _together(batch: pa.RecordBatch, whole: npt.NDArray[np.bool_], flattener: Flattener) -> Columns:
    """Flatten a batch; its column `key` has a number of what each row asks."""
    plain = plain_rows(batch, flattener.stop_ids, flattener.target.vocab_size, flattener.opening)
    if plain is None:
        asked = [flattener.key(row) for row in batch.to_pylist()]
        return _by_row(batch, whole, flattener) | {"key": _numbers(asked).tolist()}
    fine = plain.fine & ~whole
    asks: dict[int, str] = {}  # keys of rows that ask more than their own user turns, or are not fine
    for row in np.flatnonzero(fine).tolist():
        asked, turns = plain.columns["asked"][row], plain.turns_of(row)
        if _only_asks(flattener, asked, plain.columns["source"][row], turns):
            continue
        prompt = flattener.prompts.get(asked)
        fine[row] = prompt_problem(prompt, turns, None) is None
        if prompt is not None and fine[row]:
            asks[row] = chat_key(prompt.chat)
    columns, keys = _columns(plain, flattener)
    others = np.flatnonzero(~fine).tolist()
    for row, stored in zip(others, batch.filter(pa.array(~fine)).to_pylist(), strict=True):
        asks[row] = flattener.key(stored)
        for name, value in flattener.flat(stored, bool(whole[row])).items():
            columns[name][row] = value
    keys[list(asks)] = _numbers(list(asks.values()))
    return columns | {"key": keys.tolist()}


def _only_asks(flattener: Flattener, asked: str, source: str, turns: list[str]) -> bool:
    """Return whether a prompt is quickly seen to be these user turns and nothing else."""
    prompts = flattener.prompts
    return isinstance(prompts, Prompts) and prompts.written_as(asked, source, turns)


def _columns(plain: Plain, flattener: Flattener) -> tuple[Columns, Numbers]:
    """Return the columns as they are of rows that are fine, and a number of each row's user turns."""
    columns: Columns = {name: [value] * len(plain.fine) for name, value in FAULTLESS.items()}
    for name, values in plain.columns.items():
        columns[name] = values if isinstance(values, list) else values.tolist()
    texts = words_of(plain.turns)
    suspects = np.flatnonzero(flattener.overlap.suspects(texts))
    for row in np.unique(np.searchsorted(plain.begins, suspects, side="right") - 1).tolist():
        hits = map(flattener.overlap.hits, plain.turns_of(row))
        columns["overlap"][row] = next(filter(None, hits), None)
    return columns, listed(listed(texts.numbers, texts.offsets), plain.begins)


def _numbers(keys: list[str]) -> Numbers:
    """Return a number of each key, that of user turns with the same words in its lines."""
    lines = [key.split("\n") for key in keys]
    texts = words_of([line for of in lines for line in of])
    return listed(listed(texts.numbers, texts.offsets), np.cumsum([0, *map(len, lines)]))


def _keys(table: pandas.DataFrame, again: pandas.Series, flattener: Flattener) -> list[str]:
    """Return what each row asks: a text where another row has the same number, else the number."""
    found, texts, asked = (table[name].tolist() for name in ("key", "prompt", "asked"))
    repeated = table["key"][~again].duplicated(keep=False)
    suspects = set(repeated.index[repeated])
    for row, number in enumerate(found):
        if row not in suspects:
            found[row] = str(number)
        elif isinstance(texts[row], str):  # of a row that was looked at by itself
            found[row] = texts[row]
        else:
            prompt = flattener.prompts.get(asked[row])
            found[row] = short_key(chat_key(prompt.chat)) if prompt else str(number)
    return found

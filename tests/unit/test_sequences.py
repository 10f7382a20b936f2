"""Rows in flat arrays, mapped from a file: what they are as lists, whatever the cuts between chunks."""

from __future__ import annotations

import json
import random
from os.path import commonprefix
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from deepspec.errors import DeepSpecError
from deepspec.features import read
from deepspec.features.read import read_sequences
from deepspec.features.sequences import Chunk, Sequence, Sequences

ROWS = 61


def rows_of(several: bool) -> list[dict]:
    """Rows that begin alike; of some conversations several rows, the later one of which has the earlier's tokens."""
    rng = random.Random(0)
    rows: list[dict] = []
    while len(rows) < ROWS:
        ids = [7, 8, 9] + [rng.randrange(5, 40) for _ in range(rng.randrange(4, 30))]
        name = f"c{len(rows)}" if several and rng.random() < 0.6 else None
        for _ in range(rng.randrange(1, 4) if name else 1):
            mask = [int(i > 4 and rng.random() < 0.7) for i in range(len(ids))]
            rows.append({"input_ids": list(ids), "loss_mask": mask, "prompt": name})
            ids = ids[: rng.randrange(5, len(ids) + 1)] + [rng.randrange(5, 40) for _ in range(9)]
    return rows[:ROWS]


def write(directory: Path, rows: list[dict], several: bool = True, row_group: int = 16) -> Path:
    directory.mkdir(exist_ok=True)
    columns = {name: [row[name] for row in rows] for name in ("input_ids", "loss_mask")}
    columns |= {"prompt": [row["prompt"] for row in rows]} if several else {}
    pyarrow.parquet.write_table(pyarrow.table(columns), directory / "train.parquet", row_group_size=row_group)
    (directory / "manifest.json").write_text(json.dumps({"digest": "d"}))
    return directory


def as_lists(rows: list[dict], length: int, supervise: str) -> list[Sequence]:
    """The same by lists of Python's, row by row."""
    everything = [row["input_ids"][:length] for row in rows]
    start = len(commonprefix(everything))
    found: list[Sequence] = []
    for row, ids in zip(rows, everything, strict=True):
        answer, name, known = row["loss_mask"][:length], row["prompt"] or "", start
        if name and found and found[-1].conversation == name:
            known = max(start, len(commonprefix([found[-1].ids, ids])))
        learnt = [0] * known + [1] * (len(ids) - known) if supervise == "all" else answer
        found.append(Sequence(ids, answer, learnt, name))
    return found


@pytest.mark.parametrize("work", [None, "work"])
@pytest.mark.parametrize("supervise", ["all", "answer"])
@pytest.mark.parametrize(("several", "length"), [(True, 512), (True, 11), (False, 20)])
def test_rows_are_what_they_are_as_lists(tmp_path, monkeypatch, work, supervise, several, length):
    monkeypatch.setattr(read, "ROWS", 7)  # chunks that end within conversations
    monkeypatch.setattr(read, "_COLUMNS", 2)
    rows = rows_of(several)
    data = write(tmp_path / "data", rows, several)
    found, digest = read_sequences(data, length, supervise, work and tmp_path / work)
    expected = as_lists(rows, length, supervise)
    assert digest == "d" and len(found.chunks) > 5
    assert list(found) == expected
    assert found.lengths.tolist() == [len(row.ids) for row in expected]
    assert found.teaches.tolist() == [any(row.learnt[2:]) for row in expected]
    assert found.answered.tolist() == [any(row.answer[2:]) for row in expected]
    first = {
        name: i
        for i, name in reversed(list(enumerate(row.conversation or i for i, row in enumerate(expected))))
    }
    order = {name: number for number, name in enumerate(sorted(first, key=first.__getitem__))}
    assert found.groups.tolist() == [order[row.conversation or i] for i, row in enumerate(expected)]
    some = np.array([3, 4, 20, 60])
    counted = [t for i in some for t, x in zip(expected[i].ids, expected[i].learnt, strict=True) if x]
    assert found.learnt_counts(some, 41).tolist() == np.bincount(counted, minlength=41).tolist()
    assert Sequences.of(expected).digest == found.digest


def test_the_file_is_written_once_and_again_for_other_data(tmp_path, monkeypatch):
    rows = rows_of(several=True)
    data, work = write(tmp_path / "data", rows), tmp_path / "work"
    first, _ = read_sequences(data, 64, "all", work)
    monkeypatch.setattr(read, "_chunks", None)
    again, _ = read_sequences(data, 64, "all", work)
    assert again.digest == first.digest and len(list(work.iterdir())) == 1
    monkeypatch.undo()
    write(tmp_path / "data", rows[:-1])
    other, _ = read_sequences(data, 64, "all", work)
    assert len(other) == ROWS - 1 and len(list(work.iterdir())) == 2


def test_a_part_of_the_rows_is_again_rows():
    rows = [Sequence([1, 2, 3 + i], [0, 0, 1], [1, 1, 1]) for i in range(10)]
    assert list(Sequences.of(rows)[2:5]) == rows[2:5]
    with pytest.raises(IndexError):
        Sequences.of(rows)[10]


def test_a_mask_of_another_length_is_named(tmp_path):
    rows = rows_of(several=True)
    rows[9]["loss_mask"] = rows[9]["loss_mask"][:-1]
    with pytest.raises(DeepSpecError, match="row 9 has not as many mask values as tokens"):
        read_sequences(write(tmp_path / "data", rows), 64, "all")


def test_short_rows_have_no_late_marks():
    marks = np.array([1, 1, 1, 1, 0, 1, 1, 1, 0], np.uint8)
    chunk = Chunk(np.array([0, 0, 1, 3, 5, 9], np.int32), np.zeros(9, np.int32), marks, marks)
    assert chunk.marked(marks).tolist() == [False, False, False, False, True]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells resident memory")
def test_what_looks_at_all_rows_holds_none_of_the_file(tmp_path):
    rows = [{"input_ids": [7, *range(9, 2008)], "loss_mask": [0, *[1] * 1999], "prompt": None}] * 4000
    write(tmp_path / "data", rows, several=False, row_group=500)
    read_sequences(tmp_path / "data", 4096, "answer", tmp_path / "work")
    before = resident("RssFile")
    sequences, _ = read_sequences(tmp_path / "data", 4096, "answer", tmp_path / "work")
    counts = sequences.learnt_counts(np.arange(4000), 4096)
    assert counts[10] == 4000 and len(sequences.digest) == 16 and sequences.answered.all()
    (file,) = (tmp_path / "work").glob("*.arrow")
    assert file.stat().st_size > 39e6
    assert resident("RssFile") < before + 10e6


def resident(name: str) -> int:
    """Return a figure of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))

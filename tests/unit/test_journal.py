"""Finished work survives a kill."""

from __future__ import annotations

import pytest

from deepspec.journal import Journal, WorkLog, read_journal


def test_results_are_there_after_reopening(tmp_path):
    log = WorkLog(tmp_path / "sub/log.jsonl")
    log.add("a", {"n": 1})
    log.add("b", [2.5])
    again = WorkLog(tmp_path / "sub/log.jsonl")
    assert again.get("a") == {"n": 1}
    assert again.get("b") == [2.5]
    assert again.get("c") is None


def test_a_half_written_last_line_is_dropped_and_written_anew(tmp_path):
    path = tmp_path / "log.jsonl"
    log = WorkLog(path)
    log.add("a", 1)
    log.add("b", 2)
    log.close()
    path.write_bytes(path.read_bytes()[:-5])
    again = WorkLog(path)
    assert again.get("a") == 1
    assert again.get("b") is None
    again.add("b", 3)
    again.close()
    assert [WorkLog(path).get(key) for key in "ab"] == [1, 3]


@pytest.mark.parametrize("half", [1, (1 << 16) - 1, 1 << 16, 200_000])
@pytest.mark.parametrize("whole", [b"", b'{"n": 1}\n', b'{"n": "' + b"x" * 70_000 + b'"}\n'])
def test_a_half_line_of_any_length_is_dropped(tmp_path, whole, half):
    path = tmp_path / "log.jsonl"
    path.write_bytes(whole + b"y" * half)
    Journal(path).close()
    assert path.read_bytes() == whole


def test_removed_log_leaves_nothing(tmp_path):
    log = WorkLog(tmp_path / "log.jsonl")
    log.add("a", 1)
    log.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fsync", [False, True])
def test_a_journal_goes_on_after_a_kill_and_its_bytes_are_plain_json_lines(tmp_path, fsync):
    path = tmp_path / "sub/journal.jsonl"
    with Journal(path, fsync) as journal:
        journal.append({"id": "a", "text": "τ"})
    whole = path.read_bytes()
    assert whole == b'{"id": "a", "text": "\\u03c4"}\n'
    path.write_bytes(whole + b'{"id": "b"')
    assert list(read_journal(path)) == [(0, {"id": "a", "text": "τ"})], "reading changes nothing"
    with Journal(path, fsync) as journal:
        journal.append({"id": "c"})
    assert path.read_bytes() == whole + b'{"id": "c"}\n'
    assert [offset for offset, _ in read_journal(path)] == [0, len(whole)]


def test_a_damaged_line_is_work_to_be_done_and_costs_no_other(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"id": "a"}\n\x00\x00\n[1]\n{"id": "b"}\n')
    assert [entry["id"] for _, entry in read_journal(path)] == ["a", "b"]
    assert list(read_journal(tmp_path / "absent")) == []

"""Finished work survives a kill."""

from __future__ import annotations

from deepspec.journal import WorkLog


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


def test_removed_log_leaves_nothing(tmp_path):
    log = WorkLog(tmp_path / "log.jsonl")
    log.add("a", 1)
    log.remove()
    assert list(tmp_path.iterdir()) == []

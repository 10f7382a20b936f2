"""A file is either whole or as it was."""

from __future__ import annotations

import hashlib
import json

import pytest

from deepspec.files import digest, file_digest, replacing, write_json, write_text


def test_written_file_is_whole_and_leaves_no_scratch(tmp_path):
    write_text(tmp_path / "a/b.txt", "τ = 2\n")
    assert (tmp_path / "a/b.txt").read_text(encoding="utf-8") == "τ = 2\n"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_failure_keeps_the_old_file_and_leaves_no_scratch(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail_half_way():
        with replacing(path) as scratch:
            scratch.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail_half_way()
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_directory_takes_the_place_of_an_older_one_entirely(tmp_path):
    for name in ("first", "second"):
        with replacing(tmp_path / "out") as scratch:
            scratch.mkdir()
            (scratch / name).write_text(name)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_an_earlier_process_left_half_done_is_overwritten(tmp_path):
    with replacing(tmp_path / "out") as scratch:
        pass_name = scratch
        scratch.mkdir()
    pass_name.mkdir()
    (pass_name / "stale").write_text("stale")
    with replacing(tmp_path / "out") as scratch:
        assert not scratch.exists()
        scratch.mkdir()
    assert list((tmp_path / "out").iterdir()) == []


def test_digests_are_sha256(tmp_path):
    write_text(tmp_path / "a", "abc")
    whole = hashlib.sha256(b"abc").hexdigest()
    assert file_digest(tmp_path / "a") == whole
    assert digest("abc") == digest(b"abc") == whole[:16]

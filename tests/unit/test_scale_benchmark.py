"""The benchmark of scale: its data is what it says, a side says what it took, and mistakes take one line."""

from __future__ import annotations

import json

import pytest

from benchmarks import scale, scale_side
from benchmarks.bad_rows import KINDS
from benchmarks.scale_data import PREFIX, write_data
from deepspec.errors import DeepSpecError
from deepspec.features.read import read_sequences
from deepspec.journal import WorkLog


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("scale") / "data"
    write_data(path, 200, 60)
    return path


def side(data, part, capsys):
    """In this process: another would import PyTorch again."""
    scale_side.main(part, str(data), "120", "3")
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_side_makes_the_same_batches_again_and_says_what_they_took(data, capsys):
    first, second = (side(data, "training", capsys) for _ in range(2))
    assert first["result"] == second["result"]
    assert set(first["phases"]) == {"read", "read again", "vocabulary", "sampler", "first batch", "batches"}
    assert all(of["seconds"] > 0 and of["peak_bytes"] > 1 << 20 for of in first["phases"].values())
    text = scale.table({"training": {"here": [first, first], "before": [second, second]}}, 200)
    assert (
        text.count("here: warm start to the first batch") == text.count("before: read to the last batch") == 1
    )
    assert text.count("×") == len(first["phases"]) + 2, "this side alone has ratios"


def test_the_data_begins_alike_and_has_answers(data):
    sequences, _ = read_sequences(data, 120, "all")
    assert len(sequences) == 200 and sequences.answered.all()
    assert sequences.lengths.min() >= 45 and sequences.lengths.max() <= 75
    assert [row.learnt.index(1) for row in sequences][:5] == [PREFIX] * 5


def test_the_data_is_fit_to_train_on(data, capsys):
    assert side(data, "validation", capsys)["result"] == "passed"


def test_every_row_of_the_prompt_file_is_accounted_for(data, capsys):
    said = side(data, "prompts", capsys)["result"]
    assert said == "198 of 200 rows accepted, 2 of 2 kinds cannot be used, 0 rejected, 0 lost"
    assert len(KINDS) == 20


def test_shards_are_merged_whole(data, capsys):
    assert side(data, "merge", capsys)["result"] == "200 of 200 rows in 1 row groups"


def test_what_was_measured_is_not_measured_again_and_sides_take_turns(tmp_path, monkeypatch):
    asked = []

    def measure(checkout, part, *_):
        asked.append((part, checkout))
        return {"phases": {}, "result": "passed"}

    monkeypatch.setattr(scale, "measure", measure)
    sides = {"here": "a", "before": "b"}
    log = WorkLog(tmp_path / "log.jsonl")
    scale.collect(sides, ["validation", "prompts"], 2, log, tmp_path, 120, 3)
    first, second = [("validation", "a"), ("validation", "b")], [("validation", "b"), ("validation", "a")]
    assert asked == [*first, ("prompts", "a"), *second, ("prompts", "a")]
    scale.collect(sides, ["validation"], 2, log, tmp_path, 120, 3)
    assert len(asked) == 6


def test_sides_that_make_other_batches_are_no_comparison(tmp_path, monkeypatch):
    log = WorkLog(tmp_path / "log.jsonl")
    monkeypatch.setattr(scale, "measure", lambda checkout, *_: {"phases": {}, "result": checkout})
    scale.collect({"here": "a", "before": "b"}, ["training"], 1, log, tmp_path, 120, 3)
    with pytest.raises(DeepSpecError, match="other batches of the same data"):
        scale.gathered(log, ["here", "before"], 1)
    monkeypatch.setattr(scale, "code_digest", lambda *names: "another")
    assert scale.gathered(log, ["here", "before"], 1) == {}, "what other code took says nothing"


def test_a_folder_that_is_no_checkout_is_named(tmp_path, capsys):
    assert scale.main(["--rows", "10", "--beside", str(tmp_path)]) == 2
    assert "no checkout of this project there" in capsys.readouterr().err

"""The benchmark of scale: its data can be learnt from, each side says what it took, and mistakes take one line."""

from __future__ import annotations

from pathlib import Path

from benchmarks.scale import PREFIX, main, measure, table, write_data
from deepspec.features.read import read_sequences

ROOT = Path(__file__).parents[2]


def test_a_side_makes_the_same_batches_again_and_says_what_they_took(tmp_path):
    write_data(tmp_path / "data", 200, 60)
    first, second = (measure(ROOT, tmp_path / "data", 120, 3) for _ in range(2))
    assert first["digest"] == second["digest"]
    assert set(first["phases"]) == {"read", "read again", "vocabulary", "sampler", "first batch", "batches"}
    assert all(of["seconds"] > 0 and of["peak_bytes"] > 1 << 20 for of in first["phases"].values())
    text = table({"here": first, "before": second}, 200)
    assert text.count("| 1.0× |") >= len(first["phases"])


def test_the_data_begins_alike_and_has_answers(tmp_path):
    write_data(tmp_path / "data", 100, 60)
    sequences, _ = read_sequences(tmp_path / "data", 120, "all")
    assert len(sequences) == 100 and sequences.answered.all()
    assert sequences.lengths.min() >= 45 and sequences.lengths.max() <= 75
    assert [row.learnt.index(1) for row in sequences][:5] == [PREFIX] * 5


def test_a_folder_that_is_no_checkout_is_named(tmp_path, capsys):
    assert main(["--rows", "10", "--beside", str(tmp_path)]) == 2
    assert "no checkout of this project there" in capsys.readouterr().err

"""The benchmark of scale: its data can be learnt from, each side says what it took, and mistakes take one line."""

from __future__ import annotations

import json

from benchmarks import scale_side
from benchmarks.scale import PREFIX, main, table, write_data
from deepspec.features.read import read_sequences


def test_a_side_makes_the_same_batches_again_and_says_what_they_took(tmp_path, capsys):
    write_data(tmp_path / "data", 200, 60)
    found = []
    for _ in range(2):  # in this process: another would import PyTorch again
        scale_side.main(str(tmp_path / "data"), "120", "3")
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    first, second = found
    assert first["digest"] == second["digest"]
    assert set(first["phases"]) == {"read", "read again", "vocabulary", "sampler", "first batch", "batches"}
    assert all(of["seconds"] > 0 and of["peak_bytes"] > 1 << 20 for of in first["phases"].values())
    text = table({"here": first, "before": second}, 200)
    assert text.count("| 1.0× |") >= len(first["phases"])  # the last side is what others are compared with


def test_the_data_begins_alike_and_has_answers(tmp_path):
    write_data(tmp_path / "data", 100, 60)
    sequences, _ = read_sequences(tmp_path / "data", 120, "all")
    assert len(sequences) == 100 and sequences.answered.all()
    assert sequences.lengths.min() >= 45 and sequences.lengths.max() <= 75
    assert [row.learnt.index(1) for row in sequences][:5] == [PREFIX] * 5


def test_a_folder_that_is_no_checkout_is_named(tmp_path, capsys):
    assert main(["--rows", "10", "--beside", str(tmp_path)]) == 2
    assert "no checkout of this project there" in capsys.readouterr().err

"""The benchmark of feature modes: a way changes nothing but the features, and failures take one line."""

from __future__ import annotations

import pytest

from benchmarks.features import SHARES, WAYS, main, table, with_features
from deepspec.config import load_params


@pytest.mark.parametrize("way", WAYS)
def test_a_way_changes_the_features_alone(way):
    params = load_params("params.yaml")
    changed = with_features(params, way)
    found = changed.train.features
    assert (found.mode if found.mode == "online" else found.form) == way
    same = {"features": params.train.features}
    assert changed.train.model_copy(update=same) == params.train


def test_every_run_has_a_row():
    run = {
        "step_s": 1.5,
        "positions_per_second": 640.2,
        "peak_bytes": 3 << 20,
        "prepared_s": 2.0,
        "bytes_a_token": 6912.0,
    }
    text = table({f"online, {share} of the data": run for share in SHARES})
    assert text.count("| 1.50 | 640 | 3 | 6912 | 2 |") == len(SHARES)


def test_an_unknown_drafter_is_named(capsys):
    assert main(["--drafter", "nothing"]) == 2
    assert "no drafter 'nothing'" in capsys.readouterr().err

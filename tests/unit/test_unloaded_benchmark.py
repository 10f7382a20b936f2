"""The benchmark of trainers without the target's layers: its parameters, its table, and failures in one line."""

from __future__ import annotations

import pytest

from benchmarks.unloaded import EXPERTS, FAMILIES, WAYS, main, make_target, settings, stage, table
from deepspec.config import Params
from deepspec.errors import DeepSpecError
from deepspec.target.ends import load_ends
from deepspec.target.weights import stored


@pytest.mark.parametrize(("engine", "mode"), WAYS.values())
def test_a_way_changes_the_engine_and_the_features_alone(engine, mode, tmp_path):
    params = Params.model_validate(settings(tmp_path, engine, mode))
    assert (params.target.engine, params.train.features.mode) == (engine, mode)
    assert not params.train.real_decode and params.pipeline == ["eagle3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_has_all_its_experts(family, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.unloaded.WIDTH", 64)
    monkeypatch.setattr("benchmarks.unloaded.EXPERT_WIDTH", 32)
    make_target(tmp_path / "made", family, 2)
    ends = load_ends(tmp_path / "made")
    assert (ends.num_layers, ends.hidden_size, ends.vocab_size) == (2, 64, 512)
    assert any(f".1.mlp.experts.{EXPERTS - 1}." in name for name in stored(tmp_path / "made"))


def test_every_way_has_a_row():
    of = {"own_bytes": 7e8, "mapped_bytes": 9e8, "heldout_tau": 1.25, "seconds": 60.4}
    assert table(dict.fromkeys(WAYS, of)).count("| 700 | 900 | 1.250 | 60 |") == len(WAYS)


def test_a_stage_that_fails_says_why(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    with pytest.raises(DeepSpecError, match=r"^target: error: "):
        stage(tmp_path, "target", "--params", "params.yaml")
    monkeypatch.setattr("benchmarks.unloaded.measure", lambda *what: stage(tmp_path, "target"))
    assert main([]) == 2

"""Features that are stored by themselves, for a training that comes later and finds them there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest

from deepspec.config import Params, load_params
from deepspec.errors import DeepSpecError
from deepspec.stages.body import served_target
from deepspec.target.params import TargetParams
from deepspec.training import run as training
from deepspec.training.paths import TrainingPaths
from deepspec.training.run import store_features, train

ROOT = Path(__file__).parents[2]
TARGET = Path("data/target")


@pytest.fixture
def params(answered) -> Params:
    """The smoke profile for six steps, in a directory with a tiny target and random answers."""
    read = load_params(ROOT / "params.smoke.yaml")
    changes = {"steps": 6, "eval_every": 6, "save_every": 6, "real_decode": False}
    return read.model_copy(update={"train": read.train.model_copy(update=changes)})


def test_training_computes_nothing_that_was_stored(params, monkeypatch):
    store_features(params, "dspark", TARGET)
    stored = {path: path.read_bytes() for path in Path(".deepspec/features").rglob("*") if path.is_file()}
    assert any(path.name == "manifest.json" for path in stored)
    assert not Path("data/drafts").exists() and not Path("reports").exists()
    monkeypatch.setattr(training, "load_target", lambda *_, **__: pytest.fail("the target is loaded again"))
    train(params, "dspark", TARGET, TrainingPaths.of("dspark"))
    assert Path("data/drafts/dspark/model.safetensors").exists()
    assert stored == {path: path.read_bytes() for path in stored}


@pytest.mark.parametrize(
    ("mode", "name", "said"),
    [
        ("online", "dspark", "train.features.mode: online stores no features"),
        ("cached", "dsprak", "params.yaml has no drafter 'dsprak'"),
        ("cached", "lookup", "drafter 'lookup' is a lookup, which is not trained"),
    ],
)
def test_what_stores_nothing_is_refused(params, mode, name, said):
    features = params.train.features.model_copy(update={"mode": mode})
    changed = params.train.model_copy(update={"features": features})
    with pytest.raises(DeepSpecError, match=said):
        store_features(params.model_copy(update={"train": changed}), name, TARGET)


def test_a_server_of_one_machine_is_not_for_processes_of_two(monkeypatch):
    launched = SimpleNamespace(num_processes=16, is_main_process=True)
    monkeypatch.setattr(accelerate, "PartialState", lambda: launched)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    target = TargetParams.model_validate({"source": "x", "engine": "vllm"})
    with (
        pytest.raises(DeepSpecError, match=r"answers this machine alone; .* name running ones"),
        served_target(target, [0], 64),
    ):
        pass

"""What every test gets: a tiny target, no hub, no network but this machine."""

from __future__ import annotations

import os

# Before any import. A thread is all that a tiny model can use, and figures depend on how many there are.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspec.entry import quiet_environment
from tests.network import replacements

quiet_environment()


@pytest.fixture(autouse=True)
def no_store_left() -> Iterator[None]:
    """Forget the store of history that a test named, which MLflow keeps for the process: its server is gone by then."""
    yield
    if (mlflow := sys.modules.get("mlflow")) is not None:
        mlflow.set_tracking_uri(None)


@pytest.fixture(scope="session")
def tiny_target() -> Path:
    """The directory of a tiny random Llama with tokenizer and template; not to be written to."""
    from tests.tiny import cached_target

    return cached_target()


@pytest.fixture
def answered(tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present directory with a tiny target and 24 random answers, where training looks for them."""
    import pyarrow as pa
    import pyarrow.parquet
    import torch

    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_target, "data/target")
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 500, (24,), generator=rng).tolist() for _ in range(24)]
    Path("data/distill").mkdir()
    table = pa.table({"input_ids": rows, "loss_mask": [[0] * 6 + [1] * 18] * len(rows)})
    pyarrow.parquet.write_table(table, "data/distill/train.parquet")
    Path("data/distill/manifest.json").write_text(json.dumps({"digest": "d"}))
    return tmp_path


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables and nothing in them, to be copied: making them takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; skips without one, fails where `DEEPSPEC_BROWSER` requires it."""
    from tests.chromium import CHROMIUM, FLAGS

    if CHROMIUM is None:
        if os.environ.get("DEEPSPEC_BROWSER") == "required":
            pytest.fail("no Chromium; install it (apt-get install chromium)")
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_target: Path, empty_store: Path) -> Path:
    """A finished result in the present directory, with an empty store; versions are tried in this process."""
    from deepspec.tracking import trial
    from tests.tracked import ask_here, lay_out

    monkeypatch.setattr(trial, "ask_in_fresh_process", ask_here)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_store, tmp_path / "mlruns/mlflow.db")
    lay_out(tmp_path, tiny_target)
    return tmp_path


@pytest.fixture
def dvc_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask DVC in this process, where it is imported already; the e2e tests start it."""
    from tests.dvc_here import keep_here

    keep_here(monkeypatch)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch):
    """Fail a test that reaches for another machine, even if the library that did so swallowed the refusal."""
    reached: list[str] = []
    for owner, name, function in replacements(reached.append):
        monkeypatch.setattr(owner, name, function)
    yield
    assert not reached, f"the test reached for {', '.join(reached)}"

"""Missing, truncated, swapped and unreadable files at every step from a result to a served version: one line, and the
registry as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from starlette.testclient import TestClient
from typer.testing import CliRunner

from deepspec.cli import app
from deepspec.errors import DeepSpecError
from deepspec.tracking import fresh, trial
from deepspec.tracking.store import connect
from tests.tracked import MODEL, NAME, lay_out


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


def refused(*words: str) -> str:
    """The one line with which a command is refused."""
    code, said = run(*words)
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in said
    return line


def state() -> dict:
    """What the registry holds: versions with their tags, and where the aliases are."""
    with connect() as store:
        models = store.client.search_registered_models()
        versions = store.client.search_model_versions()
        logged = store.client.search_logged_models([store.experiment_id])
    return {
        "aliases": {
            model.name: {alias: str(version) for alias, version in model.aliases.items()} for model in models
        },
        "versions": {str(version.version): version.tags for version in versions},
        "logged": sorted(model.model_id for model in logged),
    }


def missing(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swapped(path: Path) -> None:
    """Another file of the same length."""
    path.write_bytes(path.read_bytes()[::-1])


def unreadable(path: Path) -> None:
    """A link to itself, which root cannot read either."""
    path.unlink()
    path.symlink_to(path)


DAMAGES = (missing, truncated, swapped, unreadable)
RESULT_FILES = (
    "dvc.lock",
    "data/target/config.json",
    "data/target/model.safetensors",
    "data/target/tokenizer.json",
    "data/target/deepspec.json",
    f"data/drafts/{NAME}/config.json",
    f"data/drafts/{NAME}/model.safetensors",
    "data/distill/manifest.json",
    f"data/exports/{NAME}/vllm/config.json",
    f"reports/eval/{NAME}.json",
    f"reports/eval/{NAME}.prompts.jsonl",
    f"reports/train/{NAME}.jsonl",
    "reports/validation.json",
    "reports/report.html",
)
EVERYWHERE = (file for file in RESULT_FILES if not file.startswith(("data/target", "data/exports")))


def restored(path: Path, kept: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(kept)


def test_register_refuses_every_damaged_file_and_changes_nothing(tree: Path):
    """Before the first version, so that there is no registered model either."""
    before = state()
    assert before["aliases"] == {}
    for name in RESULT_FILES:
        kept = (tree / name).read_bytes()
        for damage in DAMAGES:
            damage(tree / name)
            if (tree / name).is_symlink() or not (tree / name).exists() or (tree / name).read_bytes() != kept:
                refused("register")
                assert state() == before, (name, damage.__name__)
            restored(tree / name, kept)
    assert run("register")[0] == 0


def test_track_refuses_every_damaged_file_that_it_reads(tree: Path):
    for name in EVERYWHERE:
        kept = (tree / name).read_bytes()
        for damage in DAMAGES:
            damage(tree / name)
            refused("track")
            restored(tree / name, kept)
    with connect() as store:
        assert store.client.search_runs([store.experiment_id]) == []


def test_a_target_that_is_no_directory_or_is_gone_is_named(tree: Path):
    shutil.rmtree(tree / "data/target")
    assert "no target; get it with `dvc pull`, or pass --target-by-reference" in refused("register")
    (tree / "data/target").write_text("")
    assert "no target" in refused("register")
    assert state()["versions"] == {}


VERSION_FILES = {
    "artifacts/target/config.json": DAMAGES,
    "artifacts/target/model.safetensors": DAMAGES,
    "artifacts/draft/model.safetensors": (truncated, swapped),
    "artifacts/evidence/evaluation.json": DAMAGES,
    "artifacts/evidence/evaluation.prompts.jsonl": (missing, truncated),
    "artifacts/evidence/files.json": (missing, truncated),
    "MLmodel": (missing, truncated),
    "served.py": (
        missing,
    ),  # cut off, it fails in a fresh process alone: this one has MLflow's model of before
}


def each_damage(folder: Path, then: Callable[[], None], names: Iterable[str] = VERSION_FILES) -> None:
    for name in names:
        file, damages = folder / name, VERSION_FILES[name]
        kept = file.read_bytes()
        for damage in damages:
            damage(file)
            print(name, damage.__name__)  # shown if it fails
            then()
            restored(file, kept)


def test_a_version_whose_files_were_damaged_is_not_promoted(tree: Path):
    assert run("register")[0] == 0
    (folder,) = Path("mlruns/artifacts/models").glob("*/artifacts")
    before = state()
    assert before["aliases"] == {MODEL: {"challenger": "1"}}

    def check() -> None:
        assert f"{MODEL} version 1" in refused("promote")
        assert state() == before

    each_damage(folder, check)
    assert run("promote")[0] == 0
    assert state()["aliases"] == {MODEL: {"champion": "1"}}


def test_a_damaged_version_is_registered_again_as_another(tree: Path, tiny_target: Path):
    """Registering the same results found the broken version `registered before`, for good."""
    assert run("register")[0] == 0 and run("promote")[0] == 0
    (folder,) = Path("mlruns/artifacts/models").glob("*/artifacts")
    (folder / "artifacts/target/config.json").unlink()
    assert run("register")[0] == 0
    found = state()
    assert found["aliases"] == {MODEL: {"champion": "1", "challenger": "2"}}
    assert "config.json" in found["versions"]["1"]["broken"] and "broken" not in found["versions"]["2"]
    assert run("register")[0] == 0 and set(state()["versions"]) == {"1", "2"}
    assert run("promote")[0] == 0
    assert state()["aliases"] == {MODEL: {"champion": "2", "previous": "1"}}
    assert "version 1 cannot be used" in refused("promote", "--rollback")
    assert state()["aliases"] == {MODEL: {"champion": "2", "previous": "1"}}


def test_a_champion_without_evidence_is_passed_over_only_if_asked_to(tree: Path, tiny_target: Path):
    assert run("register")[0] == 0 and run("promote")[0] == 0
    (folder,) = Path("mlruns/artifacts/models").glob("*/artifacts")
    (folder / "artifacts/evidence/evaluation.json").unlink()
    lay_out(tree, tiny_target, variant="second")
    assert run("register")[0] == 0
    assert "version 1: its evidence cannot be read" in (line := refused("promote"))
    assert "--afresh passes over this champion" in line
    assert run("promote", "--afresh")[0] == 0
    assert state()["aliases"] == {MODEL: {"champion": "2", "previous": "1"}}


def test_what_does_not_write_the_targets_own_tokens_is_never_registered(tree: Path, monkeypatch):
    monkeypatch.setattr(fresh, "PROMPT", "")  # which the version refuses, in place of a broken one
    assert "not registered, since what was uploaded fails: prompt 0 is ''" in refused("register")
    assert state() == {"aliases": {}, "versions": {}, "logged": []}
    assert not list(Path("mlruns/artifacts/models").glob("*/artifacts/artifacts"))


@pytest.mark.parametrize("garbage", [b"no database", b""])
def test_a_store_that_is_no_database_is_one_line(tree: Path, garbage):
    Path("mlruns/mlflow.db").write_bytes(b"SQLite format 3\0" + 99 * garbage if garbage else garbage)
    if garbage:
        assert "MLflow at sqlite:///" in refused("track")
    else:
        assert run("track")[0] == 0  # an empty file is an empty store


def test_a_process_that_dies_while_it_loads_is_told(tmp_path: Path, monkeypatch):
    killer = tmp_path / "fresh.py"
    killer.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(fresh, "__file__", str(killer))
    assert "ended by signal 9" in str(trial.ask_in_fresh_process("models:/m/1", str(tmp_path), "sqlite:///a"))
    killer.write_text("raise SystemExit('error: no such model')")
    assert trial.ask_in_fresh_process("models:/m/1", str(tmp_path), "sqlite:///a") == "no such model"


def test_a_version_is_served_by_mlflow_and_refuses_bad_requests_in_one_line(tree: Path, monkeypatch):
    """What `mlflow models serve` starts, with a request as docs/registry.md has it."""
    assert run("register")[0] == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tree}/mlruns/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tree}/mlruns/mlflow.db")
    model = mlflow.pyfunc.load_model(f"models:/{MODEL}@challenger")
    client = TestClient(scoring_server.init(model))
    request = {"inputs": [{"prompt": "What is 12 times 7?"}], "params": {"max_new_tokens": 8}}
    (answer,) = client.post("/invocations", json=request).json()["predictions"]
    assert isinstance(answer["text"], str) and answer["tau"] >= 1
    reply = client.post("/invocations", json=request | {"inputs": [{"prompt": " "}]})
    assert reply.status_code == 400 and "prompt 0 is ' '; expected text" in reply.json()["message"]
    reply = client.post("/invocations", json=request | {"params": {"max_new_tokens": -1}})
    assert reply.status_code == 400 and "max_new_tokens" in reply.json()["message"]
    with pytest.raises(MlflowException, match=r"prompt 1 is (None|nan); expected text"):
        model.predict(pd.DataFrame({"prompt": ["Why?", None]}))


def test_a_version_whose_files_were_damaged_is_not_served(tree: Path):
    """What is ours of it; MLflow reads a part of its own MLmodel too, with which the gate refuses the version."""
    assert run("register")[0] == 0
    (folder,) = Path("mlruns/artifacts/models").glob("*/artifacts")
    before = state()

    def check() -> None:
        with connect(), pytest.raises((DeepSpecError, MlflowException, OSError)) as caught:
            mlflow.pyfunc.load_model(f"models:/{MODEL}@challenger")
        assert "\n" not in str(caught.value)
        assert state() == before

    each_damage(folder, check, (name for name in VERSION_FILES if name.startswith("artifacts/")))
    with connect():
        mlflow.pyfunc.load_model(f"models:/{MODEL}@challenger")


def test_other_precisions_and_targets_are_taken_at_loading(tree: Path, tiny_target: Path):
    """`model_config` of docs/registry.md, which MLflow ignored."""
    assert run("register")[0] == 0
    with connect():
        uri = f"models:/{MODEL}@challenger"
        model = mlflow.pyfunc.load_model(
            uri, model_config={"dtype": "float64", "target": str(tree / "data/target")}
        )
    served = model.unwrap_python_model()
    assert str(served.target.dtype) == "torch.float64" and served.target.source == str(tree / "data/target")
    answers = model.predict(pd.DataFrame({"prompt": ["Why?"]}), params={"max_new_tokens": 4})
    assert answers["tau"][0] >= 1


def test_files_json_lists_what_a_version_is_made_of(tree: Path):
    assert run("register")[0] == 0
    (listed,) = Path("mlruns/artifacts/models").glob("*/artifacts/artifacts/evidence/files.json")
    assert {"target/config.json", "draft/model.safetensors", "evidence/README.md"} <= set(
        json.loads(listed.read_text())
    )
    assert MlflowClient().get_model_version(MODEL, "1").tags["files"]

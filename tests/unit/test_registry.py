"""`deepspec register` and `promote`: versions, aliases, refusals and the way back, in a SQLite store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from typer.testing import CliRunner

from deepspec.cli import app
from deepspec.drafters.checkpoint import draft_digest
from deepspec.errors import DeepSpecError
from deepspec.evaluation.record import EVAL_VERSION
from deepspec.target.model import resolve_target
from deepspec.target.unloaded import resolve_unloaded
from deepspec.tracking import served
from deepspec.tracking.register import REQUIREMENTS, Parts, _reference, register
from deepspec.tracking.result import read_result, target_digest
from deepspec.tracking.store import connect
from tests.tracked import MODEL, NAME, lay_out, lock, write_export


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, " ".join(result.output.split())


def aliases() -> dict[str, str]:
    found = MlflowClient().get_registered_model(MODEL).aliases
    return {alias: str(version) for alias, version in found.items()}


def tags(version: str) -> dict[str, str]:
    return MlflowClient().get_model_version(MODEL, version).tags


def registered(tree: Path, target: Path, **options) -> str:
    """The version of another result."""
    lay_out(tree, target, **options)
    with connect() as store:
        return register(read_result(NAME), store).version


def test_the_same_results_are_one_version_and_other_results_another(tree: Path, tiny_target: Path):
    with connect() as store:
        first, second = (register(read_result(NAME), store) for _ in range(2))
        assert (first.version, first.new, second.version, second.new) == ("1", True, "1", False)
        version = store.client.get_model_version(MODEL, "1")
        run = store.client.get_run(version.run_id)
        model = store.client.get_registered_model(MODEL)
        (logged,) = store.client.search_logged_models([store.experiment_id])
    assert "@champion" in model.description and model.tags["drafter"] == NAME
    figures = {metric.key: metric.value for metric in logged.metrics}
    assert figures["eval/tau"] == 2.5 and figures["eval/mean/T1/speedup"] == 2.0
    assert (
        logged.params["train.lr"] == "0.001" and logged.tags["draft_digest"] == version.tags["draft_digest"]
    )
    assert aliases() == {"challenger": "1"}
    record = json.loads(Path(f"reports/eval/{NAME}.json").read_text())
    expected = {
        "draft_digest": record["draft_digest"],
        "target_digest": record["target_digest"],
        "data_digest": 64 * "a",
        "eval_version": EVAL_VERSION,
        "tau": "2.5",
        "speedup": "2.0",
        "git_commit": "c0ffee",
        "dvc_key": run.data.tags["deepspec_key"],
    }
    assert expected.items() <= version.tags.items()
    assert "| sums | 0 | 2.50 | 2.00× | yes |" in version.description
    assert f"{record['summary']['speedup']:.2f}× against plain decoding at T = 0" in version.description
    (tree / f"reports/export/{NAME}.json").unlink()
    shutil.rmtree("data/exports")
    with connect() as store:
        assert register(read_result(NAME), store).version == "2"
    assert aliases() == {"challenger": "2"}
    assert registered(tree, tiny_target) == "1"
    assert aliases() == {"challenger": "1"}


def test_a_version_holds_all_that_it_needs_and_no_path_of_this_machine(tree: Path):
    with connect() as store:
        register(read_result(NAME), store, Parts(exports=True))
    (model,) = Path("mlruns/artifacts/models").glob("*/artifacts")
    parts = {path.name for path in (model / "artifacts").iterdir()}
    assert parts == {"target", "draft", "evidence", "exports"}
    assert (model / "artifacts/exports/vllm/config.json").is_file()
    listed = json.loads((model / "artifacts/evidence/files.json").read_text())
    there = {p.relative_to(model / "artifacts").as_posix() for p in (model / "artifacts").rglob("*.*")}
    assert {name for name in there if "." in Path(name).name} - {"evidence/files.json"} <= set(listed)
    assert (model / "code/deepspec/decoding/engine.py").is_file()
    wanted = (model / "requirements.txt").read_text().splitlines()
    assert [line.split("==")[0] for line in wanted] == list(REQUIREMENTS)
    assert not any("+" in line for line in wanted)
    description = (model / "MLmodel").read_text()
    assert str(tree) not in description and str(Path(__file__).parents[2]) not in description
    assert {field["name"] for field in json.loads(yaml.safe_load(description)["signature"]["params"])} == {
        "max_new_tokens",
        "temperature",
        "seed",
    }
    assert not list(Path(".deepspec").glob("register-*"))


def test_exports_are_not_copied_unless_asked_for(tree: Path):
    """No one loads them from the registry: they were half of a version's size."""
    with connect() as store:
        register(read_result(NAME), store)
    (model,) = Path("mlruns/artifacts/models").glob("*/artifacts")
    assert {path.name for path in (model / "artifacts").iterdir()} == {"target", "draft", "evidence"}


def test_a_target_by_reference_is_named_not_copied(tree: Path, tiny_target: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tree / "home"))
    with pytest.raises(DeepSpecError, match="a directory beside this checkout"), connect() as store:
        register(read_result(NAME), store, Parts(target=False))
    resolve_target(str(tiny_target), None, "float32", tree / "resolved")
    lay_out(tree, tree / "resolved")
    lock(tree, source=str(tiny_target))
    with connect() as store:
        register(read_result(NAME), store, Parts(target=False))
    (model,) = Path("mlruns/artifacts/models").glob("*/artifacts")
    assert not (model / "artifacts/target").exists()
    config = yaml.safe_load((model / "MLmodel").read_text())["flavors"]["python_function"]["config"]
    record = json.loads(Path(f"reports/eval/{NAME}.json").read_text())
    assert config["reference"] == {
        "source": str(tiny_target),
        "revision": None,
        "template_date": None,
        "dtype": "float32",
        "chat_template_kwargs": {},
        "digest": record["target_digest"],
    }


def test_of_a_target_that_only_an_engine_holds_the_ends_are_loaded(
    tree: Path, tiny_target: Path, monkeypatch
):
    """Through register and promote; the version answers where somebody says that the target fits."""
    lay_out(tree, tiny_target, engine="vllm 0.32.0")
    with monkeypatch.context() as patch:
        patch.setattr("deepspec.target.model.load_target", lambda *what: pytest.fail("the target was loaded"))
        patch.setattr(
            "deepspec.load_target", lambda *what: pytest.fail("the target was loaded"), raising=False
        )
        for command in ("register", "promote"):
            assert run(command)[0] == 0
        assert aliases() == {"champion": "1"}
        asked = pd.DataFrame({"prompt": ["Why?"]})
        with connect():
            uri = f"models:/{MODEL}@champion"
            with pytest.raises(MlflowException, match="serve the export there"):
                mlflow.pyfunc.load_model(uri).predict(asked)
    with connect():
        model = mlflow.pyfunc.load_model(uri, model_config={"engine": "local"})
    assert model.predict(asked, params={"max_new_tokens": 4})["tau"][0] >= 1


def test_a_draft_of_another_target_is_refused_on_the_ends_too(tree: Path, tiny_target: Path):
    lay_out(tree, tiny_target, engine="vllm 0.32.0")
    record = Path(f"data/drafts/{NAME}/deepspec.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"target_digest": "another"}))
    changed = json.loads(Path(f"reports/eval/{NAME}.json").read_text())
    changed["draft_digest"] = draft_digest(Path(f"data/drafts/{NAME}"))
    Path(f"reports/eval/{NAME}.json").write_text(json.dumps(changed))
    shutil.rmtree("data/exports")
    write_export(tree, True)
    lock(tree)
    code, said = run("register")
    assert code == 2 and "not registered, since what was uploaded fails" in said


def test_a_target_of_an_engine_is_fetched_again_as_its_files_are(tree: Path, tiny_target: Path, monkeypatch):
    """By reference: resolving it as one that is run here would write other files, and load it."""
    monkeypatch.setenv("HOME", str(tree / "home"))
    resolve_unloaded(str(tiny_target), None, "float32", tree / "data/target")
    lock(tree, source=str(tiny_target))
    reference = _reference(read_result(NAME))
    assert reference["unloaded"] is True and reference["quantization"] is None
    reference["digest"] = target_digest(tree / "data/target")
    monkeypatch.setattr("deepspec.target.model.resolve_target", lambda *what: pytest.fail("it was loaded"))
    assert target_digest(served._resolved(reference)) == reference["digest"]


def test_a_registration_that_was_cut_off_leaves_one_version_and_one_model(tree: Path, monkeypatch):
    def killed(*args, **options):
        raise KeyboardInterrupt

    for step in ("log_model_artifacts", "create_model_version"):
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch, connect() as store:
            patch.setattr(MlflowClient, step, killed)
            register(read_result(NAME), store)
    with connect() as store:
        assert register(read_result(NAME), store).version == "1"
        models = store.client.search_logged_models([store.experiment_id])
    assert [str(model.status) for model in models] == ["READY"]
    assert not list(Path(".deepspec").glob("register-*"))


def test_an_export_that_is_not_what_its_record_says_is_refused(tree: Path):
    Path(f"data/exports/{NAME}/vllm/config.json").write_text("{ }")
    with pytest.raises(DeepSpecError, match=r"not the file that .* names; export again"), connect() as store:
        register(read_result(NAME), store)


def test_the_gate_from_challenger_to_champion_and_back(tree: Path, tiny_target: Path):
    assert run("promote") == (2, f"error: {MODEL} is not registered; run `deepspec register`")
    assert run("register")[0] == 0
    code, text = run("promote")
    assert code == 0 and f"{MODEL}: version 1 is the champion, the first" in text
    assert aliases() == {"champion": "1"} and tags("1")["reason"] == "the first"
    assert run("promote") == (0, f"{MODEL}: no challenger; version 1 is the champion")
    code, text = run("register")
    assert code == 0 and "version 1 registered before; it is the champion already" in text
    assert aliases() == {"champion": "1"}
    assert run("promote", "--rollback") == (2, f"error: {MODEL} has no previous champion to go back to")

    assert registered(tree, tiny_target, variant="slower", gain=1.5) == "2"
    for _ in range(2):
        code, text = run("promote")
        assert code == 1
        assert f"refused: {MODEL} version 2: speedup_not_worse (T=0 0.750" in text
        assert "tau_not_worse │ passed" in text
    assert aliases() == {"champion": "1", "challenger": "2"}
    assert tags("2")["refused"] == "speedup_not_worse"

    assert registered(tree, tiny_target, variant="lossy", speedup=None) == "3"
    code, text = run("promote")
    assert (
        code == 1 and f"refused: {MODEL} version 3: lossless (the greedy output changed on sums@T=0" in text
    )
    assert aliases() == {"champion": "1", "challenger": "3"}

    assert registered(tree, tiny_target, variant="slower", gain=1.5) == "2"
    assert run("promote", "--margin", "0.3")[0] == 0
    assert aliases() == {"champion": "2", "previous": "1"}
    assert "refused" not in tags("2") and tags("2")["reason"] == "passed the gate against version 1"
    assert tags("2")["speedup_not_worse"].startswith("T=0 0.750 (0.750–0.750); T=1 0.750")

    code, text = run("promote", "--rollback")
    assert code == 0 and text == f"{MODEL}: version 1 is the champion again, in place of version 2"
    assert aliases() == {"champion": "1", "previous": "2"}
    assert tags("2")["reason"] == "rolled back to version 1" and "rolled_back_at" in tags("2")


def test_an_export_of_another_draft_does_not_count(tree: Path):
    shutil.rmtree("data/exports")
    write_export(tree, True, draft_digest="another")
    run("register")
    code, text = run("promote")
    assert code == 1 and "evidence_of_this_draft (draft" in text.split("refused:")[1]


def test_a_promotion_that_was_cut_off_ends_the_same(tree: Path, tiny_target: Path, monkeypatch):
    run("register")
    run("promote")
    assert registered(tree, tiny_target, variant="second") == "2"
    real = MlflowClient.delete_registered_model_alias
    for step in ("set_registered_model_alias", "delete_registered_model_alias"):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, step, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
            assert run("promote")[0] == 130
    assert MlflowClient.delete_registered_model_alias is real
    assert run("promote")[0] == 0
    assert aliases() == {"champion": "2", "previous": "1"}


def test_an_unknown_drafter_is_named_with_the_nearest(tree: Path):
    for command in ("track", "register", "promote"):
        assert run(command, "--drafter", "dsprk") == (
            2,
            "error: unknown drafter 'dsprk'; did you mean 'dspark'?",
        )

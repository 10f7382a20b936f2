"""`deepspec register`: a drafter with its target as a version that loads and generates, and the evidence for it.

artifacts/target      the target's directory, unless it is kept by reference
artifacts/draft       the draft's
artifacts/evidence    the evaluation record, its prompts, and the export's record: what the gate reads
artifacts/exports     a directory for each serving engine, where there is one
code/                 this package
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME, MODEL_CODE_PATH
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

import deepspec
from deepspec.errors import DeepSpecError
from deepspec.evaluation.record import Record
from deepspec.files import digest, file_digest
from deepspec.provenance import CORE
from deepspec.tracking import served
from deepspec.tracking.result import Result, read_json
from deepspec.tracking.served import EVALUATION
from deepspec.tracking.store import KEY, Store
from deepspec.tracking.track import track

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
EXPORT = "export.json"
REQUIREMENTS = (*CORE, "mlflow", "pandas")
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "prompt")]),
    outputs=Schema([ColSpec("string", "text"), ColSpec("double", "tau")]),
    params=ParamSchema(
        [
            ParamSpec("max_new_tokens", "long", 128),
            ParamSpec("temperature", "double", 0.0),
            ParamSpec("seed", "long", 0),
        ]
    ),
)


@dataclass(frozen=True)
class Registered:
    name: str
    version: str
    new: bool  # False: these results were registered before
    challenger: bool  # False: it is the champion
    link: str


def register(result: Result, store: Store, target_by_reference: bool = False) -> Registered:
    """Register the result, unless it is registered, and make it the challenger, unless it is the champion.

    Raises:
        DeepSpecError: the export's files are not those that its record names, or there is no target.
    """
    export = _checked_export(result)
    run_id = track(result, store).run_id
    client, name, key = store.client, result.model_name, evidence_key(result)
    _create_model(client, name)
    found = client.search_model_versions(f"name = '{name}' and tags.{KEY} = '{key}'")
    if found:
        version = min(found, key=lambda one: int(one.version)).version
    else:
        model_id = _uploaded(result, store, key, run_id, export, target_by_reference)
        source = f"models:/{model_id}"
        tags = {KEY: key, **version_tags(result)}
        version = client.create_model_version(
            name, source, run_id, tags, description=describe(result.record), model_id=model_id
        ).version
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if challenger := str(champion) != str(version):
        client.set_registered_model_alias(name, CHALLENGER, version)
    link = store.link("models", name, "versions", str(version))
    return Registered(name, str(version), not found, challenger, link)


def evidence_key(result: Result) -> str:
    """Return a version's key: it changes with the draft, the target, what was measured or what was exported."""
    files = [result.eval_file, result.eval_file.with_suffix(".prompts.jsonl"), result.export_file]
    parts = [result.record.draft_digest, result.record.target_digest]
    return digest(" ".join(parts + [file_digest(file) if file.exists() else "-" for file in files]))


def version_tags(result: Result) -> dict[str, str]:
    record = result.record
    found = {
        "draft_digest": record.draft_digest,
        "target_digest": record.target_digest,
        "data_digest": result.manifest["digest"],
        "eval_version": record.eval_version,
        "device": record.device,
        "tau": _rounded(record.summary.tau),
        "speedup": _rounded(record.summary.speedup),
        "git_commit": record.provenance.git_commit,
        "dvc_key": result.key,
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def describe(record: Record) -> str:
    """Describe a version in a sentence, for a reader of the registry's page."""
    summary = record.summary
    speed = f"{summary.speedup:.2f}×" if summary.speedup else "not lossless, so no speed-up"
    return (
        f"{record.drafter} for {record.target}: τ {summary.tau:.2f}, {speed} against plain decoding at "
        f"T = {summary.temperature:g}, measured on {record.device}."
    )


def requirements() -> list[str]:
    """List the installed packages without a version's local part (2.13.0+cpu), which no registry has."""
    return [f"{name}=={installed(name).split('+')[0]}" for name in REQUIREMENTS]


def _uploaded(result: Result, store: Store, key: str, run_id: str, export: bool, by_reference: bool) -> str:
    """Upload these files as a logged model; return its id. A killed call's partial upload is replaced."""
    known: list[LoggedModel] = store.client.search_logged_models(
        [store.experiment_id], f"tags.{KEY} = '{key}'"
    )
    for model in known:
        if model.status == LoggedModelStatus.READY:
            return model.model_id
        store.client.delete_logged_model(model.model_id)
    model = store.client.create_logged_model(
        store.experiment_id, result.drafter.replace(".", "-"), run_id, tags={KEY: key}
    )
    work = result.root / ".deepspec"  # on the data's own disk, so that nothing large is copied first
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="register-", dir=work) as scratch:
        folder = Path(scratch) / "model"
        save(result, folder, Model(run_id=run_id, model_id=model.model_id), export, by_reference)
        store.client.log_model_artifacts(model.model_id, str(folder))
    return store.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY).model_id


def save(result: Result, folder: Path, model: Model, export: bool, by_reference: bool) -> None:
    """Write the version's directory, with work files beside it; nothing is inferred and nothing fetched."""
    target = result.root / "data/target"
    reference = None
    if by_reference:
        reference = result.params.target.model_dump() | {"digest": result.record.target_digest}
    elif not target.is_dir():
        raise DeepSpecError(f"{target}: no target; get it with `dvc pull`, or pass --target-by-reference")
    parts = {} if by_reference else {"target": target}
    parts |= {"draft": result.draft} | ({"exports": result.exports} if export else {})
    artifacts = {name: folder.parent / name for name in (*parts, "evidence")}
    for name, place in parts.items():  # MLflow calls a directory by its own name, and follows no link
        shutil.copytree(place, artifacts[name], copy_function=_link)
    _copy_evidence(result, artifacts["evidence"])
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=served.__file__,
        code_paths=[str(Path(deepspec.__file__).parent)],
        artifacts={name: str(place) for name, place in artifacts.items()},
        signature=SIGNATURE,
        input_example=(pd.DataFrame({"prompt": ["Why is the sky blue?"]}), {"max_new_tokens": 32}),
        pip_requirements=requirements(),
        model_config={"reference": reference},
        mlflow_model=model,
    )
    _forget_places(model, folder)


def _forget_places(model: Model, folder: Path) -> None:
    """Remove this machine's paths, which MLflow records; it loads files by their place in the version."""
    flavor = model.flavors[mlflow.pyfunc.FLAVOR_NAME]
    flavor[MODEL_CODE_PATH] = Path(flavor[MODEL_CODE_PATH]).name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    model.save(str(folder / MLMODEL_FILE_NAME))


def _link(source: str, destination: str) -> None:
    try:
        os.link(os.path.realpath(source), destination)
    except OSError:  # another disk
        shutil.copy(source, destination)


def _copy_evidence(result: Result, folder: Path) -> None:
    folder.mkdir()
    copies = {
        EVALUATION: result.eval_file,
        EVALUATION.replace(".json", ".prompts.jsonl"): result.eval_file.with_suffix(".prompts.jsonl"),
        EXPORT: result.export_file,
    }
    for name, file in copies.items():
        if file.exists():
            shutil.copy(file, folder / name)


def _checked_export(result: Result) -> bool:
    """Is there an export to take along? Its files must be those whose hashes the record has."""
    if not result.export_file.exists():
        return False
    engines = read_json(result.export_file)["engines"]
    found = False
    for name, engine in engines.items():
        for file, expected in engine.get("files", {}).items():
            path = result.root / engine["path"] / file
            if not path.is_file() or file_digest(path) != expected:
                raise DeepSpecError(
                    f"{path}: not the file that {result.export_file} names; export again for {name}"
                )
            found = True
    return found


def _create_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

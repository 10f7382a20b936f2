"""`deepspec register`: a drafter with its target as a version that loads and generates, and the evidence for it.

The files are checked before anything is uploaded, and what was uploaded is loaded and asked (`trial.py`) before there
is a version of it.

artifacts/target      the target's directory, unless it is kept by reference
artifacts/draft       the draft's
artifacts/evidence    the evaluation record, its prompts, and the export's record: what the gate reads; the card, and
                      the digests of all these files
artifacts/exports     a directory for each serving engine, if it was asked for
code/                 this package
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME, MODEL_CODE_PATH
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

import deepspec
from deepspec.errors import DeepSpecError
from deepspec.files import digest, file_digest, write_json
from deepspec.provenance import CORE
from deepspec.target.embedded import PREFIX
from deepspec.target.identity import RECORD
from deepspec.target.source import is_hub_id
from deepspec.tracking import figures, served, trial
from deepspec.tracking.card import card, describe_model
from deepspec.tracking.result import EXPORTS, TARGET, Result, read_json, target_digest
from deepspec.tracking.served import EVALUATION, FILES
from deepspec.tracking.store import KEY, Store
from deepspec.tracking.track import track

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
LISTED = "files"  # tag of a version: digest of the list of its files
BROKEN = "broken"  # tag of a version that can no longer be used: why
EXPORT, CARD = "export.json", "README.md"
_LONGEST = 5000  # characters that MLflow's tables take of a tag or a description
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
class Parts:
    """What a version takes along beside the draft and the evidence.

    Args:
        target: its directory; False keeps it by reference: source, revision and digest.
        exports: the directories for serving engines. Nothing loads them from the registry.
    """

    target: bool = True
    exports: bool = False


@dataclass(frozen=True)
class Registered:
    name: str
    version: str
    new: bool  # False: these results were registered before
    challenger: bool  # False: it is the champion
    link: str


def register(result: Result, store: Store, parts: Parts | None = None) -> Registered:
    """Register the result, unless it is registered, and make it the challenger, unless it is the champion.

    A version of before that can no longer be used is replaced by a new one.

    Raises:
        DeepSpecError: a file is not the one that dvc.lock or the export's record names, there is no target, or what was
            uploaded cannot be used. There is then no new version, and the aliases are where they were.
    """
    parts = parts or Parts()
    _check(result, parts)
    run_id = track(result, store).run_id
    client, name, key = store.client, result.model_name, evidence_key(result)
    known = _known(client, name, key)
    faults = {}
    for version in known:
        faults[version.version] = trial.fault(f"models:/{name}/{version.version}", store, result.work)
        if faults[version.version] is None:
            break
    else:
        version = _new_version(result, store, key, run_id, parts, {one.source for one in known if one.source})
    for broken in known:
        if reason := faults.get(broken.version):
            client.delete_model_version_tag(name, broken.version, KEY)
            client.set_model_version_tag(name, broken.version, BROKEN, reason[:_LONGEST])
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if challenger := str(champion) != str(version.version):
        client.set_registered_model_alias(name, CHALLENGER, version.version)
    link = store.link("models", name, "versions", str(version.version))
    return Registered(name, str(version.version), version not in known, challenger, link)


def _known(client: MlflowClient, name: str, key: str) -> list[ModelVersion]:
    found = client.search_model_versions(f"name = '{name}' and tags.{KEY} = '{key}'")
    return sorted(found, key=lambda one: int(one.version))


def _new_version(
    result: Result, store: Store, key: str, run_id: str, parts: Parts, used: set[str]
) -> ModelVersion:
    """Upload a model, try it, and make a version of it.

    Args:
        used: sources of versions, which are not taken for another one.
    """
    model_id = _uploaded(result, store, key, run_id, parts, used)
    source = f"models:/{model_id}"
    if reason := trial.fault(source, store, result.work):
        _discard(store, model_id)
        raise DeepSpecError(f"{result.model_name}: not registered, since what was uploaded fails: {reason}")
    client, name = store.client, result.model_name
    _create_model(client, result)
    tags = {KEY: key, LISTED: client.get_logged_model(model_id).tags[LISTED], **version_tags(result)}
    described = card(result.record, name)[:_LONGEST]
    return client.create_model_version(name, source, run_id, tags, description=described, model_id=model_id)


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


def requirements() -> list[str]:
    """List the installed packages without a version's local part (2.13.0+cpu), which no registry has."""
    return [f"{name}=={installed(name).split('+')[0]}" for name in REQUIREMENTS]


def _uploaded(result: Result, store: Store, key: str, run_id: str, parts: Parts, used: set[str]) -> str:
    """Upload these files as a logged model; return its id. A killed call's partial upload is replaced."""
    client = store.client
    for model in client.search_logged_models([store.experiment_id], f"tags.{KEY} = '{key}'"):
        if f"models:/{model.model_id}" in used:
            continue
        if model.status == LoggedModelStatus.READY:
            return model.model_id
        _discard(store, model.model_id)
    model = client.create_logged_model(
        store.experiment_id,
        result.drafter.replace(".", "-"),
        run_id,
        tags={KEY: key, **version_tags(result)},
        params=figures.parameters(result),
        model_type="speculative decoding",
    )
    try:
        result.work.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="register-", dir=result.work) as scratch:
            folder = Path(scratch) / "model"
            save(result, folder, Model(run_id=run_id, model_id=model.model_id), parts)
            client.log_model_artifacts(model.model_id, str(folder))
            listed = file_digest(Path(scratch) / "evidence" / FILES)
            client.set_logged_model_tags(model.model_id, {LISTED: listed})
    except Exception:
        _discard(store, model.model_id)
        raise
    started = client.get_run(run_id).info.start_time
    client.log_batch(run_id, metrics=figures.summary(result, started, model.model_id))
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY).model_id


def _discard(store: Store, model_id: str) -> None:
    """Delete a logged model with its files, which MLflow keeps otherwise."""
    place = store.client.get_logged_model(model_id).artifact_location
    store.client.delete_logged_model(model_id)
    with suppress(Exception):  # a store that deletes nothing: the model is gone all the same
        get_artifact_repository(place).delete_artifacts()


def save(result: Result, folder: Path, model: Model, parts: Parts) -> None:
    """Write the version's directory, with work files beside it; nothing is inferred and nothing fetched."""
    reference = None if parts.target else _reference(result)
    places = {"target": result.target} if parts.target else {}
    places |= {"draft": result.draft} | ({"exports": result.exports} if parts.exports else {})
    artifacts = {name: folder.parent / name for name in (*places, "evidence")}
    for name, place in places.items():  # MLflow calls a directory by its own name, and follows no link
        shutil.copytree(place, artifacts[name], copy_function=_link)
    _write_evidence(result, artifacts)
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=served.__file__,
        code_paths=[str(Path(deepspec.__file__).parent)],
        artifacts={name: str(place) for name, place in artifacts.items()},
        signature=SIGNATURE,
        input_example=(pd.DataFrame({"prompt": ["Why is the sky blue?"]}), {"max_new_tokens": 32}),
        pip_requirements=requirements(),
        # MLflow takes at loading what is named here, and nothing else.
        model_config={"reference": reference, "target": None, "dtype": None, "device": None, "engine": None},
        mlflow_model=model,
    )
    _forget_places(model, folder)


def _reference(result: Result) -> dict[str, Any]:
    """Return what fetches the target again: hub commit and pinned day as they were, where its directory says so."""
    section = result.params.target.model_dump(exclude={"engine", "vllm"})  # who ran it then
    named = section | {"digest": result.record.target_digest}
    if not (result.target / RECORD).is_file():
        return named
    made = read_json(result.target / RECORD)
    if made.get("engine"):  # its files are as they were, and an engine alone holds it
        named |= {"unloaded": True, "quantization": made.get("quantization")}
    return named | {key: made[key] for key in ("revision", "template_date") if made.get(key)}


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


def _write_evidence(result: Result, artifacts: dict[str, Path]) -> None:
    """Copy the records that the gate reads, and list the digests of all files of the version."""
    folder = artifacts["evidence"]
    folder.mkdir()
    copies = {
        EVALUATION: result.eval_file,
        EVALUATION.replace(".json", ".prompts.jsonl"): result.eval_file.with_suffix(".prompts.jsonl"),
        EXPORT: result.export_file,
    }
    for name, file in copies.items():
        if file.exists():
            shutil.copy(file, folder / name)
    (folder / CARD).write_text(card(result.record, result.model_name), encoding="utf-8")
    digests = {
        f"{part}/{file.relative_to(place).as_posix()}": file_digest(file)
        for part, place in artifacts.items()
        for file in sorted(place.rglob("*"))
        if file.is_file()
    }
    write_json(folder / FILES, digests)


def _check(result: Result, parts: Parts) -> None:
    """Check what is to be uploaded, before time is spent on it."""
    if parts.target:
        if not result.target.is_dir():
            raise DeepSpecError(
                f"{result.target}: no target; get it with `dvc pull`, or pass --target-by-reference"
            )
        result.check(TARGET)
        found, measured = target_digest(result.target), result.record.target_digest
        if found != measured:
            raise DeepSpecError(
                f"{result.target}: is target {found}, but {measured} was evaluated; run `dvc repro`"
            )
    elif _is_beside(source := result.params.target.source):
        raise DeepSpecError(
            f"target.source is {source}, a directory beside this checkout: a version that names it would load nowhere "
            "else; register without --target-by-reference, or give an absolute path"
        )
    _check_export(result, parts)


def _is_beside(source: str) -> bool:
    """Check whether a source is a directory by a relative path, which only this checkout has."""
    return not (source.startswith(PREFIX) or Path(source).is_absolute() or is_hub_id(source))


def _check_export(result: Result, parts: Parts) -> None:
    """Check that an export's files are those whose digests its record has, if there is one or it is asked for."""
    if not result.export_file.exists():
        if parts.exports:
            raise DeepSpecError(
                f"{result.export_file}: no such file; run `dvc repro`, or leave --with-exports"
            )
        return
    result.check(EXPORTS)
    engines = read_json(result.export_file).get("engines", {})
    for name, engine in engines.items():
        for file, expected in engine.get("files", {}).items():
            path = result.root / engine["path"] / file
            if not path.is_file() or file_digest(path) != expected:
                raise DeepSpecError(
                    f"{path}: not the file that {result.export_file} names; export again for {name}"
                )


def _create_model(client: MlflowClient, result: Result) -> None:
    tags = {"drafter": result.drafter, "target": result.record.target}
    try:
        client.create_registered_model(result.model_name, tags, describe_model(result.record))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

"""dvc.lock: the stages that a drafter's results came from, and whether the files are still those that they wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree
from pydantic import BaseModel, TypeAdapter, ValidationError

from deepspec.config import Params
from deepspec.errors import DeepSpecError, os_reason

LOCK = "dvc.lock"
STAGES = ("train", "evaluate", "export")  # of a drafter; an export is made on demand
REPORT = "report"  # it reads the drafters' results, and writes what is tracked with them


class _Entry(BaseModel):
    path: str
    md5: str = ""


class _Stage(BaseModel):
    deps: list[_Entry] = []
    outs: list[_Entry] = []
    params: dict[str, dict[str, Any]] = {}


Stages = dict[str, dict[str, Any]]
_STAGES = TypeAdapter(dict[str, _Stage])


def read_lock(path: Path) -> Stages:
    """Return the entries of dvc.lock by stage.

    Raises:
        DeepSpecError: no such file, or something else than a lock file.
    """
    try:
        stages = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["stages"]
        _STAGES.validate_python(stages)
        return stages
    except FileNotFoundError:
        raise DeepSpecError(f"{path}: no such file; run `dvc repro` first") from None
    except OSError as error:
        raise DeepSpecError(f"{path}: cannot be read: {os_reason(error)}") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError):
        raise DeepSpecError(
            f"{path}: not a DVC lock file; `git checkout {LOCK}` brings back the committed one"
        ) from None


def lineage(stages: Stages, drafter: str) -> Stages:
    """Return the drafter's stages and, by what they read, all before them.

    Raises:
        DeepSpecError: it was not trained and evaluated, or a stage read something else than the one before it wrote.
    """
    written = {out["path"]: (name, out) for name, stage in stages.items() for out in stage.get("outs", [])}
    found: Stages = {}
    waiting = own_stages(stages, drafter)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = stages[name]
        for dep in stages[name].get("deps", []):
            path = Path(dep["path"])
            waiting += [written[str(p)][0] for p in (path, *path.parents) if str(p) in written]
            _, out = written.get(dep["path"], (None, dep))
            if dep.get("md5") and out.get("md5") and dep["md5"] != out["md5"]:
                raise DeepSpecError(f"{LOCK}: {name} read another {path} than there is now; run `dvc repro`")
    if missing := [name for name in STAGES[:2] if f"{name}@{drafter}" not in found]:
        raise DeepSpecError(f"{LOCK}: stage {missing[0]}@{drafter} has not run; run `dvc repro`")
    return dict(sorted(found.items()))


def own_stages(stages: Stages, drafter: str) -> list[str]:
    return [f"{name}@{drafter}" for name in STAGES if f"{name}@{drafter}" in stages]


def outputs(stages: Stages, *names: str) -> dict[str, str]:
    """Return path → MD5 of what the stages wrote; without names, of all of them."""
    return {
        out["path"]: out.get("md5") or ""
        for name in names or stages
        for out in stages.get(name, {}).get("outs", [])
    }


def check(path: Path, md5: str) -> None:
    """Check that a file or directory is the one that the lock names.

    Raises:
        DeepSpecError: it is missing, cannot be read, or is another one.
    """
    if not md5:
        return
    try:
        found = _md5(path)
    except FileNotFoundError:
        raise DeepSpecError(f"{path}: no such file; get it with `dvc pull` or `dvc repro`") from None
    except OSError as error:
        raise DeepSpecError(f"{path}: cannot be read: {os_reason(error)}") from None
    if found != md5:
        raise DeepSpecError(f"{path}: changed since the stage in {LOCK} wrote it; run `dvc repro`")


def locked_params(stages: Stages, drafter: str) -> Params:
    """Return the parameters of these stages, with every default."""
    flat = {
        key: value
        for stage in stages.values()
        for values in stage.get("params", {}).values()
        for key, value in values.items()
    }
    raw: dict[str, Any] = {"pipeline": [drafter]}
    for key in sorted(flat, key=lambda key: key.count("."), reverse=True):  # whole sections last
        *parents, last = key.split(".")
        section = raw
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = flat[key]
    try:
        return Params.model_validate(raw)
    except ValidationError:
        raise DeepSpecError(
            f"{LOCK}: made with other parameters than this code has; run `dvc repro`"
        ) from None


def _md5(path: Path) -> str:
    """Return the MD5 as DVC has it: of a directory, that of the list of its files."""
    if not path.is_dir():
        return _file_md5(path)
    tree = Tree()
    for file in _files(path):
        tree.add(file.relative_to(path).parts, None, HashInfo("md5", _file_md5(file)))
    tree.digest()
    return str(tree.hash_info.value)


def _files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(path)
        if not path.is_dir():
            yield path


def _file_md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()

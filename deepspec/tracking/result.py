"""What a finished `dvc repro` left behind of one drafter. Its identity is that of the stages which made it.

dvc.lock says what ran: the stages that end in the drafter's evaluation, with the hashes of everything that they read
and wrote, and their parameters. These are taken from there and not from params.yaml, which may have been edited
since; and files that are not those which dvc.lock names are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deepspec.config import Params
from deepspec.drafters.checkpoint import draft_digest
from deepspec.errors import DeepSpecError
from deepspec.evaluation.record import Record
from deepspec.files import digest

LOCK = "dvc.lock"
STAGES = ("train", "evaluate", "export")  # of a drafter; an export is made on demand


@dataclass(frozen=True)
class Result:
    """One drafter's part of the working tree at `root`.

    Args:
        stages: stage name → its entry of dvc.lock, for all that the drafter's results were made from.
        params: as those stages had them.
    """

    root: Path
    drafter: str
    stages: dict[str, dict]
    params: Params
    record: Record

    @property
    def key(self) -> str:
        """Return the key of the tracked run: another one as soon as any of the stages read or wrote something else."""
        return digest(json.dumps(self.stages, sort_keys=True))

    @property
    def draft(self) -> Path:
        return self.root / "data/drafts" / self.drafter

    @property
    def exports(self) -> Path:
        return self.root / "data/exports" / self.drafter

    @property
    def eval_file(self) -> Path:
        return self.root / "reports/eval" / f"{self.drafter}.json"

    @property
    def export_file(self) -> Path:
        return self.root / "reports/export" / f"{self.drafter}.json"

    @cached_property
    def made(self) -> dict[str, Any]:
        """Return how the draft was made (its deepspec.json)."""
        return read_json(self.draft / "deepspec.json")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.root / "data/distill/manifest.json")

    @cached_property
    def validation(self) -> dict[str, Any]:
        return read_json(self.root / "reports/validation.json")

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """Return the training history, one line every few steps."""
        lines = (self.root / "reports/train" / f"{self.drafter}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def model_name(self) -> str:
        """Under which its versions are registered."""
        return model_name(self.params.target.source, self.drafter)


def read_result(drafter: str, root: str | Path = ".") -> Result:
    """Read and check the drafter's results.

    Raises:
        DeepSpecError: it was not trained and evaluated by `dvc repro`, or something was changed since.
    """
    root = Path(root)
    stages = lineage(_locked_stages(root / LOCK), drafter)
    for name in _own(stages, drafter):
        for out in stages[name].get("outs", []):
            _check(root / out["path"], out.get("md5", ""))
    record = Record.read(root / "reports/eval" / f"{drafter}.json")
    result = Result(root, drafter, stages, _locked_params(stages, drafter), record)
    if not result.draft.is_dir():
        raise DeepSpecError(f"{result.draft}: no such draft; get it with `dvc pull` or `dvc repro`")
    if (found := draft_digest(result.draft)) != record.draft_digest:
        raise DeepSpecError(
            f"{result.draft}: is draft {found}, but {record.draft_digest} was evaluated; run `dvc repro`"
        )
    return result


def lineage(stages: dict[str, dict], drafter: str) -> dict[str, dict]:
    """Return the drafter's stages and, by what they read, all before them."""
    writers = {out["path"]: name for name, stage in stages.items() for out in stage.get("outs", [])}
    found: dict[str, dict] = {}
    waiting = _own(stages, drafter)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = stages[name]
        for dep in stages[name].get("deps", []):
            path = Path(dep["path"])
            waiting += [writers[str(p)] for p in (path, *path.parents) if str(p) in writers]
    if missing := [name for name in STAGES[:2] if f"{name}@{drafter}" not in found]:
        raise DeepSpecError(f"{LOCK}: stage {missing[0]}@{drafter} has not run; run `dvc repro`")
    return dict(sorted(found.items()))


def model_name(source: str, drafter: str) -> str:
    """Name the model: `embedded:smollm2-135m-instruct`, `dspark` → `deepspec-smollm2-135m-instruct-dspark`.

    Of a hub id or directory the last part; whether it is the same target, digests say.
    """
    target = source.removeprefix("embedded:").rstrip("/").rsplit("/", 1)[-1]
    return "-".join(["deepspec", re.sub(r"[^a-z0-9.]+", "-", target.lower()), drafter])


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DeepSpecError(f"{path}: no such file; run `dvc repro`") from None
    except ValueError as error:
        raise DeepSpecError(f"{path}: not valid JSON: {error}") from None


def _own(stages: dict[str, dict], drafter: str) -> list[str]:
    return [f"{name}@{drafter}" for name in STAGES if f"{name}@{drafter}" in stages]


def _locked_stages(path: Path) -> dict[str, dict]:
    try:
        return yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["stages"]
    except FileNotFoundError:
        raise DeepSpecError(f"{path}: no such file; run `dvc repro` first") from None
    except (yaml.YAMLError, KeyError, TypeError):
        raise DeepSpecError(f"{path}: not a DVC lock file") from None


def _check(path: Path, md5: str) -> None:
    """Check that a file is the one that the lock names; directories are known by their own digests."""
    if not md5 or md5.endswith(".dir"):
        return
    try:
        found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    except FileNotFoundError:
        raise DeepSpecError(f"{path}: no such file; get it with `dvc pull` or `dvc repro`") from None
    if found != md5:
        raise DeepSpecError(f"{path}: changed since the stage in {LOCK} wrote it; run `dvc repro`")


def _locked_params(stages: dict[str, dict], drafter: str) -> Params:
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

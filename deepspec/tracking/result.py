"""What a finished `dvc repro` left behind of one drafter. Its identity is that of the stages which made it.

dvc.lock says what ran: the stages that end in the drafter's evaluation, with the hashes of everything that they read
and wrote, and their parameters. These are taken from there and not from params.yaml, which may have been edited
since; and files that are not those which dvc.lock names are refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deepspec.config import Params
from deepspec.drafters.checkpoint import draft_digest
from deepspec.errors import DeepSpecError, os_reason
from deepspec.evaluation.record import Record
from deepspec.files import digest
from deepspec.target.identity import RECORD
from deepspec.tracking import lock
from deepspec.tracking.lock import LOCK, Stages

TARGET, PROMPTS, EXPORTS = "data/target", "data/prompts", "data/exports"
_LARGE = (TARGET, PROMPTS, EXPORTS)  # which a tracked run does not read


@dataclass(frozen=True)
class Result:
    """One drafter's part of the working tree at `root`.

    Args:
        stages: stage name → its entry of dvc.lock, for all that the drafter's results were made from.
        outs: path → MD5 of what these stages wrote, and of the report's pages.
        params: as those stages had them.
    """

    root: Path
    drafter: str
    stages: Stages
    outs: dict[str, str]
    params: Params
    record: Record

    @property
    def key(self) -> str:
        """Return the key of the tracked run: another one as soon as any of the stages read or wrote something else."""
        return digest(json.dumps(self.stages, sort_keys=True))

    @property
    def work(self) -> Path:
        """Return the folder of unfinished work, on the data's own disk: nothing large is copied to another one."""
        return self.root / ".deepspec"

    @property
    def target(self) -> Path:
        return self.root / TARGET

    @property
    def draft(self) -> Path:
        return self.root / "data/drafts" / self.drafter

    @property
    def exports(self) -> Path:
        return self.root / EXPORTS / self.drafter

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
        path = self.root / "reports/train" / f"{self.drafter}.jsonl"
        return [_parsed(path, line) for line in _text(path).splitlines()]

    @property
    def model_name(self) -> str:
        """Under which its versions are registered."""
        return model_name(self.params.target.source, self.drafter)

    def names(self, path: Path) -> bool:
        """Check whether dvc.lock names a file, relative to the root, or the directory that it is in."""
        return any(str(place) in self.outs for place in (path, *path.parents))

    def check(self, place: str) -> None:
        """Check that what the stages wrote at `place` or below is still what they wrote.

        Raises:
            DeepSpecError: a file is missing, cannot be read, or is another one.
        """
        for path, md5 in self.outs.items():
            if path == place or path.startswith(f"{place}/"):
                lock.check(self.root / path, md5)


def read_result(drafter: str, root: str | Path = ".") -> Result:
    """Read and check the drafter's results.

    Raises:
        DeepSpecError: it was not trained and evaluated by `dvc repro`, or something was changed since.
    """
    root = Path(root)
    everything = lock.read_lock(root / LOCK)
    stages = lock.lineage(everything, drafter)
    outs = lock.outputs(everything, *stages, lock.REPORT)
    read = {path: md5 for path, md5 in outs.items() if not path.startswith(_LARGE)}
    for path, md5 in read.items():
        if not md5.endswith(".dir"):
            lock.check(root / path, md5)
    record = Record.read(root / "reports/eval" / f"{drafter}.json")
    result = Result(root, drafter, stages, outs, lock.locked_params(stages, drafter), record)
    if not result.draft.is_dir():
        raise DeepSpecError(f"{result.draft}: no such draft; get it with `dvc pull` or `dvc repro`")
    try:
        found = draft_digest(result.draft)
    except OSError as error:
        raise DeepSpecError(f"{result.draft}: cannot be read: {os_reason(error)}") from None
    if found != record.draft_digest:
        raise DeepSpecError(
            f"{result.draft}: is draft {found}, but {record.draft_digest} was evaluated; run `dvc repro`"
        )
    for path, md5 in read.items():
        if md5.endswith(".dir"):
            lock.check(root / path, md5)
    return result


def target_digest(directory: Path) -> str:
    """Return the digest that a target's directory was written with; its files are those of dvc.lock or are not."""
    found = read_json(directory / RECORD).get("digest")
    if not isinstance(found, str):
        raise DeepSpecError(f"{directory / RECORD}: names no target; run `dvc repro`")
    return found


def model_name(source: str, drafter: str) -> str:
    """Name the model: `embedded:smollm2-135m-instruct`, `dspark` → `deepspec-smollm2-135m-instruct-dspark`.

    Of a hub id or directory the last part; whether it is the same target, digests say.
    """
    target = source.removeprefix("embedded:").rstrip("/").rsplit("/", 1)[-1]
    return "-".join(["deepspec", re.sub(r"[^a-z0-9.]+", "-", target.lower()), drafter])


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DeepSpecError: it is missing, cannot be read, or is something else.
    """
    return _parsed(path, _text(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DeepSpecError(f"{path}: no such file; run `dvc repro`") from None
    except OSError as error:
        raise DeepSpecError(f"{path}: cannot be read: {os_reason(error)}") from None
    except ValueError as error:
        raise DeepSpecError(f"{path}: not text: {error}") from None


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DeepSpecError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise DeepSpecError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found

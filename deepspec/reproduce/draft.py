"""One draft that was trained again, beside the one that was published: its weights, its history, and what it read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deepspec.errors import DeepSpecError
from deepspec.git import git_or_none
from deepspec.provenance import provenance
from deepspec.reproduce import tolerance
from deepspec.reproduce.checkout import Pipeline, Stage, Work
from deepspec.reproduce.outcome import Outcome
from deepspec.reproduce.tolerance import EXACT, Difference, Row

_DRAFTS = "data/drafts/"


def draft_of(stage: Stage) -> str | None:
    """Return the draft that a stage trains, `dspark` or `seed-0/dspark`; None for another stage."""
    return next((path.split(_DRAFTS, 1)[1] for path in stage.kept if _DRAFTS in path), None)


def judge_draft(
    work: Work, pipeline: Pipeline, todo: list[str], records: Mapping[str, Mapping[str, Any]]
) -> Outcome:
    """Compare the draft and what was made on the way with the dvc.lock, the record and the history of the commit.

    Weights and data must be the same to the byte where packages, CPU and data are; elsewhere the draft is judged by
    what training says of it, within the tolerance of the table.
    """
    stages = [stage for stage in pipeline.stages if stage.address in todo]
    (name, folder) = next(
        (draft, path)
        for stage in reversed(stages)
        if (draft := draft_of(stage))
        for path in stage.kept
        if _DRAFTS in path
    )
    record = records.get(name, {})
    facts = _facts(record)
    rows = [
        _byte_for_byte(path, md5, _locked(work, stage, path), facts)
        for stage in stages
        for path, md5 in stage.kept.items()
        if _DRAFTS not in path
    ]
    if expected := record.get("draft_digest"):
        rows.append(_byte_for_byte(f"{name}.weights", expected, _digest(work.root / folder), facts))
    then, now = (_last(text) for text in _histories(work, pipeline, name))
    exact = all(row.matches for row in rows)
    for figure in ("heldout_tau", "loss"):
        if figure in then:
            old, new = then[figure], now.get(figure)
            rows.append(tolerance.one(f"{name}.{figure}", old, new, exact))
    if not rows:
        raise DeepSpecError(
            f"{work.settings.tag} has neither a record nor a history of {name} to compare with"
        )
    return Outcome(rows, {name: facts}, [])


def _facts(record: Mapping[str, Any]) -> list[Difference]:
    """List what is another machine or package than when the draft was measured."""
    made = record.get("provenance")
    return tolerance.differences({"provenance": made}, {"provenance": provenance()}) if made else []


def _byte_for_byte(name: str, then: str, now: str | None, facts: list[Difference]) -> Row:
    """Judge a digest: another one is a failure only where nothing else was other."""
    if then == now or now is None:
        return Row(name, then, now, EXACT, then == now)
    differs = any(fact.decides for fact in facts)
    return Row(
        name, then, now, "machine or packages differ" if differs else EXACT, None if differs else False
    )


def _locked(work: Work, stage: Stage, path: str) -> str | None:
    """Return the MD5 of what the stage wrote now, from the clone's dvc.lock."""
    lock = work.root / Path(stage.address.rpartition(":")[0]).with_suffix(".lock")
    entry = yaml.safe_load(lock.read_text())["stages"].get(stage.name, {})
    folder = lock.parent.relative_to(work.root)
    return next((out["md5"] for out in entry.get("outs", []) if str(folder / out["path"]) == path), None)


def _digest(folder: Path) -> str:
    from deepspec.drafters.checkpoint import draft_digest

    return draft_digest(folder)


def _histories(work: Work, pipeline: Pipeline, name: str) -> tuple[str, str]:
    """Return the training history of the commit and that of now."""
    path = next((path for path in pipeline.in_git if path.endswith(f"reports/train/{name}.jsonl")), None)
    if path is None or not (work.root / path).is_file():
        return "", ""
    return git_or_none(work.root, "show", f"{work.commit}:{path}") or "", (work.root / path).read_text()


def _last(history: str) -> dict[str, Any]:
    """Return the last value of each figure of a training history."""
    found: dict[str, Any] = {}
    for line in history.splitlines():
        found |= {key: value for key, value in json.loads(line).items() if value is not None}
    return found

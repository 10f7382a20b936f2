"""`deepspec track`: a finished run of the pipeline into MLflow, one run a drafter, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Param, Run, RunStatus, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

from deepspec.tracking import figures
from deepspec.tracking.lock import LOCK
from deepspec.tracking.result import Result
from deepspec.tracking.store import KEY, Store

_FINISHED = RunStatus.to_string(RunStatus.FINISHED)
_PARAMS, _METRICS = 100, 1000  # that MLflow takes in one batch


@dataclass(frozen=True)
class Tracked:
    run_id: str
    new: bool  # False: it was there, and nothing was written
    link: str


def track(result: Result, store: Store) -> Tracked:
    """Log the result, unless it is logged.

    Each write is one that may be repeated, so a run that a killed call left half-written is written again, in place.
    """
    run = find_run(result, store)
    if run is None:
        name = f"{result.drafter} {(result.record.provenance.git_commit or 'no commit')[:7]}"
        run = store.client.create_run(
            store.experiment_id, tags={MLFLOW_RUN_NAME: name, KEY: result.key}, run_name=name
        )
    run_id = run.info.run_id
    link = store.link("experiments", store.experiment_id, "runs", run_id)
    if run.info.status == _FINISHED:
        return Tracked(run_id, False, link)
    _log(result, store.client, run_id, run.info.start_time)
    store.client.set_terminated(run_id, _FINISHED)
    return Tracked(run_id, True, link)


def find_run(result: Result, store: Store) -> Run | None:
    """Find the run with the result's key, a finished one before others."""
    runs = store.client.search_runs(
        [store.experiment_id], f"tags.{KEY} = '{result.key}'", order_by=["attributes.start_time ASC"]
    )
    return min(runs, key=lambda run: run.info.status != _FINISHED, default=None)


def artifact_files(result: Result) -> Iterator[Path]:
    """Yield files relative to the root: the drafter's own records and what is about all of them.

    What a stage writes is taken if dvc.lock names it, and `read_result` has checked it; exports made by hand and
    records of serving are of no stage.
    """
    name, root = result.drafter, result.root
    patterns = (
        "reports/*.*",
        "reports/plots/*",
        f"reports/train/{name}.jsonl",
        f"reports/eval/{name}.*",
        "data/distill/manifest.json",
        f"data/features/{name}.json",
        f"data/drafts/{name}/*.json",
    )
    by_hand = (LOCK, "params.yaml", f"reports/export/{name}.*", f"reports/serve/{name}-*")
    for pattern in (*by_hand, *patterns):
        for path in sorted(root.glob(pattern)):
            if path.is_file() and (pattern in by_hand or result.names(path.relative_to(root))):
                yield path.relative_to(root)


def _log(result: Result, client: MlflowClient, run_id: str, now_ms: int) -> None:
    tags = [RunTag(name, value) for name, value in figures.tags(result).items()]
    client.log_batch(run_id, tags=tags)
    for params in _batches([Param(*pair) for pair in figures.parameters(result).items()], _PARAMS):
        client.log_batch(run_id, params=params)
    for metrics in _batches(figures.metrics(result, now_ms), _METRICS):
        client.log_batch(run_id, metrics=metrics)
    client.log_inputs(run_id, figures.datasets(result))
    for path in artifact_files(result):
        folder = path.parent.as_posix()
        client.log_artifact(run_id, str(result.root / path), None if folder == "." else folder)


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

"""The pipeline as a flow: one task for each stage that DVC reports, in DVC's order.

    python -m flows.pipeline          # once, now; `make up` and `flows/serve.py` do it on a schedule

A run works in a clone of its own (`flows/workspace.py`) and pushes what came of it to the branch `runs/<flow run id>`
of the repository it was cloned from.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, get_client, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed, Crashed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.command import CommandFailed, UserMistake, cancel, follow
from flows.graph import Stage, describe, read_graph
from flows.progress import ProgressArtifact, best_effort
from flows.setup import GPU_TAG, ensure_limit
from flows.workspace import Workspace, metrics_before, publish, remember, workspace

RETRIES = 3
RETRY_DELAY_S = 10.0  # doubled each time
AT_ONCE = 8  # tasks started at once; the limit on the tag says how many of them compute
HOME = Path(os.environ.get("DEEPSPEC_RUNS", ".deepspec/runs"))
DONE_ALREADY = re.compile(r"^Stage '.+' (didn't change, skipping|is cached - skipping run)")


RUNNER: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=AT_ONCE)


@flow(name="pipeline", task_runner=RUNNER)
def pipeline(
    repository: str = ".",
    ref: str = "HEAD",
    overrides: dict[str, Any] | None = None,
    track: bool = True,
    retries: int = RETRIES,
    retry_delay_s: float = RETRY_DELAY_S,
    stage_hours: float = 24.0,
) -> State:
    """Run what has changed at a git ref, in a clone, and push the results to `runs/<flow run id>`.

    Overrides are not handed to `dvc exp run`, whose experiment would hide the stages from Prefect: DVC's own code for
    `-S` writes them into the clone's params.yaml, every stage sees them there, and the run's commit records the file
    and, in its message, the overrides.

    Args:
        repository: a path or a URL that git can clone and push to.
        ref: a branch, a tag or a commit; HEAD is the commit of the repository's checkout.
        overrides: dotted keys of params.yaml and their values, as for `dvc exp run -S key=value`.
        track: log the finished run to MLflow, if `MLFLOW_TRACKING_URI` says where.
        retries: of a stage that failed for no fault of the user; the first after `retry_delay_s`, then twice that.
        stage_hours: after which a stage is stopped, and how long a run waits for another one in the same clone.
    """
    logger, overrides = get_run_logger(), overrides or {}
    ensure_limit()
    try:
        with workspace(repository, ref, overrides, flow_run.id, HOME, stage_hours, logger.info) as work:
            _close(work.previous)
            title = describe(work.root, work.name, work.base)
            _rename(title)
            logger.info("%s: %s, in the clone %s", ref, work.base, work.root)
            failed = _run_stages(work, retries, retry_delay_s, stage_hours)
            if failed:
                return Failed(message=failed)
            publish_run(work, title, overrides)
            results(work)
            if track and os.environ.get("MLFLOW_TRACKING_URI") and (work.root / "deepspec/tracking").is_dir():
                track_run(work)
    except UserMistake as mistake:
        return Failed(message=str(mistake))
    except BaseException:
        cancel()
        raise
    return Completed(message=f"{work.branch}: {title}")


def _run_stages(work: Workspace, retries: int, delay_s: float, hours: float) -> str | None:
    """One task a stage, each after those it depends on. Why the run failed, or None."""
    delays = [delay_s * 2**i for i in range(retries)]
    futures: dict[str, PrefectFuture] = {}
    for stage in read_graph(work.root):
        started = run_stage.with_options(
            tags={GPU_TAG} if stage.heavy else set(), retries=retries, retry_delay_seconds=delays
        )
        before = [futures[name] for name in stage.after]
        futures[stage.name] = started.submit(stage, work, hours, wait_for=before, return_state=False)
    for future in futures.values():
        future.wait()
    told = [
        f"{name}: {_reason(future.state)}"
        for name, future in futures.items()
        if future.state.type in (StateType.FAILED, StateType.CRASHED)
    ]
    return "; ".join(told) or None


def _reason(state: State) -> str:
    """What the command said, without Prefect's words around it."""
    return re.sub(
        r"^.*?(?:UserMistake|CommandFailed): ", "", state.message or state.name or "", flags=re.DOTALL
    )


def _worth_retrying(_task, _run, state: State) -> bool:
    return not isinstance(state.result(raise_on_failure=False), UserMistake)


@task(
    task_run_name="{stage.name}",
    cache_policy=NO_CACHE,
    retry_condition_fn=_worth_retrying,
    retry_jitter_factor=0.1,
)
def run_stage(stage: Stage, work: Workspace, hours: float) -> State:
    """`dvc repro --single-item` of a stage whose dependencies are up to date.

    Stages of one clone may run at once: DVC lets go of its repository lock while a stage's command runs, and
    `--wait-for-lock` waits for it before and after (it belongs to another stage of this very run, or to nobody).
    `is busy`, which DVC says of a path that another process uses, is retried as any other failure.
    """
    logger = get_run_logger()
    words = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage.name]
    progress = ProgressArtifact(stage.name)
    try:
        said = follow(words, work.root, logger.info, progress, hours, keep_open=[work.lock])
    except CommandFailed as failed:
        logger.error("%s: %s", stage.name, failed)
        raise
    finally:
        _show_notes(stage, work)
    progress.finish()
    if any(map(DONE_ALREADY.match, said)):
        return Completed(name="UpToDate", message="up to date")
    return Completed(message="ran")


def _show_notes(stage: Stage, work: Workspace) -> None:
    """Every Markdown output of a stage, also that of a stage which failed, and links to its pages."""
    with best_effort(f"what {stage.name} wrote"):
        for path in filter(Path.exists, (work.root / out for out in stage.outputs(".md"))):
            create_markdown_artifact(
                path.read_text(encoding="utf-8"), key=slug(path.stem), description=stage.name
            )
        for path in filter(Path.exists, (work.root / out for out in stage.outputs(".html"))):
            where = f"on the worker's machine; committed on the branch {work.branch}"
            create_link_artifact(path.as_uri(), path.name, key=slug(f"{path.stem}-page"), description=where)


@task(task_run_name="metrics", cache_policy=NO_CACHE)
def results(work: Workspace) -> None:
    """The table of metrics beside those of the last run."""
    table = metrics_before(work)
    if table:
        create_table_artifact(table, key="metrics", description="Metrics of this run and of the last one")
    remember(work)


@task(
    task_run_name="push",
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_delay_seconds=[10, 20, 40],
)
def publish_run(work: Workspace, title: str, overrides: dict[str, Any]) -> None:
    commit = publish(work, title, overrides)
    get_run_logger().info("pushed %s to %s", commit, work.branch)


@task(task_run_name="track", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[10, 20])
def track_run(work: Workspace) -> None:
    """`deepspec track`, which is idempotent, and links to the runs in MLflow that it names."""
    words = [sys.executable, "-m", "deepspec.cli", "track"]
    said = follow(words, work.root, get_run_logger().info, keep_open=[work.lock])
    for line in said:
        for link in re.findall(r"https?://\S+", line):
            create_link_artifact(link, line.split(":")[0], key=slug(f"mlflow-{line.split(':')[0]}"))


def slug(text: str) -> str:
    """A key of an artifact: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _rename(name: str) -> None:
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, name=name)


def _close(previous: str | None) -> None:
    """Say of the run that last held this clone that it crashed, if it was killed before it could say so itself."""
    if previous is None or previous == flow_run.id:
        return
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(previous)).state
        except ObjectNotFound:
            return  # another server's
        if state and not state.is_final():
            ended: State = Crashed(message=f"its process is gone; run {flow_run.id} goes on in its clone")
            client.set_flow_run_state(UUID(previous), ended, force=True)


if __name__ == "__main__":
    pipeline()

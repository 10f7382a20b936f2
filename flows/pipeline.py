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
from flows.keeping import tidy
from flows.progress import ProgressArtifact, best_effort
from flows.setup import GPU_TAG, ensure_limit
from flows.workspace import Workspace, metrics_before, publish, remember, uncommitted, workspace

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
    keep: int = 7,
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
        keep: so many clones and branches of runs, and those of as many days, stay; older ones are removed.
        stage_hours: after which a stage is stopped, and how long a run waits for another one in the same clone.
    """
    logger, overrides = get_run_logger(), overrides or {}
    ensure_limit()
    try:
        with workspace(repository, ref, overrides, flow_run.id, HOME, stage_hours, logger.info) as work:
            _close(work.previous)
            title = describe(work.root, work.name, work.base)
            rename(title)
            logger.info("%s: %s, in the clone %s", ref, work.base, work.root)
            if ref == "HEAD" and (said := uncommitted(repository)):
                logger.warning("%s", said)
            failed = _run_stages(work, retries, retry_delay_s, stage_hours)
            if failed:
                return Failed(message=failed)
            there = publish_run(work, title, overrides)
            results(work)
            if track and os.environ.get("MLFLOW_TRACKING_URI") and (work.root / "deepspec/tracking").is_dir():
                track_run(work)
            with best_effort("tidying up"):
                tidy(work, HOME, keep, logger.info)
    except UserMistake as mistake:
        return Failed(message=str(mistake))
    except BaseException:
        cancel()
        raise
    if there:
        return Completed(message=f"nothing changed since {there}: {title}")
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
    """Every Markdown output of a stage, also that of a stage which failed. Its pages are on MLflow (`track_run`)."""
    with best_effort(f"what {stage.name} wrote"):
        for path in filter(Path.exists, (work.root / out for out in stage.outputs(".md"))):
            create_markdown_artifact(
                path.read_text(encoding="utf-8"), key=slug(path.stem), description=stage.name
            )


@task(task_run_name="metrics", cache_policy=NO_CACHE)
def results(work: Workspace) -> None:
    """The metrics that are not those of the last run, or of the commit if this is the first."""
    found = metrics_before(work)
    changed = [row for row in found if row["last"] != row["this"]]
    said = (
        f"{len(changed)} of {len(found)} metrics are others than in the run before, or in the commit at first"
    )
    if changed:
        create_table_artifact(changed, key="metrics", description=said)
    elif found:
        create_markdown_artifact(f"None of {len(found)} metrics changed.", key="metrics", description=said)
    remember(work)


@task(
    task_run_name="push",
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_delay_seconds=[10, 20, 40],
)
def publish_run(work: Workspace, title: str, overrides: dict[str, Any]) -> str | None:
    """Push the results; return where they lie already, if nothing changed."""
    there = publish(work, title, overrides)
    get_run_logger().info("%s", f"nothing changed since {there}" if there else f"pushed to {work.branch}")
    return there


@task(task_run_name="track", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[10, 20])
def track_run(work: Workspace) -> None:
    """`deepspec track`, which is idempotent, and links to the runs in MLflow that it names."""
    words = [sys.executable, "-m", "deepspec.cli", "track"]
    said = follow(words, work.root, get_run_logger().info, keep_open=[work.lock])
    for drafter, link in filter(None, map(tracked, said)):
        create_link_artifact(
            link, drafter, key=slug(f"mlflow-{drafter}"), description=f"The run of {drafter} in MLflow"
        )
        for page in ("report", "validation"):
            if (work.root / f"reports/{page}.html").exists():
                create_link_artifact(
                    f"{link}/artifactPath/reports/{page}.html",
                    f"{page}.html",
                    key=f"{page}-page",
                    description=f"reports/{page}.html of this run, in MLflow; also on the branch of the run",
                )


def tracked(line: str) -> tuple[str, str] | None:
    """Return drafter and link of a line by which `deepspec track` names a run, or None."""
    found = re.match(r"([^\s:]+): tracked\b.*?(https?://\S+)$", line)
    return (found[1], found[2]) if found else None


def slug(text: str) -> str:
    """A key of an artifact: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def rename(name: str) -> None:
    """Name the present flow run."""
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

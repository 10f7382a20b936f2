"""Promotion as a flow: `deepspec register` makes a version, `deepspec promote` asks the gate.

The gate is MLflow's business (`deepspec/tracking`). A refused promotion is a failed run, whose state says which rule
it was.
"""

from __future__ import annotations

import os
import shutil
import sys

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.command import CommandFailed, cancel, follow
from flows.pipeline import HOME, rename
from flows.workspace import Workspace, uncommitted, workspace


@flow(name="promote")
def promote(
    repository: str = ".", ref: str = "HEAD", drafter: str | None = None, rollback: bool = False
) -> State:
    """Register the draft of a finished run and make it the champion, if the gate lets it.

    Args:
        ref: whose results: `runs/<flow run id>` for a run of the pipeline.
        drafter: the default is that of `deepspec register`.
        rollback: give the alias back to the previous champion instead.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return Failed(
            message="MLFLOW_TRACKING_URI is not set: a registry of the clone's own would be nobody's"
        )
    chosen = ["--drafter", drafter] if drafter else []
    what = "roll back" if rollback else "promote"
    rename(f"{what} {drafter or 'all drafters'} of {ref}")
    try:
        with workspace(repository, ref, {}, flow_run.id, HOME, say=get_run_logger().info) as work:
            try:
                if rollback:
                    said = deepspec(work, ["promote", "--rollback", *chosen])
                else:
                    deepspec(work, ["register", *chosen])
                    said = deepspec(work, ["promote", *chosen])
            finally:
                if ref.startswith("runs/"):  # asked for once; all of it is in the cache and on the branch
                    shutil.rmtree(work.root, ignore_errors=True)
    except CommandFailed as refused:
        first = uncommitted(repository) if ref == "HEAD" else None
        return Failed(message="; ".join(filter(None, (str(refused), first))))
    except BaseException:
        cancel()
        raise
    return Completed(message=said[-1] if said else "promoted")


@task(task_run_name="deepspec {words[0]}", cache_policy=NO_CACHE)
def deepspec(work: Workspace, words: list[str]) -> list[str]:
    """One command of the registry in the clone; it is not tried again, since a refusal stays one."""
    return follow(
        [sys.executable, "-m", "deepspec.cli", *words],
        work.root,
        get_run_logger().info,
        keep_open=[work.lock],
    )

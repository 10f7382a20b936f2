"""What a Prefect server needs before the first run: the limit on the accelerator, a work pool, the deployments.

    python -m flows.setup             # again and again; what is there stays as it is

`make up` does it. A limit that is missing means no limit at all, so that every run asks for it too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectNotFound

from flows.command import python_path

GPU_TAG = "gpu"
POOL = "local"
DEPLOYMENTS = ("pipeline/nightly", "promote/on-demand")  # of prefect.yaml, those for the process pool
ROOT = Path(__file__).parents[1]


def ensure_limit(slots: int | None = None) -> None:
    """At most `slots` tasks that compute at once, over all runs: one, or what was set before."""
    with get_client(sync_client=True) as client:
        try:
            found = client.read_concurrency_limit_by_tag(GPU_TAG).concurrency_limit
        except ObjectNotFound:
            found = None
        if found is None or slots not in (None, found):
            client.create_concurrency_limit(GPU_TAG, 1 if slots is None else slots)


def ensure_pool() -> None:
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(POOL)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))


def deploy() -> None:
    """Register what prefect.yaml describes."""
    names = [word for name in DEPLOYMENTS for word in ("--name", name)]
    words = [
        sys.executable,
        "-m",
        "prefect",
        "--no-prompt",
        "deploy",
        "--prefect-file",
        "prefect.yaml",
        *names,
    ]
    environment = (
        {"DEEPSPEC_REPOSITORY": str(ROOT)}
        | os.environ
        | {"DEEPSPEC_ROOT": str(ROOT), "PYTHONPATH": python_path(ROOT)}
    )
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: prefect deploy: {(done.stderr or done.stdout).strip()[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gpu-slots", type=int, help="stages that may compute at once (default: 1, or as it is)"
    )
    flags = parser.parse_args()
    if flags.gpu_slots is not None and flags.gpu_slots < 1:
        parser.error(f"--gpu-slots must be >= 1, found {flags.gpu_slots}")
    ensure_limit(flags.gpu_slots)
    ensure_pool()
    deploy()
    print(f"limit on {GPU_TAG!r}, work pool {POOL!r}, deployments {', '.join(DEPLOYMENTS)}")


if __name__ == "__main__":
    main()

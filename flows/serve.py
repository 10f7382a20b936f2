"""Schedules on one machine, without a work pool: `prefect server start`, then `python -m flows.serve`.

python -m flows.serve --cron '0 2 * * *' -S pipeline=[dspark] -S train.steps=640
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, cast

import yaml
from httpx import HTTPError
from prefect import serve
from prefect.schedules import Cron

from deepspec.entry import guarded
from deepspec.errors import DeepSpecError
from flows.pipeline import pipeline
from flows.promote import promote
from flows.setup import ensure_limit

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment


def parse(settings: list[str]) -> dict:
    """`key=value` → {key: value}, the value read as YAML."""
    for setting in settings:
        if "=" not in setting:
            raise DeepSpecError(f"-S {setting}: expected key=value")
    try:
        return {
            key: yaml.safe_load(value) for key, _, value in (setting.partition("=") for setting in settings)
        }
    except yaml.YAMLError as error:
        raise DeepSpecError(f"-S: not YAML: {' '.join(str(error).split())}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repository", default=".", help="a path or URL to clone (default: here)")
    parser.add_argument("--ref", default="HEAD", help="branch, tag or commit (default: %(default)s)")
    parser.add_argument("--cron", default="0 2 * * *", help="when (default: every night at two, UTC)")
    parser.add_argument(
        "-S", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="override"
    )
    flags = parser.parse_args()

    def run() -> None:
        where = {"repository": flags.repository, "ref": flags.ref}
        overrides = parse(flags.settings)
        try:
            Cron(flags.cron)
        except ValueError as error:
            raise DeepSpecError(f"--cron {flags.cron!r}: {' '.join(str(error).split())}") from None
        try:
            ensure_limit()
        except (RuntimeError, OSError, HTTPError) as error:
            raise DeepSpecError(
                f"no Prefect server answers ({' '.join(str(error).split())[:200]}); start it with "
                "`prefect server start`, and name it in PREFECT_API_URL"
            ) from None
        made = (
            pipeline.to_deployment("nightly", cron=flags.cron, parameters={**where, "overrides": overrides}),
            promote.to_deployment("on-demand", parameters=where),
        )
        serve(*(cast("RunnerDeployment", each) for each in made), limit=4)  # no coroutine outside a loop

    raise SystemExit(guarded(run))


if __name__ == "__main__":
    main()

"""Resolve the target of params.yaml (embedded, a directory or a hub id) into data/target."""

from __future__ import annotations

import argparse

from deepspec.config import Params
from deepspec.stages.common import stage


def main(params: Params, flags: argparse.Namespace) -> None:
    from deepspec.target.model import resolve_target

    target = params.target
    resolve_target(target.source, target.revision, target.dtype, "data/target")
    print(f"data/target: {target.source}, {target.dtype}")


if __name__ == "__main__":
    stage(main)

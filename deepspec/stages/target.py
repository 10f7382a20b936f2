"""Resolve the target of params.yaml (embedded, a directory or a hub id) into data/target.

It is tested against transformers' own forward, and the drafters of the pipeline are tried on its sizes: what cannot be
decoded or distilled is refused here, before anything is paid for.
"""

from __future__ import annotations

import argparse

from deepspec.config import Params
from deepspec.errors import DeepSpecError
from deepspec.stages.common import stage


def main(params: Params, flags: argparse.Namespace) -> None:
    from deepspec.drafters.suitable import refusals
    from deepspec.target.model import load_target, resolve_target

    target = params.target
    verdict = resolve_target(target.source, target.revision, target.dtype, "data/target")
    print(f"data/target: {target.source}, {target.dtype}; {verdict.summary}")
    drafters = {name: params.drafters[name] for name in params.pipeline}
    refused = refusals(load_target("data/target", device="cpu"), drafters)
    if refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise DeepSpecError(f"this target cannot have drafters of the pipeline: {reasons}")


if __name__ == "__main__":
    stage(main)

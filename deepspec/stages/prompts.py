"""Build the training prompts: data/prompts/train.jsonl and its manifest."""

from __future__ import annotations

import argparse
import sys

from deepspec.config import Params
from deepspec.prompts.build import build_prompts, write_prompts
from deepspec.stages.common import stage
from deepspec.tasks.task import evaluation_texts

OUT = "data/prompts"


def main(params: Params, flags: argparse.Namespace) -> None:
    prompts = build_prompts(
        params.prompts,
        params.seed,
        evaluation_texts(params.evaluate.tasks, params.evaluate.tasks_dir),
        target=_target() if params.prompts.mix.get("magpie", 0) > 0 else None,
        batch_size=params.generate.batch_size,
    )
    write_prompts(prompts, OUT)
    for note in prompts.manifest["notes"]:
        print(f"warning: {note}", file=sys.stderr)
    counts = ", ".join(f"{name} {n['accepted']}" for name, n in prompts.manifest["sources"].items())
    rejected = sum(prompts.manifest["rejected"].values())
    print(f"{len(prompts.rows)} prompts in {OUT}/train.jsonl ({counts}); {rejected} candidates rejected")


def _target():
    """Load the target only where it writes prompts: the other sources need no torch."""
    from deepspec.target.model import load_target

    return load_target("data/target")


if __name__ == "__main__":
    stage(main)

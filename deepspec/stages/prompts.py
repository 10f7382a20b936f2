"""Build the training prompts: data/prompts/train.jsonl and its manifest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from deepspec.config import Params
from deepspec.stages.common import stage
from deepspec.tasks.task import evaluation_texts

if TYPE_CHECKING:
    from deepspec.prompts.build import PromptSet

OUT = "data/prompts"


def main(params: Params, flags: argparse.Namespace) -> None:
    from deepspec.prompts.build import build_prompts, write_prompts

    build = partial(
        build_prompts,
        params.prompts,
        params.seed,
        evaluation_texts(params.evaluate.tasks, params.evaluate.tasks_dir),
        batch_size=params.generate.batch_size,
    )
    if params.prompts.mix.get("magpie", 0) <= 0:
        prompts = build()
    elif params.target.engine == "vllm":
        prompts = _with_vllm(params, build)
    else:
        prompts = build(target=_target())
    write_prompts(prompts, OUT)
    for note in prompts.manifest["notes"]:
        print(f"warning: {note}", file=sys.stderr)
    counts = ", ".join(f"{name} {n['accepted']}" for name, n in prompts.manifest["sources"].items())
    rejected = sum(prompts.manifest["rejected"].values())
    print(f"{len(prompts.rows)} prompts in {OUT}/train.jsonl ({counts}); {rejected} candidates rejected")


def _with_vllm(params: Params, build: Callable[..., PromptSet]) -> PromptSet:
    from deepspec.stages.body import answering
    from deepspec.target.ends import load_ends

    target = load_ends("data/target")
    length = len(target.user_prefix_ids()) + params.prompts.magpie.max_new_tokens
    with answering(params, target, length) as decode:
        return build(target=target, decode=decode)


def _target():
    """Load the target only where it writes prompts: the other sources need no torch."""
    from deepspec.target.model import load_target

    return load_target("data/target")


if __name__ == "__main__":
    stage(main)

"""The target answers every training prompt: data/prompts/train.jsonl becomes data/distill."""

from __future__ import annotations

import argparse

from deepspec.config import Params
from deepspec.stages.common import stage


def main(params: Params, flags: argparse.Namespace) -> None:
    from deepspec.answers.generate import generate_data, process_state
    from deepspec.stages.body import answering
    from deepspec.target.model import load_where_it_runs
    from deepspec.training.keeping import keeper

    state = process_state()
    paths = "data/prompts/train.jsonl", "data/distill"
    target = load_where_it_runs("data/target")
    if params.target.engine == "vllm" and params.generate.engine == "local":
        with answering(params, target, params.generate.max_length) as decode:
            manifest = generate_data(target, params, *paths, decode=decode)
    else:
        manifest = generate_data(target, params, *paths, keeper=keeper(params, target))
    state.destroy_process_group()
    if manifest:
        print(
            f"data/distill: {manifest['rows']} conversations, {manifest['answer_tokens']} answer tokens, "
            f"{manifest['failures']} failures"
        )


if __name__ == "__main__":
    stage(main)

"""The target answers every training prompt: data/prompts/train.jsonl becomes data/distill."""

from __future__ import annotations

import argparse

from deepspec.config import Params
from deepspec.stages.common import stage


def main(params: Params, flags: argparse.Namespace) -> None:
    from deepspec.answers.generate import generate_data, process_state
    from deepspec.target.model import load_target

    state = process_state()
    target = load_target("data/target")
    manifest = generate_data(target, params, "data/prompts/train.jsonl", "data/distill")
    state.destroy_process_group()
    if manifest:
        print(
            f"data/distill: {manifest['rows']} conversations, {manifest['answer_tokens']} answer tokens, "
            f"{manifest['failures']} failures"
        )


if __name__ == "__main__":
    stage(main)

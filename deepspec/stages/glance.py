"""Decode a few of the evaluation's prompts with the lookup alone, which needs no training: a first figure.

`python -m deepspec.stages.glance`, once the target and the prompts are there.
"""

from __future__ import annotations

import argparse

from deepspec.config import Params
from deepspec.stages.common import stage

PROMPTS, TOKENS = 2, 64  # of each task


def main(params: Params, flags: argparse.Namespace) -> None:
    from deepspec.drafters.params import DEFAULT_LOOKUP
    from deepspec.drafters.registry import algorithms
    from deepspec.evaluation.contest import Contest, DecodingConfig
    from deepspec.evaluation.runs import PLAIN, PromptRuns, pair
    from deepspec.evaluation.stats import macro_speedup
    from deepspec.progress import Progress
    from deepspec.target.model import load_target
    from deepspec.tasks.dialogue import first_turn, longest
    from deepspec.tasks.task import load_task

    chosen, lookup = params.evaluate, params.evaluate.decode.lookup or DEFAULT_LOOKUP
    tasks = [load_task(task, PROMPTS, params.seed, chosen.tasks_dir) for task in chosen.tasks]
    drafter = algorithms()[lookup.type].make(lookup)
    contest = Contest(
        load_target("data/target"),
        [DecodingConfig(PLAIN), DecodingConfig("lookup", drafter)],
        TOKENS,
        params.seed,
    )
    prompts = [[task.prompts[i] for i in range(min(PROMPTS, len(task.prompts)))] for task in tasks]
    contest.warm_up(longest(chat for task in prompts for chat in task), [0.0])
    runs: list[list[PromptRuns]] = []
    with Progress("lookup", sum(map(len, prompts))) as progress:
        for task, chats in zip(tasks, prompts, strict=True):
            runs.append([])
            for i, chat in enumerate(chats):
                runs[-1].append(contest.prompt(task.name, first_turn(chat), 0.0, i))
                progress.advance()
    speed = macro_speedup([[pair(row[PLAIN], row["lookup"]) for row in task] for task in runs])
    plain = [row[PLAIN] for task in runs for row in task]
    rate = sum(run.tokens for run in plain) / sum(run.seconds for run in plain)
    print(
        f"First figure: a lookup alone, untrained, decodes {speed}× as fast as plain decoding ({rate:.0f} tokens/s)"
    )
    print(
        f"on {len(plain)} prompts at T = 0 (95 % interval). The evaluation has it again beside the trained draft."
    )


if __name__ == "__main__":
    stage(main)

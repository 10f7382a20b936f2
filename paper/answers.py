"""What the target samples after the tasks' prompts (first turns): the texts on which all drafters are compared.

data/answers.json: task → of each prompt its ids and those of `study.samples` answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from deepspec.decoding.engine import Engine
from deepspec.decoding.request import Request, Sampling
from deepspec.stages.common import stage
from paper.bench import Bench, run
from paper.params import PaperParams

ANSWERS = Path("data/answers.json")
SAMPLING = Sampling(1.0)
BATCH = 32


def measure(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    samples, limit = bench.study.samples, bench.params.evaluate.max_new_tokens
    tasks = {task.name: task for task in bench.tasks}

    def piece(name: str) -> list[dict[str, Any]]:
        prompts, seeds = bench.prompts(tasks[name]), bench.seeds(tasks[name])
        requests = [
            Request(ids, limit, sampling=SAMPLING, seed=seed + n)
            for ids, seed in zip(prompts, seeds, strict=True)
            for n in range(samples)
        ]
        tokens = [done.tokens for done in run(Engine(bench.target, None, batch_size=BATCH), requests)]
        return [
            {"prompt": ids, "answers": tokens[i * samples : (i + 1) * samples]}
            for i, ids in enumerate(prompts)
        ]

    return bench.work.do("answers", list(tasks), piece)


def read() -> dict[str, list[dict[str, Any]]]:
    return json.loads(ANSWERS.read_text())


def main(params: PaperParams, flags: argparse.Namespace) -> None:
    study = params.study
    bench = Bench(params, {}, study.texts, __file__, study.samples, params.evaluate.max_new_tokens)
    bench.write(ANSWERS, measure(bench))


if __name__ == "__main__":
    stage(main, params=PaperParams)

"""For Table 1 and Figures 2 to 4: rounds at T = 1 without a draw of the draft, on answers that the target sampled.

Standard speculative sampling of chains, in expectation over what is drafted (`evaluation/expected.py`), on the same texts
for all drafters.

reports/expected/seed-<n>.json, and ablation-<name>.json of each of `study.ablations`:
    drafters   drafter → task → of each prompt, summed over its `study.samples` answers
        tokens
        rounds           of blocks cut to 1 … γ tokens
        reached, stood   of whole blocks: rounds that drafted position 1 … γ, all before having stood; that stood there
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from deepspec.config import Params
from deepspec.decoding.engine import Engine
from deepspec.decoding.request import Request, Sampling
from deepspec.errors import DeepSpecError, nearest
from deepspec.evaluation.expected import Text, chances, rounds
from deepspec.files import write_json
from deepspec.stages.common import stage
from deepspec.target import Target
from paper.bench import DRAFTS, Bench, trained
from paper.section import study_of

BATCH = 32
SAMPLING = Sampling(1.0)
DIGITS = 5


def answers(
    target: Target, prompts: list[list[int]], seeds: list[int], samples: int, limit: int
) -> list[Text]:
    """`samples` of each prompt, one after the other."""
    requests = iter(
        [
            Request(ids, limit, SAMPLING, seed + n, id=(i, n))
            for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True))
            for n in range(samples)
        ]
    )
    found = {}
    for generation in Engine(target, None, BATCH).run(lambda: next(requests, None)):
        if generation.error:
            raise DeepSpecError(f"prompt {generation.id[0]}: {generation.error}")
        found[generation.id] = Text(generation.prompt_ids, generation.tokens)
    return [found[key] for key in sorted(found)]


def summed(tables: Sequence[Any]) -> dict[str, Any]:
    """Of the chances [tokens, γ] of one prompt's answers."""
    lengths = range(1, tables[0].shape[1] + 1)
    cut = [[rounds(table, length) for length in lengths] for table in tables]
    parts = {
        "rounds": [[own.total for own in by_length] for by_length in cut],
        "reached": [by_length[-1].reached for by_length in cut],
        "stood": [by_length[-1].stood for by_length in cut],
    }
    sums = {key: np.round(np.sum(values, axis=0), DIGITS).tolist() for key, values in parts.items()}
    return {"tokens": sum(len(table) for table in tables), **sums}


def measure(bench: Bench) -> dict[str, Any]:
    samples, limit = bench.study.samples, bench.params.evaluate.max_new_tokens

    @cache
    def texts(place: int) -> list[Text]:
        task = bench.tasks[place]
        return answers(bench.target, bench.prompts(task), bench.seeds(task), samples, limit)

    pieces = {
        f"{name} {task.name}": (name, place)
        for place, task in enumerate(bench.tasks)
        for name in bench.drafts
    }

    def piece(key: str) -> Any:
        name, place = pieces[key]
        found = chances(bench.target, bench.drafters[name], texts(place), SAMPLING, BATCH)
        return [summed(found[i : i + samples]) for i in range(0, len(found), samples)]

    done = bench.work.do("expected", list(pieces), piece)
    drafters = {
        name: {task.name: done[f"{name} {task.name}"] for task in bench.tasks} for name in bench.drafts
    }
    return {"temperature": SAMPLING.temperature, "max_new_tokens": limit, "drafters": drafters}


def add_flags(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, help="the pipeline's drafts of one of study.seeds")
    which.add_argument("--ablation", metavar="NAME", help="the draft of one of study.ablations")


def main(params: Params, flags: argparse.Namespace) -> None:
    study = study_of(params)
    if name := flags.ablation:
        if name not in study.ablations:
            known = ", ".join(study.ablations) or "none"
            raise DeepSpecError(
                f"--ablation {name}: study.ablations has {known}{nearest(name, study.ablations)}"
            )
        record, drafts = f"ablation-{name}", {name: DRAFTS / "ablations" / name}
    else:
        record, drafts = f"seed-{flags.seed}", trained(params, flags.seed, params.pipeline)
    settings = study.samples, params.evaluate.max_new_tokens
    bench = Bench(params, drafts, study.texts, __file__, *settings)
    found = measure(bench)
    if bench.work.main:
        write_json(Path(f"reports/expected/{record}.json"), found)
    bench.work.remove()


if __name__ == "__main__":
    stage(main, add_flags)

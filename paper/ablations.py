"""What one change to a drafter is worth: τ of its blocks at T = 1, under standard speculative sampling.

The drafts of `study.ablations` are of the first seed, so a ratio is to its partner's draft of that seed, on the same
prompts. What seeds differ by is taken from the pipeline's drafters (`study.Spread`) and is in the interval.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from deepspec.config import Params
from paper.section import study_of
from paper.study import MEAN, Bootstrap, Study, Tables

TEMPERATURE = 1.0

Records = list[dict[str, Any]]  # of reports/blocks: each seed's in the study's order, then the ablations'


def read(params: Params, root: Path) -> Records:
    study = study_of(params)
    names = [f"seed-{seed}" for seed in study.seeds] + [f"ablation-{name}" for name in study.ablations]
    return [json.loads((root / f"reports/blocks/{name}.json").read_text()) for name in names]


def drafters(params: Params) -> list[str]:
    return [*params.pipeline, *study_of(params).ablations]


def tables(records: Records, name: str, length: int) -> Tables:
    """Tokens and rounds of blocks cut to `length`, of the seeds there are."""
    of_seeds = [record["lengths"][name][str(length)] for record in records if name in record["lengths"]]
    return {task: np.array([own[task] for own in of_seeds], dtype=float) for task in of_seeds[0]}


def changes(params: Params) -> Iterator[tuple[str, str, str]]:
    """Ablation, a drafter named before it that is like it but for one key, and that key."""
    before = {name: params.drafters[name].model_dump() for name in params.pipeline}
    for name in study_of(params).ablations:
        own = params.drafters[name].model_dump()
        for partner, other in before.items():
            keys = [key for key in own if key not in other or other[key] != own[key]]
            if len(keys) == 1 and len(other) == len(own):
                yield name, partner, keys[0]
        before[name] = own


def ratios(study: Study, records: Records) -> list[dict[str, Any]]:
    """A row for each of `changes`: τ of whole blocks, and its ratio to the partner's."""
    rows, tasks = [], study.groups[MEAN]
    spread = replace(study.spread(TEMPERATURE, tasks), seeds=1)
    first = [records[0], *records[len(study.params.study.seeds) :]]
    for name, partner, key in changes(study.params):
        own, other = (study.params.drafters[each] for each in (name, partner))
        ours = tables(first, name, own.block_size)
        theirs = tables(first, partner, other.block_size)
        bootstrap = Bootstrap({task: table.shape[1] for task, table in ours.items()})
        values = bootstrap.tau(ours, tasks) / bootstrap.tau(theirs, tasks)
        ratio = bootstrap.interval(values, tasks, spread.half(float(values[0]), drafters=2))
        rows.append(
            {
                "drafter": name,
                "partner": partner,
                "key": key,
                "values": [drafter.model_dump()[key] for drafter in (own, other)],
                "tau": asdict(bootstrap.tau_interval(ours, tasks, spread)),
                "ratio": asdict(ratio),
                "prompts": max(table.shape[1] for table in ours.values()),
            }
        )
    return rows

"""The trained draft alone, whole blocks, no lookup and no controller: what it was trained for, and no more.

Acceptance by position is comparable between drafters here alone (DSpark, Figure 2): a lookup that answers first takes
the easy places away, and a controller cuts what looks poor. The same blocks tell what the confidence is worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deepspec.decoding.calibration import TEMPERATURES, Blocks, collect, quality, survival
from deepspec.decoding.drafter import Drafter
from deepspec.evaluation import parts
from deepspec.evaluation.runs import prompt_seed
from deepspec.evaluation.summarise import accept_rates
from deepspec.target.model import Target
from deepspec.tasks.dialogue import prompt_ids
from deepspec.tasks.task import Task


def decode_blocks(
    target: Target, drafter: Drafter, task: Task, mode: str, max_new_tokens: int, seed: int
) -> dict[str, Any]:
    """Return the blocks of a task's first turns, as JSON holds them; `mode` is one of `TEMPERATURES`."""
    prompts = [prompt_ids(target, chat) for chat in task.prompts]
    seeds = [prompt_seed(seed, task.name, turns, 0) for turns in task.asked]
    blocks = collect(target, drafter, prompts, TEMPERATURES[mode], max_new_tokens, seeds)
    rows = [[None if np.isnan(x) else round(float(x), 4) for x in row] for row in blocks.logits]
    return {"logits": rows, "accepted": blocks.accepted.tolist(), "drafted": blocks.drafted.tolist()}


def from_json(value: Mapping[str, Any]) -> Blocks:
    size = max(map(len, value["logits"]), default=0)
    logits = np.array(value["logits"], dtype=np.float64).reshape(-1, size)  # None → NaN
    return Blocks(logits, *(np.array(value[name], dtype=np.int64) for name in ("accepted", "drafted")))


def acceptance(by_task: Mapping[str, Blocks]) -> dict[str, parts.Blocks]:
    """Return for each task the number of blocks, τ, and acceptance by position."""
    found = {}
    for task, blocks in by_task.items():
        rates, reached = accept_rates(zip(blocks.accepted.tolist(), blocks.drafted.tolist(), strict=True))
        found[task] = parts.Blocks(
            blocks=len(blocks),
            tau=1 + float(blocks.accepted.mean()) if len(blocks) else None,
            accept_rate_by_position=rates,
            reached_by_position=reached,
        )
    return found


def confidence(drafter: Drafter, by_mode: Mapping[str, list[Blocks]]) -> dict[str, parts.Confidence] | None:
    """Quality of the confidence head on prompts it was not calibrated on; None for a drafter that has none."""
    temperatures = drafter.trained.temperatures
    if temperatures is None:
        return None
    found = {}
    for mode, tasks in by_mode.items():
        blocks = tasks[0]
        for other in tasks[1:]:
            blocks = blocks.and_also(other)
        if len(blocks):
            before = survival(blocks.logits)
            after = survival(blocks.logits, temperatures[mode]) if mode in temperatures else before
            found[mode] = parts.Confidence(**quality(blocks, before, after))
    return found or None

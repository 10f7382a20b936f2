"""For Figures 5 and 6: what the confidence is worth, by standard speculative sampling at T = 1.

reports/confidence/seed-<n>.json:
    drafters     drafter → "all" or a domain → ECE, reliability and threshold sweep (`calibration.quality`) of whole
                 blocks, before and after sequential temperature scaling. The temperatures are fitted to the blocks of
                 every other prompt and judged on those of the rest, both ways round.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from deepspec.decoding.calibration import Blocks, as_trained, conditional_logits, fit, quality, survival
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import Engine
from deepspec.decoding.request import Request, Sampling
from deepspec.decoding.round import Round
from deepspec.decoding.shapes import CHAIN
from deepspec.stages.common import stage
from deepspec.target.model import Target
from paper.bench import Bench, run, trained
from paper.params import PaperParams

BATCH = 8
RULE, TEMPERATURE = "standard", 1.0


def decode(
    target: Target, drafter: Drafter, prompts: list[list[int]], seeds: list[int], limit: int
) -> dict[str, Any]:
    """Of each round: the confidences' logits as they were trained, and tokens accepted and drafted."""
    rows: list[list[float]] = []
    counts: list[tuple[int, int]] = []

    def watch(done: Round) -> None:
        if done.proposal.tokens:
            rows.append(conditional_logits(done.proposal.survival or []))
            counts.append((done.accepted, len(done.proposal.tokens)))

    requests = [
        Request(ids, limit, sampling=Sampling(TEMPERATURE), seed=seed)
        for ids, seed in zip(prompts, seeds, strict=True)
    ]
    with as_trained(drafter):
        run(Engine(target, drafter, batch_size=BATCH, tree=CHAIN, verify=RULE, on_round=watch), requests)
    return {"logits": rows, "counts": counts}


def blocks(parts: list[dict[str, Any]], size: int) -> Blocks:
    """Of several results of `decode`."""
    rows = [row for part in parts for row in part["logits"]]
    logits = np.full((len(rows), size), np.nan)
    for into, row in zip(logits, rows, strict=True):
        into[: len(row)] = row
    counts = np.array([pair for part in parts for pair in part["counts"]], dtype=np.int64).reshape(-1, 2)
    return Blocks(logits, counts[:, 0], counts[:, 1])


def judge(halves: dict[str, tuple[Blocks, Blocks]]) -> dict[str, Any]:
    """Quality for each key of `halves` and for "all" of them, each half calibrated by the other's blocks."""
    whole = [_joined([pair[half] for pair in halves.values()]) for half in (0, 1)]
    temperatures = fit(whole[1]), fit(whole[0])
    found = {}
    for name, pair in {"all": tuple(whole), **halves}.items():
        both = _joined(list(pair))
        if not len(both):
            continue
        after = [survival(part.logits, own) for part, own in zip(pair, temperatures, strict=True)]
        found[name] = quality(both, survival(both.logits), np.concatenate(after))
    return found


def _joined(parts: list[Blocks]) -> Blocks:
    first, *others = parts
    for other in others:
        first = first.and_also(other)
    return first


def measure(bench: Bench) -> dict[str, Any]:
    limit = bench.params.evaluate.max_new_tokens
    pieces = {
        f"{name} {task.name} {half}": (name, task, half)
        for name in bench.drafts
        for task in bench.tasks
        for half in (0, 1)
    }

    def piece(key: str) -> Any:
        name, task, half = pieces[key]
        prompts, seeds = bench.prompts(task)[half::2], bench.seeds(task)[half::2]
        return decode(bench.target, bench.drafters[name], prompts, seeds, limit)

    done = bench.work.do("confidence", list(pieces), piece)
    found = {}
    for name in bench.drafts:
        halves = {
            category: tuple(
                blocks(
                    [done[f"{name} {task.name} {half}"] for task in bench.tasks if task.category == category],
                    bench.params.drafters[name].block_size,
                )
                for half in (0, 1)
            )
            for category in dict.fromkeys(task.category for task in bench.tasks)
        }
        found[name] = judge(halves)
    return {"rule": RULE, "temperature": TEMPERATURE, "drafters": found}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, required=True, help="one of study.seeds")


def main(params: PaperParams, flags: argparse.Namespace) -> None:
    study = params.study
    confident = [name for name in params.pipeline if getattr(params.drafters[name], "confidence_head", False)]
    drafts = trained(params, flags.seed, confident)
    bench = Bench(params, drafts, study.prompts, __file__, params.evaluate.max_new_tokens)
    bench.write(Path(f"reports/confidence/seed-{flags.seed}.json"), measure(bench))


if __name__ == "__main__":
    stage(main, add_flags, params=PaperParams)

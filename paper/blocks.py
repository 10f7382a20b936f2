"""For Figures 4 to 6: blocks cut to a length, and the confidence, by standard speculative sampling at T = 1.

reports/blocks/seed-<n>.json, and ablation-<name>.json of each of `study.ablations`:
    lengths      drafter → tokens verified of a block → task → [tokens, rounds] of each prompt
    confidence   drafter → "all" or a domain → ECE, reliability and threshold sweep (`calibration.quality`) of whole
                 blocks, before and after sequential temperature scaling. The temperatures are fitted to the blocks of
                 every other prompt and judged on those of the rest, both ways round.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deepspec.config import Params
from deepspec.decoding.calibration import Blocks, as_trained, conditional_logits, fit, quality, survival
from deepspec.decoding.engine import Engine
from deepspec.decoding.request import Request, Sampling
from deepspec.decoding.tree import Chain, Proposal
from deepspec.drafters.base import Drafter
from deepspec.errors import DeepSpecError
from deepspec.files import write_json
from deepspec.stages.common import stage
from deepspec.target import Target
from paper.bench import DRAFTS, Bench, trained
from paper.section import study_of

BATCH = 8
RULE, TEMPERATURE = "standard", 1.0


def decode(
    target: Target, drafter: Drafter, prompts: list[list[int]], seeds: list[int], length: int, limit: int
) -> dict[str, Any]:
    """Tokens and rounds of each prompt; of each round the confidences' logits as they were trained, tokens accepted and
    drafted."""
    rows: list[list[float]] = []
    counts: list[tuple[int, int]] = []

    def watch(proposal: Proposal, accepted: int) -> None:
        rows.append(conditional_logits(proposal.survival or []))
        counts.append((accepted, len(proposal.tokens)))

    requests = iter(
        [
            Request(ids, limit, Sampling(TEMPERATURE), seed, id=i)
            for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
    )
    engine = Engine(target, drafter, BATCH, Chain(length), RULE, on_round=watch)
    sums = [[0, 0]] * len(prompts)
    with as_trained(drafter):
        for generation in engine.run(lambda: next(requests, None)):
            if generation.error:
                raise DeepSpecError(f"prompt {generation.id}: {generation.error}")
            sums[generation.id] = [generation.stats.committed, generation.stats.rounds]
    return {"sums": sums, "logits": rows, "counts": counts}


def blocks(parts: list[dict[str, Any]], size: int) -> Blocks:
    """Of several results of `decode`."""
    rows = [row for part in parts for row in part["logits"]]
    logits = np.full((len(rows), size), np.nan)
    for into, row in zip(logits, rows, strict=True):
        into[: len(row)] = row
    counts = np.array([pair for part in parts for pair in part["counts"]], dtype=np.int64).reshape(-1, 2)
    return Blocks(logits, counts[:, 0], counts[:, 1])


def confidence(halves: dict[str, tuple[Blocks, Blocks]]) -> dict[str, Any]:
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


def lengths(chosen: list[int], block_size: int) -> Iterator[int]:
    """The study's lengths that a draft can have, and its whole block."""
    yield from sorted({*(n for n in chosen if n < block_size), block_size})


def measure(bench: Bench) -> dict[str, Any]:
    limit = bench.params.evaluate.max_new_tokens
    sizes = {name: bench.params.drafters[name].block_size for name in bench.drafts}
    pieces = {
        f"{name} {n} {task.name} {half}": (name, n, task, half)
        for name, size in sizes.items()
        for n in lengths(bench.study.lengths, size)
        for task in bench.tasks
        for half in (0, 1)
    }

    def piece(key: str) -> Any:
        name, n, task, half = pieces[key]
        prompts, seeds = bench.prompts(task)[half::2], bench.seeds(task)[half::2]
        return decode(bench.target, bench.drafters[name], prompts, seeds, n, limit)

    done = bench.work.do("blocks", list(pieces), piece)
    of_length: dict[str, dict[str, dict[str, list]]] = {}
    for key, (name, n, task, _) in pieces.items():
        of_length.setdefault(name, {}).setdefault(str(n), {}).setdefault(task.name, []).extend(
            done[key]["sums"]
        )
    found = {}
    for name, size in sizes.items():
        if not getattr(bench.params.drafters[name], "confidence_head", False):
            continue
        halves = {
            category: tuple(
                blocks(
                    [
                        done[f"{name} {size} {task.name} {half}"]
                        for task in bench.tasks
                        if task.category == category
                    ],
                    size,
                )
                for half in (0, 1)
            )
            for category in dict.fromkeys(task.category for task in bench.tasks)
        }
        found[name] = confidence(halves)
    return {"rule": RULE, "temperature": TEMPERATURE, "lengths": of_length, "confidence": found}


def add_flags(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, help="the pipeline's drafts of one of study.seeds")
    which.add_argument("--ablation", metavar="NAME", help="the draft of one of study.ablations")


def main(params: Params, flags: argparse.Namespace) -> None:
    study = study_of(params)
    if flags.ablation:
        name, drafts = f"ablation-{flags.ablation}", {flags.ablation: DRAFTS / "ablations" / flags.ablation}
    else:
        name, drafts = f"seed-{flags.seed}", trained(params, flags.seed, params.pipeline)
    bench = Bench(params, drafts, study.prompts, __file__, params.evaluate.max_new_tokens)
    found = measure(bench)
    if bench.work.main:
        write_json(Path(f"reports/blocks/{name}.json"), found)
    bench.work.remove()


if __name__ == "__main__":
    stage(main, add_flags)

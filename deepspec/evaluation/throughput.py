"""Tokens a second of a full batch: plain decoding, verification of fixed length, and DSpark's prefix scheduler.

Every group of prompts is decoded by all configurations on the same seeds (`timing.py`). A group has more prompts than
fit in flight, slots are refilled, and the clock stops when the first slot stays empty.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from deepspec.decoding.cost import CostCurve
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import Engine
from deepspec.decoding.params import make_controller
from deepspec.decoding.request import Generation, Request, Sampling
from deepspec.decoding.shapes import CHAIN, Shape
from deepspec.errors import DeepSpecError
from deepspec.evaluation.contest import DecodingConfig
from deepspec.evaluation.parts import Ratio, Throughput
from deepspec.evaluation.runs import PLAIN
from deepspec.evaluation.stats import Interval, Pair, speedup
from deepspec.evaluation.timing import rotated, timed, warm_up
from deepspec.target.model import Target

FIXED, SCHEDULER, CORRECTED = "fixed", "scheduler", "scheduler, corrected"
_WARM_UP_TOKENS = 24


@dataclass(frozen=True)
class Setting:
    """A place in the table: all configurations meet there."""

    temperature: float
    batch: int


@dataclass(frozen=True)
class BatchRun:
    """One configuration on one group of prompts.

    `budget`: drafted tokens verified per request and round; None without a draft.
    """

    tokens: int
    seconds: float
    rounds: int
    budget: float | None


class FullBatch:
    """Our engine with as many requests in flight as fit; a new one for each run."""

    def __init__(self, target: Target, config: DecodingConfig, batch_size: int):
        self.engine = Engine(
            target,
            config.drafter,
            batch_size=batch_size,
            tree=config.tree,
            verify=config.verify,
            controller=config.controller,
            timed=True,
        )

    def decode(self, requests: Sequence[Request]) -> list[Generation]:
        """Decode until the queue is empty and a slot with it; what is in flight then counts as far as it is.

        Raises:
            DeepSpecError: a request failed.
        """
        waiting = iter(requests)

        def next_request() -> Request:
            request = next(waiting, None)
            if request is None:
                raise _QueueEmptyError
            return request

        results: list[Generation] = []
        with suppress(_QueueEmptyError):
            for result in self.engine.run(next_request):
                results.append(result)
        results += [slot.result() for slot in self.engine.slots]
        if failed := [result.error for result in results if result.error]:
            raise DeepSpecError(f"a prompt failed: {failed[0]}")
        return results

    def prefill_s(self, requests: Sequence[Request], results: list[Generation]) -> float:
        return sum(result.stats.prefill_s for result in results)


class _QueueEmptyError(Exception):
    """A slot is free and no prompt is left: from here on the batch would not be full."""


@dataclass(frozen=True)
class Server:
    """What all runs share."""

    target: Target
    configs: list[DecodingConfig]
    max_new_tokens: int
    seed: int

    def run(self, config: DecodingConfig, setting: Setting, group: list[list[int]]) -> BatchRun:
        """Decode a group of prompts, timed."""
        runtime = FullBatch(self.target, config, setting.batch)
        results, seconds = timed(runtime, self._requests(setting, group, self.max_new_tokens))
        rounds = sum(result.stats.rounds for result in results)
        verified = sum(sum(result.stats.verified) for result in results)
        return BatchRun(
            tokens=sum(len(result.tokens) for result in results),
            seconds=seconds,
            rounds=rounds,
            budget=verified / rounds if config.drafter and rounds else None,
        )

    def warm_up(self, setting: Setting, group: list[list[int]]) -> None:
        """Decode the beginning of a group with every configuration: kernels and caches of this batch size are made."""
        for config in self.configs:
            runtime = FullBatch(self.target, config, setting.batch)
            warm_up([runtime], self._requests(setting, group, _WARM_UP_TOKENS))

    def _requests(self, setting: Setting, group: list[list[int]], limit: int) -> list[Request]:
        """Return a request for each prompt; request i has its own seed, the same for all configurations."""
        sampling = Sampling(setting.temperature)
        return [
            Request(ids, limit, sampling=sampling, seed=self.seed + i, id=i) for i, ids in enumerate(group)
        ]


def configs(
    drafter: Drafter,
    curve: CostCurve,
    lengths: Sequence[int],
    corrected: bool = False,
    tree: Shape = CHAIN,
) -> list[DecodingConfig]:
    """Return plain decoding, chains of each fixed length (the whole block among them) and the scheduler.

    Args:
        tree: what the scheduler verifies parts of.
        corrected: with the scheduler that corrects its curve too.
    """
    within = {min(n, drafter.block_size) for n in (*lengths, drafter.block_size)}
    chains = [
        DecodingConfig(f"{FIXED} {n}", drafter, controller=make_controller("fixed", length=n))
        for n in sorted(within)
    ]
    schedulers = {SCHEDULER: make_controller("scheduler", curve)}
    if corrected:
        schedulers[CORRECTED] = make_controller("scheduler", curve, corrected=True)
    scheduled = [DecodingConfig(name, drafter, tree, None, each) for name, each in schedulers.items()]
    return [DecodingConfig(PLAIN), *chains, *scheduled]


def groups_of(prompts: list[list[int]], size: int, count: int, seed: int) -> list[list[list[int]]]:
    """`count` groups of `size` prompts, shuffled; prompts come again where there are too few."""
    ids = list(prompts)
    random.Random(seed).shuffle(ids)
    return [[ids[(g * size + i) % len(ids)] for i in range(size)] for g in range(count)]


def measure(
    server: Server, setting: Setting, prompts: list[list[int]], groups: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of all configurations at one setting, as JSON holds them; see `from_json`."""
    decoded = groups_of(prompts, 2 * setting.batch, groups, server.seed)
    server.warm_up(setting, decoded[0])
    runs: dict[str, list[dict[str, Any]]] = {config.name: [] for config in server.configs}
    for g, group in enumerate(decoded):
        for config in rotated(server.configs, g):
            runs[config.name].append(asdict(server.run(config, setting, group)))
    return runs


def from_json(runs: dict[str, list[dict[str, Any]]]) -> dict[str, list[BatchRun]]:
    return {name: [BatchRun(**run) for run in own] for name, own in runs.items()}


def compared(runs: list[BatchRun], reference: list[BatchRun]) -> Interval | None:
    """Ratio of tokens a second, paired by group."""
    pairs = zip(reference, runs, strict=True)
    return speedup([Pair(a.seconds, a.tokens, b.seconds, b.tokens) for a, b in pairs])


def best_fixed(runs: dict[str, list[BatchRun]]) -> str:
    """Return the fixed length with the highest rate here: chosen afterwards, as no server could."""
    fixed = [name for name in runs if name.startswith(FIXED)]
    return max(fixed, key=lambda name: sum(r.tokens for r in runs[name]) / sum(r.seconds for r in runs[name]))


def rows(results: dict[Setting, dict[str, list[BatchRun]]]) -> list[Throughput]:
    """Return a row for each setting and configuration."""
    data = []
    for setting, runs in results.items():
        reference = best_fixed(runs)
        for name, own in runs.items():
            budgets = [run.budget for run in own if run.budget is not None]
            data.append(
                Throughput(
                    temperature=setting.temperature,
                    batch=setting.batch,
                    name=name,
                    tokens_per_second=median(run.tokens / run.seconds for run in own),
                    speedup=_ratio(compared(own, runs[PLAIN])),
                    against_best_fixed=_ratio(compared(own, runs[reference])),
                    best_fixed=reference,
                    tau=sum(run.tokens for run in own) / sum(run.rounds for run in own),
                    verified_per_request=sum(budgets) / len(budgets) if budgets else None,
                )
            )
    return data


def _ratio(interval: Interval | None) -> Ratio | None:
    return Ratio(**asdict(interval)) if interval else None

"""Tokens a second of a full batch: plain decoding, verification of fixed length, and DSpark's prefix scheduler.

Every group of prompts is decoded by all contestants one after the other, on the same seeds, and who goes first moves
on with each group. A group has more prompts than fit in flight, slots are refilled, and the clock stops when the
first slot stays empty. Seconds are wall-clock time less the prefill of the target, which all share.
"""

from __future__ import annotations

import random
import time
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
from deepspec.decoding.scheduler import Controller
from deepspec.errors import DeepSpecError
from deepspec.evaluation.record import Ratio, Throughput
from deepspec.evaluation.runs import PLAIN
from deepspec.evaluation.stats import Interval, Pair, speedup
from deepspec.target.model import Target

SCHEDULER = "scheduler"
WARM_UP_TOKENS = 24


@dataclass(frozen=True)
class Setting:
    """A place in the table: all contestants meet there."""

    temperature: float
    batch: int


@dataclass(frozen=True)
class BatchRun:
    """One contestant on one group of prompts. `budget`: drafted tokens verified per request and round; None without
    a draft."""

    tokens: int
    seconds: float
    rounds: int
    budget: float | None


@dataclass(frozen=True)
class Server:
    """What all runs share. `contestants`: name → controller, None for plain decoding."""

    target: Target
    drafter: Drafter
    contestants: dict[str, Controller | None]
    max_new_tokens: int
    seed: int

    def run(self, name: str, setting: Setting, group: list[list[int]], limit: int | None = None) -> BatchRun:
        """Decode a group of prompts; request i of it has its own seed, the same for all contestants."""
        controller = self.contestants[name]
        drafter = self.drafter if controller else None
        engine = Engine(self.target, drafter, batch_size=setting.batch, controller=controller, timed=True)
        sampling = Sampling(setting.temperature)
        waiting = [
            Request(ids, limit or self.max_new_tokens, sampling=sampling, seed=self.seed + i, id=i)
            for i, ids in enumerate(group)
        ]

        def next_request() -> Request:
            if not waiting:
                raise _QueueEmptyError
            return waiting.pop(0)

        results: list[Generation] = []
        began = time.perf_counter()
        with suppress(_QueueEmptyError):
            for result in engine.run(next_request):
                results.append(result)
        seconds = time.perf_counter() - began
        results += [slot.result() for slot in engine.slots]
        if failed := [result.error for result in results if result.error]:
            raise DeepSpecError(f"a prompt failed: {failed[0]}")
        rounds = sum(result.stats.rounds for result in results)
        verified = sum(sum(result.stats.verified) for result in results)
        return BatchRun(
            tokens=sum(len(result.tokens) for result in results),
            seconds=seconds - sum(result.stats.prefill_s for result in results),
            rounds=rounds,
            budget=verified / rounds if controller and rounds else None,
        )


class _QueueEmptyError(Exception):
    """A slot is free and no prompt is left: from here on the batch would not be full."""


def contestants(curve: CostCurve, lengths: Sequence[int], block_size: int) -> dict[str, Controller | None]:
    """Plain decoding, each fixed length (the whole block among them) and the scheduler."""
    within = {min(n, block_size) for n in (*lengths, block_size)}
    fixed = {f"fixed {n}": make_controller("fixed", length=n) for n in sorted(within)}
    return {PLAIN: None, **fixed, SCHEDULER: make_controller("scheduler", curve)}


def groups_of(prompts: list[list[int]], size: int, count: int, seed: int) -> list[list[list[int]]]:
    """`count` groups of `size` prompts, shuffled; prompts come again where there are too few."""
    ids = list(prompts)
    random.Random(seed).shuffle(ids)
    return [[ids[(g * size + i) % len(ids)] for i in range(size)] for g in range(count)]


def measure(
    server: Server, setting: Setting, prompts: list[list[int]], groups: int
) -> dict[str, list[dict[str, Any]]]:
    """All contestants at one setting, as JSON holds them; see `from_json`."""
    names = list(server.contestants)
    decoded = groups_of(prompts, 2 * setting.batch, groups, server.seed)
    for name in names:  # kernels and caches of this batch size are made before the clock starts
        server.run(name, setting, decoded[0], WARM_UP_TOKENS)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for g, group in enumerate(decoded):
        for i in range(len(names)):
            name = names[(g + i) % len(names)]
            runs[name].append(asdict(server.run(name, setting, group)))
    return runs


def from_json(runs: dict[str, list[dict[str, Any]]]) -> dict[str, list[BatchRun]]:
    return {name: [BatchRun(**run) for run in own] for name, own in runs.items()}


def compared(runs: list[BatchRun], reference: list[BatchRun]) -> Interval | None:
    """Ratio of tokens a second, paired by group."""
    pairs = zip(reference, runs, strict=True)
    return speedup([Pair(a.seconds, a.tokens, b.seconds, b.tokens) for a, b in pairs])


def best_fixed(runs: dict[str, list[BatchRun]]) -> str:
    """The fixed length with the highest rate here: chosen afterwards, as no server could."""
    fixed = [name for name in runs if name not in (PLAIN, SCHEDULER)]
    return max(fixed, key=lambda name: sum(r.tokens for r in runs[name]) / sum(r.seconds for r in runs[name]))


def rows(results: dict[Setting, dict[str, list[BatchRun]]]) -> list[Throughput]:
    """Return a row for each setting and contestant."""
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

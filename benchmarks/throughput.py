"""Tokens a second at batch sizes 1, 4, 16: plain decoding, verification of fixed length, and the prefix scheduler.

    python -m benchmarks.throughput --target data/target --drafter data/drafts/dspark --prompts gsm8k.jsonl

One run: every group of prompts is decoded by all contestants one after the other, on the same seeds, and who goes
first moves on with each group. A group has twice as many prompts as fit in flight, slots are refilled, and the clock
stops when the first slot stays empty: throughput is that of a full batch. Seconds are wall-clock time less the prefill
of the target, which all share. The last column counts drafted tokens verified per request and round: the scheduler's
falls as the batch grows (Figure 8 of DSpark), since a verified token is no longer free.

Ratios are of tokens a second, with 95 % intervals of a paired bootstrap over groups. Finished groups are kept in a
work file: a killed benchmark goes on.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.common import (
    REPORTS,
    TASKS,
    WORK_DIR,
    Prompt,
    command_line,
    load_prompts,
    markdown_table,
    work_key,
    write_report,
)
from deepspec.data.progress import Progress
from deepspec.decoding.cost import CostCurve, load_or_measure
from deepspec.decoding.engine import Engine
from deepspec.decoding.request import Generation, Request, Sampling
from deepspec.decoding.scheduler import Controller, make_controller
from deepspec.decoding.tree import Proposal
from deepspec.drafters.base import Drafter
from deepspec.drafters.checkpoint import load_drafter
from deepspec.errors import DeepSpecError
from deepspec.evaluation.stats import Interval, Pair, speedup
from deepspec.evaluation.worklog import WorkLog
from deepspec.profile import parse_batches
from deepspec.target import Target, load_target

PLAIN, SCHEDULER = "plain", "scheduler"
_WARM_UP_TOKENS = 24


@dataclass(frozen=True)
class Setting:
    """A place in the table: all contestants meet there."""

    temperature: float
    batch: int


@dataclass(frozen=True)
class Run:
    """One contestant on one group of prompts. `budget` is None for plain decoding."""

    tokens: int
    seconds: float
    rounds: int
    budget: float | None


class Counting(Controller):
    """Another controller, and how many tokens it had verified for each request in each round."""

    def __init__(self, inner: Controller):
        self.inner = inner
        self.verified: list[int] = []
        super().__init__()

    def reset(self) -> None:
        self.inner.reset()

    def round(self, requests: int) -> None:
        self.inner.round(requests)

    def pace(self):
        return self.inner.pace()

    def select(self, proposals: list[Proposal]) -> list[Proposal]:
        selected = self.inner.select(proposals)
        self.verified += [len(proposal.tokens) for proposal in selected]
        return selected

    def observe(self, proposal: Proposal, accepted: int) -> None:
        self.inner.observe(proposal, accepted)


@dataclass(frozen=True)
class Bench:
    """What all runs share. `contestants`: name → controller, None for plain decoding."""

    target: Target
    drafter: Drafter
    contestants: dict[str, Controller | None]
    max_new_tokens: int
    seed: int

    def run(self, name: str, setting: Setting, group: list[list[int]], limit: int | None = None) -> Run:
        """Decode a group of prompts; request i of it has its own seed, the same for all contestants."""
        controller = self.contestants[name]
        counting = Counting(controller) if controller else None
        drafter = self.drafter if controller else None
        engine = Engine(self.target, drafter, setting.batch, controller=counting)
        sampling = Sampling(setting.temperature)
        waiting = [
            Request(ids, limit or self.max_new_tokens, sampling, self.seed + i, id=i)
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
        verified = counting.verified if counting else []
        return Run(
            tokens=sum(len(result.tokens) for result in results),
            seconds=seconds - sum(result.stats.prefill_s for result in results),
            rounds=sum(result.stats.rounds for result in results),
            budget=sum(verified) / len(verified) if verified else None,
        )


class _QueueEmptyError(Exception):
    """A slot is free and no prompt is left: from here on the batch would not be full."""


def contestants(curve: CostCurve, lengths: list[int], block_size: int) -> dict[str, Controller | None]:
    """Plain decoding, each fixed length (the whole block among them) and the scheduler."""
    fixed = {f"fixed {n}": make_controller("fixed", length=n) for n in sorted({*lengths, block_size})}
    return {PLAIN: None, **fixed, SCHEDULER: make_controller("scheduler", curve)}


def groups_of(prompts: list[Prompt], size: int, count: int, seed: int) -> list[list[list[int]]]:
    """`count` groups of `size` prompts, sources mixed; prompts come again where there are too few."""
    ids = [prompt.ids for prompt in prompts]
    random.Random(seed).shuffle(ids)
    return [[ids[(g * size + i) % len(ids)] for i in range(size)] for g in range(count)]


def measure(
    bench: Bench, settings: list[Setting], prompts: list[Prompt], groups: int, log: WorkLog
) -> dict[Setting, dict[str, list[Run]]]:
    """All runs, those in the log taken from there."""
    names = list(bench.contestants)
    pieces = [
        (setting, g, names[(g + i) % len(names)])
        for setting in settings
        for g in range(groups)
        for i in range(len(names))
    ]
    missing = [piece for piece in pieces if log.get(_key(*piece)) is None]
    decoded = {s: groups_of(prompts, 2 * s.batch, groups, bench.seed) for s in settings}
    warm: Setting | None = None
    with Progress("throughput", len(pieces), len(pieces) - len(missing)) as progress:
        for setting, g, name in missing:
            if setting != warm:  # kernels and caches of this batch size are made before the clock starts
                for each in names:
                    bench.run(each, setting, decoded[setting][0], _WARM_UP_TOKENS)
                warm = setting
            run = bench.run(name, setting, decoded[setting][g])
            log.add(_key(setting, g, name), asdict(run))
            progress.tokens(run.tokens)
            progress.advance()
    return {
        setting: {name: [Run(**log.get(_key(setting, g, name))) for g in range(groups)] for name in names}
        for setting in settings
    }


def compared(runs: list[Run], reference: list[Run]) -> Interval | None:
    """Ratio of tokens a second, paired by group."""
    pairs = zip(reference, runs, strict=True)
    return speedup([Pair(a.seconds, a.tokens, b.seconds, b.tokens) for a, b in pairs])


def best_fixed(runs: dict[str, list[Run]]) -> str:
    """The fixed length with the highest rate here: chosen afterwards, as no server could."""
    fixed = [name for name in runs if name not in (PLAIN, SCHEDULER)]
    return max(fixed, key=lambda name: sum(r.tokens for r in runs[name]) / sum(r.seconds for r in runs[name]))


def report(results: dict[Setting, dict[str, list[Run]]]) -> tuple[str, dict]:
    """The Markdown table, and the same figures as data."""
    rows, data = [], []
    for setting, runs in results.items():
        reference = best_fixed(runs)
        for name, own in runs.items():
            budgets = [run.budget for run in own if run.budget is not None]
            entry = {
                "temperature": setting.temperature,
                "batch": setting.batch,
                "name": name,
                "tokens_per_second": median(run.tokens / run.seconds for run in own),
                "speedup": _interval(compared(own, runs[PLAIN])),
                "against_best_fixed": _interval(compared(own, runs[reference])),
                "best_fixed": reference,
                "tau": sum(run.tokens for run in own) / sum(run.rounds for run in own),
                "verified_per_request": sum(budgets) / len(budgets) if budgets else None,
            }
            data.append(entry)
            rows.append(
                [
                    f"T={setting.temperature:g}, batch {setting.batch}, {name}",
                    f"{entry['tokens_per_second']:.1f}",
                    _cell(entry["speedup"]),
                    _cell(entry["against_best_fixed"]) if name == SCHEDULER else "",
                    f"{entry['tau']:.2f}",
                    "" if entry["verified_per_request"] is None else f"{entry['verified_per_request']:.2f}",
                ]
            )
    header = ["", "tokens/s (median)", "× plain", "× best fixed", "τ", "verified a request"]
    return markdown_table(header, rows), {"results": data}


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return interval and asdict(interval)


def _cell(interval: dict[str, float] | None) -> str:
    return f"{interval['value']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]" if interval else ""


def _key(setting: Setting, group: int, name: str) -> str:
    return f"T={setting.temperature:g} batch={setting.batch} group={group} {name}"


def arguments() -> argparse.ArgumentParser:
    parser = command_line("throughput", __doc__)
    add = parser.add_argument
    add("--target", default="data/target", help="target directory")
    add("--drafter", required=True, help="directory of a trained draft for it")
    add(
        "--prompts",
        nargs="+",
        default=TASKS,
        help='evaluation tasks, or JSONL files with {"turns": [...]} a line',
    )
    add("--count", type=int, default=32, help="prompts of each source")
    add("--groups", type=int, default=6, help="groups of prompts at each batch size")
    add("--batches", default="1,4,16", help="requests in flight")
    add("--lengths", default="2,4", help="fixed verification lengths beside the whole block")
    add("--temperatures", default="0,1", help="of the sampler; 0 is greedy")
    add("--max-new-tokens", type=int, default=128, help="of an answer")
    add("--seed", type=int, default=0, help="of the sampling and of the choice of prompts")
    add("--reports", type=Path, default=REPORTS, help="folder of the table")
    return parser


def _numbers(text: str, flag: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise DeepSpecError(f"{flag} takes numbers like 0,1, found {text!r}") from None


def run(flags: argparse.Namespace) -> None:
    batches = parse_batches(flags.batches)
    lengths = _numbers(flags.lengths, "--lengths", int)
    settings = [Setting(t, b) for t in _numbers(flags.temperatures, "--temperatures", float) for b in batches]
    target = load_target(flags.target)
    drafter = load_drafter(flags.drafter, target)
    prompts = load_prompts(target, flags.prompts, flags.count, flags.seed)
    curve = load_or_measure(target, drafter, batches=batches)
    bench = Bench(
        target,
        drafter,
        contestants(curve, lengths, drafter.block_size),
        flags.max_new_tokens,
        flags.seed,
    )
    key = work_key(
        target,
        [flags.drafter],
        curve.to_json(),
        flags.max_new_tokens,
        flags.seed,
        [prompt.ids for prompt in prompts],
    )
    log = WorkLog(WORK_DIR / f"throughput-{key}.jsonl")
    results = measure(bench, settings, prompts, flags.groups, log)
    table, data = report(results)
    data |= {"curve": curve.to_json(), "groups": flags.groups, "max_new_tokens": flags.max_new_tokens}
    write_report(flags.reports, "throughput", "Throughput by batch size", table, data, target)
    log.remove()


def main(argv: list[str] | None = None) -> int:
    flags = arguments().parse_args(argv)
    try:
        run(flags)
    except DeepSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

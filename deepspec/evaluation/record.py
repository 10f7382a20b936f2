"""The evaluation record (DESIGN.md §4), made from what was measured prompt by prompt."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from deepspec.evaluation.stats import Interval, Pair, macro_speedup, median_per_round_ms, speedup

if TYPE_CHECKING:
    from deepspec.decoding.request import Generation
    from deepspec.evaluation.task import Task

EVAL_VERSION = "1"  # raised whenever numbers of before and after cannot be compared


@dataclass(frozen=True)
class Subject:
    """What was measured, on what."""

    drafter: str
    target: str
    target_digest: str
    device: str
    dtype: str
    seed: int


@dataclass
class PromptResult:
    """One prompt at one temperature, its turns added up; `accepted` and `drafted` count tokens by round."""

    plain_s: float = 0.0
    plain_tokens: int = 0
    drafted_s: float = 0.0
    drafted_tokens: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    output_hash: str = ""  # of the drafted run's token ids

    def add(self, plain: Generation, plain_s: float, drafted: Generation, drafted_s: float) -> None:
        """Add the two runs of one turn, with their seconds after the target's prefill."""
        self.plain_s += plain_s
        self.plain_tokens += len(plain.tokens)
        self.drafted_s += drafted_s
        self.drafted_tokens += len(drafted.tokens)
        self.draft_s += drafted.stats.draft_s
        self.verify_s += drafted.stats.verify_s
        self.accepted += drafted.stats.accepted
        self.drafted += drafted.stats.drafted

    @property
    def host_s(self) -> float:
        """What is neither drafting nor verifying: bookkeeping and Python."""
        return self.drafted_s - self.draft_s - self.verify_s

    @property
    def pair(self) -> Pair:
        return Pair(self.plain_s, self.plain_tokens, self.drafted_s, self.drafted_tokens)


@dataclass(frozen=True)
class Identity:
    """Outcome of a task's token-identity check: no difference but `ties` proven ties, or not lossless."""

    lossless: bool
    ties: int
    prompts: int = 0
    tokens: int = 0


def task_key(task: str, temperature: float) -> str:
    return f"{task}@T={temperature:g}"


def build_record(
    subject: Subject,
    tasks: list[Task],
    results: Mapping[tuple[str, float], list[PromptResult]],
    identities: Mapping[str, Identity],
    native: Mapping[str, float],
) -> dict:
    """The whole record. An entry of T > 0 carries the verdict of its task's check, which is made at T = 0.

    A task that failed its check has no speed-up, and neither has a mean over it: both are null.
    """
    by_name = {task.name: task for task in tasks}
    entries = {
        task_key(name, temperature): _entry(by_name[name], temperature, rows, identities[name], subject.seed)
        for (name, temperature), rows in results.items()
    }
    for name, identity in identities.items():
        if not identity.lossless:
            print(
                f"warning: {subject.drafter} changed the target's greedy output on {name}; "
                "no speed-up is reported",
                file=sys.stderr,
            )
    return {
        "eval_version": EVAL_VERSION,
        "target": subject.target,
        "target_digest": subject.target_digest,
        "drafter": subject.drafter,
        "device": subject.device,
        "dtype": subject.dtype,
        "seed": subject.seed,
        "tasks": entries,
        "summary": _summary(results, identities, native, entries, subject.seed),
    }


def accept_rates(rows: list[PromptResult]) -> list[float]:
    """Share accepted at position k+1, of the rounds that proposed it and accepted every earlier position."""
    rounds = [(a, d) for row in rows for a, d in zip(row.accepted, row.drafted, strict=True)]
    rates = []
    for k in range(max((drafted for _, drafted in rounds), default=0)):
        reached = [accepted > k for accepted, drafted in rounds if drafted > k and accepted >= k]
        if not reached:
            break
        rates.append(sum(reached) / len(reached))
    return rates


def tau(rows: list[PromptResult]) -> float | None:
    """Tokens committed per verification, the target's own included; counted over all rounds."""
    rounds = sum(len(row.accepted) for row in rows)
    return 1 + sum(sum(row.accepted) for row in rows) / rounds if rounds else None


def _entry(task: Task, temperature: float, rows: list[PromptResult], identity: Identity, seed: int) -> dict:
    interval = speedup([row.pair for row in rows], seed) if identity.lossless else None
    rounds = [len(row.accepted) for row in rows]
    return {
        "category": task.category,
        "task_version": task.version,
        "temperature": temperature,
        "prompts": len(rows),
        "new_tokens": sum(row.drafted_tokens for row in rows),
        "tau": tau(rows),
        "accept_rate_by_position": accept_rates(rows),
        "tokens_per_second": _rate(sum(r.drafted_tokens for r in rows), sum(r.drafted_s for r in rows)),
        "baseline_tokens_per_second": _rate(sum(r.plain_tokens for r in rows), sum(r.plain_s for r in rows)),
        **_speedup_keys(interval),
        "draft_ms": median_per_round_ms([row.draft_s for row in rows], rounds),
        "verify_ms": median_per_round_ms([row.verify_s for row in rows], rounds),
        "host_ms": median_per_round_ms([row.host_s for row in rows], rounds),
        "lossless": identity.lossless,
        "ties": identity.ties,
        "lossless_checked": {"prompts": identity.prompts, "tokens": identity.tokens},
        "output_hashes": [row.output_hash for row in rows],
    }


def _summary(
    results: Mapping[tuple[str, float], list[PromptResult]],
    identities: Mapping[str, Identity],
    native: Mapping[str, float],
    entries: dict[str, dict],
    seed: int,
) -> dict:
    """Macro means over tasks. The headline is greedy decoding, or the lowest temperature measured."""
    temperatures = sorted({temperature for _, temperature in results})
    lossless = all(identity.lossless for identity in identities.values())
    means = {f"{t:g}": _macro(results, t, lossless, seed) for t in temperatures}
    headline = temperatures[0]
    rates = [
        entries[task_key(name, headline)]["tokens_per_second"]
        for name in native
        if lossless and headline == 0
    ]
    against_native = (
        fmean(rate / native[name] for rate, name in zip(rates, native, strict=True))
        if rates and all(rates)
        else None
    )
    return {
        "temperature": headline,
        **means[f"{headline:g}"],
        "speedup_vs_hf": against_native,
        "lossless": lossless,
        "by_temperature": means,
    }


def _macro(
    results: Mapping[tuple[str, float], list[PromptResult]], temperature: float, lossless: bool, seed: int
) -> dict:
    tasks = [rows for (_, t), rows in results.items() if t == temperature]
    taus = [tau(rows) for rows in tasks]
    interval = macro_speedup([[row.pair for row in rows] for rows in tasks], seed) if lossless else None
    return {"tau": fmean(taus) if None not in taus else None, **_speedup_keys(interval)}


def _speedup_keys(interval: Interval | None) -> dict:
    if interval is None:
        return {"speedup": None, "speedup_ci95": None}
    return {"speedup": interval.value, "speedup_ci95": [interval.low, interval.high]}


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if seconds > 0 else None

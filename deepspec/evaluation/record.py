"""The evaluation record (docs/evaluation.md), made from what was measured prompt by prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from deepspec.evaluation.runs import PLAIN, PromptRuns, Run, pair
from deepspec.evaluation.stats import (
    Interval,
    bootstrap,
    macro_speedup,
    median_per_round_ms,
    pair_table,
    quotient,
    speed_ratio,
    speedup,
)

if TYPE_CHECKING:
    from deepspec.decoding.train_parity import Check
    from deepspec.tasks.task import Task

logger = logging.getLogger(__name__)

EVAL_VERSION = "3"  # raised whenever numbers of before and after cannot be compared
DRAFT = "draft"  # the contestant that a record is about: the draft as `evaluate.decode` uses it
LOOKUP = "lookup"  # the strongest baseline that needs no training
OUTPUT_BIN = 16  # tokens
_UNLIKE = 0.8  # of the held-out acceptance at position 1


@dataclass(frozen=True)
class Subject:
    """What was measured, on what."""

    drafter: str
    draft_digest: str
    target: str
    target_digest: str
    device: str
    dtype: str
    seed: int
    processes: int
    max_new_tokens: int  # an answer's, of every turn


@dataclass(frozen=True)
class Identity:
    """Outcome of a token-identity check: no difference but `ties` proven ties, or not lossless."""

    lossless: bool
    ties: int
    prompts: int = 0
    tokens: int = 0


Results = Mapping[tuple[str, float], list[PromptRuns]]  # (task, temperature) → its prompts


@dataclass(frozen=True)
class Measured:
    """All that a record is made of.

    Args:
        contest: of the contestants `plain`, `draft`, `lookup` and other controllers of the same draft.
        identities: path ("draft", "lookup") → task → outcome. Other controllers verify less of what "draft" does.
        native: task → tokens/s of `transformers.generate`.
        parts: further sections of the record: blocks, confidence, sweeps, throughput.
        promise: what became of training's figures in decoding.
    """

    contest: Results
    identities: Mapping[str, Mapping[str, Identity]]
    native: Mapping[str, float]
    parts: Mapping[str, Any] = field(default_factory=dict)
    promise: Check | None = None


def task_key(task: str, temperature: float) -> str:
    return f"{task}@T={temperature:g}"


def build_record(subject: Subject, tasks: list[Task], measured: Measured) -> dict:
    """The whole record. An entry of T > 0 carries the verdict of its task's check, which is made at T = 0.

    A task that failed its check has no speed-up, and neither has a mean over it: both are null.
    """
    by_name = {task.name: task for task in tasks}
    seed = subject.seed
    entries = {
        task_key(name, temperature): _entry(by_name[name], temperature, rows, measured.identities, seed)
        for (name, temperature), rows in measured.contest.items()
    }
    record = {
        "eval_version": EVAL_VERSION,
        **asdict(subject),
        "tasks": entries,
        "summary": _summary(measured, entries, seed),
        **measured.parts,
        "promise": measured.promise and {"greedy": asdict(measured.promise)},
    }
    record["warnings"] = warnings(record)
    for warning in record["warnings"]:
        logger.warning("%s: %s: %s", subject.drafter, warning["name"], warning["message"])
    return record


def accept_rates(rounds: Iterable[tuple[int, int]]) -> tuple[list[float], list[int]]:
    """Share accepted at position k+1, of the rounds that proposed it and accepted every earlier position; and how
    many rounds that were. `rounds` are (accepted, drafted) tokens."""
    rounds = list(rounds)
    rates, counts = [], []
    for k in range(max((drafted for _, drafted in rounds), default=0)):
        reached = [accepted > k for accepted, drafted in rounds if drafted > k and accepted >= k]
        if not reached:
            break
        rates.append(sum(reached) / len(reached))
        counts.append(len(reached))
    return rates, counts


def tau_by_output_position(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """τ of the rounds that begin where so many tokens of the answer are there, by bins of `OUTPUT_BIN`."""
    bins: dict[int, list[int]] = {}
    for run in runs:
        for accepted in run.accepted:  # a turn
            starts = accumulate((count + 1 for count in accepted), initial=0)
            for start, count in zip(starts, accepted, strict=False):
                bins.setdefault(start // OUTPUT_BIN, []).append(count + 1)
    return [
        {"start": at * OUTPUT_BIN, "end": (at + 1) * OUTPUT_BIN, "rounds": len(found), "tau": fmean(found)}
        for at, found in sorted(bins.items())
    ]


def tau_table(runs: Iterable[Run]) -> np.ndarray:
    """[prompts, 2]: tokens committed and rounds, the columns of `quotient`."""
    return np.array([(run.committed, run.rounds) for run in runs], dtype=np.float64).reshape(-1, 2)


def warnings(record: dict) -> list[dict[str, str]]:
    """What a reader must not overlook, by name; nothing here changes a number."""
    found = []

    def warn(name: str, message: str) -> None:
        found.append({"name": name, "message": message})

    broken = sorted({key.rsplit("@", 1)[0] for key, e in record["tasks"].items() if not e["lossless"]})
    if broken:
        warn(
            "not_lossless",
            f"the target's greedy output changed on {', '.join(broken)}; no speed-up is reported",
        )
    promise = (record["promise"] or {}).get("greedy")
    if promise and promise["below"]:
        warn(
            "below_training_promise",
            f"acceptance at position 1 is {promise['measured']:.3f} in decoding and {promise['promised']:.3f} in "
            f"training, on the same {promise['blocks']} held-out contexts",
        )
    if promise and promise["unlike"]:
        shares = ", ".join(f"{share:.3f}" for share in promise["agreement"])
        warn(
            "drafts_other_tokens",
            f"on the same {promise['blocks']} held-out contexts decoding drafts other tokens than training did "
            f"(shares alike by position: {shares}): what decodes is not what was trained",
        )
    if promise and not promise["below"] and not promise["unlike"]:
        for task, entry in (record["blocks"] or {}).get("greedy", {}).items():
            rate = entry["accept_rate_by_position"][0] if entry["accept_rate_by_position"] else None
            if rate is not None and rate < _UNLIKE * promise["promised"]:
                warn(
                    "unlike_training_data",
                    f"on {task} acceptance at position 1 is {rate:.2f}, on held-out training data "
                    f"{promise['promised']:.2f}: more prompts like these in the mix would help",
                )
    for temperature, mean in record["summary"]["by_temperature"].items():
        if mean["speedup_ci95"] and mean["speedup_ci95"][1] < 1:
            warn("slower_than_plain", f"at T = {temperature} decoding with the draft is slower than without")
        lookup = mean["beside"].get(LOOKUP)
        if lookup and lookup["ratio_ci95"] and lookup["ratio_ci95"][1] < 1:
            warn("weaker_than_lookup", f"at T = {temperature} the lookup alone, without training, is faster")
    return found


def _entry(
    task: Task,
    temperature: float,
    rows: list[PromptRuns],
    identities: Mapping[str, Mapping[str, Identity]],
    seed: int,
) -> dict:
    own = [row[DRAFT] for row in rows]
    identity = identities[DRAFT][task.name]
    beside = {}
    for name in rows[0]:
        if name not in (PLAIN, DRAFT):
            path = name if name in identities else DRAFT
            beside[name] = _figures(rows, name, identities[path][task.name], seed)
            both = identity.lossless and identities[path][task.name].lossless
            ratio = speedup([pair(row[name], row[DRAFT]) for row in rows], seed) if both else None
            beside[name] |= _keys("ratio", ratio)
    return {
        "category": task.category,
        "task_version": task.version,
        "source": task.source,
        "prompts_digest": task.digest,
        "temperature": temperature,
        "prompts": len(rows),
        "new_tokens": sum(run.tokens for run in own),
        **_figures(rows, DRAFT, identity, seed),
        "tau_by_output_position": tau_by_output_position(own),
        "baseline_tokens_per_second": _rate([row[PLAIN] for row in rows]),
        "ties": identity.ties,
        "lossless_checked": {"prompts": identity.prompts, "tokens": identity.tokens},
        "output_hashes": [run.output for run in own],
        "beside": beside,
    }


def _figures(rows: list[PromptRuns], name: str, identity: Identity, seed: int) -> dict:
    """What is said of every contestant."""
    runs = [row[name] for row in rows]
    rounds = [run.rounds for run in runs]
    rates, reached = accept_rates(
        pair
        for run in runs
        for turn in zip(run.accepted, run.drafted, strict=True)
        for pair in zip(*turn, strict=True)
    )
    gain = speedup([pair(row[PLAIN], row[name]) for row in rows], seed) if identity.lossless else None
    return {
        "rounds": sum(rounds),
        **_keys("tau", bootstrap([tau_table(runs)], quotient, seed)),
        "accept_rate_by_position": rates,
        "reached_by_position": reached,
        "tokens_per_second": _rate(runs),
        **_keys("speedup", gain),
        "draft_ms": median_per_round_ms([run.draft_s for run in runs], rounds),
        "verify_ms": median_per_round_ms([run.verify_s for run in runs], rounds),
        "host_ms": median_per_round_ms([run.host_s for run in runs], rounds),
        "lossless": identity.lossless,
    }


def _summary(measured: Measured, entries: dict[str, dict], seed: int) -> dict:
    """Macro means over tasks. The headline is greedy decoding, or the lowest temperature measured."""
    temperatures = sorted({temperature for _, temperature in measured.contest})
    lossless = {
        path: all(i.lossless for i in by_task.values()) for path, by_task in measured.identities.items()
    }
    means = {f"{t:g}": _macro(measured.contest, t, lossless, seed) for t in temperatures}
    headline = temperatures[0]
    rates = [
        entries[task_key(name, headline)]["tokens_per_second"]
        for name in measured.native
        if lossless[DRAFT] and headline == 0
    ]
    against_native = (
        fmean(rate / measured.native[name] for rate, name in zip(rates, measured.native, strict=True))
        if rates and all(rates)
        else None
    )
    own = {key: value for key, value in means[f"{headline:g}"].items() if key != "beside"}
    return {
        "temperature": headline,
        **own,
        "speedup_vs_hf": against_native,
        "lossless": lossless[DRAFT],
        "by_temperature": means,
    }


def _macro(contest: Results, temperature: float, lossless: Mapping[str, bool], seed: int) -> dict:
    tasks = [rows for (_, t), rows in contest.items() if t == temperature]
    means = {}
    for name in tasks[0][0]:
        if name == PLAIN:
            continue
        sound = lossless[name if name in lossless else DRAFT]
        gain = macro_speedup([[pair(row[PLAIN], row[name]) for row in rows] for rows in tasks], seed)
        tau = bootstrap([tau_table(row[name] for row in rows) for rows in tasks], quotient, seed)
        means[name] = {**_keys("tau", tau), **_keys("speedup", gain if sound else None)}
        if name != DRAFT:
            ratio = macro_speedup([[pair(row[name], row[DRAFT]) for row in rows] for rows in tasks], seed)
            means[name] |= _keys("ratio", ratio if sound and lossless[DRAFT] else None)
    own = means.pop(DRAFT)
    return {**own, "beside": means}


def compare_tables(first: list[PromptRuns], second: list[PromptRuns]) -> dict[str, np.ndarray]:
    """Of two records on the same prompts: for each of `FIGURES` the columns of the first, then of the second."""
    pairs = [pair_table([pair(row[PLAIN], row[DRAFT]) for row in rows]) for rows in (first, second)]
    taus = [tau_table(row[DRAFT] for row in rows) for rows in (first, second)]
    return {"speedup": np.concatenate(pairs, axis=1), "tau": np.concatenate(taus, axis=1)}


FIGURES = {"speedup": speed_ratio, "tau": quotient}


def _keys(name: str, interval: Interval | None) -> dict:
    if interval is None:
        return {name: None, f"{name}_ci95": None}
    return {name: interval.value, f"{name}_ci95": interval.bounds}


def _rate(runs: list[Run]) -> float | None:
    seconds = sum(run.seconds for run in runs)
    return sum(run.tokens for run in runs) / seconds if seconds > 0 else None

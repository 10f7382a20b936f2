"""Numbers with their uncertainty: ratios of sums, with a paired bootstrap over prompts.

A prompt is the unit of resampling: all its runs saw the same context one after the other, so they stay together, and
so do the turns of one conversation. Of a task, a table has a row of sums for each prompt, and a statistic is a ratio
of the table's column sums: a speed-up is

    (Σ plain seconds / Σ plain tokens) / (Σ drafted seconds / Σ drafted tokens)

over its prompts, not a mean of per-prompt ratios, which short answers would dominate.

Percentiles of a bootstrap are too narrow for few prompts: drawn from what was seen, they know neither that its spread
is too small by √((n − 1) / n), nor Student's tails. The tails are moved outwards by both (Hesterberg, "What Teachers
Should Know about the Bootstrap": the expanded percentile interval); a test counts how often the truth lies within.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
COVERAGE = 0.95

Statistic = Callable[
    [np.ndarray], np.ndarray
]  # column sums [..., columns] → values [...], NaN where undefined


@dataclass(frozen=True)
class Pair:
    """Decode seconds and tokens of one prompt, without and with the draft, over all its turns."""

    plain_s: float
    plain_tokens: int
    drafted_s: float
    drafted_tokens: int


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its 95 % interval; None where one prompt says nothing of the others."""

    value: float
    low: float | None
    high: float | None

    @property
    def bounds(self) -> list[float] | None:
        return None if self.low is None or self.high is None else [self.low, self.high]

    def __str__(self) -> str:
        return f"{self.value:.3f} " + (f"({self.low:.3f}–{self.high:.3f})" if self.bounds else "(one prompt)")


def bootstrap(tables: list[np.ndarray], statistic: Statistic, seed: int = 0) -> Interval | None:
    """Mean of a statistic over tasks; prompts are resampled within each task.

    Args:
        tables: float64 [prompts, columns], one a task.

    Returns:
        None where some task has no value, since a mean over the others would flatter.
    """
    values = [float(statistic(table.sum(axis=0))) for table in tables]
    if not values or not np.isfinite(values).all():
        return None
    if min(map(len, tables)) < 2:
        return Interval(float(np.mean(values)), None, None)
    rng = np.random.default_rng(seed)
    resampled = np.mean([_resampled(table, statistic, rng) for table in tables], axis=0)  # [RESAMPLES]
    return expanded(float(np.mean(values)), resampled, sum(map(len, tables)), len(tables))


def expanded(value: float, resampled: np.ndarray, prompts: int, tasks: int) -> Interval:
    """Return the 95 % interval of a value from its resamples, expanded for so few prompts of so many tasks."""
    tail = _tail(prompts, tasks)
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def speedup(pairs: list[Pair], seed: int = 0) -> Interval | None:
    """Speed-up of one task with its interval, or None where no time was measured."""
    return macro_speedup([pairs], seed)


def macro_speedup(tasks: list[list[Pair]], seed: int = 0) -> Interval | None:
    """Mean over tasks of their speed-ups."""
    return bootstrap([pair_table(pairs) for pairs in tasks], speed_ratio, seed)


def pair_table(pairs: list[Pair]) -> np.ndarray:
    """[prompts, 4], the columns of `speed_ratio`."""
    rows = [(p.plain_s, p.plain_tokens, p.drafted_s, p.drafted_tokens) for p in pairs]
    return np.array(rows, dtype=np.float64).reshape(len(rows), 4)


def speed_ratio(sums: np.ndarray) -> np.ndarray:
    """Speed-up from sums [..., 4] of plain seconds and tokens, drafted seconds and tokens."""
    plain_s, plain_tokens, drafted_s, drafted_tokens = np.moveaxis(sums, -1, 0)
    measured = (plain_tokens > 0) & (drafted_s > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(measured, (plain_s / plain_tokens) * (drafted_tokens / drafted_s), np.nan)


def quotient(sums: np.ndarray) -> np.ndarray:
    """First column over second, from sums [..., 2]: τ of tokens and rounds."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def against(statistic: Statistic) -> Statistic:
    """Return the statistic of the second half of the columns over that of the first."""

    def ratio(sums: np.ndarray) -> np.ndarray:
        first, second = np.split(sums, 2, axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return statistic(second) / statistic(first)

    return ratio


def median_per_round_ms(seconds: list[float], rounds: list[int]) -> float | None:
    """Median over prompts of the milliseconds a round took: one prompt's hiccup does not move it."""
    per_prompt = [1000 * s / n for s, n in zip(seconds, rounds, strict=True) if n]
    return float(np.median(per_prompt)) if per_prompt else None


def _tail(prompts: int, tasks: int) -> float:
    """Share of resamples beyond each end of an interval, so that it covers what it says."""
    from scipy.stats import norm, t  # a second to import, which reading a record need not wait for

    freedom = prompts - tasks
    return float(norm.cdf(-t.ppf((1 + COVERAGE) / 2, freedom) * (prompts / freedom) ** 0.5))


def _resampled(table: np.ndarray, statistic: Statistic, rng: np.random.Generator) -> np.ndarray:
    picks = rng.integers(len(table), size=(RESAMPLES, len(table)))
    return statistic(table[picks].sum(axis=1))  # [RESAMPLES]

"""The interval of a speed-up says what it claims."""

from __future__ import annotations

import numpy as np
import pytest

from deepspec.evaluation.stats import Pair, macro_speedup, median_per_round_ms, speedup


def pairs(rng: np.random.Generator, count: int, ratio: float, noise: float = 0.2) -> list[Pair]:
    """Prompts of uneven length with a true speed-up of `ratio`; a prompt's two runs share the noise."""
    tokens = rng.integers(20, 200, count)
    common = rng.lognormal(0, noise, count)
    own = rng.lognormal(0, noise / 4, count)
    plain = 0.03 * tokens * common
    drafted = plain * own / ratio
    return [Pair(p, int(n), d, int(n)) for p, n, d in zip(plain, tokens, drafted, strict=True)]


def test_speedup_is_the_ratio_of_sums_not_the_mean_of_ratios():
    rows = [Pair(10.0, 100, 5.0, 100), Pair(1.0, 10, 1.0, 10)]
    assert speedup(rows).value == pytest.approx(11 / 6)


def test_speedup_compares_seconds_per_token_where_lengths_differ():
    assert speedup([Pair(10.0, 100, 10.0, 200)]).value == pytest.approx(2.0)


def test_the_same_seed_gives_the_same_interval_and_another_seed_a_near_one():
    rows = pairs(np.random.default_rng(1), 12, 1.5)
    first, again, other = speedup(rows, seed=0), speedup(rows, seed=0), speedup(rows, seed=1)
    assert first == again
    assert first != other
    assert first.low == pytest.approx(other.low, rel=0.02)


def test_interval_covers_the_true_speedup_about_as_often_as_it_claims():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        interval = speedup(pairs(rng, 30, 1.7), seed=trial)
        covered += interval.low <= 1.7 <= interval.high
    assert 85 <= covered <= 100


@pytest.mark.parametrize("tasks", [1, 3])
def test_interval_of_few_prompts_is_wide_enough_too(tasks):
    """The plain percentile interval covers 88 % (one task) and 86 % here."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        interval = macro_speedup([pairs(rng, 6, 1.7) for _ in range(tasks)], seed=trial)
        covered += interval.low <= 1.7 <= interval.high
    assert 0.91 <= covered / 300 <= 0.98


def test_one_prompt_has_no_interval():
    (row,) = pairs(np.random.default_rng(0), 1, 1.5)
    found = speedup([row])
    assert found.value > 0 and found.bounds is None
    assert macro_speedup([[row], [row] * 20]).bounds is None, "nor has a mean with such a task in it"


def test_pairing_removes_the_noise_that_both_runs_share():
    rows = pairs(np.random.default_rng(2), 30, 1.7, noise=0.5)
    shuffled = [
        Pair(a.plain_s, a.plain_tokens, b.drafted_s, b.drafted_tokens)
        for a, b in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    paired, unpaired = speedup(rows), speedup(shuffled)
    assert (paired.high - paired.low) < (unpaired.high - unpaired.low) / 2


def test_macro_speedup_weighs_tasks_alike_whatever_their_size():
    short = [Pair(1.0, 10, 0.5, 10)] * 2
    long = [Pair(100.0, 1000, 100.0, 1000)] * 20
    interval = macro_speedup([short, long])
    assert interval.value == pytest.approx(1.5)
    assert interval.low == pytest.approx(interval.high) == pytest.approx(1.5)


def test_no_measured_time_gives_no_speedup_and_no_mean_over_the_rest():
    empty = [Pair(0.0, 0, 0.0, 0)]
    assert speedup(empty) is None
    assert macro_speedup([[Pair(1.0, 10, 0.5, 10)], empty]) is None
    assert macro_speedup([]) is None


def test_median_per_round_ignores_a_hiccup_and_prompts_without_rounds():
    assert median_per_round_ms([0.02, 0.02, 5.0, 0.0], [10, 10, 10, 0]) == pytest.approx(2.0)
    assert median_per_round_ms([0.0], [0]) is None

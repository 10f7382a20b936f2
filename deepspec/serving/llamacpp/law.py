"""Does an engine sample the same law with a draft as without? Two samples of answers to the same questions, at T = 1.

The draft decides the second token first, so that token's counts are compared, and the answers' lengths; the questions
have short answers, so that lengths vary. The statistic is the squared distance of the counts from equal shares, summed
over all values of all questions: common tokens decide it, which are those that a faulty rule writes too often or too
seldom, and not the many rare ones. Its law under equality comes from permuting answers within questions.

How many answers are drawn follows from what is to be seen. A rule that takes one token of each question too often
moves a share of the law onto it; with our engine's own draws for the law, `draws_for` simulates the test and returns
the fewest draws with which such a move of `CHANGE` is seen with probability `POWER`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

QUESTIONS = (
    "Name one animal. Answer with one word.",
    "Name a colour. Answer with one word.",
    "Is a tomato a fruit? Answer yes or no.",
    "Say a number from one to ten, and nothing else.",
)
TOKENS = 12  # of an answer at most
PERMUTATIONS = 10_000
LEVEL = 1e-3  # p below it: another law
CHANGE, POWER = 0.15, 0.9  # total variation that is to be seen, and how surely
DRAWS = (25, 50, 100, 200, 400)
SIMULATIONS = 20_000
Sample = Sequence[Sequence[Hashable]]  # one value an answer, by question


def p_value(first: Sample, second: Sample, seed: int = 0) -> float:
    """Return the share of permutations whose statistic is at least as large as the found one.

    Args:
        first, second: values by question, of equally many questions.
    """
    random = np.random.default_rng(seed)
    found, drawn = 0.0, np.zeros(PERMUTATIONS)
    for one, other in zip(first, second, strict=True):
        counts, totals = Counter(one), Counter([*one, *other])
        total = np.array(list(totals.values()))
        here = np.array([counts[value] for value in totals])
        permuted = random.multivariate_hypergeometric(total, len(one), PERMUTATIONS)
        share = len(one) / total.sum()
        found += float(_distance(here, share * total))
        drawn += _distance(permuted, share * total)
    return float((1 + (drawn >= found - 1e-9).sum()) / (1 + PERMUTATIONS))


def power(sample: Sample, draws: int, change: float = CHANGE, seed: int = 0) -> float:
    """Simulate how surely the test sees that a share `change` of each law moved onto its likeliest value.

    Args:
        sample: values by question, whose shares stand for the law.
        draws: answers to each question, of either sample.
    """
    random = np.random.default_rng(seed)
    laws = [np.array(list(Counter(values).values())) / len(values) for values in sample]
    null, moved = np.zeros(SIMULATIONS), np.zeros(SIMULATIONS)
    for law in laws:
        first, same, other = (
            random.multinomial(draws, of, SIMULATIONS) for of in (law, law, _moved(law, change))
        )
        null += _distance(first, (first + same) / 2)
        moved += _distance(first, (first + other) / 2)
    return float((moved > np.quantile(null, 1 - LEVEL)).mean())


def draws_for(sample: Sample, change: float = CHANGE) -> tuple[int, float]:
    """Return the fewest draws with which the change is seen surely enough, else the most, and how surely it is."""
    for draws in DRAWS:
        found = power(sample, draws, change)
        if found >= POWER:
            break
    return draws, found


def second_tokens(answers: Sequence[Sequence[list[int]]]) -> list[list[int]]:
    """Return the token that a draft decides first, by question; -1 where an answer has none."""
    return [[answer[1] if len(answer) > 1 else -1 for answer in of] for of in answers]


def answer_lengths(answers: Sequence[Sequence[list[int]]]) -> list[list[int]]:
    """Return how many tokens each answer has, by question."""
    return [[len(answer) for answer in of] for of in answers]


def _distance(counts: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return ((counts - expected) ** 2).sum(axis=-1)


def _moved(law: np.ndarray, change: float) -> np.ndarray:
    """Move a share of the law onto its likeliest value, from the others as they stand; all of theirs at most."""
    best = law.argmax()
    rest = 1 - law[best]
    moved = law * (1 - min(change, rest) / rest) if rest > 0 else law.copy()
    moved[best] = 0.0
    moved[best] = 1 - moved.sum()
    return moved

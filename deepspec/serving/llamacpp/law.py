"""Does an engine sample the same law with a draft as without? Two samples of answers to the same prompts, at T = 1.

The draft decides the second token first, so that token's counts are compared, and the answers' lengths. The statistic
is the squared distance from equal shares over the total, summed over all values of all prompts; its law under equality
comes from permuting answers within prompts.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

PERMUTATIONS = 2000
Sample = Sequence[Sequence[Hashable]]  # one value an answer, by prompt


def p_value(first: Sample, second: Sample, seed: int = 0) -> float:
    """Return the share of permutations whose statistic is at least as large as the found one.

    Args:
        first, second: values by prompt, of equally many prompts.
    """
    random = np.random.default_rng(seed)
    found, drawn = 0.0, np.zeros(PERMUTATIONS)
    for one, other in zip(first, second, strict=True):
        values = {value: i for i, value in enumerate(dict.fromkeys([*one, *other]))}
        codes = np.array([values[value] for value in (*one, *other)])
        totals = np.bincount(codes, minlength=len(values))

        def statistic(
            counts: np.ndarray, totals: np.ndarray = totals, share: float = len(one) / len(codes)
        ) -> float:
            return float((((counts - share * totals) ** 2) / totals).sum())

        found += statistic(np.bincount(codes[: len(one)], minlength=len(values)))
        for i in range(PERMUTATIONS):
            chosen = random.permutation(codes)[: len(one)]
            drawn[i] += statistic(np.bincount(chosen, minlength=len(values)))
    return float((1 + (drawn >= found - 1e-9).sum()) / (1 + PERMUTATIONS))


def second_tokens(answers: Sequence[Sequence[list[int]]]) -> list[list[int]]:
    """Return the token that a draft decides first, by prompt; -1 where an answer has none."""
    return [[answer[1] if len(answer) > 1 else -1 for answer in of] for of in answers]


def answer_lengths(answers: Sequence[Sequence[list[int]]]) -> list[list[int]]:
    """Return how many tokens each answer has, by prompt."""
    return [[len(answer) for answer in of] for of in answers]

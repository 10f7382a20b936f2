"""What a round costs in llama.cpp here beside a plain pass, and from that whether and how long to draft.

A machine's speed drifts, and other work on it comes and goes, by more than what lengths differ by. So all servers run
at once, every short answer is timed between two plain ones, and a length's cost is the median, over turns in which all
lengths run, of its ratio to these two. A pass over n tokens is timed where a lookup drafted n − 1 of them, since
finding them takes no time.

With E(k) tokens a round of k drafted ones, from our engine's acceptance, and R(k) plain passes that such a round takes,
drafting k gains E(k) / R(k).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

import numpy as np

from deepspec.errors import DeepSpecError
from deepspec.evaluation.parts import Bounds
from deepspec.serving.protocols import Counts, Turn

TURNS = 7
LEAST = 3  # turns in which a length was seen
RESAMPLES = 1000
Ask = Callable[[], Sequence[Turn]]  # a short answer of one server


@dataclass(frozen=True)
class Ratio:
    """A cost in plain passes: the median over turns, and its 95 % interval by turns."""

    value: float
    bounds: Bounds

    @classmethod
    def of(cls, turns: Sequence[float]) -> Ratio:
        random = np.random.default_rng(0)
        medians = np.median(random.choice(np.array(turns), (RESAMPLES, len(turns))), axis=1)
        low, high = np.quantile(medians, [0.025, 0.975])
        return cls(median(turns), (float(low), float(high)))


@dataclass(frozen=True)
class Costs:
    """Seconds of a plain pass, and in such passes: a pass over n tokens, a round that drafts k."""

    plain: float
    passes: dict[int, Ratio]
    rounds: dict[int, Ratio]


@dataclass(frozen=True)
class Choice:
    """Drafting so many tokens: tokens a round, and how much faster than plain decoding, with its interval."""

    drafted: int
    tau: float
    speedup: float
    bounds: Bounds


def lengths(most: int) -> list[int]:
    """Return the draft lengths to measure: all up to 3, and the longest."""
    return sorted({*range(1, min(most, 3) + 1), most})


def measure(plain: Ask, lookups: Mapping[int, Ask], drafts: Mapping[int, Ask]) -> Costs:
    """
    Time passes and rounds beside plain passes.

    Args:
        lookups, drafts: by the number of tokens that they draft.

    Raises:
        DeepSpecError: plain answers are too short to time.
    """
    asks = {(True, k): ask for k, ask in lookups.items()} | {(False, k): ask for k, ask in drafts.items()}
    order, plains = list(asks), [_seconds(plain(), 0)]
    ratios: dict[tuple[bool, int], list[float]] = {key: [] for key in asks}
    for turn in range(TURNS):
        start = turn % len(order)
        for key in order[start:] + order[:start]:
            seconds = _seconds(asks[key](), key[1])
            plains.append(_seconds(plain(), 0))
            before, after = plains[-2:]
            if seconds and before and after:
                ratios[key].append(2 * seconds / (before + after))
    seen = [seconds for seconds in plains if seconds]
    if len(seen) < LEAST:
        raise DeepSpecError("llama.cpp answered in too few tokens to time a pass; ask another task (--tasks)")
    found = {key: Ratio.of(turns) for key, turns in ratios.items() if len(turns) >= LEAST}
    return Costs(
        median(seen),
        {k + 1: ratio for (lookup, k), ratio in found.items() if lookup},
        {k: ratio for (lookup, k), ratio in found.items() if not lookup},
    )


def choices(costs: Costs, counts: Counts) -> list[Choice]:
    """Return what each measured length gains, with the acceptance that our engine counted of whole drafts."""
    if not counts.drafts:
        return []
    taus = list(accumulate((n / counts.drafts for n in counts.by_position), initial=1.0))
    found = []
    for k, ratio in costs.rounds.items():
        if k < len(taus):
            low, high = ratio.bounds
            found.append(Choice(k, taus[k], taus[k] / ratio.value, (taus[k] / high, taus[k] / low)))
    return found


def advice(found: Sequence[Choice], costs: Costs) -> str:
    """Say in a line whether to draft, and how many tokens."""
    if not found:
        return "no round of the draft could be timed"
    best = max(found, key=lambda choice: choice.speedup)
    low, high = best.bounds
    said = f"{best.tau:.2f} tokens a round that takes {costs.rounds[best.drafted].value:.2f} plain passes"
    said += f": {best.speedup:.2f}× ({low:.2f}–{high:.2f}) expected"
    if high <= 1:
        return f"do not draft here: at best {best.drafted} drafted, {said}"
    if low <= 1:
        return f"drafting gains or loses little here: at best {best.drafted} drafted, {said}"
    return f"draft {best.drafted}: {said}"


def _seconds(turns: Sequence[Turn], drafted: int) -> float | None:
    """Return the median seconds of the turns that drafted so many tokens; None where there is none."""
    found = [turn.seconds for turn in turns if turn.drafted == drafted]
    return median(found) if found else None

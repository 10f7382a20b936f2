"""What a round costs in llama.cpp here, and from that whether and how long to draft.

A pass over n tokens is timed where a lookup drafted n − 1 of them, since finding them takes no time; a round of the
draft is timed at each length. With E(k) tokens a round of k drafted ones, from our engine's acceptance, drafting k
gains E(k) T(1) / R(k), R(k) the round's seconds and T(1) a plain pass's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from deepspec.errors import DeepSpecError
from deepspec.serving.llamacpp.launch import Server
from deepspec.serving.protocols import Answer, Counts, Turn

MATCH = 1  # tokens that the lookup looks for: so few that it nearly always drafts
LEAST = 3  # rounds of a length
REPEATS = 2


@dataclass(frozen=True)
class Costs:
    """Seconds: of a pass over n tokens, and of a round that drafts k, both medians."""

    passes: dict[int, float]
    rounds: dict[int, float]


@dataclass(frozen=True)
class Choice:
    """Drafting so many tokens: tokens a round, and how much faster than plain decoding."""

    drafted: int
    tau: float
    speedup: float


def lengths(most: int) -> list[int]:
    """Return the draft lengths to measure: all up to 3, and the longest."""
    return sorted({*range(1, min(most, 3) + 1), most})


def measure(answer: Callable[[Server, str], Answer], plain: Server, drafting: Server) -> Costs:
    """
    Time passes and rounds.

    Args:
        answer: what a server makes of a prompt, and the name of its log.

    Raises:
        DeepSpecError: the lookup drafted nothing.
    """
    passes: dict[int, list[Turn]] = {}
    rounds: dict[int, list[Turn]] = {}
    for _ in range(REPEATS):  # a load of the machine that comes and goes is spread over all lengths
        passes.setdefault(1, []).extend(answer(plain, "plain").turns)
        for k in lengths(drafting.tokens):
            lookup = replace(plain, kind="ngram-simple", tokens=k, match=MATCH)
            passes.setdefault(k + 1, []).extend(answer(lookup, f"pass-{k}").turns)
            rounds.setdefault(k, []).extend(answer(replace(drafting, tokens=k), f"round-{k}").turns)
    found = _medians({n: _drafted(turns, n - 1) for n, turns in passes.items()})
    if 1 not in found:
        raise DeepSpecError("llama.cpp answered in too few tokens to time a pass; ask another task (--tasks)")
    return Costs(found, _medians({k: _drafted(turns, k) for k, turns in rounds.items()}))


def choices(costs: Costs, counts: Counts) -> list[Choice]:
    """Return what each measured length gains, with the acceptance that our engine counted of whole drafts."""
    if not counts.drafts:
        return []
    taus = list(accumulate((n / counts.drafts for n in counts.by_position), initial=1.0))
    return [
        Choice(k, taus[k], taus[k] * costs.passes[1] / seconds)
        for k, seconds in costs.rounds.items()
        if k < len(taus)
    ]


def advice(found: Sequence[Choice], costs: Costs) -> str:
    """Say in a line whether to draft, and how many tokens."""
    if not found:
        return "no round of the draft could be timed"
    best = max(found, key=lambda choice: choice.speedup)
    said = f"{best.tau:.2f} tokens a round of {1000 * costs.rounds[best.drafted]:.1f} ms"
    said += f", a plain token {1000 * costs.passes[1]:.1f} ms: {best.speedup:.2f}× expected"
    if best.speedup <= 1:
        return f"do not draft here: at best {best.drafted} drafted, {said}"
    return f"draft {best.drafted}: {said}"


def _drafted(turns: Sequence[Turn], tokens: int) -> list[float]:
    return [turn.seconds for turn in turns if turn.drafted == tokens]


def _medians(seconds: dict[int, list[float]]) -> dict[int, float]:
    """Return medians by length, without lengths of which there were too few."""
    return {n: statistics.median(found) for n, found in seconds.items() if len(found) >= LEAST}

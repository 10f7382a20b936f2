"""τ by context: of the rounds that begin behind so many tokens, prompt and answer together."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from deepspec.evaluation.parts import ContextBin
from deepspec.evaluation.runs import Run

SHORTEST = 128  # tokens of the first bin; each further one is as long as all before it


def tau_by_context(runs: Iterable[Run]) -> list[ContextBin]:
    """Return τ of the rounds by the tokens before them; runs that do not tell their prompts' lengths have none."""
    found: dict[int, list[int]] = {}
    for run in runs:
        for starts, accepted in zip(run.contexts, run.accepted, strict=False):  # a turn
            for start, count in zip(starts, accepted, strict=True):
                found.setdefault((start // SHORTEST).bit_length(), []).append(count + 1)
    return [
        ContextBin(start=_begin(at), end=_begin(at + 1), rounds=len(committed), tau=fmean(committed))
        for at, committed in sorted(found.items())
    ]


def _begin(at: int) -> int:
    return SHORTEST << (at - 1) if at else 0

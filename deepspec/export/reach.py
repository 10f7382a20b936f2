"""For what contexts a draft is: to what length it was trained, and what was measured within and beyond that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deepspec.evaluation.parts import ContextBin
from deepspec.evaluation.record import Record


@dataclass(frozen=True)
class Reach:
    """Contexts that a draft is for.

    Attributes:
        longest: tokens of the longest row that it was trained on; None: unknown, or nothing was trained.
        common: tokens that 95 % of its rows do not exceed; None: unknown.
        measured: τ by context at the lowest temperature, all tasks together.
    """

    longest: int | None = None
    common: int | None = None
    measured: tuple[ContextBin, ...] = ()

    @classmethod
    def of(cls, made: Mapping[str, Any], evaluation: Record | None) -> Reach:
        """Return it of a draft.

        Args:
            made: the draft's deepspec.json.
            evaluation: its evaluation record, if it has one.
        """
        if not made.get("data_digest"):  # nothing was learnt, or nobody says from what
            return cls(measured=_measured(evaluation))
        rows = made.get("row_tokens") or {}
        longest = rows.get("longest") or (made.get("train") or {}).get("max_length")
        return cls(longest, rows.get("common"), _measured(evaluation))

    def sentence(self) -> str:
        """Say what contexts to serve the draft for, and how it fares beyond; empty where nothing is known."""
        if self.longest is None:
            return ""
        common = f" (95 % of them up to {self.common})" if self.common and self.common < self.longest else ""
        begins = f"It was trained on rows of up to {self.longest} tokens{common}: serve it for contexts up to that."
        within = tau(each for each in self.measured if each.start < self.longest)
        beyond = tau(each for each in self.measured if each.start >= self.longest)
        if beyond is None:
            return f"{begins} Longer ones were not measured."
        known = f", {within:.2f} below" if within is not None else ""
        first = min(each.start for each in self.measured if each.start >= self.longest)
        return f"{begins} From {first} tokens on τ was {beyond:.2f}{known}."

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it, with its sentence."""
        measured = [each.model_dump() for each in self.measured]
        return {**asdict(self), "measured": measured, "sentence": self.sentence()}


def tau(bins: Iterable[ContextBin]) -> float | None:
    """Return τ of bins together; None where they have no round."""
    bins = list(bins)
    rounds = sum(each.rounds for each in bins)
    return sum(each.tau * each.rounds for each in bins) / rounds if rounds else None


def _measured(record: Record | None) -> tuple[ContextBin, ...]:
    if record is None or not record.contexts:
        return ()
    lowest = record.summary.temperature
    by_start: dict[int, list[ContextBin]] = {}
    for key, bins in record.contexts.items():
        if record.tasks[key].temperature == lowest:
            for each in bins:
                by_start.setdefault(each.start, []).append(each)
    return tuple(_pooled(bins) for _, bins in sorted(by_start.items()))


def _pooled(bins: Sequence[ContextBin]) -> ContextBin:
    rounds = sum(each.rounds for each in bins)
    return bins[0].model_copy(update={"rounds": rounds, "tau": tau(bins)})

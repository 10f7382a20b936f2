"""How many tokens to draft, for what contexts: what maximises tokens/s on the machine that measured the draft.

With a_j the acceptance at position j of whole blocks (greedy, the draft alone), a round that drafts k tokens commits
E(k) = 1 + a_1 + a_1 a_2 + … + a_1 ⋯ a_k on average, and takes V(k + 1) + D(k): a target pass over k + 1 tokens and the
draft. A block drafter makes its whole block at once and sees all of its masks, so it always drafts γ; of the others k
is where E(k) / (V(k + 1) + D(k)) is largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from operator import mul
from types import MappingProxyType
from typing import Any

import numpy as np

from deepspec.evaluation.record import Record
from deepspec.export.reach import Reach

BLOCKS = ("peagle", "dspark", "dflash", "dflash2", "medusa")  # γ tokens or none


@dataclass(frozen=True)
class Choice:
    """`tau`: tokens committed a round; `tokens_per_second` at one request."""

    drafted: int
    tau: float
    tokens_per_second: float


@dataclass(frozen=True)
class Advice:
    tokens: int
    reason: str
    choices: tuple[Choice, ...] = ()
    reach: Reach = field(default_factory=Reach)

    def to_dict(self) -> dict[str, Any]:
        choices = [asdict(choice) for choice in self.choices]
        return {
            "num_speculative_tokens": self.tokens,
            "reason": self.reason,
            "choices": choices,
            "contexts": self.reach.to_dict(),
        }


def advise(
    record: Record | None, kind: str, gamma: int, made: Mapping[str, Any] = MappingProxyType({})
) -> Advice:
    """
    Say how many tokens to draft, why, and for what contexts.

    Args:
        record: the draft's evaluation record, if it has one.
        gamma: γ, tokens drafted at most.
        made: the draft's deepspec.json.
    """
    return replace(_tokens(record, kind, gamma), reach=Reach.of(made, record))


def _tokens(record: Record | None, kind: str, gamma: int) -> Advice:
    choices = _choices(record, kind, gamma)
    if kind in BLOCKS:
        return Advice(gamma, "the whole block: another length is not what it was trained on", choices)
    if record is None or not choices:
        return Advice(gamma, "γ: no evaluation record says what a shorter draft would save", choices)
    best = max(choices, key=lambda choice: choice.tokens_per_second)
    return Advice(best.drafted, f"most tokens a second by the figures measured on {record.device}", choices)


def _choices(record: Record | None, kind: str, gamma: int) -> tuple[Choice, ...]:
    if record is None or record.round_costs is None:
        return ()
    tasks = record.greedy_blocks.values()
    passes, draft = record.round_costs.passes.get("1"), record.round_costs.drafts.get("1")
    if not tasks or not passes or draft is None:
        return ()
    survival = _mean([list(accumulate(task.accept_rate_by_position, mul)) for task in tasks], gamma)
    tokens, seconds = zip(*passes, strict=True)
    found = []
    for k in range(1, gamma + 1):
        tau = 1 + sum(survival[:k])
        drafting = draft if kind in BLOCKS else draft * k / gamma
        found.append(Choice(k, tau, tau / (float(np.interp(k + 1, tokens, seconds)) + drafting)))
    return tuple(found)


def _mean(rows: list[list[float]], length: int) -> list[float]:
    """Average over tasks; a position that no block of a task reached counts as never accepted there."""
    return [sum(row[k] if k < len(row) else 0.0 for row in rows) / len(rows) for k in range(length)]

"""What a round is made of: a request's part of it, its seconds, and the shape of the target's pass."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from deepspec.decoding.slot import Slot
from deepspec.decoding.tree import Proposal


@dataclass(frozen=True)
class Round:
    """One request's part of a round that has ended.

    Args:
        request_id: `Request.id`.
        proposal: what the target verified; without tokens where nothing was drafted.
        accepted: how many tokens of the proposal stood.
        tokens: what was committed: the accepted ones and the target's own, cut at a stop or the limit.
    """

    request_id: Any
    proposal: Proposal
    accepted: int
    tokens: list[int]


@dataclass
class Turn:
    """One request's part of a round under way.

    Args:
        row: of the cache and of the drafter's session.
        offset: place of its anchor in the target's pass; the nodes of its proposal follow.
        nodes, token: the accepted nodes of the proposal and the target's own token after them.
        fed, passes: committed tokens that the target ran again for it, and runs of the model (`ForwardPass`).
    """

    row: int
    slot: Slot
    proposal: Proposal = field(default_factory=Proposal)
    offset: int = 0
    nodes: list[int] = field(default_factory=list)
    token: int = -1
    fed: int = 0
    passes: int = 1

    @property
    def size(self) -> int:
        """Tokens that the target's pass has of it: the anchor and the proposal."""
        return 1 + len(self.proposal.tokens)


class RoundClock:
    """Seconds of a round's parts, which its requests share evenly.

    Args:
        timed: wait on a GPU until all that was launched has ended; without it a part's seconds there are those of
            launching it.
    """

    def __init__(self, device: torch.device, timed: bool):
        self.waits_for = device if timed and device.type == "cuda" else None
        self.parts: dict[str, float] = {}
        self.last = self.now()

    def now(self) -> float:
        if self.waits_for is not None:
            torch.cuda.synchronize(self.waits_for)
        return time.perf_counter()

    def lap(self, part: str) -> None:
        """End the part `draft_s`, `verify_s` or `host_s` of `Stats`."""
        now = self.now()
        self.parts[part] = now - self.last
        self.last = now

    def share(self, turns: Iterable[Turn]) -> None:
        """Add the seconds of each part to the requests' statistics."""
        slots = [turn.slot for turn in turns]
        for slot in slots:
            for part, seconds in self.parts.items():
                setattr(slot.stats, part, getattr(slot.stats, part) + seconds / len(slots))


def padded_size(tokens: int) -> int:
    """Return the next of the sizes 1 ... 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ...: four to an octave."""
    step = 1 << max((tokens - 1).bit_length() - 3, 0)
    return -(-tokens // step) * step

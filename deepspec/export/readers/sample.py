"""What a reader is asked about: tokens, blocks that begin in them, and what the target makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """
    Args:
        tokens: int64 [n].
        anchors: int64 [blocks], positions at which blocks begin; γ tokens follow each.
        states: target layer → its output float32 [n, d]; -1 is the embedding output.
        last: float32 [n, d], after the target's final norm.
        embeddings, head: of the target, float32 [vocab, d], rounded to the bfloat16 that engines hold.
        gamma: γ.
    """

    tokens: Tensor
    anchors: Tensor
    gamma: int
    states: dict[int, Tensor]
    last: Tensor
    embeddings: Tensor
    head: Tensor

    def shifted(self, by: int) -> Sample:
        """As an engine sees it that takes layer i + by for layer i."""
        return replace(self, states={i - by: x for i, x in self.states.items()})

"""What a reader is asked about: tokens, blocks that begin in them, and what the target makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepspec.export.readers.directory import Unreadable


@dataclass(frozen=True)
class Sample:
    """A text with the target's states, from which a reader computes logits.

    Args:
        tokens: int64 [n].
        anchors: int64 [blocks], positions at which blocks begin; γ tokens follow each.
        states: target layer → its output float32 [n, d]; -1 is the embedding output.
        last: float32 [n, d], after the target's final norm.
        embeddings, head: of the target, float32 [vocab, d], rounded to the dtype of the draft.
        gamma: γ.
    """

    tokens: Tensor
    anchors: Tensor
    gamma: int
    states: dict[int, Tensor]
    last: Tensor
    embeddings: Tensor
    head: Tensor

    def features(self, layer_ids: Sequence[int]) -> Tensor:
        """Return the outputs of these layers side by side, [n, layers·d].

        Raises:
            Unreadable: the target hands out no such layer.
        """
        if foreign := [i for i in layer_ids if i not in self.states]:
            raise Unreadable(
                f"layer ids: the engine would read target layer {foreign[0]}, which it cannot hand out"
            )
        return torch.cat([self.states[i] for i in layer_ids], -1)

    def shifted(self, by: int) -> Sample:
        """Return the sample as an engine sees it that takes layer i + by for layer i."""
        return replace(self, states={i - by: x for i, x in self.states.items()})

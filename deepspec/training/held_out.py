"""Held-out blocks as the network in training drafts them, which decoding is held to (`decoding/train_parity.py`)."""

from __future__ import annotations

import torch

from deepspec.decoding.train_parity import HeldOutBlocks
from deepspec.target.ends import Ends
from deepspec.training.batches import Batches
from deepspec.training.objective import BlockObjective

_SEQUENCES, _ANCHORS = 16, 6  # conversations, and blocks of each


@torch.no_grad()
def draft_held_out_blocks(
    objective: BlockObjective, batches: Batches, heldout: list[int], target: Ends
) -> list[HeldOutBlocks]:
    """Return the greedy blocks at a few anchors of the first held-out conversations."""
    kept = []
    for i in heldout[:_SEQUENCES]:
        ids = batches.store.sequences[i].ids
        starts = [start for start in batches.starts(i, answers_only=True) if start + batches.gamma < len(ids)]
        if not starts:
            continue
        anchors = torch.tensor(starts[:: -(-len(starts) // _ANCHORS)])
        batch = batches.at([i] * len(anchors), anchors[:, None], answers_only=True).to(target.device)
        chains = objective.greedy_chains(batch)
        after = target.logits(batch.hidden[0, anchors].to(target.dtype)).argmax(-1)
        accepted = (chains[:, 0] == after).int().tolist()
        kept.append(HeldOutBlocks(ids, anchors.tolist(), chains.tolist(), accepted))
    return kept

"""A second stage: blocks that start where the draft of the moment was rejected (after Draft-OPD).

Random anchors are mostly places where a verification round would never start. Here decoding is replayed on the training
conversations: from an anchor the draft's token k is accepted with probability α_k = Σ min(p, q), a round ends at the
first rejection (or after the block), the next begins at the token that replaced it. The starts that follow a
rejection are the anchors of the steps that remain.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from deepspec.training.batches import Batches
from deepspec.training.objective import BlockObjective

_ANCHORS = 256  # of a pass


@torch.no_grad()
def rejected_starts(
    objective: BlockObjective, batches: Batches, accelerator: Accelerator, seed: int
) -> dict[int, list[int]]:
    """Return sequence → anchors for each training sequence in which a draft was rejected; processes share the work."""
    objective.eval()
    members = batches.members.tolist()
    mine = members[accelerator.process_index :: accelerator.num_processes]
    most = -(-len(members) // accelerator.num_processes)
    found = []
    for i in mine + members[: most - len(mine)]:  # a sharded network needs all processes in every pass
        rng = torch.Generator().manual_seed(seed * 1_000_003 + i)
        chances = _acceptance(objective, batches, accelerator, i)
        starts = walk(chances, torch.rand(chances.shape, generator=rng), batches.starts(i))
        if starts:
            found.append((i, starts))
    return dict(gather_object(found) if accelerator.num_processes > 1 else found)


def _acceptance(objective: BlockObjective, batches: Batches, accelerator: Accelerator, i: int) -> Tensor:
    """Compute α at every position of the blocks at all anchors of sequence i, [anchors, γ]; −1 where none counts."""
    parts = []
    for anchors in torch.tensor(batches.starts(i)).split(_ANCHORS):
        batch = batches.at([i], anchors[None]).to(accelerator.device)
        with accelerator.autocast():
            alpha = objective.acceptance(batch)[0]
        parts.append(alpha.masked_fill(~batch.valid[0], -1).cpu())
    return torch.cat(parts)


def walk(chances: Tensor, uniforms: Tensor, anchors: list[int]) -> list[int]:
    """Return where rounds start after a rejection, among `anchors`.

    A block ends without a rejection where nothing more is to be learnt (chance −1), or after γ tokens.

    Args:
        chances, uniforms: [anchors, γ], of the blocks at the anchors.
        anchors: ascending.
    """
    place = {anchor: row for row, anchor in enumerate(anchors)}
    starts: list[int] = []
    anchor = anchors[0]
    while anchor in place:
        row = place[anchor]
        accepted, rejected = 0, False
        for chance, uniform in zip(chances[row].tolist(), uniforms[row].tolist(), strict=True):
            if chance < 0:
                break
            if uniform >= chance:
                rejected = True
                break
            accepted += 1
        anchor += accepted + 1
        if rejected and anchor in place:
            starts.append(anchor)
    return starts

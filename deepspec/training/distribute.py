"""The objective over several processes: data parallel, or sharded by FSDP2, as accelerate's configuration says."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from deepspec.training.objective import BlockObjective

if TYPE_CHECKING:
    from deepspec.config import TrainParams


def distribute(
    objective: BlockObjective, params: TrainParams, accelerator: Accelerator
) -> tuple[nn.Module, Any]:
    """The wrapped objective and its AdamW.

    accelerate shards on accelerators only; on CPUs (a test of the same code on any machine) FSDP2 is applied here.
    """
    sharded = (
        accelerator.distributed_type == DistributedType.MULTI_CPU
        and os.environ.get("ACCELERATE_USE_FSDP") == "true"
    )
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for block in objective.model.blocks():
            fully_shard(block)
        fully_shard(objective)
        return objective, _adamw(objective, params, fused=False)
    return accelerator.prepare(objective, _adamw(objective, params, fused=True))


def _adamw(objective: nn.Module, params: TrainParams, fused: bool) -> torch.optim.AdamW:
    trainable = [p for p in objective.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trainable, lr=params.lr, weight_decay=params.weight_decay, betas=(0.9, 0.95), fused=fused
    )

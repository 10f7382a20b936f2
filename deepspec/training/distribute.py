"""The objective over several processes: data parallel or sharded by FSDP2, as accelerate's configuration says.

The trainer's loop is the same for all.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from deepspec.errors import DeepSpecError
from deepspec.files import replacing
from deepspec.training.objective import BlockObjective

if TYPE_CHECKING:
    from deepspec.training.params import TrainParams

CHECKPOINT = "checkpoint.pt"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


class DistributedObjective:
    """The objective with its optimizer in one process, data parallel ones, or FSDP2's.

    accelerate shards on accelerators only; on CPUs (the same code, tested on any machine) FSDP2 is applied here.

    Attributes:
        objective: wrapped; call it in training.
        optimizer: AdamW.
    """

    def __init__(self, objective: BlockObjective, params: TrainParams, accelerator: Accelerator):
        self.accelerator, self.clip = accelerator, params.grad_clip
        cpus = accelerator.distributed_type == DistributedType.MULTI_CPU
        if cpus and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            from torch.distributed.fsdp import fully_shard

            for block in objective.model.blocks():
                fully_shard(block)
            fully_shard(objective)
            self.objective, self.optimizer = objective, _adamw(objective, params, fused=False)
        else:
            self.objective, self.optimizer = accelerator.prepare(
                objective, _adamw(objective, params, fused=True)
            )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part of the step's loss.

        Wrappers average gradients over processes; their sum is wanted.
        """
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a part's passes: only the step's `last` part brings the gradients together."""
        return nullcontext() if last else self.accelerator.no_sync(self.objective)

    def clip_gradients(self) -> float:
        """Clip the gradients by their global norm, and return it as it was."""
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.clip)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def optimizer_step(self) -> None:
        """Update the weights and drop the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        """Return the trained weights, whole, on the CPU; every process takes part."""
        return cast("dict[str, Tensor]", get_model_state_dict(self.objective, options=_WHOLE))

    def save_checkpoint(self, work: Path, progress: dict[str, Any]) -> None:
        """Write a checkpoint, whole or not at all; it can be read by any number of processes."""
        state = {
            "progress": progress,
            "weights": self.weights(),
            "optimizer": get_optimizer_state_dict(self.objective, self._inner, options=_WHOLE),
        }
        if self.accelerator.is_main_process:
            with replacing(work / CHECKPOINT) as scratch:
                torch.save(state, scratch)

    def load_checkpoint(self, work: Path) -> dict[str, Any] | None:
        """Load the checkpoint in `work` and return its progress, or None where there is none.

        Raises:
            DeepSpecError: it cannot be read.
        """
        path = work / CHECKPOINT
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise DeepSpecError(
                f"{path}: corrupt checkpoint ({error}); delete it to train from the start"
            ) from error
        set_model_state_dict(self.objective, state["weights"], options=_WHOLE)
        set_optimizer_state_dict(self.objective, self._inner, state["optimizer"], options=_WHOLE)
        return state["progress"]

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)


def _adamw(objective: nn.Module, params: TrainParams, fused: bool) -> torch.optim.AdamW:
    trainable = [p for p in objective.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trainable, lr=params.lr, weight_decay=params.weight_decay, betas=(0.9, 0.95), fused=fused
    )

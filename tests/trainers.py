"""Trainers of a small DSpark network on twenty random sequences."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from deepspec.drafters.start import channel_std
from deepspec.training.batches import Batches
from deepspec.training.objective import BlockObjective
from deepspec.training.params import TrainParams
from deepspec.training.trainer import Trainer
from tests.tiny import make_draft

STEPS = 9


def make_trainer(store, work, steps=STEPS, start="random", **changes) -> Trainer:
    model = make_draft(store.target)
    if start == "target":
        model.init_from_target(store.target, channel_std(store.rows([2, 3, 4]), store.layers))
    train = TrainParams(
        **{"steps": steps, "lr": 3e-3, "batch_size": 4, "anchors": 6, "eval_every": 3, "save_every": 2}
        | {"mixed_precision": "no", **changes}
    )
    batches = Batches(
        store, list(range(2, 20)), train.batch_size, train.anchors, model.config.block_size, seed=0
    )
    objective = BlockObjective(model, train.loss)
    return Trainer(objective, batches, [0, 1], train, Accelerator(mixed_precision="no", cpu=True), work)


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.raw.named_parameters() if p.requires_grad}

"""Trains a tiny draft for a few steps, in as many processes as it is launched in: `test_distributed.py` runs it.

python -m tests.train_small TARGET WORK STEPS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator

from deepspec.features import local
from deepspec.features.local import CachedFeatures, Share
from deepspec.features.sequences import Sequence
from deepspec.target.model import load_target
from deepspec.training.batches import Batches
from deepspec.training.objective import BlockObjective
from deepspec.training.params import TrainParams
from deepspec.training.trainer import Trainer
from tests.tiny import make_draft


def main(directory: str, work: str, steps: str) -> None:
    accelerator = Accelerator(mixed_precision="no")
    target = load_target(directory)
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 500, (n,), generator=rng).tolist() for n in range(14, 34)]
    sequences = [Sequence(row, [0] * 4 + [1] * (len(row) - 4), [1] * len(row)) for row in rows]
    params = TrainParams(
        steps=8, lr=3e-3, batch_size=4, anchors=6, eval_every=2, save_every=4, mixed_precision="no"
    )
    model = make_draft(target, draft_vocab_size=128)
    store = CachedFeatures(Path(work) / "features", target, sequences, (0, 1), "data")
    share = Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    with (
        mock.patch.multiple(local, BATCH_TOKENS=80, SHARD_TOKENS=60),  # every process has some shards
        mock.patch.object(store, "_write", wraps=store._write) as write,
    ):
        store.build(share=share)
    computed = [call.args[0] for call in write.call_args_list]
    Path(work).joinpath(f"shards-{share.rank}.json").write_text(json.dumps(computed))
    batches = Batches(store, list(range(3, 20)), 4, 6, 3, seed=0)
    trainer = Trainer(BlockObjective(model, params.loss), batches, [0, 1, 2], params, accelerator, Path(work))
    original = trainer.train_step

    def step():
        if trainer.step == int(steps):
            raise SystemExit(9)
        return original()

    trainer.train_step = step
    trainer.run()
    if accelerator.is_main_process:
        weights = {name: w.tolist() for name, w in trainer.best_weights().items() if "norm" in name}
        (Path(work) / "result.json").write_text(json.dumps([trainer.history, weights]))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])

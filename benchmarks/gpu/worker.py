"""A short training in as many processes as it is launched in: step 5 runs it. `worker.py TARGET WORK RESULT SIZES`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from deepspec.drafters.algorithms.dspark import network
from deepspec.drafters.params import DSparkParams
from deepspec.features.local import OnlineFeatures
from deepspec.features.sequences import Sequence
from deepspec.target.model import load_target
from deepspec.training.batches import Batches
from deepspec.training.objective import BlockObjective
from deepspec.training.params import TrainParams
from deepspec.training.trainer import Trainer

BACKEND = "DEEPSPEC_BACKEND"


def main(directory: str, work: str, result: str, sizes: str) -> None:
    size = json.loads(sizes)
    backend = os.environ.get(BACKEND)
    rank = int(os.environ.get("RANK", "0"))
    if "LOCAL_RANK" in os.environ and os.environ.get("ACCELERATE_USE_CPU") != "true":
        os.environ["LOCAL_RANK"] = "0"  # all processes on the one device
    handlers = [InitProcessGroupKwargs(backend=backend)] if backend else []
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=handlers)
    target = load_target(directory, device=str(accelerator.device))
    rng = torch.Generator().manual_seed(0)
    lengths = range(size["length"] - 8, size["length"])
    rows = [torch.randint(2, target.vocab_size, (n,), generator=rng).tolist() for n in lengths]
    sequences = [Sequence(row, [1] * len(row), [1] * len(row)) for row in rows]
    params = TrainParams(
        steps=size["steps"],
        lr=1e-3,
        batch_size=4,
        anchors=size["anchors"],
        eval_every=2,
        save_every=size["steps"],
        mixed_precision="no",
    )
    torch.manual_seed(0)
    draft = network(
        DSparkParams(type="dspark", layers=1, block_size=3, markov_rank=8, start="random"), target
    )
    draft.share(target, torch.arange(draft.config.draft_vocab_size))
    store = OnlineFeatures(target, sequences, draft.config.target_layer_ids)
    batches = Batches(store, list(range(2, len(rows))), 4, params.anchors, 3, seed=0)
    objective = BlockObjective(draft, params.loss).to(accelerator.device)
    trainer = Trainer(objective, batches, [0, 1], params, accelerator, Path(work))
    began = time.perf_counter()
    trainer.run()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if accelerator.device.type == "cuda" else None
    if rank == 0:
        losses = [line["loss"] for line in trainer.history]
        found = {"losses": losses, "seconds": seconds, "peak_bytes": peak, "tau": trainer.best_tau}
        Path(result).write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])

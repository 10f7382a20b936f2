"""One side of `benchmarks/training.py`, in a process of its own: a training step of DeepSpec's or SpecForge's.

python -m benchmarks.training_steps deepspec|specforge DIR; DIR holds setup.json (algorithm and sizes) and
setup.safetensors (weights by their published names, and the inputs). A line on stdin asks for a step; its answer is a
JSON line with seconds, loss, and the step's peak of memory over what the process held before.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Step = Callable[[], Tensor]  # forward; returns the loss
TTT_DECAY = 0.8  # of EAGLE-3's steps


def dspark_step(sizes: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, Step]:
    """The paper's loss at the anchors."""
    from deepspec.drafters.algorithms.dspark import DSparkConfig, DSparkModel
    from deepspec.drafters.loss_params import LossParams

    places = tensors["anchors"][..., None] + torch.arange(sizes["block_size"])  # [1, blocks, γ]
    batch = _batch(tensors, dtype, tensors["anchors"], places, torch.ones_like(places, dtype=torch.bool))
    return _objective(DSparkModel(DSparkConfig.read(sizes)), LossParams(), tensors, batch, dtype)


def dflash_step(sizes: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, Step]:
    """SpecForge's layout: position k of a block has the token at anchor + k, so the first has nothing to learn."""
    from deepspec.drafters.algorithms.dspark import DSparkConfig, DSparkModel
    from deepspec.drafters.loss_params import LossParams

    places = tensors["anchors"][..., None] + torch.arange(sizes["block_size"]) - 1
    valid = (torch.arange(sizes["block_size"]) > 0).expand(places.shape)
    batch = _batch(tensors, dtype, tensors["anchors"], places, valid)
    loss = LossParams(ce=1.0, tv=0.0, confidence=0.0)
    return _objective(DSparkModel(DSparkConfig.read(sizes)), loss, tensors, batch, dtype)


def eagle3_step(sizes: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, Step]:
    """KL at every token, as SpecForge does it, and the laws' entropy, which it does not leave out."""
    from deepspec.drafters.algorithms.eagle3 import Eagle3Config, Eagle3Model
    from deepspec.drafters.loss_params import LossParams

    n, gamma = tensors["tokens"].shape[1], sizes["block_size"]
    anchors = torch.arange(1, n)[None]
    places = anchors[..., None] + torch.arange(gamma)
    batch = _batch(tensors, dtype, anchors, places.clamp(max=n - 1), places < n)
    decay = {"type": "geometric", "decay": -1 / math.log(TTT_DECAY)}
    loss = LossParams(ce=0.0, tv=0.0, kl=1.0, confidence=0.0, positions=decay)
    model, step = _objective(Eagle3Model(Eagle3Config.read(sizes)), loss, tensors, batch, dtype)
    law = (tensors["last_hidden"][0] @ tensors["lm_head.weight"].T).log_softmax(-1)
    entropy = -(law.exp() * law).sum(-1)[places.clamp(max=n - 1)] * (places < n)
    weight = model.weight(batch) / n
    constant = float((entropy * TTT_DECAY ** torch.arange(gamma)).sum() / n)
    return model, lambda: step() * weight + constant


STEPS = {"dspark": dspark_step, "dflash": dflash_step, "eagle3": eagle3_step}


def _batch(tensors: dict[str, Tensor], dtype: torch.dtype, anchors: Tensor, places: Tensor, valid: Tensor):
    """The blocks at `anchors`, whose predictions are the target's at `places` [1, blocks, γ]."""
    from deepspec.training.batches import Batch

    hidden, tokens = tensors["last_hidden"], tensors["tokens"]
    log_norm = (hidden @ tensors["lm_head.weight"].T).logsumexp(-1)
    labels = tokens[0][(places + 1).clamp(max=tokens.shape[1] - 1)]
    features = tensors["features"].to(dtype)
    return Batch(features, tokens, hidden.to(dtype), log_norm, anchors, places, labels, valid)


def _objective(model, loss, tensors: dict[str, Tensor], batch, dtype: torch.dtype) -> tuple[nn.Module, Step]:
    """The mean loss of a batch by our objective, on the weights of the file."""
    from deepspec.training.objective import BlockObjective

    names = {name: model.stored_name(name) for name in model.state_dict() if name != "draft_ids"}
    model.load_state_dict({name: tensors[stored] for name, stored in names.items()}, strict=False)
    objective = BlockObjective(model, loss)

    def step() -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            total, _ = objective(batch)
        return total / objective.weight(batch)

    return objective, step


def resident(field: str) -> int:
    """Bytes: VmRSS now, or VmHWM, its largest since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(side: str, directory: str) -> None:
    setup = json.loads((Path(directory) / "setup.json").read_text())
    tensors = load_file(Path(directory) / "setup.safetensors")
    steps = STEPS if side == "deepspec" else importlib.import_module("benchmarks.training_specforge").STEPS
    model, step = steps[setup["algorithm"]](setup["sizes"], tensors, getattr(torch, setup["dtype"]))
    del tensors
    print("ready", flush=True)
    for _ in sys.stdin:
        model.zero_grad(set_to_none=True)
        gc.collect()
        forget_peak()
        before, began = resident("VmRSS"), time.perf_counter()
        loss = step()
        loss.backward()
        seconds, loss = time.perf_counter() - began, float(loss)
        peak = resident("VmHWM")
        answer = {"seconds": seconds, "loss": loss, "over": peak - before, "peak": peak}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

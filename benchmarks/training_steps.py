"""One side of `benchmarks/training.py`, in a process of its own: a training step of DeepSpec's or SpecForge's DSpark.

python -m benchmarks.training_steps deepspec|specforge DIR; DIR holds setup.json (sizes) and setup.safetensors (weights
by their published names, the target's embeddings and head, and the inputs). A line on stdin asks for a step; its answer
is a JSON line with seconds, loss, and the step's peak of memory over what the process held before.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Step = Callable[[], Tensor]  # forward and backward; returns the loss


def deepspec_step(sizes: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, Step]:
    from deepspec.config import LossParams
    from deepspec.drafters.dspark import DSparkConfig, DSparkModel
    from deepspec.training.batches import Batch
    from deepspec.training.objective import BlockObjective

    gamma, anchors = sizes["block_size"], tensors["anchors"]
    model = DSparkModel(DSparkConfig.read(sizes))
    weights = {name: t for name, t in tensors.items() if name in model.state_dict()}
    model.load_state_dict(weights, strict=False)
    places = anchors[..., None] + torch.arange(gamma)  # [1, blocks, γ]
    hidden = tensors["last_hidden"]
    logits = hidden.float() @ tensors["lm_head.weight"].T
    batch = Batch(
        tensors["features"].to(dtype),
        tensors["tokens"],
        anchors,
        hidden[0][places].to(dtype),
        logits.logsumexp(-1)[0][places],
        tensors["tokens"][0][places + 1],
        torch.ones(places.shape, dtype=torch.bool),
    )
    objective = BlockObjective(model, LossParams())

    def step() -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss, _ = objective(batch)
        loss = loss / objective.weight(batch)
        loss.backward()
        return loss.detach()

    return objective, step


def specforge_step(sizes: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, Step]:
    from specforge.algorithms.common.dflash_family_model import OnlineDSparkModel
    from specforge.modeling.draft.dspark import DSparkDraftModel
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Config

    known = {
        name: sizes[name]
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "vocab_size",
            "max_position_embeddings",
        )
    }
    config = Qwen3Config(**known, rope_parameters=sizes["rope_parameters"], attn_implementation="sdpa")
    config.block_size, config.num_target_layers = sizes["block_size"], sizes["num_target_layers"]
    config.dflash_config = {
        "target_layer_ids": sizes["target_layer_ids"],
        "mask_token_id": sizes["mask_token_id"],
        "markov_rank": sizes["markov_rank"],
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    draft = DSparkDraftModel(config)
    shared = ("embed_tokens.weight", "lm_head.weight")
    weights = {name: t for name, t in tensors.items() if name in draft.state_dict() and name not in shared}
    if missing := set(draft.state_dict()) - set(weights):
        raise SystemExit(f"SpecForge's draft has weights that ours lacks: {sorted(missing)[:3]}")
    draft.load_state_dict(weights)
    embed = nn.Embedding.from_pretrained(tensors["embed_tokens.weight"].to(dtype), freeze=True)
    head = nn.Linear(sizes["hidden_size"], sizes["vocab_size"], bias=False).requires_grad_(False)
    head.weight.data = tensors["lm_head.weight"]
    model = OnlineDSparkModel(
        draft,
        head,
        embed,
        mask_token_id=sizes["mask_token_id"],
        block_size=sizes["block_size"],
        attention_backend="sdpa",
        num_anchors=tensors["anchors"].shape[1],
        loss_decay_gamma=4.0,
    ).to(dtype)
    anchors = tensors["anchors"].sort(-1).values
    model._sample_anchor_positions = lambda *_: (anchors, torch.ones_like(anchors, dtype=torch.bool))
    mask = torch.ones_like(tensors["tokens"])
    features, last = tensors["features"].to(dtype), tensors["last_hidden"].to(dtype)

    def step() -> Tensor:
        loss, _, _ = model(tensors["tokens"], features, mask, last)
        loss.backward()
        return loss.detach()

    return model, step


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
    make = {"deepspec": deepspec_step, "specforge": specforge_step}[side]
    model, step = make(setup["sizes"], tensors, getattr(torch, setup["dtype"]))
    del tensors
    print("ready", flush=True)
    for _ in sys.stdin:
        model.zero_grad(set_to_none=True)
        gc.collect()
        forget_peak()
        before, began = resident("VmRSS"), time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - began
        peak = resident("VmHWM")
        print(
            json.dumps({"seconds": seconds, "loss": float(loss), "over": peak - before, "peak": peak}),
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])

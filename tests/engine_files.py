"""Hidden states as a serving engine writes them: the state before each layer asked for, and the last one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from deepspec.features.inside.deepspec_codec import packed
from deepspec.target.attention import ForwardPass
from deepspec.target.model import Target


def engine_states(target: Target, ids: list[int], layers: list[int]) -> torch.Tensor:
    """Return [tokens, layers, d] of the engine's layer ids."""
    raw: list[torch.Tensor] = []
    handle = target.layers[-1].register_forward_hook(
        lambda module, args, output: raw.append(output[0] if isinstance(output, tuple) else output)
    )
    wanted = tuple(layer - 1 for layer in layers if layer < target.num_layers)
    step = ForwardPass(torch.arange(len(ids))[None], wanted=wanted)
    target.forward(torch.tensor([ids]), step)
    handle.remove()
    found = {layer + 1: step.features[layer][0] for layer in wanted} | {target.num_layers: raw.pop()[0]}
    return torch.stack([found[layer] for layer in layers], 1)


def write_states(
    path: Path, target: Target, ids: list[int], layers: list[int], named: bool = False, form: str = "bf16"
) -> None:
    """Write a file; `named`: with the layers' ids and the form, as DeepSpec's connector does."""
    kept = packed(engine_states(target, ids, layers), form) | {"token_ids": torch.tensor(ids)}
    said = {"layer_ids": json.dumps(layers), "form": form}
    save_file(kept, path, said if named or form != "bf16" else None)

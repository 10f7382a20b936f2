"""The draft as it was trained: its network, and the logits that every export has to reproduce."""

from __future__ import annotations

from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deepspec.drafters.algorithms.dspark import DSparkConfig, DSparkModel
from deepspec.drafters.algorithms.eagle3 import Eagle3Config, Eagle3Model
from deepspec.drafters.algorithms.lm import LMConfig, LMModel, cut_padding
from deepspec.drafters.algorithms.medusa import PUBLISHED_WEIGHTS, MedusaConfig, MedusaModel
from deepspec.drafters.checkpoint import load_network, weight_names
from deepspec.drafters.network import Network
from deepspec.export.readers.sample import Sample
from deepspec.target.model import H_LAST, Target
from deepspec.target.source import from_pretrained


def network(
    kind: str, directory: Path, config: dict[str, Any], target: Target, dtype: torch.dtype
) -> Network:
    """Load a draft directory's network on the CPU in float32, all weights rounded to `dtype`, the file's own.

    Raises:
        DeepSpecError: an unsupported configuration, or an unknown, missing or misshapen weight.
    """
    model = _NETWORKS[kind](directory, config, target).cpu().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


@torch.no_grad()
def logits(model: Network, sample: Sample) -> Tensor:
    """Return logits [anchors, γ, columns] of the blocks at the anchors, true tokens fed, for `model.draft_ids`."""
    gamma = model.config.block_size
    layers = [
        sample.last if layer == H_LAST else sample.states[layer] for layer in model.config.target_layer_ids
    ]
    features = torch.cat(layers, -1) if layers else sample.last[:, :0]
    hidden = model(features[None], sample.tokens[None], sample.anchors[None])
    previous = sample.tokens[sample.anchors[:, None] + torch.arange(gamma)]
    factors = model.outputs(hidden, previous[None]).factors
    return reduce(add, (x.float() @ w.float().T for x, w in factors))[0]


def _eagle3(directory: Path, config: dict[str, Any], target: Target) -> Network:
    return load_network(Eagle3Model(Eagle3Config.read(config)), directory, target)


def _dspark(directory: Path, config: dict[str, Any], target: Target) -> Network:
    return load_network(DSparkModel(DSparkConfig.read(config)), directory, target)


def _medusa(directory: Path, config: dict[str, Any], target: Target) -> Network:
    file = PUBLISHED_WEIGHTS if (directory / PUBLISHED_WEIGHTS).exists() else None
    own_heads = f"0.{config.get('medusa_num_layers', 1)}.weight" in weight_names(directory, file)
    sizes = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    return load_network(MedusaModel(MedusaConfig.read(sizes | config, own_heads)), directory, target, file)


def _lm(directory: Path, config: dict[str, Any], target: Target) -> Network:
    model = from_pretrained(AutoModelForCausalLM, str(directory), dtype=torch.float32)
    cut_padding(model, target.vocab_size)
    return LMModel(LMConfig.of(target, model, config.get("block_size", 5)), model)


_NETWORKS = {"eagle3": _eagle3, "dspark": _dspark, "dflash": _dspark, "medusa": _medusa, "lm": _lm}

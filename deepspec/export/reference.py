"""The draft as it was trained: its network, and the logits that every export has to reproduce."""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from functools import reduce
from operator import add

import torch
from torch import Tensor

from deepspec.drafters.algorithms.dspark import DSparkConfig, DSparkModel
from deepspec.drafters.algorithms.eagle3 import Eagle3Config, Eagle3Model
from deepspec.drafters.algorithms.lm import LMConfig, LMModel, cut_padding
from deepspec.drafters.algorithms.medusa import MedusaConfig, MedusaModel
from deepspec.drafters.checkpoint import Checkpoint, load_network
from deepspec.drafters.network import Network
from deepspec.export.readers.sample import Sample
from deepspec.target.ends import H_LAST
from deepspec.target.model import Target
from deepspec.target.source import load_model


def network(kind: str, checkpoint: Checkpoint, target: Target, dtype: torch.dtype) -> Network:
    """Load a draft directory's network on the CPU in float32, all weights rounded to `dtype`, the file's own.

    Raises:
        DeepSpecError: an unsupported configuration, or an unknown, missing or misshapen weight.
    """
    model = _NETWORKS[kind](checkpoint, target).cpu().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


@torch.no_grad()
def rounded(model: Network, names: Collection[str], rounding: Callable[[Tensor], Tensor]) -> Network:
    """Return a copy of the network whose weights of these names, those of the draft's file, are rounded."""
    copy = deepcopy(model)
    for name, parameter in copy.named_parameters():
        stored = name.removeprefix("model.") if isinstance(copy, LMModel) else copy.stored_name(name)
        if stored in names:
            parameter.data = rounding(parameter.data)
    return copy


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


def _eagle3(checkpoint: Checkpoint, target: Target) -> Network:
    return load_network(Eagle3Model(Eagle3Config.read(checkpoint.config)), checkpoint, target)


def _dspark(checkpoint: Checkpoint, target: Target) -> Network:
    return load_network(DSparkModel(DSparkConfig.read(checkpoint.config)), checkpoint, target)


def _medusa(checkpoint: Checkpoint, target: Target) -> Network:
    return load_network(MedusaModel(MedusaConfig.read(checkpoint.config)), checkpoint, target)


def _lm(checkpoint: Checkpoint, target: Target) -> Network:
    model = load_model(str(checkpoint.directory), dtype=torch.float32)
    cut_padding(model, target.vocab_size)
    return LMModel(LMConfig.of(target, model, checkpoint.config.get("block_size", 5)), model)


_NETWORKS = {"eagle3": _eagle3, "dspark": _dspark, "dflash": _dspark, "medusa": _medusa, "lm": _lm}

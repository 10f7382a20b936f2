"""The draft as it was trained: its network, and the logits that every export has to reproduce."""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from deepspec.drafters.algorithms.lm import LMModel
from deepspec.drafters.checkpoint import Checkpoint
from deepspec.drafters.network import Network
from deepspec.drafters.registry import algorithms
from deepspec.errors import DeepSpecError
from deepspec.export.readers.sample import Sample
from deepspec.target.ends import H_LAST, Ends


def network(kind: str, checkpoint: Checkpoint, target: Ends, dtype: torch.dtype) -> Network:
    """Load a draft directory's network on the CPU in float32, all weights rounded to `dtype`, the file's own.

    Raises:
        DeepSpecError: an unsupported configuration, or an unknown, missing or misshapen weight.
    """
    read = algorithms()[kind].read
    if read is None:
        raise DeepSpecError(f"{checkpoint.directory}: a draft of type {kind} has no network")
    model = read(checkpoint, target).cpu().eval()
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
def with_dense_head(model: Network, dtype: torch.dtype) -> Network:
    """Return a copy of the network whose head of low rank is multiplied out and rounded to `dtype`."""
    copy = deepcopy(model)
    if (factors := copy.low_rank_head) is not None:
        copy.lm_head.weight.data = (factors.up.weight @ factors.down.weight).to(dtype).float()
        copy.low_rank_head = None
        copy.config = replace(copy.config, head_rank=None)
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
    whole = model.outputs(hidden, previous[None])._replace(
        candidates=None
    )  # the scores that candidates are cut of
    return whole.logits()[0]

"""Which states the passes that answer the prompts are to keep for training (`deepspec.features.kept`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch

from deepspec.decoding.recorder import Recorder
from deepspec.drafters.registry import algorithms
from deepspec.drafters.start import WAYS
from deepspec.features.kept import Keeper
from deepspec.target.ends import H_LAST, Ends
from deepspec.target.model import Target

if TYPE_CHECKING:
    from deepspec.config import Params

logger = logging.getLogger(__name__)

SHARE = 0.25  # of the memory that is free, which the states of requests in flight may take


def keeper(params: Params, target: Ends) -> Keeper | None:
    """Return what keeps the states that the pipeline's drafters are trained on; None where none are to be kept."""
    features = params.train.features
    stored = features.mode == "cached" and features.states is None and features.directory is None
    if params.generate.engine != "local" or not stored:
        return None
    if not (isinstance(target, Target) and Recorder.can_record(target)):
        return None
    trained = [_layers(params.drafters[name], target) for name in params.pipeline]
    layers = sorted({layer for own in trained if own is not None for layer in own if layer != H_LAST})
    if not any(own is not None for own in trained):
        return None
    recorder = Recorder(target, layers)
    needed = recorder.bytes_a_token * params.generate.batch_size * params.generate.max_length
    if needed > SHARE * psutil.virtual_memory().available:
        logger.info("states are not kept for training: %.1f GB of memory would be needed", needed / 1e9)
        return None
    return Keeper(recorder, features.form)


def _layers(section: Any, target: Target) -> Sequence[int] | None:
    """Return the layers that a drafter is trained on; None where it is not trained, or goes on from a draft."""
    algorithm = algorithms()[section.type]
    if algorithm.network is None or not getattr(section, "finetune", True):
        return None
    if algorithm.standalone:
        return ()
    if getattr(section, "start", None) is not None:
        if section.start not in WAYS:
            return None
        section = section.model_copy(update={"start": "random"})
    with torch.device("meta"):
        network = algorithm.network(section, target)
    return cast(Any, network.config).target_layer_ids

"""Where a target comes from: its directory or hub id, and what is read there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from deepspec.errors import DeepSpecError
from deepspec.target.identity import TEXT, WEIGHTS


def is_hub_id(source: str) -> bool:
    path = Path(source)
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not path.parent.is_dir()


def hub_directory(source: str, revision: str | None = None) -> Path:
    """Return the local copy of a hub model; its name is the commit that the revision stands for.

    Raises:
        DeepSpecError: no such model or revision, or neither a network nor a copy.
    """
    from huggingface_hub import snapshot_download

    try:
        kinds = [f"*{ending}" for ending in (*TEXT, *WEIGHTS[:3])]
        return Path(snapshot_download(source, revision=revision, allow_patterns=kinds))
    except Exception as error:
        raise DeepSpecError(f"{source}: cannot be fetched from the hub: {_first_line(error)}") from error


def local_directory(source: str) -> Path | None:
    """Return the directory of a target's source, of a hub id's copy too; None where there is none."""
    if is_hub_id(source):
        return hub_directory(source)
    return Path(source) if Path(source).is_dir() else None


def from_pretrained(cls: Any, source: str | None, **options: Any) -> Any:
    """`from_pretrained`, its many errors turned into one line; code that comes with a model is not run."""
    if cls.__name__.startswith("Auto"):
        options["trust_remote_code"] = False
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return cls.from_pretrained(source, **options)
    except Exception as error:
        own_code = "trust_remote_code=True" in str(error)
        reason = "it needs code of its own, which is not run here" if own_code else _first_line(error)
        raise DeepSpecError(f"{source}: cannot be loaded as a target: {reason}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def load_model(source: str, **options: Any) -> PreTrainedModel:
    """Load a model that writes text, all of whose weights must be there: transformers draws what is missing.

    Raises:
        DeepSpecError: nothing loadable there, a model without layers, or one that lacks weights.
    """
    config = options.get("config") or from_pretrained(AutoConfig, source)
    model, found = from_pretrained(model_class(config), source, output_loading_info=True, **options)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if layers is not None and layers < 1:
        raise DeepSpecError(
            f"{source}: config.json says num_hidden_layers {layers}; a target has one at least"
        )
    lacking = sorted(set(found["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise DeepSpecError(f"{source}: its weights lack {lacking[0]}{more}; fetch all of its files again")
    return model


def model_class(config: PreTrainedConfig) -> Any:
    """Return transformers' class that loads a configuration; for one that also sees, and then whole."""
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    alone = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if sees and not alone else AutoModelForCausalLM


def moved(model: PreTrainedModel, device: str, source: str) -> PreTrainedModel:
    """Return a model on a device, for inference.

    Raises:
        DeepSpecError: no such device, or one with too little memory.
    """
    try:
        module: torch.nn.Module = model
        module.to(torch.device(device))
    except (AssertionError, RuntimeError) as error:
        raise DeepSpecError(f"{source}: cannot be moved to {device}: {str(error).splitlines()[0]}") from None
    return model.eval()


def length_limit(config: Any) -> int:
    """Return the tokens of the longest text that a model is run on, 1 << 20 where it names none.

    Longrope takes other factors for all positions of a pass that goes beyond its original length, those of earlier
    tokens and of other requests included, so what is cached no longer fits: such a model is run up to that length.
    """
    limit = getattr(config, "max_position_embeddings", None) or 1 << 20
    whole = getattr(config, "rope_parameters", None) or {}
    ropes = [whole, *(rope for rope in whole.values() if isinstance(rope, dict))]  # one a kind of layers
    for rope in ropes:
        if "longrope" in (rope.get("rope_type"), rope.get("type")):
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limit = min(limit, original or limit)
    return limit


def _first_line(error: Exception) -> str:
    said = str(error).strip().splitlines()[:1]
    if isinstance(error, (LookupError, AttributeError, TypeError)):  # whose words alone say little
        return ": ".join([type(error).__name__, *said])
    return said[0] if said else type(error).__name__


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """Find the list of `count` decoder layers, the outermost if there are several."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    if isinstance(layers := getattr(model, "layers", None), nn.ModuleList):  # LongCat counts two to a layer
        return layers
    raise DeepSpecError(f"{type(model).__name__}: found no list of {count} decoder layers")


def text_decoder(model: nn.Module) -> nn.Module:
    """Return the decoder of a causal language model without its head; of one that also sees or hears, the text's."""
    inner: Any = model.model if hasattr(model, "model") else model.base_model
    return getattr(inner, "language_model", inner)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """Return the dtype of a name like "float32"; a dtype is returned as it is."""
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise DeepSpecError(f"unknown dtype {name!r}; use bfloat16, float16 or float32")
    return dtype

"""Where a target comes from: its directory or hub id, what is read there, and its identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from deepspec.errors import DeepSpecError, os_reason

RECORD = "deepspec.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")
_TEXT = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
_SAMPLES, _SAMPLE = 4096, 1 << 20  # of a weight file: places read, bytes at each


def check_source(source: str, weights: bool = True) -> None:
    """Refuse a path that is no complete target directory; a hub id looks like `owner/name` and is not a path.

    Args:
        weights: whether every file of weights must be readable.
    """
    path = Path(source)
    if not path.is_dir():
        if is_hub_id(source):
            return
        raise DeepSpecError(f"{source}: no such target directory (and not a hub id like owner/name)")
    if not (path / "config.json").exists():
        raise DeepSpecError(f"{source}: not a target directory: config.json is missing")
    for file in _files(path, (*_TEXT, *(WEIGHTS if weights else ()))):
        try:
            file.open("rb").close()  # what may not be read, libraries call missing
        except OSError as error:
            raise DeepSpecError(f"{file}: cannot be read: {os_reason(error)}") from None
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise DeepSpecError(
            f"{source}: the target has no tokenizer (tokenizer.json); add the one it was trained with"
        )


def is_hub_id(source: str) -> bool:
    path = Path(source)
    return source.count("/") == 1 and not source.startswith((".", "/")) and not path.parent.is_dir()


def hub_directory(source: str, revision: str | None = None) -> Path:
    """Return the local copy of a hub model; its name is the commit that the revision stands for.

    Raises:
        DeepSpecError: no such model or revision, or neither a network nor a copy.
    """
    from huggingface_hub import snapshot_download

    try:
        kinds = [*_TEXT, *WEIGHTS[:3]]
        return Path(snapshot_download(source, revision=revision, allow_patterns=kinds))
    except Exception as error:
        raise DeepSpecError(f"{source}: cannot be fetched from the hub: {_first_line(error)}") from error


def from_pretrained(cls: Any, source: str, **options: Any) -> Any:
    """`from_pretrained`, its many errors turned into one line."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return cls.from_pretrained(source, **options)
    except Exception as error:
        raise DeepSpecError(f"{source}: cannot be loaded as a target: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def load_model(source: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model, all of whose weights must be there: transformers draws what is missing.

    Raises:
        DeepSpecError: nothing loadable there, or it lacks weights.
    """
    model, found = from_pretrained(AutoModelForCausalLM, source, output_loading_info=True, **options)
    lacking = sorted(set(found["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise DeepSpecError(f"{source}: its weights lack {lacking[0]}{more}; fetch all of its files again")
    return model


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


def check_stops(source: str, model: PreTrainedModel) -> None:
    """Refuse stop tokens beyond the vocabulary."""
    size = model.config.get_text_config().vocab_size
    stops = model.generation_config.eos_token_id if model.generation_config else None
    for stop in stops if isinstance(stops, list) else [stops]:
        if stop is not None and not 0 <= stop < size:
            raise DeepSpecError(
                f"{source}: eos_token_id {stop} is no token of a vocabulary of {size}; mend generation_config.json"
            )


def length_limit(config: Any) -> int:
    """Return the tokens of the longest text that a model is run on, 1 << 20 where it names none.

    Longrope takes other factors for all positions of a pass that goes beyond its original length, those of earlier
    tokens and of other requests included, so what is cached no longer fits: such a model is run up to that length.
    """
    limit = getattr(config, "max_position_embeddings", None) or 1 << 20
    rope = getattr(config, "rope_parameters", None) or {}
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        limit = min(limit, original or limit)
    return limit


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def directory_digest(directory: Path) -> str:
    """Identity of a target: its configuration, tokenizer, template and weights (many gigabytes are sampled)."""
    recorded = directory / RECORD
    if recorded.exists():
        try:
            record = json.loads(recorded.read_text())
        except ValueError as error:
            raise DeepSpecError(f"{recorded}: not valid JSON: {error}") from None
        if "digest" in record:  # a draft's record has none
            return record["digest"]
    state = hashlib.sha256()
    for path in _files(directory, _TEXT):
        state.update(path.name.encode() + path.read_bytes())
    for path in _files(directory, WEIGHTS):
        size = path.stat().st_size
        step = max(size // _SAMPLES, _SAMPLE)
        if path.suffix != ".safetensors":
            state.update(path.name.encode())
        with path.open("rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                state.update(file.read(_SAMPLE))
    return state.hexdigest()[:16]


def target_record(directory: Path) -> dict[str, Any]:
    """Return what was written beside a target when it was resolved; empty for another directory."""
    path = directory / RECORD
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if "digest" in found else {}


def _files(directory: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    yield from sorted(path for pattern in patterns for path in directory.glob(pattern))


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

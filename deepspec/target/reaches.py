"""Sizes of a configuration that a text may grow beyond: windows, chunks, what an index keeps, steps of a temperature.

No weight depends on them. Where one is larger than a test can be long, the model is tested again with a small one.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from deepspec.target.source import length_limit

REACHES = [
    "sliding_window",
    "attention_chunk_size",
    "index_topk",
    "index_topk_blocks",
    "local_window_size",
    "window_size",
    "attention_window_size",
    "indexer_budget",
    "sliding_window_size",
    "keep_window_size",
    "original_max_position_embeddings",
    "mamba_chunk_size",
    "chunk_size",
    "floor_scale",
]
_ROPE, _TEMPERED = "rope_parameters", "llama_4_scaling_beta"
STEP = 32  # between small sizes, so that what is counted in blocks stays whole


def reaches(config: Any) -> dict[str, int]:
    """Return these sizes of a text configuration, in tokens by name; not those that the longest text is not beyond."""
    kinds = " ".join(map(str, getattr(config, "layer_types", None) or ["any"]))
    found = {}
    for name in REACHES:
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 2:
            continue
        windowed = "window" in name or "chunk" in name
        if windowed and not any(
            word in kinds for word in ("sliding", "chunk", "local", "linear", "mamba", "any", "hybrid")
        ):
            continue
        found[name] = value * _unit(config, name)
    rope = getattr(config, _ROPE, None) or {}
    if rope.get(_TEMPERED) and isinstance(length := rope.get("original_max_position_embeddings"), int):
        found[f"{_ROPE}.original_max_position_embeddings"] = length
    limit = length_limit(config)
    return {name: value for name, value in found.items() if value < limit}


def reduced(config: Any, far: Mapping[str, int]) -> dict[str, int]:
    """Return small sizes, in tokens, in the place of those that are too far; their order stays."""
    ranks = {value: rank for rank, value in enumerate(sorted(set(far.values())), 1)}
    return {name: max(ranks[value] * STEP, 2 * _unit(config, name)) for name, value in far.items()}


def resized(config: Any, sizes: Mapping[str, int]) -> Any:
    """Return a copy of a configuration with other such sizes, given in tokens."""
    copy = deepcopy(config)
    text = copy.get_text_config()
    for name, value in sizes.items():
        if name.startswith(f"{_ROPE}."):
            setattr(text, _ROPE, getattr(text, _ROPE) | {name.removeprefix(f"{_ROPE}."): value})
        else:
            setattr(text, name, value // _unit(text, name))
    return copy


def _unit(config: Any, name: str) -> int:
    """Return how many tokens one of a size is: an index may choose among blocks or compressed states."""
    if name == "index_topk_blocks":
        return getattr(config, "index_block_size", None) or 1
    rates = getattr(config, "compress_rates", None)
    return min(rates.values()) if name == "index_topk" and rates else 1

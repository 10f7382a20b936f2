"""Sizes of a decoder layer in a foreign directory: said, left to a class's defaults, or read off the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import LlamaConfig, Qwen3Config

from deepspec.drafters.rope import read_rope
from deepspec.errors import DeepSpecError
from deepspec.target.weights import Stored

_CLASSES = {"llama": LlamaConfig, "qwen3": Qwen3Config}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
)
_OFF = ("attention_bias", "qkv_bias", "mlp_bias", "bias")


@dataclass(frozen=True)
class Sizes:
    """Sizes in the keys of the drafts that are written here, and what had to be assumed for them."""

    config: dict[str, Any]
    assumed: tuple[str, ...] = field(default=())


def sizes(
    config: Mapping[str, Any], layer: Mapping[str, Stored], defaults: bool = False, theta: float = 10000.0
) -> Sizes:
    """
    Return the sizes that all layers of a draft share.

    Args:
        config: its config.json, or the part with the sizes.
        layer: the weights of its first layer, by their names below it (`self_attn.q_proj.weight`).
        defaults: whether a size that is not said is that of transformers' class, as in files that leave out defaults.
        theta: the base of a rotary embedding that says none.

    Raises:
        DeepSpecError: an option that is not run here, or a size that nothing says.
    """
    _check(config)
    class_ = _CLASSES.get(str(config.get("model_type")), LlamaConfig)
    standard = class_().to_dict() if defaults else {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
    found = {key: config[key] if config.get(key) is not None else standard.get(key) for key in _SIZES}
    _read_off(found, layer, config)
    if missing := [key for key, value in found.items() if value is None]:
        raise DeepSpecError(f"config.json lacks {', '.join(missing)}")
    base, scaling = read_rope(config, theta)
    assumed = []
    stated = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")
    if not stated and not (config.get("rope_scaling") or {}).get("rope_theta"):
        assumed.append(f"rope_theta {theta:g}, which config.json does not say")
    if scaling:
        found["rope_scaling"] = scaling
    return Sizes(found | {"rope_theta": base}, tuple(assumed))


def width(config: Mapping[str, Any], fc: Stored | None, hidden_size: int) -> int:
    """
    Return of how many of the target's layers `fc` reads the states.

    Raises:
        DeepSpecError: no `fc`, or states of another width than the draft's own.
    """
    target = config.get("target_hidden_size") or hidden_size
    if target != hidden_size:
        raise DeepSpecError(
            f"the draft is {hidden_size} wide and its target {target}; drafts of another width than their target's "
            "are not run here"
        )
    if fc is None:
        raise DeepSpecError("fc.weight is missing: nothing reads the target's states")
    if len(fc.shape) != 2 or fc.shape[1] % hidden_size:
        raise DeepSpecError(f"fc.weight is {list(fc.shape)}, not [{hidden_size}, layers x {hidden_size}]")
    return fc.shape[1] // hidden_size


def windows(config: Mapping[str, Any], layers: int, own: Mapping[str, Any] | None = None) -> list[int | None]:
    """
    Return the window of each layer's attention; None where it sees the whole context.

    Args:
        own: of a block drafter, `dflash_config`, which may force a window on every layer.
    """
    own = own or {}
    kinds = config.get("layer_types") or []
    sliding = [kinds[i] == "sliding_attention" if i < len(kinds) else False for i in range(layers)]
    if own.get("use_swa") and not any(sliding):
        sliding = [True] * layers
    window = own.get("swa_window_size") or config.get("sliding_window")
    return [window if slides else None for slides in sliding]


def _check(config: Mapping[str, Any]) -> None:
    if on := [key for key in _OFF if config.get(key)]:
        raise DeepSpecError(f"{on[0]} is set: projections with biases are not run here")
    activation = config.get("hidden_act") or config.get("hidden_activation") or "silu"
    if activation not in ("silu", "swish"):
        raise DeepSpecError(f"hidden_act {activation!r} is not run here, only 'silu'")
    if config.get("quantization_config"):
        kind = config["quantization_config"].get("quant_method", "an unknown method")
        raise DeepSpecError(f"its weights are quantised ({kind}); use the directory before quantisation")


def _read_off(found: dict[str, Any], layer: Mapping[str, Stored], config: Mapping[str, Any]) -> None:
    """Fill in what a config.json leaves to the reader: key-value heads and the width of a head."""
    heads = found["num_attention_heads"]
    queries, keys = layer.get("self_attn.q_proj.weight"), layer.get("self_attn.k_proj.weight")
    if not heads or queries is None or keys is None:
        return
    if config.get("head_dim") is None:
        found["head_dim"] = queries.shape[0] // heads
    if config.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = max(keys.shape[0] // max(found["head_dim"], 1), 1)

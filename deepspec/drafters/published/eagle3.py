"""EAGLE-3 with one flat `config.json`: SafeAILab, SpecForge, SGLang, vLLM, NVIDIA, AngelSlim, DeepSeek, ours.

They differ in what they leave out (layer ids, RoPE, the embeddings) and in names; what is computed is told by keys
and weights that engines agree on: `norm_before_residual`, EAGLE-3.1's `fc_norm` and `norm_output`, gpt-oss's
`norm_before_fc`, further layers behind the first, norms of queries and keys. A draft with a `mask_hidden` is P-EAGLE's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspec.drafters.published.layers import read_layers
from deepspec.drafters.published.names import Names, plain_names
from deepspec.drafters.published.plan import Found, Plan
from deepspec.drafters.published.sizes import sizes, width, windows
from deepspec.errors import DeepSpecError
from deepspec.target.weights import Stored

VARIANTS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_STYLES = {
    "Qwen3Eagle3Model": "DeepSeek",
    "Eagle3LlamaForCausalLM": "AngelSlim",
    "LlamaForCausalLM": "SafeAILab",
    "LlamaForCausalLMEagle3": "SpecForge, SGLang, vLLM",
    "PEagleDraftModel": "vLLM",
}
_MASKS = ("mask_token_id", "pard_token", "ptd_token_id")  # what trainers and vLLM call a mask token


def recognise(found: Found) -> Plan | None:
    """Recognise an EAGLE-3 draft by its first layer, which norms a state beside the embedding."""
    if found.config.get("speculators_model_type"):
        return None
    named = found.architecture in _STYLES and found.architecture != "LlamaForCausalLM"
    if not (named or found.has("midlayer.") or found.has("layers.0.hidden_norm.")):
        return None
    eagle = found.config.get("eagle_config") or {}
    style = _STYLES.get(found.architecture, "EAGLE-3")
    if "use_input_layernorm_in_first_layer" in eagle or "parallel_draft_step" in eagle:
        style = "NVIDIA ModelOpt"
    try:
        return plan(style, found.config, found)
    except DeepSpecError as error:
        return Plan(style, "EAGLE-3", made_for=made_for(found.config), refusal=str(error))


def plan(style: str, config: Mapping[str, Any], found: Found, defaults: bool = False) -> Plan:
    """
    Return how an EAGLE-3 draft is loaded.

    Args:
        config: with sizes, layer ids and variants on one level.
        defaults: see `sizes`.

    Raises:
        DeepSpecError: why it does not load.
    """
    eagle = config.get("eagle_config") or {}
    names = plain_names(found.weights)
    first = names.below("layers.0.", found.weights)
    size = sizes(config, first, defaults)
    own = size.config
    weights = names.weights(found.weights)
    count = width(config, weights.get("fc.weight"), own["hidden_size"])
    layers = read_layers(config, count, found.target_layers)
    depth = _depth(weights, own["hidden_size"])
    if sliding := [w for w in windows(config, depth) if w]:
        own["sliding_window"] = _one_window(sliding, depth)
    qk_norm = "self_attn.q_norm.weight" in first
    own["architectures"] = ["Qwen3Eagle3Model" if qk_norm else "LlamaForCausalLMEagle3"]
    own |= {key: bool(config.get(key, eagle.get(key, False))) for key in VARIANTS}
    own |= {
        "num_hidden_layers": depth,
        "draft_vocab_size": _columns(config, weights, own["vocab_size"]),
        "block_size": _drafted(config),
    }
    if config.get("num_target_layers") or found.target_layers:
        own["num_target_layers"] = config.get("num_target_layers") or found.target_layers
    if layers.ids is not None:
        own["target_layer_ids"] = list(layers.ids)
    what = "EAGLE-3.1" if own["fc_norm"] or own["norm_output"] else "EAGLE-3"
    kind = "peagle" if found.has("mask_hidden") or found.architecture == "PEagleDraftModel" else "eagle3"
    if kind == "peagle":
        what = "P-EAGLE"
        own |= {"architectures": ["DeepSpecPEagleModel"], "qk_norm": qk_norm, "mask_token_id": _mask(config)}
    return Plan(
        style,
        what + (f", {depth} layers" if depth > 1 else ""),
        kind,
        own,
        _ours(names, weights, depth, qk_norm),
        made_for=made_for(config),
        assumed=(*size.assumed, *layers.assumed),
        left_out=names.left_out,
        needs_target=layers.needed,
    )


def made_for(config: Mapping[str, Any]) -> str | None:
    """Return what a configuration calls its target."""
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    for key in ("target_model_name_or_path", "base_model_name_or_path", "target_model_path"):
        if config.get(key):
            return str(config[key])
    return verifier.get("name_or_path")


def _depth(weights: Mapping[str, Stored], hidden: int) -> int:
    """Count the layers; all but the first read the state alone.

    Raises:
        DeepSpecError: a further layer reads the embeddings too.
    """
    indices = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    depth = len(indices)
    if indices != {str(i) for i in range(depth)}:
        raise DeepSpecError(f"layers {', '.join(sorted(indices))} are there, not 0 to {depth - 1}")
    for i in range(1, depth):
        queries = weights.get(f"layers.{i}.self_attn.q_proj.weight")
        if queries and queries.shape[1] != hidden:
            raise DeepSpecError(
                f"layer {i} reads the embeddings beside the state ({queries.shape[1]} wide); only the first does here"
            )
    return depth


def _one_window(sliding: list[int], depth: int) -> int:
    if len(sliding) != depth or len(set(sliding)) > 1:
        raise DeepSpecError("its layers attend within several windows, which is not run here")
    return sliding[0]


def _columns(config: Mapping[str, Any], weights: Mapping[str, Stored], vocab_size: int) -> int:
    for name in ("d2t", "lm_head.weight"):
        if name in weights:
            return weights[name].shape[0]
    return config.get("draft_vocab_size") or vocab_size


def _drafted(config: Mapping[str, Any]) -> int:
    stated = (config.get(key) for key in ("block_size", "num_depths", "ttt_length"))
    methods = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
    return next((n for n in (*stated, methods[0].get("speculative_tokens")) if n), 5)


def _mask(config: Mapping[str, Any]) -> int:
    for key in _MASKS:
        if config.get(key) is not None:
            return int(config[key])
    raise DeepSpecError(f"config.json names no mask token ({', '.join(_MASKS)})")


def _ours(names: Names, weights: Mapping[str, Stored], depth: int, qk_norm: bool) -> dict[str, str]:
    """Return names in the files → those of `Eagle3Model`'s directories."""

    def ours(name: str) -> str:
        if name.startswith("layers.0.") and depth == 1 and not qk_norm:
            return "midlayer." + name.removeprefix("layers.0.")
        index = name.split(".")[1] if name.startswith("layers.") else "0"
        before = f"layers.{index}.input_layernorm."
        if (
            index != "0" and before + "weight" not in weights
        ):  # SGLang's further layers call it as the first does
            return name.replace(f"layers.{index}.hidden_norm.", before)
        return name

    return {theirs: ours(plain) for theirs, plain in names.plain.items()}

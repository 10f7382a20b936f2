"""The speculators format (RedHat, vLLM): sizes in `transformer_layer_config`, which leaves out a class's defaults.

Layer ids are those of inputs, one higher than ours. DFlash's `block_size` counts the anchor, DSpark's where the anchor
does not predict (`sample_from_anchor: false`). Layers with a window are causal in the block unless
`sliding_window_non_causal`.
"""

from __future__ import annotations

from typing import Any

from deepspec.drafters.published import block, eagle3
from deepspec.drafters.published.layers import read_layers
from deepspec.drafters.published.plan import Found, Plan
from deepspec.errors import DeepSpecError

STYLE = "speculators (RedHat, vLLM)"
_WHAT = {
    "eagle3": "EAGLE-3",
    "peagle": "P-EAGLE",
    "dflash": "DFlash",
    "dflash2": "DFlash 2",
    "dspark": "DSpark",
}
_NOT_RUN = {
    "mtp": (
        "MTP",
        "a next-token module of the target's own (MTP), which is read from the target's checkpoint alone",
    ),
    "eagle": ("EAGLE", "EAGLE-1 reads the last state alone; only EAGLE-3 is run here"),
    "mlp": ("MLP speculator", "MLP speculators are not run here"),
}


def recognise(found: Found) -> Plan | None:
    """Recognise the format by its `speculators_model_type`."""
    kind = found.config.get("speculators_model_type")
    if not kind:
        return None
    target = eagle3.made_for(found.config)
    if kind in _NOT_RUN:
        what, why = _NOT_RUN[kind]
        return Plan(STYLE, what, made_for=target, refusal=why)
    if kind not in _WHAT:
        return Plan(
            STYLE, str(kind), made_for=target, refusal=f"speculators_model_type {kind!r} is not run here"
        )
    try:
        return _plan(str(kind), _flat(found.config), found)
    except DeepSpecError as error:
        return Plan(STYLE, _WHAT[kind], made_for=target, refusal=str(error))


def _flat(config: Any) -> dict[str, Any]:
    inner = config.get("transformer_layer_config")
    if not isinstance(inner, dict):
        raise DeepSpecError("config.json lacks transformer_layer_config, the sizes of the draft")
    outer = {key: value for key, value in config.items() if key != "transformer_layer_config"}
    outer.pop("model_type", None)
    sizes: dict[str, Any] = {"model_type": "qwen3"} | inner
    rope: Any = sizes.get("rope_parameters") or {}
    if isinstance(rope.get("sliding_attention"), dict):  # one for each kind of layer; trained with this one
        sizes["rope_parameters"] = rope["sliding_attention"]
    return sizes | {key: value for key, value in outer.items() if value is not None}


def _plan(kind: str, config: dict[str, Any], found: Found) -> Plan:
    if kind in ("eagle3", "peagle"):
        return eagle3.plan(STYLE, config, found, defaults=True)
    base = block.backbone(config, found, defaults=True)
    layers = read_layers(config, base.count, found.target_layers)
    from_anchor = bool(config.get("sample_from_anchor", kind == "dspark"))
    total = config.get("block_size") or 8
    standard = {"markov_rank": 256, "enable_confidence_head": True, "confidence_head_with_markov": True}
    own = {
        "mask_token_id": config.get("mask_token_id"),
        "block_size": total - (not from_anchor),
        "sample_from_anchor": from_anchor,
        **block.parts(_WHAT[kind], standard | config),
        **block.attention(config, base.depth, {}, sliding_causal=not config.get("sliding_window_non_causal")),
    }
    return block.planned(STYLE, _WHAT[kind], config, found, base, layers, own)

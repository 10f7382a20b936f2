"""Block drafters with one flat `config.json`: DFlash (z-lab, SpecForge, AngelSlim, our exports), DFlash 2, DSpark.

DFlash's keys are in `dflash_config`, its `block_size` counts the anchor and its masks alone predict; DSpark's counts
what is drafted, from the anchor on. DFlash 2 is a DFlash with a selector. Embeddings and head are the target's where
the files have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepspec.drafters.published.eagle3 import made_for
from deepspec.drafters.published.layers import Layers, block_layers
from deepspec.drafters.published.names import Names, plain_names
from deepspec.drafters.published.plan import Found, Plan
from deepspec.drafters.published.sizes import Sizes, sizes, width, windows
from deepspec.errors import DeepSpecError
from deepspec.target.weights import Stored

THETA = 1e6  # of a draft that says none: what vLLM takes
DFLASH, DFLASH2, DSPARK = "DFlashDraftModel", "DFlash2DraftModel", "DSparkDraftModel"
OURS = {
    "DFlash 2": ("dflash2", "DeepSpecDFlash2Model")
}  # algorithm and architecture here; others are DSpark's
_DOMINO = "Domino corrects its logits with a GRU, which is not run here"
HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
SELECTOR = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")


@dataclass(frozen=True)
class Backbone:
    """What all block drafters have.

    Args:
        count: states of the target that `fc` reads.
        depth: layers.
    """

    names: Names
    sizes: Sizes
    count: int
    depth: int


def recognise(found: Found) -> Plan | None:
    """Recognise a block drafter by its architecture and `dflash_config`."""
    config = found.config
    if config.get("speculators_model_type"):
        return None
    own = config.get("dflash_config") or {}
    kind = str(own.get("projector_type") or "").lower()
    if found.architecture == "DominoDraftModel" or kind == "domino":
        return Plan("SpecForge", "Domino", refusal=_DOMINO)
    if found.architecture not in (DFLASH, DFLASH2, DSPARK) and not own:
        return None
    what = "DSpark" if found.architecture == DSPARK or kind == "dspark" else "DFlash"
    if found.architecture == DFLASH2 or found.has("candidate_selector."):
        what = "DFlash 2"
    style = "SpecForge" if what == "DSpark" else "z-lab, SpecForge"
    try:
        keys = (*HEADS, *SELECTOR)
        return _plan(style, what, found, own | {key: config[key] for key in keys if key in config})
    except DeepSpecError as error:
        return Plan(style, what, made_for=made_for(config), refusal=str(error))


def _plan(style: str, what: str, found: Found, own: Mapping[str, Any]) -> Plan:
    config = found.config
    base = backbone(config, found)
    ids = own.get("target_layer_ids") or config.get("target_layer_ids")
    layers = block_layers(ids, base.depth, base.count, found.target_layers)
    from_anchor = bool(own.get("sample_from_anchor", what == "DSpark"))
    sized = {
        "mask_token_id": own.get("mask_token_id", config.get("mask_token_id")),
        "block_size": _drafted(own.get("block_size") or config.get("block_size"), from_anchor),
        "sample_from_anchor": from_anchor,
        **parts(what, own),
        **attention(config, base.depth, own),
    }
    return planned(style, what, config, found, base, layers, sized)


def backbone(config: Mapping[str, Any], found: Found, defaults: bool = False) -> Backbone:
    """
    Return the part of a directory that all block drafters have.

    Raises:
        DeepSpecError: a part that is not run here, or a size that nothing says.
    """
    names = plain_names(found.weights)
    weights = names.weights(found.weights)
    _refuse_parts(weights)
    size = sizes(config, names.below("layers.0.", found.weights), defaults, THETA)
    count = width(config, weights.get("fc.weight"), size.config["hidden_size"])
    depth = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    return Backbone(names, size, count, depth)


def planned(
    style: str,
    what: str,
    config: Mapping[str, Any],
    found: Found,
    base: Backbone,
    layers: Layers,
    own: Mapping[str, Any],
) -> Plan:
    """
    Return how a block drafter is loaded.

    Args:
        config: with the draft's keys on one level.
        own: block, heads and attention in our keys, which each style says in its own way.

    Raises:
        DeepSpecError: no mask token is named.
    """
    if own["mask_token_id"] is None:
        raise DeepSpecError(
            "config.json names no mask_token_id, the token that stands for those to be drafted"
        )
    kind, architecture = OURS.get(what, ("dspark", "Qwen3DSparkModel"))
    weights, size = base.names.weights(found.weights), base.sizes.config
    columns = next((weights[n].shape[0] for n in ("d2t", "lm_head.weight") if n in weights), None)
    sized = size | {
        "architectures": [architecture],
        "num_hidden_layers": base.depth,
        "draft_vocab_size": columns or config.get("draft_vocab_size") or size["vocab_size"],
        **own,
    }
    if config.get("num_target_layers") or found.target_layers:
        sized["num_target_layers"] = config.get("num_target_layers") or found.target_layers
    if layers.ids is not None:
        sized["target_layer_ids"] = list(layers.ids)
    return Plan(
        style,
        f"{what}, {base.depth} layers",
        kind,
        sized,
        base.names.plain,
        made_for=made_for(config),
        assumed=(*base.sizes.assumed, *layers.assumed),
        left_out=base.names.left_out,
        needs_target=layers.needed,
    )


def parts(what: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return what a block drafter has besides the backbone: heads, or convolutions and a selector.

    Raises:
        DeepSpecError: a size of DFlash 2 is not said, or its logits are changed before they are compared.
    """
    if what != "DFlash 2":
        return heads(own if what == "DSpark" else {})
    if changed := [
        key for key in ("final_logit_softcapping", "output_multiplier") if own.get(key) not in (None, 1)
    ]:
        raise DeepSpecError(f"{changed[0]} is set: logits of the draft's own scale are not run here")
    if missing := [key for key in SELECTOR if not own.get(key)]:
        raise DeepSpecError(f"config.json lacks {', '.join(missing)} of DFlash 2")
    return {key: own[key] for key in SELECTOR}


def heads(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sequential and the confidence head of a configuration; neither where it says none."""
    rank = own.get("markov_rank") or 0
    return {
        "markov_rank": rank,
        "markov_head_type": own.get("markov_head_type") or "vanilla",
        "enable_confidence_head": bool(own.get("enable_confidence_head")),
        "confidence_head_with_markov": bool(own.get("confidence_head_with_markov")) and rank > 0,
    }


def attention(
    config: Mapping[str, Any], depth: int, own: Mapping[str, Any], sliding_causal: bool = True
) -> dict[str, Any]:
    """
    Return windows and causality of the layers, as vLLM resolves them; nothing where all see all.

    Args:
        sliding_causal: whether layers with a window are causal in the block where nothing is said.
    """
    found = windows(config, depth, own)
    stated = config.get("is_causal", own.get("causal"))
    causal = [
        bool(w) and sliding_causal and not own.get("use_swa") if stated is None else bool(stated)
        for w in found
    ]
    if not any(found) and not any(causal):
        return {}
    if missing := [
        i for i, kind in enumerate(config.get("layer_types") or []) if "sliding" in kind and not found[i]
    ]:
        raise DeepSpecError(f"layer {missing[0]} is of sliding_attention, and no sliding_window is named")
    return {"windows": [w or 0 for w in found], "causal": causal}


def _drafted(block_size: int | None, from_anchor: bool) -> int:
    if not block_size or block_size < 2 - from_anchor:
        raise DeepSpecError(f"block_size is {block_size}: nothing would be drafted")
    return block_size - (not from_anchor)


def _refuse_parts(weights: Mapping[str, Stored]) -> None:
    if "mask_embedding" in weights:
        raise DeepSpecError("it brings an embedding of its own for the mask, which is not run here")
    if any("attention_sink_bias" in name or name.endswith(".sinks") for name in weights):
        raise DeepSpecError("its attention has sinks, which are not run here")
    if any(".mlp.experts." in name for name in weights):
        raise DeepSpecError("its layers are mixtures of experts, which are not run here")
    if any(".kv_a_proj" in name or ".q_a_proj" in name for name in weights):
        raise DeepSpecError("its attention is multi-head latent (MLA), which is not run here")

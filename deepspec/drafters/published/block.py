"""Block drafters with one flat `config.json`: DFlash (z-lab, SpecForge, AngelSlim, our exports), DSpark (SpecForge).

DFlash's keys are in `dflash_config`, its `block_size` counts the anchor and its masks alone predict; DSpark's counts
what is drafted, from the anchor on. Embeddings and head are the target's where the files have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspec.drafters.published.eagle3 import made_for
from deepspec.drafters.published.layers import block_layers
from deepspec.drafters.published.names import Names, plain_names
from deepspec.drafters.published.plan import Found, Plan
from deepspec.drafters.published.sizes import sizes, width, windows
from deepspec.errors import DeepSpecError
from deepspec.target.weights import Stored

THETA = 1e6  # of a draft that says none: what vLLM takes
DFLASH, DSPARK = "DFlashDraftModel", "DSparkDraftModel"
_NOT_RUN = {
    "domino": "Domino corrects its logits with a GRU, which is not run here",
    "dflash2": "DFlash 2's path selector and convolutions are not run here yet",
}
HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")


def recognise(found: Found) -> Plan | None:
    """Recognise a block drafter by its architecture and `dflash_config`."""
    config = found.config
    if config.get("speculators_model_type"):
        return None
    own = config.get("dflash_config") or {}
    kind = str(own.get("projector_type") or "").lower()
    if found.architecture == "DominoDraftModel" or kind == "domino":
        return Plan("SpecForge", "Domino", refusal=_NOT_RUN["domino"])
    if found.architecture not in (DFLASH, DSPARK) and not own:
        return None
    dspark = found.architecture == DSPARK or kind == "dspark"
    style = "SpecForge" if dspark else "z-lab, SpecForge"
    what = "DSpark" if dspark else "DFlash"
    try:
        return _plan(style, what, found, own | {key: config[key] for key in HEADS if key in config})
    except DeepSpecError as error:
        return Plan(style, what, made_for=made_for(config), refusal=str(error))


def _plan(style: str, what: str, found: Found, own: Mapping[str, Any]) -> Plan:
    config = found.config
    names, size, count, depth = backbone(config, found)
    mask = own.get("mask_token_id", config.get("mask_token_id"))
    ids = own.get("target_layer_ids") or config.get("target_layer_ids")
    layers = block_layers(ids, depth, count, found.target_layers)
    sized = finish(size, config, found, names, depth, mask)
    from_anchor = bool(own.get("sample_from_anchor", what == "DSpark"))
    sized |= {
        "block_size": _drafted(config.get("block_size"), from_anchor),
        "sample_from_anchor": from_anchor,
        **heads(own if what == "DSpark" else {}),
        **attention(config, depth, own),
    }
    if layers.ids is not None:
        sized["target_layer_ids"] = list(layers.ids)
    return Plan(
        style,
        f"{what}, {depth} layers",
        "dspark",
        sized,
        names.plain,
        made_for=made_for(config),
        assumed=(*size.pop("assumed"), *layers.assumed),
        left_out=names.left_out,
        needs_target=layers.needed,
    )


def backbone(
    config: Mapping[str, Any], found: Found, defaults: bool = False
) -> tuple[Names, dict[str, Any], int, int]:
    """
    Return names, sizes (with what they assume under "assumed"), the states that `fc` reads, and the number of layers.

    Raises:
        DeepSpecError: a part that is not run here, or a size that nothing says.
    """
    names = plain_names(found.weights)
    weights = names.weights(found.weights)
    _refuse_parts(weights)
    size = sizes(config, names.below("layers.0.", found.weights), defaults, THETA)
    count = width(config, weights.get("fc.weight"), size.config["hidden_size"])
    depth = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    return names, size.config | {"assumed": size.assumed}, count, depth


def finish(
    size: Mapping[str, Any],
    config: Mapping[str, Any],
    found: Found,
    names: Names,
    depth: int,
    mask: int | None,
) -> dict[str, Any]:
    """
    Return what all block drafters have in common, in our keys.

    Raises:
        DeepSpecError: no mask token is named.
    """
    if mask is None:
        raise DeepSpecError(
            "config.json names no mask_token_id, the token that stands for those to be drafted"
        )
    weights = names.weights(found.weights)
    columns = next((weights[n].shape[0] for n in ("d2t", "lm_head.weight") if n in weights), None)
    own = {key: value for key, value in size.items() if key != "assumed"}
    own |= {
        "architectures": ["Qwen3DSparkModel"],
        "num_hidden_layers": depth,
        "draft_vocab_size": columns or config.get("draft_vocab_size") or size["vocab_size"],
        "mask_token_id": mask,
    }
    if config.get("num_target_layers") or found.target_layers:
        own["num_target_layers"] = config.get("num_target_layers") or found.target_layers
    return own


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
    if any("conv" in name or "selector" in name for name in weights):
        raise DeepSpecError(_NOT_RUN["dflash2"])
    if any(".mlp.experts." in name for name in weights):
        raise DeepSpecError("its layers are mixtures of experts, which are not run here")
    if any(".kv_a_proj" in name or ".q_a_proj" in name for name in weights):
        raise DeepSpecError("its attention is multi-head latent (MLA), which is not run here")

"""vLLM (read from 0.32): native directories of each method, and the speculators format.

Its layer ids for EAGLE-3 are one higher than ours (it takes the state before a layer runs); those in `dflash_config`
and a top-level `target_layer_ids` it raises by one itself. A reduced vocabulary brings its rows of the head and d2t;
embeddings are shared with the target. It runs DFlash as an anchor and masks that alone predict.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from deepspec.export.draft import Draft
from deepspec.export.formats import (
    backbone,
    dflash_config,
    dspark_config,
    eagle3_config,
    lm_layout,
    trained_layout,
)
from deepspec.export.layout import Layout
from deepspec.export.next_token import stitched
from deepspec.export.readers.eagle3 import VARIANTS
from deepspec.export.tgi import medusa_layout

VERSION = "0.5.0"  # of the speculators format
GPU_ONLY = "vLLM runs DSpark on a GPU only (its V2 model runner)."


def serve(draft: Draft, settings: dict[str, Any]) -> str:
    return (
        f"vllm serve {draft.target_path} --speculative-config '{json.dumps(settings, separators=(',', ':'))}'"
    )


def eagle3(draft: Draft, where: str, tokens: int) -> Layout:
    layers = [i + 1 for i in draft.network.config.target_layer_ids]
    aux = {"eagle_aux_hidden_state_layer_ids": layers}
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **eagle3_config(draft),
        **aux,
        "eagle_config": aux | {"use_aux_hidden_state": True},
    }
    method = {"method": "eagle3", "model": where, "num_speculative_tokens": tokens}
    return trained_layout(draft, "LlamaForCausalLMEagle3", "vllm-eagle3", config, serve(draft, method))


def peagle(draft: Draft, where: str, tokens: int) -> Layout:
    """Lay out P-EAGLE, which vLLM runs as an EAGLE-3 that drafts all places at once."""
    layout = eagle3(draft, where, tokens)
    mask = draft.network.config.mask_token_id
    parallel = {
        "parallel_drafting": True,
        "pard_token": mask,
        "ptd_token_id": mask,
        "num_depths": draft.block_size,
    }
    method = {"method": "eagle3", "model": where, "num_speculative_tokens": tokens, "parallel_drafting": True}
    return replace(layout, config=(layout.config or {}) | parallel, command=serve(draft, method))


def mtp(draft: Draft, where: str, tokens: int) -> Layout:
    method = json.dumps({"method": "mtp", "num_speculative_tokens": tokens}, separators=(",", ":"))
    return stitched(draft, f"vllm serve {where} --speculative-config '{method}'")


def dflash(draft: Draft, where: str, tokens: int) -> Layout:
    method = {"method": "dflash", "model": where, "num_speculative_tokens": tokens}
    config = dflash_config(draft) | {"draft_vocab_size": draft.network.config.draft_vocab_size}
    return trained_layout(draft, "DFlashDraftModel", "vllm-dflash", config, serve(draft, method))


def dspark(draft: Draft, where: str, tokens: int) -> Layout:
    method = {"method": "dspark", "model": where, "num_speculative_tokens": tokens}
    config = dspark_config(draft)
    return trained_layout(draft, "Qwen3DSparkModel", "dspark", config, serve(draft, method), (GPU_ONLY,))


def medusa(draft: Draft, where: str, tokens: int) -> Layout:
    method = {"method": "medusa", "model": where, "num_speculative_tokens": draft.block_size}
    return medusa_layout(draft, "vllm-medusa", serve(draft, method))


def lm(draft: Draft, where: str, tokens: int) -> Layout:
    method = {"method": "draft_model", "model": where, "num_speculative_tokens": tokens}
    return lm_layout(draft, serve(draft, method))


def ngram(draft: Draft, where: str, tokens: int) -> Layout:
    least = draft.config["min_match"]
    longest = least if draft.kind == "lookup" else max(8, least)  # ours matches any length
    settings = {
        "method": "ngram",
        "num_speculative_tokens": draft.block_size,
        "prompt_lookup_max": longest,
        "prompt_lookup_min": least,
    }
    return Layout("ngram settings", "settings", serve(draft, settings), settings=settings)


def speculators_eagle3(draft: Draft, where: str, tokens: int) -> Layout:
    flat = eagle3_config(draft)
    layers = [i + 1 for i in draft.network.config.target_layer_ids]
    outside = ("draft_vocab_size", "target_hidden_size", *VARIANTS)
    config = {
        "architectures": ["Eagle3DraftModel"],
        **_speculators(draft, "eagle3", tokens),
        **{key: flat.pop(key) for key in outside},
        "eagle_aux_hidden_state_layer_ids": layers,
        "transformer_layer_config": flat | {"num_aux_hidden_states": len(layers)},
    }
    layout = trained_layout(draft, "speculators eagle3", "speculators-eagle3", config, f"vllm serve {where}")
    named = {name.replace("midlayer.", "layers.0."): weight for name, weight in layout.weights.items()}
    return replace(layout, weights=named)


def speculators_block(draft: Draft, where: str, tokens: int) -> Layout:
    """Lay out DFlash or DSpark in the speculators format."""
    own = draft.network.config
    config = {
        "architectures": ["Qwen3DSparkModel" if draft.kind == "dspark" else "DFlashDraftModel"],
        **_speculators(draft, draft.kind, tokens),
        "draft_vocab_size": own.draft_vocab_size,
        "target_hidden_size": own.hidden_size,
        "mask_token_id": own.mask_token_id,
        "block_size": own.query_size,
        "aux_hidden_state_layer_ids": [i + 1 for i in own.target_layer_ids],
        "sample_from_anchor": own.sample_from_anchor,
        "sliding_window_non_causal": True,
        "transformer_layer_config": backbone(draft),
    }
    notes: tuple[str, ...] = ()
    if draft.kind == "dspark":
        heads = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
        config |= {key: getattr(own, key) for key in heads}
        notes = (GPU_ONLY,)
    name = f"speculators {draft.kind}"
    return trained_layout(draft, name, "speculators-block", config, f"vllm serve {where}", notes)


def _speculators(draft: Draft, algorithm: str, tokens: int) -> dict[str, Any]:
    verifier = {"name_or_path": draft.target_path, "architectures": draft.target.config.architectures}
    return {
        "speculators_model_type": algorithm,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": tokens}],
            "verifier": verifier,
        },
        "dtype": draft.dtype_name,
        "tie_word_embeddings": False,
    }


PLANS = {
    "eagle3": eagle3,
    "peagle": peagle,
    "mtp": mtp,
    "dflash": dflash,
    "dspark": dspark,
    "medusa": medusa,
    "lm": lm,
    "lookup": ngram,
    "suffix": ngram,
}
SPECULATORS = {"eagle3": speculators_eagle3, "dflash": speculators_block, "dspark": speculators_block}

"""TGI 3 (in maintenance since 2025-12): Medusa, and n-grams. Its Medusa directory is one that vLLM loads as well."""

from __future__ import annotations

from deepspec.export.draft import Draft
from deepspec.export.layout import Layout

MEDUSA_WEIGHTS = "medusa_lm_head.safetensors"


def medusa(draft: Draft, where: str, tokens: int) -> Layout:
    command = f"text-generation-launcher --model-id {where} --speculate {draft.block_size}"
    return medusa_layout(draft, "tgi-medusa", command)


def ngram(draft: Draft, where: str, tokens: int) -> Layout:
    command = f"text-generation-launcher --model-id {draft.target_path} --speculate {draft.block_size}"
    return Layout("ngram settings", "settings", command, settings={"speculate": draft.block_size})


def medusa_layout(draft: Draft, reader: str, command: str) -> Layout:
    """Lay out Medusa as FasterDecoding did: a vocabulary matrix a head, for our drafts the target's own.

    No `architectures`, by which TGI knows it for a speculator; vLLM knows it by its `model_type`, wants to be told of
    biases, reads one matrix where `original_lm_head` and cuts it to the tokens of `token_map`.
    """
    config = draft.network.config
    heads, layers = config.medusa_num_heads, config.medusa_num_layers
    weights = {name: weight for name, weight in draft.weights.items() if ".linear." in name}
    described = {
        "model_type": "medusa",
        "medusa_num_heads": heads,
        "medusa_num_layers": layers,
        "medusa_fc_bias": True,
        "base_model_name_or_path": draft.target_path,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "dtype": draft.dtype_name,
    }
    if config.own_heads:
        weights |= {f"{k}.{layers}.weight": draft.weights[f"{k}.{layers}.weight"] for k in range(heads)}
    else:
        head = draft.target.head_weight.cpu().to(draft.dtype)
        weights |= {
            f"{k}.{layers}.weight": head.clone() for k in range(heads)
        }  # safetensors shares no storage
        described["original_lm_head"] = True
    if draft.reduced:
        weights["token_map"] = draft.network.draft_ids.clone()
        described["truncated_vocab_size"] = config.draft_vocab_size
    return Layout("medusa", reader, command, described, weights, MEDUSA_WEIGHTS, copies=draft.tokenizer_files)


PLANS = {"medusa": medusa, "lookup": ngram, "suffix": ngram}

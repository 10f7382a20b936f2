"""What the formats of several engines have in common: which drafts they take, their keys, their weights."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from deepspec.drafters.algorithms.lm import LMModel
from deepspec.drafters.block_network import BlockConfig
from deepspec.drafters.rope import Rotated, written_rope
from deepspec.export.draft import Draft
from deepspec.export.layout import Layout
from deepspec.export.readers.eagle3 import VARIANTS

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
)


def eagle3_config(draft: Draft) -> dict[str, Any]:
    """Return the configuration that all engines read of an EAGLE-3 draft, every key written out."""
    config = draft.network.config
    return {
        "model_type": "llama",
        **{name: getattr(config, name) for name in SIZES},
        "max_position_embeddings": draft.target.max_length,
        "num_hidden_layers": config.num_hidden_layers,
        **_rope(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": draft.dtype_name,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.hidden_size,
        **{name: getattr(config, name) for name in VARIANTS},
    }


def dflash_config(draft: Draft) -> dict[str, Any]:
    """Return the configuration of a `DFlashDraftModel`, whose `block_size` counts the anchor."""
    config = draft.network.config
    return {
        "architectures": ["DFlashDraftModel"],
        **backbone(draft),
        "block_size": config.query_size,
        "num_target_layers": config.num_target_layers,
        "dflash_config": {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.target_layer_ids),
            "causal": config.one_way(0),
            "use_aux_hidden_state": True,
        },
    }


def _rope(config: Rotated) -> dict[str, Any]:
    """Return the rotary embedding as transformers 5 has it, and a scaling as earlier servers read it."""
    scaled = config.rope_scaling
    return {"rope_parameters": written_rope(config), **({"rope_scaling": dict(scaled)} if scaled else {})}


def _windows(config: BlockConfig) -> dict[str, Any]:
    """Return kinds of layers, all of them alike, and their window."""
    window = config.window(0)
    if window is None:
        return {"layer_types": ["full_attention"] * config.num_hidden_layers}
    kinds = ["sliding_attention"] * config.num_hidden_layers
    return {"layer_types": kinds, "sliding_window": window, "use_sliding_window": True}


def dspark_config(draft: Draft) -> dict[str, Any]:
    """Return the configuration of DeepSeek's `Qwen3DSparkModel`."""
    known = draft.network.description()
    known.pop("context_skip")
    return known | {
        "architectures": ["Qwen3DSparkModel"],
        **_rope(draft.network.config),
        "max_position_embeddings": draft.target.max_length,
        "use_aux_hidden_state": True,
        "dtype": draft.dtype_name,
    }


def lm_layout(draft: Draft, command: str) -> Layout:
    """Lay out a plain model directory with the target's tokenizer, and as many embeddings as the target has."""
    if draft.config["vocab_size"] != draft.target.vocab_size:
        config, weights = lm_of_target_size(draft)
        name, files = config["architectures"][0], draft.tokenizer_files
        return Layout(name, "causal-lm", command, config, weights, copies=files, notes=(PADDED,))
    copies = {name: draft.directory / name for name in ("config.json", "model.safetensors")}
    return Layout(
        draft.config["architectures"][0], "causal-lm", command, copies=copies | draft.tokenizer_files
    )


PADDED = (
    "Target and draft pad their vocabularies differently; here the draft has the target's size, which engines ask for, "
    "with zeros in rows of its own that it did not have."
)


def lm_of_target_size(draft: Draft) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and weights of an independent model, embeddings and head cut or padded to the target's."""
    size = draft.target.vocab_size
    weights = load_file(draft.directory / "model.safetensors")
    network = draft.network
    if not isinstance(network, LMModel):
        raise TypeError(f"{draft.name} is no independent model")
    model = network.model
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    names = {name for name, weight in model.named_parameters() if any(weight is end for end in ends)}
    for name in names & set(weights):
        rows = weights[name][:size]
        weights[name] = F.pad(rows, (0, 0, 0, size - len(rows)))
    return draft.config | {"vocab_size": size}, weights


def shared(draft: Draft) -> dict[str, Tensor]:
    """Return all weights but embeddings that are the target's own: engines share those."""
    weights = dict(draft.weights)
    if not draft.own_embeddings:
        weights.pop("embed_tokens.weight")
    return weights


def trained_layout(
    draft: Draft, name: str, reader: str, config: dict[str, Any], command: str, notes: tuple[str, ...] = ()
) -> Layout:
    weights = shared(draft)
    return Layout(name, reader, command, config, weights, copies=draft.tokenizer_files, notes=notes)


def backbone(draft: Draft) -> dict[str, Any]:
    """Return the sizes of the Qwen3 decoder of a block drafter."""
    config = draft.network.config
    return {
        "model_type": "qwen3",
        **{name: getattr(config, name) for name in SIZES},
        "max_position_embeddings": draft.target.max_length,
        "num_hidden_layers": config.num_hidden_layers,
        **_windows(config),
        **_rope(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "dtype": draft.dtype_name,
    }

"""What the formats of several engines have in common: which drafts they take, their keys, their weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deepspec.export.draft import Draft
from deepspec.export.layout import Layout, Refused
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


def check_eagle3(draft: Draft) -> None:
    if draft.network.config.qk_norm:
        raise Refused("engines run EAGLE-3 in Llama's layer, without q/k norms; train with qk_norm: false")
    _check_layers(draft)


def check_dflash(draft: Draft) -> None:
    _check_skip(draft)
    if draft.network.config.sample_from_anchor:
        raise Refused(
            "engines take DFlash drafts from the masks alone (1 + γ places), and this draft's anchor predicts the "
            "first token; train with sample_from_anchor: false"
        )
    _check_layers(draft)


def check_dspark(draft: Draft) -> None:
    config = draft.network.config
    _check_skip(draft)
    if config.markov_head_type != "vanilla":
        raise Refused(
            f"engines run DSpark's vanilla Markov head, not {config.markov_head_type!r}; train with "
            "markov_head: vanilla"
        )
    _check_layers(draft)


def eagle3_config(draft: Draft) -> dict[str, Any]:
    """Return the configuration that all engines read of an EAGLE-3 draft, every key written out."""
    config = draft.network.config
    return {
        "model_type": "llama",
        **{name: getattr(config, name) for name in SIZES},
        "max_position_embeddings": draft.target.max_length,
        "num_hidden_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": draft.dtype_name,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.hidden_size,
        **dict.fromkeys(VARIANTS, False),
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
            "causal": False,
            "use_aux_hidden_state": True,
        },
    }


def dspark_config(draft: Draft) -> dict[str, Any]:
    """Return the configuration of DeepSeek's `Qwen3DSparkModel`."""
    known = draft.network.description()
    known.pop("context_skip")
    return known | {
        "architectures": ["Qwen3DSparkModel"],
        "max_position_embeddings": draft.target.max_length,
        "use_aux_hidden_state": True,
        "dtype": draft.dtype_name,
    }


def lm_layout(draft: Draft, command: str) -> Layout:
    """Lay out a plain model directory with the target's tokenizer."""
    copies = {name: draft.directory / name for name in ("config.json", "model.safetensors")}
    return Layout(
        draft.config["architectures"][0], "causal-lm", command, copies=copies | draft.tokenizer_files
    )


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
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "dtype": draft.dtype_name,
    }


def _check_skip(draft: Draft) -> None:
    if draft.network.config.context_skip:
        raise Refused("context_skip is known to our engine alone; train with context_skip: false")


def _check_layers(draft: Draft) -> None:
    layers = list(draft.network.config.target_layer_ids)
    if layers != sorted(set(layers)):
        raise Refused(
            f"engines hand out target layers in their order; train with target_layer_ids ascending, not {layers}"
        )
    if layers[0] < 0:
        raise Refused("engines hand out no embedding output; train without target layer -1")

"""Tiny random models of every decoder-only family of the installed transformers.

A family's default configuration is shrunk by the names of its fields: widths, heads, experts, and all that a prompt
must be able to pass (windows, chunks, what an index keeps). Lists with an entry a layer keep one entry of each kind.
A few families need values of their own (`OWN`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deepspec.target.source import model_class

LAYERS, HIDDEN = 4, 64
VOCABULARY = 512
ENCODERS = frozenset(  # encoders, encoder-decoders and what hears, draws or predicts something else than text
    [
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "marian",
        "mbart",
        "megatron-bert",
        "mvp",
        "pegasus",
        "plbart",
        "prophetnet",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "trocr",
        "whisper",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
        "reformer",
        "moshi",
        "musicgen",
        "musicgen_melody",
        "mllama",
        "git",
        "hrm_text",
        "modernbert-decoder",
        "gemma4_assistant",
        "gemma4_unified_assistant",
    ]
)
SMALL: dict[str, int] = {
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size"), HIDDEN),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "lru_width"), HIDDEN),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "dff"), 2 * HIDDEN
    ),
    **dict.fromkeys(
        ("intermediate_size_mlp", "dense_intermediate_size", "shared_intermediate_size"), 2 * HIDDEN
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("swa_num_attention_heads", "num_query_groups"), 4),
    **dict.fromkeys(
        ("head_dim", "d_kv", "swa_head_dim", "v_head_dim", "attention_head_dim", "kv_channels"), 16
    ),
    **dict.fromkeys(("swa_v_head_dim", "qk_nope_head_dim", "global_head_dim", "rotary_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "index_rope_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "adapter_rank", "laurel_rank"), 24),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32
    ),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), 4
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(
        ("n_group", "topk_group", "num_expert_group", "zero_expert_num", "first_k_dense_replace"), 1
    ),
    **dict.fromkeys(("sliding_window", "local_window_size", "window_size", "attention_window_size"), 24),
    **dict.fromkeys(("sliding_window_size", "attention_chunk_size", "floor_scale"), 24),
    **dict.fromkeys(("index_topk", "keep_window_size"), 16),
    **dict.fromkeys(("index_n_heads", "n_index_heads"), 16),
    **dict.fromkeys(("index_head_dim",), 16),
    **dict.fromkeys(("index_block_size",), 8),
    **dict.fromkeys(("index_topk_blocks",), 2),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length", "n_ctx"), 1024
    ),
    **dict.fromkeys(("original_max_position_embeddings",), 1024),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size_per_layer_input",), 16),
    **dict.fromkeys(("mamba_d_ssm",), 64),
    **dict.fromkeys(
        ("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_num_heads", "num_heads"), 4
    ),
    **dict.fromkeys(
        ("mamba_d_head", "mamba_head_dim", "linear_head_dim", "linear_key_head_dim", "mamba_headdim"), 16
    ),
    **dict.fromkeys(("linear_value_head_dim", "state_size", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(
        ("linear_num_key_heads", "mamba_n_groups", "mamba_ngroups", "n_groups", "n_mamba_heads"), 2
    ),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("hc_sinkhorn_iters",), 3),
    **dict.fromkeys(("attention_hidden_size",), 64),
    "num_kv_shared_layers": 2,
    "block_multiple_of": 16,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
TOKENS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1, "decoder_start_token_id": None}
MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 16}
HEADS_OF_16 = {"head_dim": 16}
QSA = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
OWN: dict[str, dict[str, Any]] = {
    "bamba": MAMBA_HEADS | {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": MAMBA_HEADS | {"layer_types": ["mamba", "attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "falcon_h1": MAMBA_HEADS | {"mamba_d_ssm": 128, "lm_head_multiplier": 0.5},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "hunyuan_v1_dense": HEADS_OF_16,
    "hunyuan_v1_moe": HEADS_OF_16,
    "ministral": HEADS_OF_16,
    "nemotron": {"num_key_value_heads": 2},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.25},
    "granitemoe": {"logits_scaling": 4.0},
    "dots1": {"n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "qwen4_exp_text": QSA,
    "qwen4_exp": {"text_config": QSA},
    "zamba": {"attention_head_dim": 32, "attention_hidden_size": 128, "mamba_dt_rank": 8},
    "zamba2": {
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "mamba_headdim": 64,
        "attention_hidden_size": 128,
    },
    "xglm": {"decoder_start_token_id": 2},
    "cwm": {"bos_token_id": 0},
    "emu3": {"bos_token_id": 0, "text_config": {"bos_token_id": 0}},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "cohere": {"logit_scale": 0.25},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
}


def families() -> list[str]:
    """Return the model types that generate text with a decoder alone."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - ENCODERS)


def tiny_config(model_type: str, **own: Any) -> PreTrainedConfig:
    """Return the family's configuration, shrunk, but for values of one's own."""
    return _shrunk(CONFIG_MAPPING[model_type], OWN.get(model_type, {}) | own)


def _shrunk(config_class: type, own: dict[str, Any]) -> PreTrainedConfig:
    default = config_class()
    values = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    layers = next(
        (values[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in values), None
    )
    chosen: dict[str, Any] = dict(TOKENS)
    own = dict(own)
    for name, value in values.items():
        if name in SMALL and isinstance(value, (int, list)) and not isinstance(value, bool):
            chosen[name] = SMALL[name]
        elif isinstance(value, (list, tuple)) and len(value) == layers:
            chosen[name] = _one_of_each(list(value))
        elif isinstance(value, PreTrainedConfig):
            chosen[name] = _shrunk(type(value), own.pop(name, {})).to_dict()
    if "kv_lora_rank" in values or values.get("num_key_value_heads") == values.get("num_attention_heads"):
        chosen |= {"num_key_value_heads": 4} if "num_key_value_heads" in values else {}
    if "kv_lora_rank" in values and values.get("head_dim") == values.get("qk_rope_head_dim"):
        chosen["head_dim"] = SMALL["qk_rope_head_dim"]
    if "tie_word_embeddings" in values:
        chosen["tie_word_embeddings"] = False
    return config_class(**chosen | own)


def _one_of_each(kinds: list[Any]) -> list[Any]:
    """LAYERS entries, of each kind one at least, in the order in which they first come."""
    distinct = [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    return (distinct * LAYERS)[:LAYERS] if len(distinct) > 1 else kinds[:LAYERS]


def tiny_model(
    model_type: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """Return a random model whose logits vary by about 1 and depend on what was read."""
    torch.manual_seed(seed)
    config = config or tiny_config(model_type)
    model = model_class(config).from_config(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                wide = 1.0 if "embed" in name and "proj" not in name else weight.shape[-1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * wide)
            elif name.endswith(("bias", "sinks")):
                weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(4))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    return model

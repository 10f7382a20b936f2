"""A whole model of Llama's or Qwen3's architecture as a GGUF file: a draft LM, or the target beside its draft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from deepspec.export import converter
from deepspec.export.gguf import Gguf, Key, interleaved, tokenizer_keys
from deepspec.export.suitable import GGUF_ARCHITECTURES, GGUF_MODULES, gguf_model
from deepspec.target.ends import Ends

LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def model(
    config: dict[str, Any], weights: dict[str, Tensor], tokenizer: dict[str, Key], name: str, precision: str
) -> Gguf:
    """Return a model's file, of its configuration and Hugging Face weights."""
    arch = config["model_type"]
    tensors = _tensors(weights, config)
    return Gguf(
        arch,
        name,
        precision,
        _sizes(config, arch) | tokenizer,
        {name: x for name, x in tensors.items() if x.dim() == 2},
        {name: x for name, x in tensors.items() if x.dim() == 1},
    )


def check_target(target: Ends, precision: str) -> None:
    """Refuse a target that cannot be written as GGUF."""
    if is_converted(target):
        converter.find(precision)
    else:
        gguf_model(target.config.to_dict(), "the target")


def is_converted(target: Ends) -> bool:
    """Return whether llama.cpp's converter writes it, and not we."""
    kind = target.config.model_type
    return kind in GGUF_MODULES or (kind not in GGUF_ARCHITECTURES and converter.named())


def write_target(target: Ends, precision: str, path: Path) -> None:
    """Write the target as one GGUF file, without next-token modules.

    Raises:
        Refused: its architecture or tokenizer is not written here.
    """
    source = Path(target.source)
    check_target(target, precision)
    if is_converted(target):
        part = converter.WITHOUT if target.config.model_type in GGUF_MODULES else None
        converter.find(precision).run(source, path, precision, "target", part)
        return
    config = json.loads((source / "config.json").read_text())
    weights: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        weights |= load_file(file)
    tokenizer = target_tokenizer(target, config["vocab_size"], None)
    model(config, weights, tokenizer, "target", precision).write(path)


def target_tokenizer(target: Ends, size: int, mask: int | None) -> dict[str, Key]:
    """Return the keys of the target's tokenizer and template, with the token that stands for those to be drafted."""
    known = target.tokenizer
    own = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    specials = {theirs: getattr(known, f"{ours}_token_id", None) for ours, theirs in own.items()}
    return tokenizer_keys(Path(target.source), size, specials | {"mask": mask}, known.chat_template)


def _sizes(config: dict[str, Any], arch: str) -> dict[str, Key]:
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    return {
        f"{arch}.vocab_size": config["vocab_size"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": config.get("num_key_value_heads") or heads,
        f"{arch}.attention.key_length": dim,
        f"{arch}.attention.value_length": dim,
        f"{arch}.rope.dimension_count": dim,
        f"{arch}.rope.freq_base": float(config.get("rope_theta") or rope.get("rope_theta", 10000.0)),
        f"{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
    }


def _tensors(weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Rename weights to llama.cpp's names; query and key rows of Llama's go in its order."""
    heads = config["num_attention_heads"]
    permuted = {"attn_q": heads, "attn_k": config.get("num_key_value_heads") or heads}
    found = {}
    for name, weight in weights.items():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        if parts[0] != "layers":
            if not (parts[0] == "lm_head" and config.get("tie_word_embeddings")):
                found[f"{TOP[parts[0]]}.weight"] = weight
            continue
        kind = LAYER[parts[2]]
        if kind in permuted and config["model_type"] == "llama":
            weight = interleaved(weight, permuted[kind])
        found[f"blk.{parts[1]}.{kind}.weight"] = weight
    return found

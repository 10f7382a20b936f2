"""llama.cpp: an independent draft model of the Llama architecture as one GGUF file, with the target's tokenizer.

llama.cpp rotates neighbouring pairs where transformers rotates halves, so the rows of the query and key projections go
in another order. The tokenizer is byte-level BPE, its text split as `tokenizer.ggml.pre` says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.export.draft import Draft
from deepspec.export.formats import lm_of_target_size
from deepspec.export.layout import Layout
from deepspec.export.suitable import split_name

FILE = "draft-bf16.gguf"
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # llama.cpp's token types


def lm(draft: Draft, where: str, tokens: int) -> Layout:
    tokenizer = json.loads((Path(draft.target.source) / "tokenizer.json").read_text())
    split = split_name(tokenizer)
    command = (
        f"llama-server -m TARGET.gguf -md {where}/{FILE} --draft-max {tokens} --draft-min 1 "
        "(TARGET.gguf: the target, converted with llama.cpp's convert_hf_to_gguf.py)"
    )

    def make(directory: Path) -> None:
        _write(draft, tokenizer, split, directory / FILE)

    return Layout("GGUF llama", "gguf", command, make=make, copies=draft.tokenizer_files)


def _write(draft: Draft, tokenizer: dict[str, Any], split: str, path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import quantize

    config, weights = lm_of_target_size(draft)
    writer = GGUFWriter(path, "llama")
    writer.add_name(f"{draft.name} draft")
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    for key, value in _sizes(config).items():
        getattr(writer, f"add_{key}")(value)
    _add_tokenizer(writer, draft, tokenizer, split)
    for name, weight in sorted(_tensors(weights, config).items()):
        plain = weight.float().numpy()
        if weight.dim() == 1:
            writer.add_tensor(name, plain)
        else:
            kind = GGMLQuantizationType.BF16
            writer.add_tensor(name, quantize(plain, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "head_count": heads,
        "head_count_kv": config.get("num_key_value_heads") or heads,
        "key_length": dim,
        "value_length": dim,
        "rope_dimension_count": dim,
        "rope_freq_base": float(config.get("rope_theta") or rope.get("rope_theta", 10000.0)),
        "layer_norm_rms_eps": float(config["rms_norm_eps"]),
    }


def _add_tokenizer(writer: Any, draft: Draft, tokenizer: dict[str, Any], split: str) -> None:
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    names = {i: token for token, i in tokenizer["model"]["vocab"].items()}
    names |= {i: token["content"] for i, token in added.items()}
    size = draft.target.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(size)])
    kinds = [
        NORMAL
        if i in names and i not in added
        else CONTROL
        if added.get(i, {}).get("special", True)
        else USER_DEFINED
        for i in range(size)
    ]
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    special = draft.target.tokenizer
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(special, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(False)
    writer.add_chat_template(special.chat_template)


def _tensors(weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Rename weights to llama.cpp's names, query and key rows in its order."""
    heads = config["num_attention_heads"]
    counts = {"attn_q": heads, "attn_k": config.get("num_key_value_heads") or heads}
    found = {}
    for name, weight in weights.items():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        if parts[0] != "layers":
            if not (parts[0] == "lm_head" and config.get("tie_word_embeddings")):
                found[f"{TOP_NAMES[parts[0]]}.weight"] = weight
            continue
        kind = LAYER_NAMES[parts[2]]
        if kind in counts:
            weight = _interleaved(weight, counts[kind])
        found[f"blk.{parts[1]}.{kind}.weight"] = weight
    return found


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Interleave the rows of each head's two halves."""
    rows = weight.unflatten(0, (heads, 2, -1))
    return torch.movedim(rows, 1, 2).flatten(0, 2)


PLANS = {"lm": lm}

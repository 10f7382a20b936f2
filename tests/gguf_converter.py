"""Stands in for llama.cpp's convert_hf_to_gguf.py: next-token modules of Qwen3.5 and GLM-4 MoE, no target's layers.

It is run as a script with the flags that the exporter gives. Names and numbers are those that llama.cpp's own writes.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file

ARCHITECTURES = {
    "Qwen3_5ForCausalLM": "qwen35",
    "Qwen3NextForCausalLM": "qwen3next",
    "Glm4MoeForCausalLM": "glm4moe",
}
PARTS = {
    "fc": "nextn.eh_proj",
    "pre_fc_norm_embedding": "nextn.enorm",
    "pre_fc_norm_hidden": "nextn.hnorm",
    "norm": "nextn.shared_head_norm",
    "shared_head.norm": "nextn.shared_head_norm",
    **{name: f"nextn.{name}" for name in ("eh_proj", "enorm", "hnorm")},
}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
    **{f"mlp.shared_expert.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")},
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.gate": "ffn_gate_inp",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
EXACT = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("model", type=Path)
    for name in ("--outfile", "--outtype", "--model-name"):
        flags.add_argument(name, required=True)
    for name in ("--mtp", "--no-mtp"):
        flags.add_argument(name, action="store_true")
    asked = flags.parse_args()
    config = json.loads((asked.model / "config.json").read_text())
    kind = config["architectures"][0]
    if kind not in ARCHITECTURES:
        raise SystemExit(f"ERROR:hf-to-gguf:Model {kind} is not supported")
    writer = GGUFWriter(asked.outfile, ARCHITECTURES[kind])
    _keys(writer, asked.model, config, asked.mtp)
    for name, array in sorted(_tensors(asked.model, config, asked.mtp).items()):
        exact = array.ndim == 1 or name.endswith(EXACT)
        quant = GGMLQuantizationType["F32" if exact else asked.outtype.upper()]
        writer.add_tensor(name, quantize(np.ascontiguousarray(array), quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _keys(writer: GGUFWriter, model: Path, config: dict, module: bool) -> None:
    rope = config["rope_parameters"]
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"] + module)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "head_dim" in config:
        writer.add_key_length(dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(dim * rope.get("partial_rotary_factor", 1)))
    if config.get("num_experts_per_tok"):
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if module:
        writer.add_nextn_predict_layers(1)
    known = json.loads((model / "tokenizer.json").read_text())
    vocabulary = known["model"]["vocab"] | {token["content"]: token["id"] for token in known["added_tokens"]}
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_chat_template((model / "chat_template.jinja").read_text())


def _tensors(model: Path, config: dict, module: bool) -> dict[str, np.ndarray]:
    index = model / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    held = {name: x.float().numpy() for file in files for name, x in load_file(model / file).items()}
    layers = config["num_hidden_layers"]
    qwen = config["model_type"].startswith("qwen")
    found, experts = {}, {}
    for name, array in held.items():
        if name in TOP:
            found[TOP[name]] = array
        below = re.fullmatch(rf"(?:mtp\.(?:layers\.0\.)?|model\.layers\.{layers}\.)(.*)", name)
        if not (below and module):
            continue
        base, _, suffix = below[1].rpartition(".")
        if expert := re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)_proj", base):
            experts.setdefault(expert[2], {})[int(expert[1])] = array
        elif suffix == "e_score_correction_bias":
            found[f"blk.{layers}.exp_probs_b.bias"] = array
        else:
            found[f"blk.{layers}.{(PARTS | LAYER)[base]}.{suffix}"] = array
    for name, arrays in experts.items():
        found[f"blk.{layers}.ffn_{name}_exps.weight"] = np.stack([arrays[i] for i in sorted(arrays)])
    if qwen:  # norms are 1 + w
        found |= {name: array + 1 for name, array in found.items() if name.endswith("norm.weight")}
    return found


if __name__ == "__main__":
    main()

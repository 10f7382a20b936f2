"""A next-token module (MTP) in GGUF as llama.cpp (b11549) drafts with it: the block behind those of the target.

The file has the target's architecture, its embeddings and head, and of its blocks the last alone. Names go back to
those of the target's checkpoint, and the module is read as that of a stitched directory is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from deepspec.export.readers import next_token
from deepspec.export.readers.directory import Directory, Facts, Reading, Unreadable
from deepspec.export.readers.gguf import LAYER, draft_file, keys, short, tensors
from deepspec.export.readers.sample import Sample

ROUNDING = 0.02  # of the norm of embeddings or head, by which a file's precision may change them


@dataclass(frozen=True)
class _Family:
    """How the checkpoints of an architecture name a module.

    Args:
        names: of its parts.
        prefix: of all; `{n}` is how many layers the target has.
        shared: its expert that all tokens go through.
        one: what llama.cpp's norms have more than the checkpoint's.
    """

    names: next_token.Names
    prefix: str
    shared: str
    one: float = 0.0


_QWEN = _Family(next_token.QWEN, "mtp.", "shared_expert", 1.0)
_GLM = _Family(next_token.DEEPSEEK, "model.layers.{n}.", "shared_experts")
_FAMILIES = {"qwen35": _QWEN, "qwen3next": _QWEN, "glm4moe": _GLM}
_LAYER = LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_EXPERTS = {f"ffn_{name}_exps": f"{name}_proj" for name in ("gate", "up", "down")}
_CORRECTION = "mlp.gate.e_score_correction_bias"  # exp_probs_b.bias


def open_module(path: Path) -> Directory:
    """Open a draft's file; the target's configuration lies beside it."""
    file = draft_file(path)
    known = keys(file)
    arch = known.get("general.architecture")
    if arch not in _FAMILIES:
        raise Unreadable(
            f"general.architecture is {arch!r}: no file with a next-token module that is known here"
        )
    family, config = _FAMILIES[arch], AutoConfig.from_pretrained(path).get_text_config()
    _check_sizes(known, arch, config)
    held, kinds = tensors(file)
    block = f"blk.{config.num_hidden_layers}."
    _check_parts(held, kinds, block)
    weights: dict[str, Tensor] = {}
    for name, weight in held.items():
        if name.startswith(block):
            weights |= _named(name.removeprefix(block), weight, family, config.num_hidden_layers)
        else:
            weights[name] = weight
    return Directory({"context_length": known[f"{arch}.context_length"]}, weights, path)


def read(source: Directory, sample: Sample) -> Reading:
    """Compute what llama.cpp's `draft-mtp` drafts."""
    source.take("output_norm.weight", sample.last.shape[-1])
    embeddings, head = source.take("token_embd.weight"), source.optional("output.weight")
    head = embeddings if head is None else head  # as llama.cpp does
    for name, found, own in (("token_embd", embeddings, sample.embeddings), ("output", head, sample.head)):
        if not _alike(found, own):
            raise Unreadable(f"{name}.weight is not the target's: llama.cpp would draft with another one")
    reading = next_token.stitched(source, sample)
    return replace(reading, facts=Facts(max_position_embeddings=source.want("context_length")))


def _alike(found: Tensor, own: Tensor) -> bool:
    return found.shape == own.shape and float((found - own).norm()) <= ROUNDING * float(own.norm())


def _check_sizes(known: dict[str, Any], arch: str, config: Any) -> None:
    rope = config.rope_parameters
    default = config.hidden_size // config.num_attention_heads  # of llama.cpp and transformers
    dim = getattr(config, "head_dim", None) or default
    wanted = {
        "nextn_predict_layers": 1,
        "block_count": config.num_hidden_layers + 1,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": int(dim * rope.get("partial_rotary_factor", 1.0)),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
    }
    for key, value in wanted.items():
        found = known.get(f"{arch}.{key}", default if key == "attention.key_length" else None)
        found = short(found) if isinstance(found, float) else found
        if value is not None and found != value:
            raise Unreadable(f"{arch}.{key} is {found}, the target with one next-token module has {value}")


def _check_parts(held: dict[str, Tensor], kinds: dict[str, str], block: str) -> None:
    for part in ("eh_proj", "enorm", "hnorm"):
        if f"{block}nextn.{part}.weight" not in held:
            raise Unreadable(f"{block}nextn.{part}.weight is missing: llama.cpp does not load the file")
    if f"{block}nextn.shared_head_norm.weight" not in held:
        raise Unreadable(
            f"{block}nextn.shared_head_norm.weight is missing: llama.cpp would take the target's last norm, silently"
        )
    for name, weight in held.items():
        if weight.dim() == 1 and kinds[name] != "F32":
            raise Unreadable(f"{name} is {kinds[name]}; llama.cpp multiplies by norms in F32")


def _named(name: str, weight: Tensor, family: _Family, layers: int) -> dict[str, Tensor]:
    """Return a tensor of the block by the names that the checkpoint has; experts one by one."""
    names, prefix = family.names, family.prefix.format(n=layers)
    parts = {
        "nextn.eh_proj": names.joins,
        "nextn.enorm": names.embedding_norm,
        "nextn.hnorm": names.hidden_norm,
        "nextn.shared_head_norm": names.norm,
    }
    below = f"{prefix}{names.layer}"
    base, _, suffix = name.rpartition(".")
    if base.endswith("norm") and family.one:
        weight = weight - family.one
    if base in parts:
        return {f"{prefix}{parts[base]}.{suffix}": weight}
    if base in _EXPERTS:
        return {f"{below}mlp.experts.{i}.{_EXPERTS[base]}.{suffix}": one for i, one in enumerate(weight)}
    if base == "exp_probs_b":
        return {f"{below}{_CORRECTION}": weight}
    if base.endswith("_shexp") and base not in _LAYER:
        kind = base.removeprefix("ffn_").removesuffix("_shexp")
        return {f"{below}mlp.{family.shared}.{kind}_proj.{suffix}": weight}
    return {f"{below}{_LAYER.get(base, base)}.{suffix}": weight}

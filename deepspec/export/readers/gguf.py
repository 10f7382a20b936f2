"""GGUF drafts as llama.cpp (b11549) runs them: its keys, defaults, names and what it refuses, crashes on or ignores.

A file becomes a `Directory` of the readers' own names, after llama.cpp's conventions: layer ids are inputs of layers,
one more than the output that is meant; `d2t` holds target ids; `eagle3` rotates neighbouring pairs, so its query and
key rows are put back in halves, and `dflash` rotates halves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepspec.export.readers import block, eagle3
from deepspec.export.readers.dflash2 import SIZES as SELECTOR
from deepspec.export.readers.directory import Directory, Reading, Unreadable
from deepspec.export.readers.sample import Sample

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_norm_2": "hidden_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_conv_proj": "attention_conv.kernel_projection",
    "ffn_conv_proj": "mlp_conv.kernel_projection",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {
    "fc": "fc",
    "enc.output_norm": "hidden_norm",
    "output_norm": "norm",
    "output": "lm_head",
    "token_embd": "embed_tokens",
    "markov_w1": "markov_head.markov_w1",
    "markov_w2": "markov_head.markov_w2",
    "conf_proj": "confidence_head.proj",
    "selector_hidden": "candidate_selector.hidden_projection",
}
BARE = {  # named without `.weight` here or there
    "selector_predecessor.weight": "candidate_selector.predecessor_codebook",
    "selector_successor.weight": "candidate_selector.successor_codebook",
    "attn_conv_base": "attention_conv.base_kernel",
    "ffn_conv_base": "mlp_conv.base_kernel",
}
SIZES = {  # llama.cpp's key below the architecture → the readers'
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}


def draft_file(path: Path) -> Path:
    """Return the draft's GGUF file of a directory."""
    files = sorted(path.glob("draft-*.gguf"))
    if len(files) != 1:
        raise Unreadable(f"expected one draft-*.gguf file, found {len(files)}")
    return files[0]


def draft_kind(file: Path) -> str:
    """Return the `--spec-type` that a file is served with."""
    from gguf import GGUFReader

    arch = keys(file).get("general.architecture")
    names = {tensor.name for tensor in GGUFReader(file).tensors}
    if arch == "dflash":
        return "draft-dspark" if "markov_w1.weight" in names else "draft-dflash"
    if any(".nextn." in name for name in names):
        return "draft-mtp"
    return "draft-eagle3" if arch == "eagle3" else "draft-simple"


def keys(file: Path) -> dict[str, Any]:
    """Read the keys of a GGUF file."""
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a GGUF file by llama.cpp's names, floats in float32, and their types."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    found, kinds = {}, {}
    for tensor in GGUFReader(file).tensors:
        kinds[tensor.name] = tensor.tensor_type.name
        whole = tensor.tensor_type.name.startswith("I")
        plain = tensor.data if whole else dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(n) for n in tensor.shape[::-1])
        found[tensor.name] = torch.from_numpy(plain.copy()).reshape(shape)
    return found, kinds


def open_dflash(path: Path) -> Directory:
    """Open a file of architecture `dflash`: DSpark where it has a Markov head, else DFlash."""
    source = _open(draft_file(path), "dflash")
    config, weights = source.config, source.weights
    dspark = "markov_head.markov_w1.weight" in weights
    _read_selector(source)
    if dspark and config["block_size"] is None:
        raise Unreadable("dflash.block_size is missing: llama.cpp aborts while it starts")
    if config["mask_token_id"] is None:
        raise Unreadable("tokenizer.ggml.mask_token_id is missing: llama.cpp aborts at its first draft")
    for i in range(config["num_hidden_layers"]):
        for name in ("q_norm", "k_norm"):
            if f"layers.{i}.self_attn.{name}.weight" not in weights:
                raise Unreadable(
                    f"blk.{i}.attn_{name}.weight is missing: llama.cpp does not load a draft without q/k norms"
                )
    if dspark:
        _check_dspark(config, weights)
    size = config["block_size"] or 16
    config |= {
        "sample_from_anchor": dspark and config["sample_from_anchor"],
        "block_size": size if dspark else size - 1,
        "enable_confidence_head": dspark and config["enable_confidence_head"],
        "markov_rank": weights["markov_head.markov_w1.weight"].shape[-1] if dspark else 0,
    }
    return source


def open_eagle3(path: Path) -> Directory:
    """Open a file of architecture `eagle3`."""
    source = _open(draft_file(path), "eagle3")
    config = source.config
    if config["num_hidden_layers"] != 1:
        raise Unreadable(f"eagle3.block_count is {config['num_hidden_layers']}; llama.cpp runs one layer")
    if len(config["target_layer_ids"]) != 3:
        raise Unreadable(
            f"eagle3.target_layers has {len(config['target_layer_ids'])} ids; llama.cpp asks for three"
        )
    source.weights = {name.replace("layers.0.", "midlayer.", 1): x for name, x in source.weights.items()}
    for name in ("q_proj", "k_proj"):
        place = f"midlayer.self_attn.{name}.weight"
        if place in source.weights:
            source.weights[place] = in_halves(source.weights[place], config["head_dim"])
    return source


def dflash(source: Directory, sample: Sample) -> Reading:
    """Compute what llama.cpp's `draft-dspark` or `draft-dflash` drafts."""
    _check_target(source, sample)
    config = source.config
    return block.read(
        source,
        sample,
        config["target_layer_ids"],
        config["mask_token_id"],
        config["block_size"],
        config["sample_from_anchor"],
        config["causal"],
    )


def draft_eagle3(source: Directory, sample: Sample) -> Reading:
    """Compute what llama.cpp's `draft-eagle3` drafts."""
    _check_target(source, sample)
    return eagle3.read(source, sample, source.config["target_layer_ids"])


def in_halves(weight: Tensor, dim: int) -> Tensor:
    """Put the rows [heads·dim, in] of neighbouring pairs back in two halves a head."""
    return weight.unflatten(0, (-1, dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def in_pairs(weight: Tensor, dim: int) -> Tensor:
    """Put the rows [heads·dim, in] of two halves a head in neighbouring pairs."""
    return weight.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).flatten(0, 2)


ROTATED = ("q_proj.weight", "k_proj.weight")
ORDERS = {  # what mends the rows of queries and keys → what was wrong with them
    in_pairs: "rows of attn_q and attn_k are in halves, and llama.cpp rotates neighbouring pairs of this architecture",
    in_halves: "rows of attn_q and attn_k are in pairs, and llama.cpp rotates halves of this architecture",
}


def _open(file: Path, arch: str) -> Directory:
    """Read keys and tensors by the readers' names, llama.cpp's defaults filled in."""
    known = keys(file)
    if known.get("general.architecture") != arch:
        raise Unreadable(f"general.architecture is {known.get('general.architecture')!r}, not {arch!r}")
    held, kinds = tensors(file)
    weights = {_name(name): weight for name, weight in held.items()}
    for name, kind in kinds.items():
        if (
            (weights[_name(name)].dim() == 1 or name.startswith("conf_proj"))
            and name != "d2t"
            and kind != "F32"
        ):
            raise Unreadable(f"{name} is {kind}; llama.cpp multiplies by norms in F32")
    config = _config(known, arch)
    _check_vocabulary(config, weights, kinds)
    return Directory(config, weights, file)


def _config(known: dict[str, Any], arch: str) -> dict[str, Any]:
    def want(key: str) -> Any:
        if known.get(f"{arch}.{key}") is None:
            raise Unreadable(f"{arch}.{key} is missing: llama.cpp does not load the file")
        return known[f"{arch}.{key}"]

    config = {ours: want(theirs) for theirs, ours in SIZES.items()}
    config["rms_norm_eps"] = short(config["rms_norm_eps"])
    optional = lambda key, default: known.get(f"{arch}.{key}", default)  # noqa: E731
    heads = config["num_attention_heads"]
    dim = optional("attention.key_length", config["hidden_size"] // heads)
    if optional("rope.dimension_count", dim) != dim:
        raise Unreadable(f"{arch}.rope.dimension_count is not the whole head of {dim}")
    if optional("rope.scaling.type", "none") != "none":
        raise Unreadable(f"{arch}.rope.scaling is set, which no draft here is trained with")
    tokens = known.get("tokenizer.ggml.tokens") or []
    if optional("vocab_size", len(tokens)) != len(tokens):
        raise Unreadable(
            f"{arch}.vocab_size is {optional('vocab_size', 0)}, the tokenizer has {len(tokens)} tokens"
        )
    return config | {
        "arch": arch,
        "num_key_value_heads": optional("attention.head_count_kv", heads),
        "head_dim": dim,
        "rope_theta": short(optional("rope.freq_base", 10000.0)),
        "vocab_size": len(tokens),
        "target_layer_ids": [int(i) - 1 for i in want("target_layers")],
        "block_size": optional("block_size", None),
        "sample_from_anchor": optional("sample_from_anchor", True),
        "enable_confidence_head": optional("has_confidence_head", True),
        "confidence_head_with_markov": True,
        "causal": bool(optional("attention.causal", False)),
        **_windows(optional("attention.sliding_window", 0), optional("attention.sliding_window_pattern", [])),
        **{name: optional(name, 0) for name in SELECTOR},
        "mask_token_id": known.get("tokenizer.ggml.mask_token_id"),
        "norm_before_residual": optional("norm_before_residual", False),
        "norm_before_fc": optional("norm_before_fc", False),
    }


def _windows(window: Any, pattern: Any) -> dict[str, Any]:
    """Return the readers' keys for windowed layers; a window without a pattern is none."""
    kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    return {"layer_types": kinds, "sliding_window": window} if window and any(pattern) else {}


def _check_vocabulary(config: dict[str, Any], weights: dict[str, Tensor], kinds: dict[str, str]) -> None:
    """Read `d2t` as llama.cpp does, target ids, and keep it as the readers do, offsets."""
    vocab, head = config["vocab_size"], weights.get("lm_head.weight")
    if "d2t" not in weights:
        if head is not None and len(head) != vocab:
            raise Unreadable(
                f"d2t is missing, and output.weight has {len(head)} rows of {vocab}: llama.cpp does not start"
            )
        return
    ids = weights["d2t"]
    if kinds["d2t"] != "I64":
        raise Unreadable(f"d2t is {kinds['d2t']}; llama.cpp asserts I64")
    if len(ids.unique()) < len(ids) or int(ids.min()) < 0 or int(ids.max()) >= vocab:
        offsets = len((ids + torch.arange(len(ids))).unique()) == len(ids)
        said = "it names tokens twice, or none of the target's"
        if offsets:
            said = "it holds offsets, and llama.cpp reads target ids"
        raise Unreadable(f"d2t: {said}; nothing would be accepted, without a message")
    weights["d2t"] = ids - torch.arange(len(ids))
    config["draft_vocab_size"] = len(ids)


def _read_selector(source: Directory) -> None:
    """Read the sizes of DFlash 2, without any of which llama.cpp drafts as DFlash does."""
    config, weights = source.config, source.weights
    has = "candidate_selector.hidden_projection.weight" in weights
    sizes = {name: config.pop(name) for name in SELECTOR}
    if has != bool(sizes["selector_top_k"]):
        raise Unreadable(
            "DFlash 2 is known by dflash.selector_top_k and selector_hidden.weight, and one is there alone: llama.cpp "
            "would draft as DFlash, or not start"
        )
    if has and (missing := [name for name, size in sizes.items() if not size]):
        raise Unreadable(f"dflash.{missing[0]} is missing: llama.cpp does not load the file")
    if has:
        config |= sizes


def _check_dspark(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    vocab, columns = config["vocab_size"], config.get("draft_vocab_size", config["vocab_size"])
    first, second = weights["markov_head.markov_w1.weight"], weights.get("markov_head.markov_w2.weight")
    if second is None:
        raise Unreadable("markov_w2.weight is missing: llama.cpp does not load the file")
    rank = first.shape[-1]
    for name, found, wanted in (("markov_w1", first, (vocab, rank)), ("markov_w2", second, (columns, rank))):
        if tuple(found.shape) != wanted:
            raise Unreadable(
                f"{name}.weight is {list(found.shape)}, llama.cpp wants {list(wanted)}; it is transposed"
            )
    if config["enable_confidence_head"] and "confidence_head.proj.weight" not in weights:
        raise Unreadable(
            "conf_proj is missing, which dflash.has_confidence_head does not say: with --spec-draft-p-min llama.cpp "
            "would draft nothing, silently"
        )


def _check_target(source: Directory, sample: Sample) -> None:
    own, theirs = source.want("hidden_size"), sample.last.shape[-1]
    if own != theirs:
        raise Unreadable(
            f"embedding_length is {own}, the target's {theirs}: llama.cpp sizes fc by the draft's"
        )


def short(value: Any) -> float:
    """Return the shortest number that is the same in float32: what was written."""
    return float(str(np.float32(value)))


def _name(name: str) -> str:
    """Return a tensor's name as the readers call it; unknown ones stay, and are found to be unread."""
    if name in BARE:
        return BARE[name]
    base, dot, suffix = name.rpartition(".")
    parts = base.split(".", 2)
    if parts[0] == "blk" and suffix in BARE:
        return f"layers.{parts[1]}.{BARE[suffix]}"
    if parts[0] == "blk" and len(parts) == 3:
        return f"layers.{parts[1]}.{LAYER.get(parts[2], parts[2])}.{suffix}"
    return f"{TOP.get(base, base)}{dot}{suffix}"

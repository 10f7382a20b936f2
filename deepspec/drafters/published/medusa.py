"""Medusa as FasterDecoding, vLLM and TGI have it, and ours: residual heads, with a vocabulary matrix each or none."""

from __future__ import annotations

import re
from typing import Any

from deepspec.drafters.published.eagle3 import made_for
from deepspec.drafters.published.plan import Found, Plan
from deepspec.errors import DeepSpecError

_BLOCK = re.compile(r"(?:medusa_heads?\.|heads\.)?(\d+)\.(\d+)\.linear\.(weight|bias)")
_MATRIX = re.compile(r"(?:medusa_heads?\.|heads\.)?(\d+)\.(\d+)\.weight")
_VLLM_BLOCK = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
_VLLM_MATRIX = re.compile(r"lm_heads\.(\d+)\.weight")


def recognise(found: Found) -> Plan | None:
    """Recognise Medusa by `medusa_num_heads` or its architecture."""
    if "medusa_num_heads" not in found.config and found.architecture != "MedusaModel":
        return None
    try:
        return _plan(found)
    except DeepSpecError as error:
        return Plan("FasterDecoding", "Medusa", made_for=made_for(found.config), refusal=str(error))


def _plan(found: Found) -> Plan:
    config = found.config
    blocks, matrices = _names(found)
    if not blocks:
        raise DeepSpecError("no weight of a residual head (0.0.linear.weight) is there")
    layers = 1 + max(int(ours.split(".")[1]) for ours in blocks.values())
    size = next(found.weights[theirs].shape[0] for theirs, ours in blocks.items() if ours.endswith("weight"))
    names = {**blocks, **{name: name for name in ("d2t", "t2d", "lm_head.weight") if name in found.weights}}
    names |= {name: name for name in ("embed_tokens.weight",) if name in found.weights}
    shared = bool(config.get("original_lm_head"))
    left_out: list[str] = []
    if shared and "token_map" in found.weights:
        names["token_map"] = "d2t"
    if shared:
        left_out += list(matrices)
    else:
        names |= {theirs: f"{head}.{layers}.weight" for theirs, head in matrices.items()}
    rows = [found.weights[theirs].shape[0] for theirs in matrices]
    columns = next((found.weights[n].shape[0] for n in ("d2t", "token_map") if n in found.weights), None)
    own: dict[str, Any] = {
        "architectures": ["MedusaModel"],
        "hidden_size": config.get("hidden_size") or size,
        "medusa_num_heads": config.get("medusa_num_heads")
        or 1 + max(int(o.split(".")[0]) for o in blocks.values()),
        "medusa_num_layers": layers,
        "medusa_fc_bias": any(ours.endswith("bias") for ours in blocks.values()),
        "own_heads": bool(matrices) and not shared,
    }
    if vocab := config.get("vocab_size") or next(iter(rows), None):
        own["vocab_size"] = vocab
    own |= {"draft_vocab_size": columns} if columns else {}
    return Plan(
        "FasterDecoding" if matrices else "DeepSpec",
        f"Medusa, {own['medusa_num_heads']} heads",
        "medusa",
        own,
        names,
        made_for=made_for(config),
        left_out=tuple(sorted(set(found.weights) - set(names)) if shared else left_out),
    )


def _names(found: Found) -> tuple[dict[str, str], dict[str, str]]:
    """Return names of residual blocks → ours, and names of vocabulary matrices → which head's.

    Raises:
        DeepSpecError: a weight that is of neither kind.
    """
    blocks, matrices, strange = {}, {}, []
    known = {"d2t", "t2d", "lm_head.weight", "embed_tokens.weight", "token_map"}
    for name in found.weights:
        if match := _BLOCK.fullmatch(name) or _VLLM_BLOCK.fullmatch(name):
            head, layer, part = match.groups()
            blocks[name] = f"{head}.{layer}.linear.{part}"
        elif match := _MATRIX.fullmatch(name) or _VLLM_MATRIX.fullmatch(name):
            matrices[name] = match.group(1)
        elif name not in known:
            strange.append(name)
    if strange:
        raise DeepSpecError(f"unknown weights {sorted(strange)[:3]}")
    return blocks, matrices

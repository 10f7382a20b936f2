"""Tiny targets with next-token modules of their own, and what these compute, in plain torch: nothing of the package.

A module's weights are random, under the names and in the shapes that the family's checkpoints have for a decoder layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.tiny_families import tiny_config, tiny_model
from tests.tiny import make_tokenizer

MODULE = "model-00002-of-00002.safetensors"


@dataclass(frozen=True)
class Family:
    """How a family names a module and what its layer computes.

    Args:
        model_type: of the target.
        prefix, layer: how the names of a module, and of its decoder layer, begin.
        joins, embedding_norm, hidden_norm, norm: names of its parts.
        one: what is added to the weights of norms (Qwen's are 1 + w).
    """

    model_type: str
    prefix: str
    layer: str
    joins: str
    embedding_norm: str
    hidden_norm: str
    norm: str
    attention: Callable[[Reader, Tensor], Tensor]
    mlp: Callable[[Reader, Tensor], Tensor]
    one: float = 0.0
    hidden_first: bool = False

    def prefix_of(self, number: int) -> str:
        """Return how the names of a further module begin."""
        return re.sub(r"\d+", lambda found: str(int(found[0]) + number), self.prefix)


def write(family: Family, directory: Path, parts: int = 2, modules: int = 1) -> Path:
    """Write a target whose checkpoint has modules, in two shards.

    Args:
        parts: 1 leaves the modules out.
    """
    model = tiny_model(
        family.model_type, config=tiny_config(family.model_type, **OWN.get(family.model_type, {}))
    )
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    if parts == 1:
        return directory
    whole = load_file(directory / "model.safetensors")
    rng = torch.Generator().manual_seed(7)
    d = model.config.hidden_size
    last = f"model.layers.{model.config.num_hidden_layers - 1}."
    shapes: dict[str, torch.Size] = {}
    for prefix in (family.prefix_of(number) for number in range(modules)):
        shapes |= {
            f"{prefix}{family.layer}{name.removeprefix(last)}": weight.shape
            for name, weight in whole.items()
            if name.startswith(last)
        }
        norms = (family.embedding_norm, family.hidden_norm, family.norm)
        shapes |= {f"{prefix}{name}.weight": torch.Size([d]) for name in norms}
        shapes[f"{prefix}{family.joins}.weight"] = torch.Size([d, 2 * d])
    made = {name: _random(name, shape, 1 - family.one, rng) for name, shape in sorted(shapes.items())}
    save_file(made, directory / MODULE, {"format": "pt"})
    files = dict.fromkeys(whole, "model.safetensors") | dict.fromkeys(made, MODULE)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return directory


def _random(name: str, shape: torch.Size, centre: float, rng: torch.Generator) -> Tensor:
    if len(shape) > 1:
        return torch.randn(shape, generator=rng) * shape[-1] ** -0.5
    around = centre if "norm" in name else 0.0
    return around + torch.randn(shape, generator=rng) / 4


class Reader:
    """A module read by its own names from the target's files.

    Args:
        model: the target, as transformers loads it.
    """

    def __init__(self, family: Family, directory: Path, model: Any):
        self.family, self.config = family, model.config
        self.prefix = family.prefix
        self.w = {name: w.float() for name, w in load_file(directory / MODULE).items()}
        self.embed = model.get_input_embeddings().weight.detach()
        self.head = model.get_output_embeddings().weight.detach()

    def part(self, name: str) -> Tensor:
        return self.w[f"{self.prefix}{name}.weight"]

    def of(self, name: str) -> Tensor:
        """Return a weight of the layer."""
        return self.w[f"{self.prefix}{self.family.layer}{name}"]

    def rms(self, x: Tensor, weight: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * (weight + self.family.one)

    @torch.no_grad()
    def laws(self, tokens: list[int], states: Tensor, gamma: int) -> Tensor:
        """Laws [γ, vocab] behind the anchor, the token at len(states); every step over all places anew.

        Args:
            states: the target's post-norm states [n, d] of the tokens before the anchor.
        """
        below, out = states, []
        for _ in range(gamma):
            last = self.outputs(tokens[1 : len(below) + 1], below)[-1:]
            out.append((last @ self.head.T).softmax(-1))
            below = torch.cat((below, last))
        return torch.cat(out)

    @torch.no_grad()
    def laws_of_several(self, tokens: list[int], states: Tensor, modules: int) -> Tensor:
        """Laws [modules, vocab] behind the anchor, a module for each; module k reads token i + k at place i."""
        below, out = states, []
        for number in range(modules):
            self.prefix = self.family.prefix_of(number)
            below = self.outputs(tokens[number + 1 : number + 1 + len(states)], below)
            out.append((below[-1:] @ self.head.T).softmax(-1))
        return torch.cat(out)

    def outputs(self, tokens: list[int], below: Tensor) -> Tensor:
        """The module's outputs [n, d] behind its norm, of tokens read beside states [n, d]."""
        parts = [
            self.rms(self.embed[torch.tensor(tokens)], self.part(self.family.embedding_norm)),
            self.rms(below, self.part(self.family.hidden_norm)),
        ]
        joined = torch.cat(parts[::-1] if self.family.hidden_first else parts, -1)
        x = joined @ self.part(self.family.joins).T
        x = x + self.family.attention(self, self.rms(x, self.of("input_layernorm.weight")))
        x = x + self.family.mlp(self, self.rms(x, self.of("post_attention_layernorm.weight")))
        return self.rms(x, self.part(self.family.norm))


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention; q [n, heads, ·], k and v of as many or fewer heads."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("mhd,nhd->hmn", q, k) * q.shape[-1] ** -0.5
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hmn,nhd->mhd", scores.masked_fill(later, -torch.inf).softmax(-1), v).flatten(1)


def rotated(x: Tensor, theta: float, width: int, pairs: bool = False) -> Tensor:
    """Rotate the first `width` of heads, x [n, heads, ·] at positions 0 to n − 1; `pairs`: neighbours together."""
    angles = torch.arange(len(x))[:, None].double() * theta ** (-torch.arange(0, width, 2).double() / width)
    cos, sin = (part.float()[:, None] for part in (angles.cos(), angles.sin()))
    half = x[..., :width]
    a, b = (half[..., 0::2], half[..., 1::2]) if pairs else half.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., width:]), -1)


def grouped(reader: Reader, x: Tensor) -> Tensor:
    """Qwen2's attention, with biases."""
    config = reader.config
    q, k, v = (
        (x @ reader.of(f"self_attn.{name}.weight").T + reader.of(f"self_attn.{name}.bias")).unflatten(
            -1, (-1, config.hidden_size // config.num_attention_heads)
        )
        for name in ("q_proj", "k_proj", "v_proj")
    )
    theta, width = config.rope_parameters["rope_theta"], q.shape[-1]
    return (
        attended(rotated(q, theta, width), rotated(k, theta, width), v)
        @ reader.of("self_attn.o_proj.weight").T
    )


def gated(reader: Reader, x: Tensor) -> Tensor:
    """Qwen3.5's attention: normed queries and keys, a part of a head rotated, a gate for each head."""
    config = reader.config
    q, k, v = (
        (x @ reader.of(f"self_attn.{name}.weight").T).unflatten(-1, (-1, width * config.head_dim))
        for name, width in (("q_proj", 2), ("k_proj", 1), ("v_proj", 1))
    )
    q, gate = q.chunk(2, -1)
    q, k = (
        rotated(
            reader.rms(y, reader.of(f"self_attn.{name}.weight")),
            config.rope_parameters["rope_theta"],
            int(config.head_dim * config.rope_parameters["partial_rotary_factor"]),
        )
        for y, name in ((q, "q_norm"), (k, "k_norm"))
    )
    return (attended(q, k, v) * gate.flatten(1).sigmoid()) @ reader.of("self_attn.o_proj.weight").T


def latent(reader: Reader, x: Tensor) -> Tensor:
    """DeepSeek-V3's attention: keys and values of a latent vector, one rotated key for all heads."""
    config, of = reader.config, lambda name: reader.of(f"self_attn.{name}.weight")
    theta, rope = config.rope_parameters["rope_theta"], config.qk_rope_head_dim
    q = reader.rms(x @ of("q_a_proj").T, of("q_a_layernorm")) @ of("q_b_proj").T
    q = q.unflatten(-1, (config.num_attention_heads, -1))
    kv, key = (x @ of("kv_a_proj_with_mqa").T).split((config.kv_lora_rank, rope), -1)
    kv = (reader.rms(kv, of("kv_a_layernorm")) @ of("kv_b_proj").T).unflatten(
        -1, (config.num_attention_heads, -1)
    )
    k, v = kv.split((config.qk_nope_head_dim, config.v_head_dim), -1)
    turned = [rotated(y, theta, rope, pairs=True) for y in (q[..., config.qk_nope_head_dim :], key[:, None])]
    q = torch.cat((q[..., : config.qk_nope_head_dim], turned[0]), -1)
    k = torch.cat((k, turned[1].expand(-1, k.shape[1], -1)), -1)
    return attended(q, k, v) @ of("o_proj").T


def dense(reader: Reader, x: Tensor, prefix: str = "mlp.") -> Tensor:
    gate, up = (x @ reader.of(f"{prefix}{name}_proj.weight").T for name in ("gate", "up"))
    return (gate * gate.sigmoid() * up) @ reader.of(f"{prefix}down_proj.weight").T


def experts(reader: Reader, x: Tensor) -> Tensor:
    """DeepSeek-V3's experts: chosen by biased scores, weighed by their own, beside those that all tokens share."""
    config = reader.config
    scores = (x @ reader.of("mlp.gate.weight").T).sigmoid()
    chosen = (
        (scores + reader.of("mlp.gate.e_score_correction_bias")).topk(config.num_experts_per_tok, -1).indices
    )
    out = dense(reader, x, "mlp.shared_experts.")
    for place, own in enumerate(chosen.tolist()):
        total = scores[place, own].sum()
        for expert in own:
            share = config.routed_scaling_factor * scores[place, expert] / total
            out[place] += share * dense(reader, x[place : place + 1], f"mlp.experts.{expert}.")[0]
    return out


OWN: dict[str, dict[str, Any]] = {"qwen2": {"max_window_layers": 4}}
FAMILIES = {
    "DeepSeek-V3": Family(
        "deepseek_v3", "model.layers.4.", "", "eh_proj", "enorm", "hnorm", "shared_head.norm", latent, experts
    ),
    "Qwen3.5": Family(
        "qwen3_5_text",
        "mtp.",
        "layers.0.",
        "fc",
        "pre_fc_norm_embedding",
        "pre_fc_norm_hidden",
        "norm",
        gated,
        dense,
        one=1.0,
    ),
    "MiMo": Family(
        "qwen2",
        "model.mtp_layers.0.",
        "",
        "input_proj",
        "token_layernorm",
        "hidden_layernorm",
        "final_layernorm",
        grouped,
        dense,
        hidden_first=True,
    ),
}

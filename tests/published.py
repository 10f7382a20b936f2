"""Tiny drafts in the styles of other trainers, and what they compute, in plain torch: nothing of the package is used.

A draft's directory is made of random weights under the style's own names. The reference reads those weights by those
names, and the target's states from transformers' own `hidden_states`, in the style's own convention.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

D, HEADS, KV, HEAD_DIM, FFN, VOCAB, LAYERS = 64, 4, 2, 16, 96, 512, 8
SIZES: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


class Weights:
    """Draws random weights by name."""

    def __init__(self, seed: int = 0):
        self.rng = torch.Generator().manual_seed(seed)
        self.named: dict[str, Tensor] = {}

    def matrix(self, name: str, out: int, in_: int, size: float = 1.0) -> None:
        self.named[f"{name}.weight"] = size * torch.randn(out, in_, generator=self.rng) * in_**-0.5

    def norm(self, name: str, width: int) -> None:
        self.named[f"{name}.weight"] = 1 + torch.randn(width, generator=self.rng) / 4

    def layer(self, prefix: str, width: int, qk_norm: bool) -> None:
        self.norm(f"{prefix}input_layernorm", D)
        self.norm(f"{prefix}post_attention_layernorm", D)
        self.matrix(f"{prefix}self_attn.q_proj", HEADS * HEAD_DIM, width)
        self.matrix(f"{prefix}self_attn.k_proj", KV * HEAD_DIM, width)
        self.matrix(f"{prefix}self_attn.v_proj", KV * HEAD_DIM, width)
        self.matrix(f"{prefix}self_attn.o_proj", D, HEADS * HEAD_DIM)
        if qk_norm:
            self.norm(f"{prefix}self_attn.q_norm", HEAD_DIM)
            self.norm(f"{prefix}self_attn.k_norm", HEAD_DIM)
        self.matrix(f"{prefix}mlp.gate_proj", FFN, D)
        self.matrix(f"{prefix}mlp.up_proj", FFN, D)
        self.matrix(f"{prefix}mlp.down_proj", D, FFN)

    def selector(self, layers: int, rank: int = 8, taps: int = 2, group: int = 16) -> None:
        """DFlash 2's parts."""
        for i in range(layers):
            for name in ("attention_conv", "mlp_conv"):
                base = torch.randn(2, taps, D, generator=self.rng) / 4
                base[:, 0] += 1
                self.named[f"layers.{i}.{name}.base_kernel"] = base
                self.matrix(f"layers.{i}.{name}.kernel_projection", 2 * taps * D // group, D, 0.3)
        self.matrix("candidate_selector.hidden_projection", rank, D)
        for name in ("predecessor", "successor"):
            codes = torch.randn(VOCAB, rank, generator=self.rng)
            self.named[f"candidate_selector.{name}_codebook"] = codes


@dataclass
class Draft:
    """A directory's contents, and how its style means them.

    Args:
        reads: of transformers' hidden_states (0: the embeddings), in the order that `fc` has them.
        gamma: tokens drafted.
        ids: target ids of the columns; None: all.
        rope: as `rope_parameters` has it.
        first: how its first layer's names begin.
        window, causal: of its layers.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    reads: list[int]
    gamma: int
    ids: Tensor | None = None
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    first: str = "midlayer."
    window: int | None = None
    causal: bool = False
    from_anchor: bool = False
    mask: int = VOCAB - 1

    def write(self, directory: Path, form: str = "safetensors") -> Path:
        """Write it as `safetensors`, `bin` or `shards`."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        if form == "safetensors":
            save_file(self.weights, directory / "model.safetensors")
        elif form == "bin":
            torch.save(self.weights, directory / "pytorch_model.bin")
        else:
            names = sorted(self.weights)
            shards = {
                "model-00001-of-00002.safetensors": names[::2],
                "model-00002-of-00002.safetensors": names[1::2],
            }
            for file, kept in shards.items():
                save_file({name: self.weights[name] for name in kept}, directory / file)
            where = {name: file for file, kept in shards.items() for name in kept}
            (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        return directory


def eagle3(
    reads: list[int],
    columns: int | None = 100,
    as_ids: bool = False,
    layers: int = 1,
    qk_norm: bool = False,
    first: str = "midlayer.",
    prefix: str = "",
    norms: tuple[str, ...] = (),
    own_embeddings: bool = False,
    parallel: bool = False,
    **config: Any,
) -> Draft:
    """An EAGLE-3 draft, or a P-EAGLE of four tokens (`parallel`).

    `norms`: which of norm_before_residual, norm_before_fc, fc_norm and norm_output are on.
    """
    made = Weights()
    made.matrix("fc", D, len(reads) * D)
    made.layer(first, 2 * D, qk_norm)
    made.norm(f"{first}hidden_norm", D)
    for i in range(1, layers):
        made.layer(f"layers.{i}.", D, qk_norm)
    made.norm("norm", D)
    if "norm_before_fc" in norms:
        made.norm("input_norm", len(reads) * D)
    if "fc_norm" in norms:
        for i in range(len(reads)):
            made.norm(f"fc_norm.{i}", D)
    if parallel:
        made.named["mask_hidden"] = torch.randn(1, 1, len(reads) * D, generator=made.rng)
    if own_embeddings:
        made.named["embed_tokens.weight"] = torch.randn(VOCAB, D, generator=made.rng)
    ids = None
    if columns:
        ids = torch.randperm(VOCAB, generator=made.rng)[:columns].sort().values
        made.matrix("lm_head", columns, D)
        made.named["d2t"] = ids if as_ids else ids - torch.arange(columns)
        made.named["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, ids, True)
    named = {prefix + name: weight for name, weight in made.named.items()}
    described = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", **SIZES, **config}
    described |= {"num_hidden_layers": layers} | ({"draft_vocab_size": columns} if columns else {})
    return Draft(described, named, reads, 4 if parallel else 5, ids, first=first, mask=VOCAB - 2)


def block(
    reads: list[int],
    size: int,
    layers: int = 2,
    columns: int | None = None,
    rank: int = 0,
    head: str = "vanilla",
    confidence: bool = False,
    from_anchor: bool = False,
    selector: bool = False,
    **config: Any,
) -> Draft:
    """A DFlash, DFlash 2 (`selector`) or DSpark draft, blocks of `size` places, `config` in the style's own keys."""
    made = Weights(1)
    made.matrix("fc", D, len(reads) * D)
    made.norm("hidden_norm", D)
    made.norm("norm", D)
    for i in range(layers):
        made.layer(f"layers.{i}.", D, qk_norm=True)
    rows = columns or VOCAB
    if selector:
        made.selector(layers)
    if rank:
        made.matrix("markov_head.markov_w1", VOCAB, rank)
        made.matrix("markov_head.markov_w2", rows, rank)
        if head == "gated":
            made.matrix("markov_head.gate_proj", rank, D + rank)
            made.named["markov_head.gate_proj.bias"] = torch.randn(rank, generator=made.rng)
    if confidence:
        made.matrix("confidence_head.proj", 1, D + rank)
        made.named["confidence_head.proj.bias"] = torch.randn(1, generator=made.rng)
    ids = None
    if columns:
        ids = torch.randperm(VOCAB, generator=made.rng)[:columns].sort().values
        made.matrix("lm_head", columns, D)
        made.named["d2t"] = ids - torch.arange(columns)
    described = {"model_type": "qwen3", **SIZES, "num_hidden_layers": layers, **config}
    gamma = size - (not from_anchor)
    return Draft(
        described, made.named, reads, gamma, ids, first="layers.0.", from_anchor=from_anchor, mask=VOCAB - 2
    )


# What they compute


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + SIZES["rms_norm_eps"]) * weight


def rotated(x: Tensor, positions: Tensor, rope: dict[str, Any]) -> Tensor:
    """x [n, heads, head_dim] at positions [n]; the first part of a head alone where the embedding is partial."""
    rotary = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0))
    factor = 1.0
    rates = rope["rope_theta"] ** (-torch.arange(0, rotary, 2).double() / rotary)
    if rope["rope_type"] != "default":
        config = LlamaConfig(
            hidden_size=D,
            num_attention_heads=HEADS,
            head_dim=HEAD_DIM,
            max_position_embeddings=4096,
            rope_parameters=rope,
        )
        rates, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    angles = positions[:, None].double() * rates.double()
    cos, sin = (part.float()[:, None] * factor for part in (angles.cos(), angles.sin()))
    a, b, rest = x[..., : rotary // 2], x[..., rotary // 2 : rotary], x[..., rotary:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


class Reference:
    """A draft read by its own names.

    Args:
        embeddings, head: of the target, [VOCAB, D].
        states: transformers' hidden_states of the text's tokens, each [n, D].
    """

    def __init__(self, draft: Draft, embeddings: Tensor, head: Tensor, states: list[Tensor]):
        self.draft, self.config = (
            draft,
            draft.config.get("transformer_layer_config", draft.config) | draft.config,
        )
        self.w = {name.removeprefix("model."): weight.float() for name, weight in draft.weights.items()}
        self.embed = self.w.get("embed_tokens.weight", embeddings)
        self.head = self.w.get("lm_head.weight", head)
        self.read = [states[i] for i in draft.reads]

    def on(self, option: str) -> bool:
        return bool(self.config.get(option) or (self.config.get("eagle_config") or {}).get(option))

    def attended(
        self, prefix: str, queries_of: Tensor, keys_of: Tensor, at: Tensor, places: Tensor
    ) -> Tensor:
        """Attention of rows at positions `at` to rows at `places`, all of them where the draft is not causal."""
        w = lambda name: self.w[f"{prefix}self_attn.{name}.weight"]  # noqa: E731
        heads = lambda x, name: (x @ w(name).T).unflatten(-1, (-1, HEAD_DIM))  # noqa: E731
        q, k, v = heads(queries_of, "q_proj"), heads(keys_of, "k_proj"), heads(keys_of, "v_proj")
        if f"{prefix}self_attn.q_norm.weight" in self.w:
            q, k = rms(q, w("q_norm")), rms(k, w("k_norm"))
        q, k = rotated(q, at, self.draft.rope), rotated(k, places, self.draft.rope)
        k, v = (x.repeat_interleave(HEADS // KV, 1) for x in (k, v))
        scores = torch.einsum("mhd,nhd->hmn", q, k) * HEAD_DIM**-0.5
        back = at[:, None] - places
        hidden = torch.zeros_like(back, dtype=torch.bool)
        if self.draft.causal:
            hidden |= back < 0
        if self.draft.window:
            hidden |= back >= self.draft.window
        scores = scores.masked_fill(hidden, -torch.inf)
        return torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v).flatten(1) @ w("o_proj").T

    def mlp(self, prefix: str, x: Tensor) -> Tensor:
        w = lambda name: self.w[f"{prefix}{name}.weight"]  # noqa: E731
        normed = rms(x, w("post_attention_layernorm"))
        gate = normed @ w("mlp.gate_proj").T
        return x + (gate * gate.sigmoid() * (normed @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T

    def laws(self, tokens: list[int], anchor: int) -> Tensor:
        """Laws [γ, VOCAB] of the places behind the anchor, `tokens[anchor + 1:]` being what was drafted."""
        logits = (
            self.chain(tokens, anchor) if "fc.weight" in self.w and self.eagle else self.block(tokens, anchor)
        )
        if self.draft.ids is None:
            return logits.softmax(-1)
        return torch.zeros(len(logits), VOCAB).index_copy(1, self.draft.ids, logits.softmax(-1))

    @property
    def eagle(self) -> bool:
        return f"{self.draft.first}hidden_norm.weight" in self.w

    def fused(self, parts: list[Tensor]) -> Tensor:
        if self.on("fc_norm"):
            parts = [rms(part, self.w[f"fc_norm.{i}.weight"]) for i, part in enumerate(parts)]
        joined = torch.cat(parts, -1)
        if self.on("norm_before_fc"):
            joined = rms(joined, self.w["input_norm.weight"])
        return joined @ self.w["fc.weight"].T

    def chain(self, tokens: list[int], anchor: int) -> Tensor:
        """EAGLE-3, every step over all places anew, causally."""
        self.draft.causal = True
        below, out = self.fused(self.read)[:anchor], []
        if "mask_hidden" in self.w:
            return self.parallel(tokens, anchor, below)
        for k in range(self.draft.gamma):
            n = anchor + k
            places = torch.arange(n)
            embedded = self.embed[torch.tensor(tokens[1 : n + 1])]
            hidden = below
            last = self.eagle_layers(embedded, hidden, places)[-1:]
            normed = rms(last, self.w["norm.weight"])
            out.append(normed @ self.head.T)
            below = torch.cat((below, normed if self.on("norm_output") else last))
        return torch.cat(out)

    def eagle_layers(self, embedded: Tensor, hidden: Tensor, places: Tensor) -> Tensor:
        for i in range(self.config["num_hidden_layers"]):
            prefix = self.draft.first if i == 0 else f"layers.{i}."
            x = rms(hidden, self.w[f"{prefix}input_layernorm.weight"]) if i else None
            if i == 0:
                normed = rms(hidden, self.w[f"{prefix}hidden_norm.weight"])
                x = torch.cat((rms(embedded, self.w[f"{prefix}input_layernorm.weight"]), normed), -1)
                hidden = normed if self.on("norm_before_residual") else hidden
            hidden = self.mlp(prefix, hidden + self.attended(prefix, x, x, places, places))
        return hidden

    def parallel(self, tokens: list[int], anchor: int, below: Tensor) -> Tensor:
        """P-EAGLE: one causal pass, with mask tokens and one vector for the states behind the anchor's place."""
        gamma = self.draft.gamma
        later = self.fused(list(self.w["mask_hidden"].view(1, -1).split(D, -1))).expand(gamma - 1, -1)
        ids = [*tokens[1 : anchor + 1], *[self.draft.mask] * (gamma - 1)]
        hidden = self.eagle_layers(
            self.embed[torch.tensor(ids)], torch.cat((below, later)), torch.arange(len(ids))
        )
        return rms(hidden, self.w["norm.weight"])[-gamma:] @ self.head.T

    def block(self, tokens: list[int], anchor: int) -> Tensor:
        """DFlash and DSpark: one pass over the anchor and the masks, beside the context's states."""
        gamma = self.draft.gamma
        size = gamma + (not self.draft.from_anchor)
        context = rms(torch.cat(self.read, -1) @ self.w["fc.weight"].T, self.w["hidden_norm.weight"])[:anchor]
        x = self.embed[torch.tensor([tokens[anchor]] + [self.draft.mask] * (size - 1))]
        at, places = torch.arange(anchor, anchor + size), torch.arange(anchor + size)
        for i in range(self.config["num_hidden_layers"]):
            normed = rms(x, self.w[f"layers.{i}.input_layernorm.weight"])
            if f"layers.{i}.attention_conv.base_kernel" in self.w:
                x = self.convolved_layer(f"layers.{i}.", x, context, at, places)
                continue
            keys_of = torch.cat((context, normed))
            x = self.mlp(f"layers.{i}.", x + self.attended(f"layers.{i}.", normed, keys_of, at, places))
        hidden = rms(x, self.w["norm.weight"])[size - gamma :]
        logits = hidden @ self.head.T
        if "candidate_selector.successor_codebook" in self.w:
            return self.selected(logits, hidden, tokens[anchor : anchor + gamma])
        if "markov_head.markov_w1.weight" in self.w:
            latent = self.w["markov_head.markov_w1.weight"][torch.tensor(tokens[anchor : anchor + gamma])]
            if "markov_head.gate_proj.weight" in self.w:
                gate = torch.cat((hidden, latent), -1) @ self.w["markov_head.gate_proj.weight"].T
                latent = (gate + self.w["markov_head.gate_proj.bias"]).sigmoid() * latent
            logits = logits + latent @ self.w["markov_head.markov_w2.weight"].T
        return logits

    def convolved(self, name: str, side: int, x: Tensor, source: Tensor) -> Tensor:
        """Each place [size, d] and the one before it, weighed by what `source` says at the place."""
        base = self.w[f"{name}.base_kernel"]
        said = (source @ self.w[f"{name}.kernel_projection.weight"].T).view(len(x), 2, base.shape[1], -1)
        out = torch.zeros_like(x)
        for t in range(len(x)):
            for back in range(base.shape[1]):
                kernel = base[side, back] + said[t, side, back].repeat_interleave(D // said.shape[-1])
                out[t] += kernel * x[t - back] if t >= back else 0
        return out

    def convolved_layer(self, prefix: str, x: Tensor, context: Tensor, at: Tensor, places: Tensor) -> Tensor:
        """A layer of DFlash 2."""
        w, name = self.w, f"{prefix}attention_conv"
        normed = rms(x, w[f"{prefix}input_layernorm.weight"])
        read = self.convolved(name, 0, normed, normed)
        attended = self.attended(prefix, read, torch.cat((context, read)), at, places)
        x, name = x + self.convolved(name, 1, attended, normed), f"{prefix}mlp_conv"
        normed = rms(x, w[f"{prefix}post_attention_layernorm.weight"])
        read = self.convolved(name, 0, normed, normed)
        gate, up = (read @ w[f"{prefix}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        made = (gate * gate.sigmoid() * up) @ w[f"{prefix}mlp.down_proj.weight"].T
        return x + self.convolved(name, 1, made, normed)

    def selected(self, logits: Tensor, hidden: Tensor, before: list[int]) -> Tensor:
        """Scores among the candidates of each place, −inf elsewhere."""
        part = lambda name: self.w[f"candidate_selector.{name}"]  # noqa: E731
        top = self.config.get("dflash_config", self.config)
        out = torch.full_like(logits, -torch.inf)
        for t, a in enumerate(before):
            latent = part("predecessor_codebook")[a] * (part("hidden_projection.weight") @ hidden[t])
            for b in logits[t].argsort(descending=True)[: top["selector_top_k"]].tolist():
                out[t, b] = logits[t, b] + latent @ part("successor_codebook")[b]
        return out

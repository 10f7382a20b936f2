"""The arithmetic of a decoder layer in plain torch, float32, written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deepspec.export.readers.directory import Directory, Unreadable


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def rotary(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """Rotate x [n, heads, head_dim] at positions [n]; the first half of a head is paired with the second."""
    half = x.shape[-1] // 2
    rates, factor = rope.rates(x.shape[-1])
    angles = positions[:, None].double() * rates
    cos, sin = (part.float()[:, None] * factor for part in (angles.cos(), angles.sin()))
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def attention(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> Tensor:
    """Attend with queries [m, heads, hd] to keys, values [n, kv_heads, hd] that are `seen`; return [m, heads·hd].

    Args:
        seen: bool [m, n]; None: all.
    """
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    scores = torch.einsum("mhd,nhd->hmn", queries, keys) * queries.shape[-1] ** -0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hmn,nhd->mhd", scores.softmax(-1), values).flatten(1)


class Rope:
    """The rotary embedding of a config.json: base and scaling, said by transformers 5's keys or by older ones."""

    def __init__(self, config: dict[str, Any]):
        self.theta = rope_theta(config)
        parameters, older = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
        kinds = {
            found.get("rope_type") or found.get("type") or "default" for found in (parameters, older) if found
        }
        if len(kinds) > 1:
            raise Unreadable(
                f"the scaling of RoPE: rope_parameters and rope_scaling disagree ({sorted(kinds)})"
            )
        self.kind = kinds.pop() if kinds else "default"
        self.parameters = older | parameters | {"rope_theta": self.theta}
        self.longest = int(config.get("max_position_embeddings") or 2048)  # as LlamaConfig

    def rates(self, dim: int) -> tuple[Tensor, float]:
        """Return the rates float64 [dim / 2] and the factor on cosine and sine."""
        if self.kind == "default":
            plain = [self.theta ** (-2 * i / dim) for i in range(dim // 2)]
            return torch.tensor(plain, dtype=torch.float64), 1.0
        config = LlamaConfig(
            hidden_size=dim,
            num_attention_heads=1,
            head_dim=dim,
            max_position_embeddings=self.longest,
            rope_parameters=self.parameters,
        )
        found, factor = ROPE_INIT_FUNCTIONS[self.kind](config, torch.device("cpu"))
        return found.double(), float(factor)


def rope_theta(config: dict[str, Any]) -> float:
    """Return the RoPE base: `rope_parameters` of transformers 5, else `rope_theta`; both must say the same."""
    parameters = config.get("rope_parameters") or {}
    stated = {float(x) for x in (parameters.get("rope_theta"), config.get("rope_theta")) if x is not None}
    if not stated:
        raise Unreadable("config.json says no rope_theta; engines would take bases of their own")
    if len(stated) > 1:
        raise Unreadable(f"RoPE base: rope_theta and rope_parameters disagree ({sorted(stated)})")
    return stated.pop()


def seen_by(at: Tensor, places: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """Return what rows at positions `at` [m] see of those at `places` [n], bool [m, n]; None: everything."""
    back = at[:, None] - places
    seen = torch.ones_like(back, dtype=torch.bool)
    if causal:
        seen &= back >= 0
    if window:
        seen &= back < window
    return None if bool(seen.all()) else seen


class Layer:
    """Weights of one decoder layer below `prefix`, queries and keys normed where the format has such norms."""

    def __init__(self, source: Directory, prefix: str, width: int, normed: bool):
        config = source.config
        self.eps, self.rope = float(source.want("rms_norm_eps")), Rope(config)
        d, hidden = source.want("hidden_size"), source.want("intermediate_size")
        heads = source.want("num_attention_heads")
        kv = config.get("num_key_value_heads") or heads
        self.dim = config.get("head_dim") or d // heads
        take = lambda name, *shape: source.take(f"{prefix}{name}.weight", *shape)  # noqa: E731
        self.q = take("self_attn.q_proj", heads * self.dim, width)
        self.k = take("self_attn.k_proj", kv * self.dim, width)
        self.v = take("self_attn.v_proj", kv * self.dim, width)
        self.o = take("self_attn.o_proj", d, heads * self.dim)
        self.q_norm = take("self_attn.q_norm", self.dim) if normed else None
        self.k_norm = take("self_attn.k_norm", self.dim) if normed else None
        self.input_norm, self.output_norm = take("input_layernorm", d), take("post_attention_layernorm", d)
        self.gate, self.up = take("mlp.gate_proj", hidden, d), take("mlp.up_proj", hidden, d)
        self.down = take("mlp.down_proj", d, hidden)

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotary(self._heads(x, self.q, self.q_norm), positions, self.rope)

    def keys(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotary(self._heads(x, self.k, self.k_norm), positions, self.rope)

    def values(self, x: Tensor) -> Tensor:
        return self._heads(x, self.v, None)

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Apply the output projection and the MLP with their residuals."""
        hidden = residual + attended @ self.o.T
        normed = rms(hidden, self.output_norm, self.eps)
        gate = normed @ self.gate.T
        return hidden + (gate * gate.sigmoid() * (normed @ self.up.T)) @ self.down.T

    def _heads(self, x: Tensor, weight: Tensor, norm: Tensor | None) -> Tensor:
        heads = (x @ weight.T).unflatten(-1, (-1, self.dim))
        return heads if norm is None else rms(heads, norm, self.eps)


class Head:
    """Logits of the draft's columns at their target ids: the file's own head and d2t, or the target's whole head.

    DeepSpec's own directories may have a head of low rank, a product of two matrices.
    """

    def __init__(self, source: Directory, vocab: int, shared: Tensor):
        reduced = (source.config.get("draft_vocab_size") or vocab) < vocab
        self.vocab = vocab
        self.ids: Tensor | None = None
        rank = source.config.get("head_rank")
        self.down = source.take("low_rank_head.down.weight", rank, shared.shape[1]) if rank else None
        own = source.optional("low_rank_head.up.weight" if rank else "lm_head.weight")
        if reduced and own is None:
            raise Unreadable("lm_head.weight is missing: a reduced vocabulary cannot share the target's head")
        if reduced and not source.has("d2t"):
            raise Unreadable("d2t is missing: the columns of a reduced vocabulary have no target ids")
        if reduced:
            offsets = source.take("d2t", source.config["draft_vocab_size"])
            self.ids = torch.arange(len(offsets)) + offsets
            if (
                int(self.ids.max()) >= vocab
                or int(self.ids.min()) < 0
                or len(self.ids.unique()) < len(self.ids)
            ):
                raise Unreadable(_misread(offsets, vocab))
            if (known := source.optional("t2d", vocab)) is not None and not bool(known[self.ids].all()):
                raise Unreadable("t2d does not mark the tokens that d2t leads to")
        self.weight = shared if own is None else own
        if self.weight.shape[0] != (vocab if self.ids is None else len(self.ids)):
            raise Unreadable(f"lm_head.weight has {self.weight.shape[0]} rows for another number of columns")

    def logits(self, hidden: Tensor, correction: Tensor | float = 0.0) -> Tensor:
        """Return logits [..., vocab] of hidden [..., d]."""
        read = hidden if self.down is None else hidden @ self.down.T
        columns = read @ self.weight.T + correction
        if self.ids is None:
            return columns
        return columns.new_full((*columns.shape[:-1], self.vocab), -torch.inf).index_copy(
            -1, self.ids, columns
        )


def _misread(offsets: Tensor, vocab: int) -> str:
    if bool((offsets[1:] > offsets[:-1]).all()) and int(offsets.max()) < vocab:
        return "d2t holds target ids; engines read it as offsets (target id = column + d2t)"
    return "d2t leads to tokens that the target does not have, or twice to the same one"

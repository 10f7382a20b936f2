"""The decoder layer of EAGLE's drafts, and how a step that comes later attends to its own entries.

The first layer reads [norm(embed(x_{i+1})); norm(g_i)], 2d wide; further layers read the state alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from deepspec.drafters.network import MLP, RMSNorm
from deepspec.target.attention import attend
from deepspec.target.fused import rotate


class EagleSizes(Protocol):
    """What the layers read of a configuration."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def norm_before_residual(self) -> bool: ...
    @property
    def sliding_window(self) -> int | None: ...


class Attention(nn.Module):
    """The first layer's reads [norm(embedding); norm(hidden)], 2d wide.

    The attributes are those of transformers' own (`FusedLayer`).
    """

    def __init__(self, config: EagleSizes, index: int):
        super().__init__()
        self.layer_idx, self.sliding_window = index, config.sliding_window
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        width = (1 if index else 2) * config.hidden_size
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, q, bias=False)
        self.k_proj = nn.Linear(width, kv, bias=False)
        self.v_proj = nn.Linear(width, kv, bias=False)
        self.o_proj = nn.Linear(q, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x [b, n, 2d] → [b, heads, n, head_dim], rotated."""
        return self._rotated(self.q_proj(x), "q_norm", rope)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """x [b, n, 2d] → rotated keys and values, each [b, kv_heads, n, head_dim]."""
        values = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return self._rotated(self.k_proj(x), "k_norm", rope), values

    def _rotated(self, x: Tensor, norm: str, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x.unflatten(-1, (-1, self.head_dim))
        if hasattr(self, norm):
            x = getattr(self, norm)(x)
        return rotate(x, *rope).transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, config: EagleSizes, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(
            config.hidden_size, config.rms_norm_eps
        )  # in the first of the embeddings
        self.hidden_norm = None if index else RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.normed_residual = config.norm_before_residual and not index
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def joined(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """[norm(embedding); norm(hidden)] [..., 2d]; of a further layer norm(hidden) [..., d]."""
        if self.hidden_norm is None:
            return self.input_layernorm(hidden)
        return torch.cat((self.input_layernorm(embedded), self.hidden_norm(hidden)), -1)

    def residual(self, hidden: Tensor) -> Tensor:
        """Return what the attention's output is added to."""
        return self.hidden_norm(hidden) if self.normed_residual and self.hidden_norm is not None else hidden

    def finish(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """Output projection, MLP and their residuals; attended [b, n, heads, head_dim]."""
        hidden = hidden + self.self_attn.o_proj(attended.flatten(2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def rows(x: Tensor, index: Tensor) -> Tensor:
    """x [batch, n, d], index [batch, m] → [batch, m, d]"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def attend_with_own(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, own: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Attention of each query to the shared keys under the mask, and to its own entries of later steps.

    queries [b, heads, m, d]; keys, values [b, kv_heads, n, d]; mask [b, 1, m, n] additive; own entries: keys and
    values [b, kv_heads, m, d] each. Returns [b, m, heads, d].
    """
    groups = queries.shape[1] // keys.shape[1]
    if not own:
        return attend(queries, keys, values, mask.repeat(1, 1, groups, 1), None)
    grouped = queries.unflatten(1, (keys.shape[1], groups))  # [b, kv_heads, groups, m, d]
    scale = queries.shape[-1] ** -0.5
    shared = grouped @ keys[:, :, None].transpose(-1, -2) * scale + mask[:, :, None]
    mine = torch.stack([(grouped * key[:, :, None]).sum(-1) for key, _ in own], -1) * scale
    weights = torch.cat((shared, mine), -1).float().softmax(-1).to(values.dtype)
    out = weights[..., : keys.shape[2]] @ values[:, :, None]
    for i, (_, value) in enumerate(own):
        out = out + weights[..., keys.shape[2] + i, None] * value[:, :, None]
    return out.flatten(1, 2).transpose(1, 2)

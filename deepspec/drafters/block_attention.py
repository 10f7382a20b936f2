"""Attention of blocks over a context and over themselves, for training on a CPU: each part by itself.

Laid side by side, the keys of all blocks of a sequence are nearly as many as its tokens, and a place sees those of one
block. Here torch's kernel attends to the context alone, a block's own few keys are a small product, and both are joined
by the sums that their softmax is divided by. With the joined output and sum, each part's gradient is that of its own
scores (as in ring attention, arXiv 2310.01889, where a part is another device's).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_attend_to_all = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_gradients_of_all = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class BlockMasks(NamedTuple):
    """Additive masks: of a context, [b, 1, blocks·size, n], and of the own block, [size, size]."""

    context: Tensor
    own: Tensor


def attend_in_blocks(
    queries: Tensor,
    context: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    masks: BlockMasks,
    scale: float,
) -> Tensor:
    """Attend to a context and to the own block, on a CPU; under autocast in its dtype.

    Args:
        queries: [b, heads, blocks·size, d].
        context: keys and values [b, kv_heads, n, d].
        own: keys and values [b, kv_heads, blocks·size, d].

    Returns:
        [b, blocks·size, heads, d]
    """
    batch, heads, m, dim = queries.shape
    groups = heads // own[0].shape[1]
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else queries.dtype
    read = (x.to(dtype) for x in (queries.reshape(batch, -1, groups * m, dim), *context, *own))
    mask = masks.context.repeat(1, 1, groups, 1)
    if dtype == torch.float16:  # where what is next to −∞ would be −∞, and a row that hides all has no number
        mask.clamp_(min=torch.finfo(dtype).min / 2)
    out = _InBlocks.apply(*read, mask.to(dtype), masks.own, scale)
    return out.view(batch, heads, m, dim).transpose(1, 2)


class _InBlocks(torch.autograd.Function):
    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, queries: Tensor, *rest: Any) -> Tensor:
        keys, values, own_keys, own_values, mask, own_mask, scale = rest
        out, sums = _attend_to_all(queries, keys, values, 0.0, False, attn_mask=mask, scale=scale)
        size = len(own_mask)
        blocks = own_keys.shape[2] // size
        scores = (
            _by_block(queries, blocks, size) @ _by_block(own_keys, blocks, size).transpose(-1, -2) * scale
        )
        scores = scores + own_mask.repeat(scores.shape[3] // size, 1)
        own_sums = _by_token(scores.logsumexp(-1, keepdim=True), queries, size)
        both = torch.logaddexp(sums, own_sums[..., 0])
        shares = (scores - _by_block(both[..., None], blocks, size)).exp()
        mixed = _by_token(shares @ _by_block(own_values, blocks, size), queries, size)
        joined = (out * (sums - both).exp()[..., None] + mixed).to(queries.dtype)
        ctx.save_for_backward(queries, keys, values, own_keys, own_values, mask, joined, both, shares)
        ctx.scale = scale
        return joined

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slope = gradients[0].contiguous()
        queries, keys, values, own_keys, own_values, mask, joined, both, shares = ctx.saved_tensors
        given = slope, queries, keys, values, joined, both
        options = {"attn_mask": mask, "scale": ctx.scale}
        by_queries, by_keys, by_values = _gradients_of_all(*given, 0.0, False, **options)
        blocks, size = shares.shape[2], shares.shape[4]
        rows = _by_block(slope, blocks, size)
        offsets = _by_block((_precise(slope) * _precise(joined)).sum(-1, keepdim=True), blocks, size)
        by_scores = (
            shares * (rows @ _by_block(own_values, blocks, size).transpose(-1, -2) - offsets) * ctx.scale
        )
        by_queries = by_queries + _by_token(by_scores @ _by_block(own_keys, blocks, size), queries, size)
        by_own_keys = by_scores.transpose(-1, -2) @ _by_block(queries, blocks, size)
        by_own_values = shares.transpose(-1, -2) @ rows
        own = (x.flatten(2, 3).to(own_keys.dtype) for x in (by_own_keys, by_own_values))
        return by_queries.to(queries.dtype), by_keys, by_values, *own, None, None, None


def _by_block(x: Tensor, blocks: int, size: int) -> Tensor:
    """[b, kv_heads, groups·blocks·size, ·] → [b, kv_heads, blocks, groups·size, ·], in float32 or more"""
    return _precise(x).unflatten(2, (-1, blocks, size)).transpose(2, 3).flatten(3, 4)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_token(x: Tensor, queries: Tensor, size: int) -> Tensor:
    """Undo `_by_block` for what has as many rows as the queries."""
    return x.unflatten(3, (-1, size)).transpose(2, 3).reshape(*queries.shape[:3], -1)

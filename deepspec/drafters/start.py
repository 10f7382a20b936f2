"""What a network begins with: its layers at random or as the target's last ones, and its draft vocabulary.

A drafter that is trained for minutes spends them on learning to read the target's features. As the target's last
layers, on the deepest feature as `fc` gives it, it reads them from the first step (docs/lab-notes.md has what that is
worth). The file it ends up in is the same: nothing but the weights tells how a draft began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepspec.drafters.network import Network, NormalisedLinear
from deepspec.errors import DeepSpecError
from deepspec.target.ends import Ends
from deepspec.target.fused import FusedLayer, Int4Linear, LlamaLayer, LlamaNorm, PackedLinear, qk_norms

Way = Literal["auto", "target", "random"]
WAYS: tuple[str, ...] = get_args(Way)


def resolve_start(start: str, target: Ends, layers: int, qk_norm: bool = True) -> Literal["target", "random"]:
    """Return where a drafter of so many layers begins.

    Under `auto` a draft takes the target's layers whole or not at all; under `target` it leaves out what it has no
    place for.

    Args:
        qk_norm: its layers have norms of queries and keys.

    Raises:
        DeepSpecError: `start` is `target`, whose layers are not Llama-shaped, or too few.
    """
    if start == "random":
        return "random"
    try:
        lent = target.last_layers(layers)
    except DeepSpecError:
        if start == "target":
            raise
        return "random"
    whole = all(_without_biases(layer) and (qk_norm or layer.qk_norms is None) for layer in lent)
    return "target" if whole or start == "target" else "random"


def _without_biases(layer: FusedLayer) -> bool:
    return all(part.bias is None for part in (layer.qkv, layer.out, layer.gate_up, layer.down))


@torch.no_grad()
def init_from_target(
    layers: Sequence[LlamaLayer], norm: LlamaNorm, fc: NormalisedLinear, target: Ends, channel_std: Tensor
) -> None:
    """Initialise `layers` as the target's last ones, the norm behind them as its own, `fc` as the deepest feature.

    That feature, the last one listed, keeps its own size: hundreds of a learning rate's steps do not drown it, where
    they would at size 1. The norms before the target's projections are folded into them, since the context comes to the
    draft's keys and values through another norm. A layer that reads more than the state (EAGLE-3's) keeps random
    weights for the rest.

    Args:
        channel_std: standard deviation of each channel of the features, [n·d].

    Raises:
        DeepSpecError: the target's layers are not Llama-shaped, or too few.
    """
    for mine, theirs in zip(layers, target.last_layers(len(layers)), strict=True):
        _begin(mine, theirs)
    norm.weight.copy_(target.last_norm)
    fc.set_scale(channel_std)
    fc.weight.zero_()
    fc.weight[:, -fc.out_features :] = torch.diag(fc.scale[-fc.out_features :])


def _begin(mine: LlamaLayer, theirs: FusedLayer) -> None:
    attention, mlp = mine.self_attn, mine.mlp
    before, between = (norm.weight.float() for norm in theirs.norms)
    heads, kv_heads = theirs.heads * theirs.head_dim, theirs.kv_heads * theirs.head_dim
    qkv = (_dense(theirs.qkv).float() * before).split((heads, kv_heads, kv_heads))
    for into, weight in zip((attention.q_proj, attention.k_proj, attention.v_proj), qkv, strict=True):
        into.weight[:, -weight.shape[1] :].copy_(weight)
    attention.o_proj.weight.copy_(_dense(theirs.out))
    gate, up = (_dense(theirs.gate_up).float() * between).chunk(2)
    mlp.gate_proj.weight.copy_(gate)
    mlp.up_proj.weight.copy_(up)
    mlp.down_proj.weight.copy_(_dense(theirs.down))
    if mine_norms := qk_norms(attention):
        norms = theirs.qk_norms or (None, None)
        for norm, own, weight in zip(mine_norms, norms, qkv[:2], strict=True):
            # Without such norms in the target: the size that its queries and keys have of an input of random signs.
            size = weight.square().sum(1).mean().sqrt()
            norm.weight.copy_(own.weight if own else size.expand_as(norm.weight))


@torch.no_grad()
def match_head(network: Network, target: Ends) -> None:
    """Let a draft that shares a head with a scale (Granite, Cohere, Falcon-H1) begin with logits of the target's size.

    The scale goes into the norm before the head, which every format has: a bias or a soft cap has no such place, nor
    has Medusa, whose heads have no norm.
    """
    norm = getattr(network, "norm", None)
    if target.head_transform.scale != 1.0 and norm is not None:
        norm.weight.mul_(target.head_transform.scale)


def _dense(part: PackedLinear | Int4Linear) -> Tensor:
    if not isinstance(part, PackedLinear):
        raise DeepSpecError("a draft cannot begin as layers in 4 bits; use `start: random`")
    return part.dense


def draft_vocabulary(
    counts: npt.NDArray[np.int64], size: int, always: frozenset[int] = frozenset()
) -> Tensor:
    """Return the `size` most frequent tokens as ascending target ids, int64 [size]; rarer ids fill up from the lowest.

    Args:
        counts: how often each token is to be learnt, [vocab].
        always: tokens that come before all others.
    """
    rare = np.ones(len(counts), bool)
    rare[[token for token in always if token < len(counts)]] = False
    ranked = np.lexsort((-counts, rare))  # equal ones stay in the order of their ids
    return torch.from_numpy(np.sort(ranked[:size]))


def channel_std(rows: Sequence[Mapping[int | str, Tensor]], layers: Sequence[int]) -> Tensor:
    """Return the standard deviation of each channel of the concatenated layers over all tokens, float32 [layers·d].

    Args:
        rows: of each sequence its features, layer → [tokens, d].
    """
    of_layers = (torch.cat([row[layer].float() for row in rows]).std(0) for layer in layers)
    return torch.cat(list(of_layers))

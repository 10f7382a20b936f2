"""SpecForge's side of `benchmarks/training.py`: its online models on our weights and inputs, in sdpa mode on a CPU.

Weights have the same published names on both sides; embeddings and head are the target's, frozen. Only what cannot run
without a GPU is replaced: EAGLE-3's loss kernel, by the reference that SpecForge gives beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config

from benchmarks.training_steps import TTT_DECAY, Step

SHARED = ("embed_tokens.weight", "lm_head.weight")


def known_sizes(sizes: dict[str, Any]) -> dict[str, Any]:
    """What transformers' configurations have in common with ours."""
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "vocab_size",
        "max_position_embeddings",
        "rope_parameters",
    )
    return {name: sizes[name] for name in names if name in sizes}


def load_weights(draft: nn.Module, tensors: dict[str, Tensor], but: tuple[str, ...]) -> None:
    """All of a draft's weights, but for what it shares or counts.

    Raises:
        SystemExit: it has weights that ours lacks.
    """
    wanted = {name for name in draft.state_dict() if name not in but}
    if missing := wanted - set(tensors):
        raise SystemExit(f"SpecForge's draft has weights that ours lacks: {sorted(missing)[:3]}")
    draft.load_state_dict({name: tensors[name] for name in wanted}, strict=False)


def blocks_model(
    algorithm: str, sizes: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """`OnlineDSparkModel` or `OnlineDFlashModel` at our anchors."""
    from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel, OnlineDSparkModel
    from specforge.modeling.draft import DFlashDraftModel, DSparkDraftModel

    config = Qwen3Config(**known_sizes(sizes), attn_implementation="sdpa")
    config.block_size, config.num_target_layers = sizes["block_size"], sizes["num_target_layers"]
    config.dflash_config = {
        "target_layer_ids": sizes["target_layer_ids"],
        "mask_token_id": sizes["mask_token_id"],
        "markov_rank": sizes["markov_rank"],
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    online, network = {
        "dspark": (OnlineDSparkModel, DSparkDraftModel),
        "dflash": (OnlineDFlashModel, DFlashDraftModel),
    }[algorithm]
    draft = network(config)
    load_weights(draft, tensors, SHARED)
    embed = nn.Embedding.from_pretrained(tensors["embed_tokens.weight"].to(dtype), freeze=True)
    head = nn.Linear(sizes["hidden_size"], sizes["vocab_size"], bias=False).requires_grad_(False)
    head.weight.data = tensors["lm_head.weight"]
    model = online(
        draft,
        head,
        embed,
        mask_token_id=sizes["mask_token_id"],
        block_size=sizes["block_size"],
        attention_backend="sdpa",
        num_anchors=tensors["anchors"].shape[1],
        loss_decay_gamma=4.0,
    ).to(dtype)
    anchors = tensors["anchors"].sort(-1).values
    model._sample_anchor_positions = lambda *_: (anchors, torch.ones_like(anchors, dtype=torch.bool))
    return model


def dspark_step(sizes: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, Step]:
    model = blocks_model("dspark", sizes, tensors, dtype)
    mask = torch.ones_like(tensors["tokens"])
    features, last = tensors["features"].to(dtype), tensors["last_hidden"].to(dtype)
    return model, lambda: model(tensors["tokens"], features, mask, last)[0]


def dflash_step(sizes: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, Step]:
    model = blocks_model("dflash", sizes, tensors, dtype)
    mask, features = torch.ones_like(tensors["tokens"]), tensors["features"].to(dtype)
    return model, lambda: model(tensors["tokens"], features, mask)[0]


def eagle3_step(sizes: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, Step]:
    """Its places are one before our anchors: tokens, laws and mask are moved by one, as its data loader does."""
    with triton_stub():
        from specforge.algorithms.eagle3 import model as eagle3
        from specforge.core.loss import _compute_loss
    from specforge.modeling.draft import LlamaForCausalLMEagle3
    from specforge.utils import padding

    class ReferenceLoss:
        apply = staticmethod(_compute_loss)

    eagle3.LogSoftmaxLoss = ReferenceLoss
    own = {name: sizes[name] for name in ("draft_vocab_size", "target_hidden_size")}
    draft = LlamaForCausalLMEagle3(LlamaConfig(**known_sizes(sizes), **own))
    load_weights(draft, tensors, ("t2d", "d2t"))
    draft.embed_tokens.requires_grad_(False)
    draft.lm_head.requires_grad_(False)
    gamma = sizes["block_size"]
    model = eagle3.OnlineEagle3Model(draft, length=gamma, attention_backend="sdpa").to(dtype)
    tokens = padding(tensors["tokens"], left=False)
    features, last = tensors["features"].to(dtype), tensors["last_hidden"].to(dtype)
    mask = torch.ones(*tokens.shape, 1)
    mask[:, -1] = 0  # the last token has no successor

    def step() -> Tensor:
        laws = padding(F.linear(last, draft.lm_head.weight), left=False)
        losses = model(tokens, torch.ones_like(tokens), laws, mask, features)[0]
        return sum(TTT_DECAY**k * loss for k, loss in enumerate(losses))

    return model, step


STEPS = {"dspark": dspark_step, "dflash": dflash_step, "eagle3": eagle3_step}


@contextmanager
def triton_stub() -> Iterator[None]:
    """Let SpecForge be imported where there is no Triton; its kernels are never called, and torch does not see it."""
    torch.compile(lambda: None)  # imports a compiler that looks for Triton itself, and must find the truth
    stub, language = ModuleType("triton"), ModuleType("triton.language")
    stub.jit, stub.language, language.constexpr = lambda function: function, language, int
    missing = {"triton": stub, "triton.language": language} if find_spec("triton") is None else {}
    sys.modules |= missing
    yield
    for name in missing:
        del sys.modules[name]

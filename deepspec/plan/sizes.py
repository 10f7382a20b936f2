"""How large a target and its drafts are: counted on models without memory for their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from deepspec.drafters.params import LMParams
from deepspec.drafters.registry import algorithms
from deepspec.drafters.start import WAYS
from deepspec.errors import DeepSpecError
from deepspec.target.checkpoint import skeleton
from deepspec.target.ends import Ends
from deepspec.target.head import HeadTransform
from deepspec.target.source import decoder_layers, from_pretrained, text_decoder

_EXPERTS = ".experts."  # in the names of a mixture's weights


@dataclass(frozen=True)
class TargetSize:
    """Numbers of a target.

    Attributes:
        parameters: all of them.
        active: those that one token goes through, the embeddings' one row left out.
        ends: of embeddings and head.
        mixture: of all experts.
        experts, chosen: of a layer, and those of them that a token goes to; 1 of 1 without.
        kv: numbers that a token leaves in the KV cache.
        bytes: of one number, as the target is kept.
    """

    name: str
    parameters: int
    active: int
    ends: int
    layers: int
    hidden: int
    vocab: int
    mixture: int
    experts: int
    chosen: int
    kv: int
    bytes: float

    @property
    def weights(self) -> float:
        """Return the bytes of its weights."""
        return self.parameters * self.bytes

    def read(self, tokens: int) -> float:
        """Return the bytes of weights that a pass over so many new tokens reads; of a mixture those that are hit."""
        share = self.chosen / self.experts
        hit = 1 - (1 - share) ** tokens
        return (self.active + self.mixture * (hit - share)) * self.bytes


@dataclass(frozen=True)
class DraftSize:
    """Numbers of a draft in training.

    Attributes:
        trained: parameters with gradients.
        multiplied: those of them that every token and place multiplies: neither looked up (`Network.looked_up`) nor a
            head of low rank.
        columns: of its vocabulary.
        block: γ.
        features: layers whose states it reads, the post-norm one left out.
        head_rank: of a head of its own that is trained; None: the target's.
    """

    trained: int
    multiplied: int
    columns: int
    block: int
    features: int
    head_rank: int | None = None


def measure_target(name: str, config: Any, dtype: torch.dtype) -> TargetSize:
    """Count a target's parameters.

    Args:
        config: transformers' configuration.
        dtype: in which it is kept.

    Raises:
        DeepSpecError: no model can be made of the configuration.
    """
    model = skeleton(name, config)
    text = model.config.get_text_config()
    # Tied weights are one parameter, which `parameters` hands out once.
    total = sum(p.numel() for p in model.parameters())
    mixture = sum(p.numel() for n, p in model.named_parameters() if _EXPERTS in n)
    into, out = (
        part.get_parameter("weight") for part in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    tied = out is into
    experts, chosen = _experts(text) if mixture else (1, 1)
    unread = 0 if tied else into.numel()
    return TargetSize(
        name,
        total,
        round(total - unread - mixture * (1 - chosen / experts)),
        out.numel() + unread,
        text.num_hidden_layers,
        text.hidden_size,
        text.vocab_size,
        mixture,
        experts,
        chosen,
        _kv_numbers(text),
        dtype.itemsize,
    )


def measure_draft(section: Any, config: Any, target: TargetSize) -> DraftSize | None:
    """Count a draft's parameters; None for a drafter that is not trained, or is used as it is.

    Args:
        section: of the drafter, in params.yaml.
        config: transformers' configuration of the target.

    Raises:
        DeepSpecError: a drafter that the target cannot have.
    """
    algorithm = algorithms()[section.type]
    if algorithm.network is None:
        return None
    if not getattr(section, "finetune", True):
        return None
    if algorithm.standalone:
        return _standalone(section, target)
    if getattr(section, "start", None) in WAYS:
        section = section.model_copy(update={"start": "random"})
    with torch.device("meta"):
        network = algorithm.network(section, _Sketch(target.name, config))
    sizes: Any = network.config
    block: Any = getattr(sizes, "block_size", None) or getattr(sizes, "medusa_num_heads", 1)
    layers = [layer for layer in sizes.target_layer_ids if layer >= -1]
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    looked_up = sum(p.numel() for p in network.looked_up() if p.requires_grad)
    factors = network.low_rank_head
    head = 0 if factors is None else factors.up.weight.numel()
    rank = None if factors is None else factors.up.in_features
    return DraftSize(trained, trained - looked_up - head, sizes.draft_vocab_size, block, len(layers), rank)


def _standalone(section: LMParams, target: TargetSize) -> DraftSize:
    """Count a draft that is a model of its own."""
    body = target.parameters - target.ends
    if section.source is not None:
        config = from_pretrained(AutoConfig, section.source)
        trained = sum(p.numel() for p in skeleton(section.source, config).parameters())
    elif section.hidden_size is not None:
        share = section.hidden_size / target.hidden
        trained = round(body / target.layers * section.layers * share**2 + target.ends * share)
    else:
        trained = round(body / target.layers * len(section.from_layers or []))
    return DraftSize(trained, trained, target.vocab, section.block_size, 0)


class _Sketch(Ends):
    """A target of which nothing but the configuration is there."""

    def __init__(self, name: str, config: Any):
        self._model = skeleton(name, config)
        text = self._model.config.get_text_config()
        super().__init__(text, self._model.generation_config, None, name)  # type: ignore[arg-type]  # no words are read
        self.num_layers = len(decoder_layers(text_decoder(self._model), text.num_hidden_layers))
        self.dtype, self.device = torch.float32, torch.device("meta")
        self.embeddings = self._model.get_input_embeddings().get_parameter("weight").detach()
        self.head_weight = self._model.get_output_embeddings().get_parameter("weight").detach()
        self.head_transform = HeadTransform()

    def _last(self, count: int) -> Sequence[nn.Module]:
        return []

    def normed(self, hidden: Tensor) -> Tensor:
        raise DeepSpecError(f"{self.source}: a configuration has no weights")

    @property
    def last_norm(self) -> Tensor:
        raise DeepSpecError(f"{self.source}: a configuration has no weights")


def _experts(config: Any) -> tuple[int, int]:
    """Return how many experts a layer has and how many a token goes to."""
    counts = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
    choices = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    experts = next((n for n in (getattr(config, name, None) for name in counts) if n), None)
    chosen = next((n for n in (getattr(config, name, None) for name in choices) if n), None)
    return (experts, chosen) if experts and chosen else (1, 1)


def _kv_numbers(config: Any) -> int:
    """Return how many numbers a token leaves in the cache of all layers."""
    layers = config.num_hidden_layers
    if latent := getattr(config, "kv_lora_rank", None):
        return layers * (latent + config.qk_rope_head_dim)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return layers * 2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim

"""What the networks of trained drafters share: norms, MLP, rotary embedding, and the target's embeddings and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from functools import reduce
from operator import add
from typing import Any, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepspec.decoding.tree import Vocabulary
from deepspec.drafters.low_rank import LowRankHead
from deepspec.drafters.rope import Rope, followed_rope
from deepspec.target.ends import Ends
from deepspec.target.fused import PackedLinear
from deepspec.target.head import PLAIN
from deepspec.target.model import Target
from deepspec.target.native.layer import Norm
from deepspec.target.native.norm import can_norm, learnt_norm

SHARED = frozenset({"embed_tokens.weight", "lm_head.weight"})  # absent from a draft's file: the target's own


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    drafts = False  # in our kernels, where they are

    def forward(self, x: Tensor) -> Tensor:
        norm = Norm(self.weight.to(x.dtype), self.variance_epsilon)
        if self.drafts:
            return norm(x)
        return learnt_norm(x, norm.weight, norm.eps) if can_norm(x, norm.weight) else norm.by_torch(x)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Any):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class NormalisedLinear(nn.Linear):
    """Linear layer over inputs normalised per channel: y = W (x / scale) + b.

    `scale` is folded into the weight when it is saved: a draft's file has W diag(1 / scale).

    A few channels of a target's features are hundreds of times as loud as the median one (massive activations, arXiv
    2402.17762); under one learning rate for all, the others are hardly heard. `scale` is 1 until `set_scale` is called.
    """

    scale: Tensor  # [in]

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)
        self.register_buffer("scale", torch.ones(in_features), persistent=False)

    def set_scale(self, channel_std: Tensor) -> None:
        """Divide by channel_std [in] from now on."""
        self.scale.copy_(channel_std.clamp_min(1e-6))

    def folded_weight(self) -> Tensor:
        """Return the weight [out, in] over inputs as they come."""
        return self.weight / self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.folded_weight(), self.bias)


class Outputs(NamedTuple):
    """What a loss reads: the draft's logits are Σ x Wᵀ over `factors`, which are never multiplied out at once.

    With `candidates` a draft is made of so many tokens at each place, those of the largest first product.
    """

    factors: list[tuple[Tensor, Tensor]]  # x [..., m], W [draft_vocab, m]
    confidence: Tensor | None = None  # [...], logits of the chance that a token drawn at k survives
    candidates: int | None = None

    def logits(self) -> Tensor:
        """Return the logits [..., draft_vocab], float32, −inf for what is no candidate."""
        products = [x.float() @ w.float().T for x, w in self.factors]
        total = reduce(add, products)
        if self.candidates is None:
            return total
        return total.masked_fill(~largest(products[0], self.candidates), -torch.inf)


def largest(logits: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` largest logits of each row, bool like logits [..., columns]."""
    places = logits.topk(min(count, logits.shape[-1]), -1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, places, True)


class Given(Protocol):
    """Weights that a network begins with; `deepspec.drafters.origin` has them."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def record(self) -> dict[str, Any]: ...
    def give(self, network: Network) -> None: ...


class Network(nn.Module):
    """A drafter's network with the target's embeddings and head, frozen.

    `lm_head` keeps only the draft vocabulary's rows, whose target ids are `draft_ids`.

    Attributes:
        own_head: a head that is not the target's, of a draft that was published with one; frozen too. `lm_head` stays
            the target's, whose law a loss needs.
        low_rank_head: a head of low rank, trained, in the place of either.
        own_embeddings: whether `embed_tokens` are such.
        origin: the draft that it begins as (`start: <directory>`).
    """

    draft_ids: Tensor  # [draft vocab]

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("draft_ids", torch.arange(config.draft_vocab_size))
        self.own_head: nn.Linear | None = None
        self.low_rank_head: LowRankHead | None = None
        self.own_embeddings = False

    target_transform = PLAIN  # what the target makes of its head's product, for the draft's columns
    maps_columns = True  # a reduced vocabulary is written down (d2t)
    start: str | None = None  # `target`, `random` or a directory, where `deepspec.drafters.start` has a say
    origin: Given | None = None
    norms_features = False  # whether it norms the target's features before it joins them
    confident = False  # whether it says how sure it is (`Outputs.confidence`)
    checkpointing = False  # activations of blocks are computed again in the backward pass

    def run(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Call a part of the network, under `checkpointing` without keeping what it computes."""
        if self.checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def blocks(self) -> list[nn.Module]:
        """Its layers, which FSDP2 shards one by one; only those that are called as modules."""
        return []

    def looked_up(self) -> list[Tensor]:
        """Its weights of which a pass reads some rows and multiplies none."""
        return [module.weight for module in self.modules() if isinstance(module, nn.Embedding)]

    def for_drafting(self, target: Target) -> Self:
        """Take it to a target's device and precision, for inference alone."""
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.drafts = True
        return self.to(target.device, target.dtype)

    def outputs(self, hidden: Tensor, previous: Tensor) -> Outputs:
        """For hidden states [..., γ, d] of blocks and the tokens before each, int64 [..., γ]."""
        return Outputs([self.head_factor(hidden)])

    @property
    def head(self) -> Tensor:
        """Return the head [draft_vocab, d] that makes its logits, where none of low rank does."""
        return (self.own_head or self.lm_head).weight

    def head_factor(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return x [..., m] and W [draft_vocab, m] of states [..., d]: the head's logits are x Wᵀ."""
        if self.low_rank_head is None:
            return hidden, self.head
        return self.low_rank_head.down(hidden), self.low_rank_head.up.weight

    def packed_head(self) -> nn.Module:
        """Return the head for inference: states [..., d] → logits [..., draft_vocab]."""
        if self.low_rank_head is None:
            return PackedLinear(self.head)
        factors = self.low_rank_head.down, self.low_rank_head.up
        return nn.Sequential(*(PackedLinear(factor.weight) for factor in factors))

    def begin_low_rank(self, states: Tensor, counts: Tensor) -> None:
        """Begin a head of low rank as what comes nearest to the head that it is in the place of.

        Args:
            states, counts: see `LowRankHead.begin`.
        """
        if self.low_rank_head is not None:
            self.low_rank_head.begin(self.head, states, counts)
            self.own_head = None

    def take_head(self, weight: Tensor) -> None:
        """Take a head of its own [draft_vocab, d], unless it is the target's but for rounding."""
        if torch.equal(weight.bfloat16(), self.lm_head.weight.bfloat16().cpu()):
            return
        own = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=self.lm_head.weight.device)
        own.weight.data.copy_(weight)
        self.own_head = own.requires_grad_(False)

    def take_embeddings(self, weight: Tensor) -> None:
        """Take embeddings of its own [vocab, d], unless they are the target's but for rounding."""
        if not torch.equal(weight.bfloat16(), self.embed_tokens.weight.bfloat16().cpu()):
            self.embed_tokens.weight.data.copy_(weight)
            self.own_embeddings = True

    def stored_name(self, name: str) -> str:
        """Return a weight's name in a draft's file."""
        return name

    def stored(self, written_out: bool = False) -> dict[str, Tensor]:
        """Return the weights of a draft's file, by their names there.

        Embeddings, and a head over the whole vocabulary, are left to the target unless they are to be written out, as
        an engine wants that does not share them.
        """
        left_out = {"draft_ids"}
        if not written_out:
            reduced = self.config.draft_vocab_size < self.config.vocab_size
            left_out |= SHARED - {"lm_head.weight"} if reduced else SHARED
        if self.own_embeddings:
            left_out.discard("embed_tokens.weight")
        state = self.state_dict()
        if self.low_rank_head is not None:
            left_out.add("lm_head.weight")
        if self.own_head is not None:
            left_out.discard("lm_head.weight")
            state["lm_head.weight"] = state.pop("own_head.weight")
        for name, module in self.named_modules():
            if isinstance(module, NormalisedLinear):
                state[f"{name}.weight"] = module.folded_weight()
        return {self.stored_name(name): tensor for name, tensor in state.items() if name not in left_out}

    def description(self) -> dict[str, Any]:
        """Its `config.json`."""
        return self.config.to_dict()

    def initialise(self) -> None:
        """Draw normal weights of deviation 0.02; to be called at the end of __init__."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    def init_from_target(self, target: Ends, channel_std: Tensor) -> None:
        """Begin as `start: target` says. channel_std: standard deviation of each channel of the features, [n·d]."""
        raise NotImplementedError

    def take_buffers(self, other: Network) -> None:
        """Take what a network of the same sizes has besides weights."""
        for mine, theirs in zip(self.buffers(), other.buffers(), strict=True):
            mine.copy_(theirs)

    def share(self, target: Ends, draft_ids: Tensor) -> None:
        """Take embeddings and head from the target. draft_ids int64 [draft_vocab], ascending target ids."""
        self.draft_ids.copy_(draft_ids)
        self.embed_tokens.weight.data = target.embeddings.to(torch.float32).clone()
        rows = target.head_weight[draft_ids.to(target.head_weight.device)]
        self.lm_head.weight.data = rows.to(torch.float32)
        self.target_transform = target.head_transform.rows(draft_ids)
        if self.origin is not None:
            self.origin.give(self)

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Operands of `rotate` for positions [b, n]: each [b, n, 1, head_dim]."""
        return Rope.of(self.config).operands(positions, dtype)

    def vocabulary(self) -> Vocabulary:
        """Return what the columns of the logits mean."""
        ids = self.draft_ids.cpu()
        if len(ids) == self.config.vocab_size:
            return Vocabulary(self.config.vocab_size)
        return Vocabulary(self.config.vocab_size, ids, ids.tolist())


def like_target(
    target: Ends, layers: Sequence[int], draft_vocab_size: int | None, follow_rope: bool = True
) -> dict[str, Any]:
    """Sizes of a draft that follow its target's.

    Args:
        follow_rope: whether the rotary embedding is scaled as the target's.

    Raises:
        DeepSpecError: a target that cannot be distilled, or a layer that it lacks.
    """
    target.check_layers(layers)
    return {
        "hidden_size": target.hidden_size,
        **_attention_sizes(target.config, target.hidden_size),
        "rms_norm_eps": 1e-6,
        "rope_theta": target.rope_theta,
        "rope_scaling": followed_rope(target.config) if follow_rope else None,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": min(draft_vocab_size or target.vocab_size, target.vocab_size),
        "target_layer_ids": tuple(layers),
        "num_target_layers": target.num_layers,
        "max_position_embeddings": target.max_length,
    }


def _attention_sizes(config: Any, hidden: int) -> dict[str, int]:
    """Return the target's own widths where all its layers share them and a draft of Llama's shape can have them."""

    def of(name: str) -> int | None:
        try:
            value = getattr(config, name, None)
        except Exception:  # transformers raises where layers differ
            return None
        value = max(value) if isinstance(value, (list, tuple)) and value else value
        return value if isinstance(value, int) and value > 0 else None

    heads = of("num_attention_heads") or max(hidden // 64, 1)
    latent = of("kv_lora_rank") is not None  # keys and values of several widths: the draft has plain ones
    head_dim = None if latent else of("head_dim")
    shared = heads if latent else of("num_key_value_heads") or heads
    head_dim = head_dim or max(hidden // heads, 2)
    return {
        "intermediate_size": of("intermediate_size") or 4 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": shared if heads % shared == 0 else heads,
        "head_dim": head_dim + head_dim % 2,
    }


def missing_keys(sizes: type, config: dict[str, Any]) -> list[str]:
    """Fields of the dataclass `sizes` without a default that `config` does not give."""
    return [f.name for f in fields(sizes) if f.default is MISSING and config.get(f.name) is None]

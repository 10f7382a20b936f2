"""Medusa: K residual heads on the target's last hidden state, one for each of the next K tokens.

Source: arXiv 2401.10774. With h the post-norm state of the last token that had a target pass (the anchor, drawn from
it, is known), head k predicts the k-th token after the anchor: z_k = W f_k(h), f_k a stack of x + SiLU(W_i x + b_i)
that starts as the identity. Here W is the target's own head, frozen, so K heads cost K·d² weights and one product;
published drafts bring a W for each head, and load too (`medusa_lm_head.safetensors`, the FasterDecoding layout).
Heads do not see each other's tokens: a tree takes the marginals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.decoding.drafter import Drafter, DraftRequest, GrowingSession
from deepspec.decoding.tree import DraftLogits, Growth, Parent
from deepspec.drafters.algorithm import Algorithm
from deepspec.drafters.checkpoint import Checkpoint, load_network
from deepspec.drafters.network import Network, like_target, missing_keys
from deepspec.drafters.origin import check_kept, open_origin
from deepspec.drafters.params import MedusaParams
from deepspec.errors import DeepSpecError
from deepspec.target.ends import H_LAST, Ends
from deepspec.target.fused import PackedLinear
from deepspec.target.model import Target

ARCHITECTURE = "MedusaModel"


@dataclass(frozen=True)
class MedusaConfig:
    """Sizes of the network."""

    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    medusa_num_heads: int
    medusa_num_layers: int
    own_heads: bool = False  # a vocabulary matrix for each head, as published drafts have
    medusa_fc_bias: bool = True  # of the residual blocks

    target_layer_ids = (H_LAST,)

    @property
    def block_size(self) -> int:
        return self.medusa_num_heads

    @classmethod
    def read(cls, config: dict[str, Any]) -> MedusaConfig:
        """From a `config.json` in our own keys.

        Raises:
            DeepSpecError: a missing key.
        """
        found = dict(config)
        found.setdefault("draft_vocab_size", config.get("vocab_size"))
        if missing := missing_keys(cls, found):
            raise DeepSpecError(f"config.json of a Medusa draft lacks {', '.join(missing)}")
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})

    @classmethod
    def for_target(cls, params: MedusaParams, target: Ends) -> MedusaConfig:
        sizes = like_target(target, (), params.draft_vocab_size)
        kept = {name: sizes[name] for name in ("hidden_size", "vocab_size", "draft_vocab_size")}
        return cls(**kept, medusa_num_heads=params.heads, medusa_num_layers=params.layers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "medusa",
            **{name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _WRITTEN_APART},
            "medusa_fc_bias": self.medusa_fc_bias,
            "dtype": "bfloat16",
        }


_WRITTEN_APART = ("own_heads", "medusa_fc_bias")


class ResBlock(nn.Module):
    def __init__(self, size: int, bias: bool):
        super().__init__()
        self.linear = nn.Linear(size, size, bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class MedusaModel(Network):
    def __init__(self, config: MedusaConfig):
        super().__init__(config)
        self.heads = nn.ModuleList(
            nn.Sequential(
                *(
                    ResBlock(config.hidden_size, config.medusa_fc_bias)
                    for _ in range(config.medusa_num_layers)
                )
            )
            for _ in range(config.medusa_num_heads)
        )
        self.own_heads = nn.ModuleList(
            nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
            for _ in range(config.medusa_num_heads if config.own_heads else 0)
        )
        self.initialise()
        for block in self.heads.modules():
            if isinstance(block, ResBlock):  # f_k starts as the identity
                for parameter in block.linear.parameters():
                    nn.init.zeros_(parameter)

    def stored_name(self, name: str) -> str:
        if name.startswith("own_heads."):
            return f"{name.split('.')[1]}.{self.config.medusa_num_layers}.weight"
        return name.removeprefix("heads.")

    def states(self, hidden: Tensor) -> Tensor:
        """h [..., d] → f_k(h), [..., K, d]"""
        return torch.stack([head(hidden) for head in self.heads], -2)

    def forward(self, features: Tensor, tokens: Tensor, anchors: Tensor) -> Tensor:
        """f_k of the state before each anchor.

        Args:
            features: h_last [batch, n, d] of every token.
            tokens: int64 [batch, n], not read.
            anchors: int64 [batch, blocks], positions of the anchors (>= 1).

        Returns:
            [batch, blocks, K, d]: row k predicts the token at anchor + k + 1.
        """
        return self.states(features.gather(1, (anchors - 1)[..., None].expand(-1, -1, features.shape[-1])))


class MedusaDrafter(Drafter):
    layers = (H_LAST,)

    def __init__(self, model: MedusaModel, target: Target):
        self.config = model.config
        self.block_size = model.config.medusa_num_heads
        self.vocab_size = target.vocab_size
        with torch.no_grad():
            model = model.for_drafting(target)
            self._states = model.states
            heads: list[Tensor] = [head.get_parameter("weight") for head in model.own_heads] or [model.head]
            self._heads = [PackedLinear(head) for head in heads]
            self.vocabulary = model.vocabulary()

    def session(self, slots: int) -> MedusaSession:
        return MedusaSession(self, slots)

    def logits(self, hidden: Tensor) -> Tensor:
        """h_last [m, d] → [m, K, columns]"""
        states = self._states(hidden)
        if len(self._heads) == 1:
            return self._heads[0](states)
        return torch.stack([head(states[:, k]) for k, head in enumerate(self._heads)], 1)


class MedusaSession(GrowingSession):
    def __init__(self, drafter: MedusaDrafter, slots: int):
        self.drafter = drafter
        self.newest: dict[int, Tensor] = {}  # row → h_last [d] of the token before the anchor

    def begin(self, row: int) -> None:
        self.newest.pop(row, None)

    def extend(self, row: int, tokens: list[int], features: Tensor | None) -> None:
        if features is not None and len(features):
            self.newest[row] = features[-1]

    def move(self, source: int, destination: int) -> None:
        if source in self.newest:
            self.newest[destination] = self.newest[source]
        else:
            self.begin(destination)

    def ready(self, row: int) -> bool:
        return row in self.newest

    def laws(self, asks: list[DraftRequest], growths: list[Growth]) -> Callable[[list[Parent]], DraftLogits]:
        logits = self.drafter.logits(torch.stack([self.newest[ask.row] for ask in asks]))
        return lambda parents: DraftLogits(logits[[parent.growth for parent in parents], parents[0].depth])


def read(checkpoint: Checkpoint, target: Ends) -> MedusaModel:
    """Return the network of a directory, in float32.

    Raises:
        DeepSpecError: an unsupported configuration, or an unknown, missing or misshapen weight.
    """
    return load_network(MedusaModel(MedusaConfig.read(checkpoint.config)), checkpoint, target)


def load(checkpoint: Checkpoint, target: Target) -> MedusaDrafter:
    """Load a draft of ours, or a published one with a vocabulary matrix for each head."""
    return MedusaDrafter(read(checkpoint, target), target)


def network(params: MedusaParams, target: Ends) -> MedusaModel:
    """Make the network to train.

    Raises:
        DeepSpecError: a draft to go on from that has a vocabulary matrix for each head, or other heads.
    """
    if params.start is None:
        return MedusaModel(MedusaConfig.for_target(params, target))
    origin = open_origin(params.start, ("medusa",), target)
    if origin is None:
        raise DeepSpecError(f"start: {params.start!r} is no draft directory, the only start that Medusa has")
    config = MedusaConfig.read(origin.config)
    if config.own_heads:
        raise DeepSpecError(
            f"start: {params.start} has a vocabulary matrix for each head, which is not trained here"
        )
    names = {"heads": "medusa_num_heads", "layers": "medusa_num_layers"}
    asked = {key: getattr(params, name) for name, key in names.items() if name in params.model_fields_set}
    check_kept(asked, origin)
    if "draft_vocab_size" in params.model_fields_set:
        columns = min(params.draft_vocab_size or config.vocab_size, config.vocab_size)
        config = replace(config, draft_vocab_size=columns)
    model = MedusaModel(config)
    model.start, model.origin = params.start, origin
    return model


ALGORITHM = Algorithm(MedusaParams, (ARCHITECTURE,), load, network, read=read)

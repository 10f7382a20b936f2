"""P-EAGLE: EAGLE-3's network, run once for all places of a draft (arXiv 2602.01469).

The first place is EAGLE-3's: the anchor with the target's state before it. Each later one has the mask token and one
learnt vector in the place of the target's states, `mask_hidden`, and sees the context and the places before it. So a
draft costs one pass, and its places are predicted without knowing what was drawn before them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deepspec.decoding.drafter import DraftRequest
from deepspec.decoding.tree import DraftLogits, Growth, Parent
from deepspec.drafters.algorithm import Algorithm
from deepspec.drafters.algorithms.eagle3 import Eagle3Config, Eagle3Drafter, Eagle3Model, go_on
from deepspec.drafters.autoregressive import AutoregressiveSession
from deepspec.drafters.checkpoint import Checkpoint, load_network
from deepspec.drafters.eagle_network import Layer, attend_with_own, rows
from deepspec.drafters.origin import check_kept, open_origin
from deepspec.drafters.params import PEagleParams
from deepspec.drafters.start import resolve_start
from deepspec.target.ends import Ends
from deepspec.target.model import Target

ARCHITECTURE = "DeepSpecPEagleModel"


@dataclass(frozen=True)
class PEagleConfig(Eagle3Config):
    """Sizes of the network."""

    mask_token_id: int = 0

    def to_dict(self) -> dict[str, Any]:
        """`config.json`."""
        return super().to_dict() | {"architectures": [ARCHITECTURE], "qk_norm": self.qk_norm}


class PEagleModel(Eagle3Model):
    """The network, trained on whole blocks."""

    def __init__(self, config: PEagleConfig, start: str = "random"):
        super().__init__(config, start)
        self.mask_hidden = nn.Parameter(torch.randn(1, self.fc.in_features))

    def init_from_target(self, target: Ends, channel_std: Tensor) -> None:
        super().init_from_target(target, channel_std)
        with torch.no_grad():
            self.mask_hidden.mul_(channel_std)

    def forward(self, features: Tensor, tokens: Tensor, anchors: Tensor) -> Tensor:
        """Hidden states of the drafts that start at the anchors; of the tokens behind them nothing is read.

        Args:
            features: [batch, n, layers·d] of every token of the sequences.
            tokens: int64 [batch, n].
            anchors: int64 [batch, blocks], positions of the anchors (>= 1).

        Returns:
            [batch, blocks, γ, d] after the final norm: row k predicts the token at anchor + k + 1.
        """
        (batch, blocks), size = anchors.shape, self.config.block_size
        fused, embedded = self.fuse(features), self.embed_tokens(tokens)
        shared = self._first_step(embedded[:, 1:], fused[:, :-1])  # place i: x_{i+1} with g_i
        first = anchors - 1
        later = (batch, blocks, size - 1, self.config.hidden_size)
        hidden = torch.cat((rows(fused, first)[:, :, None], self.fuse(self.mask_hidden).expand(later)), 2)
        fed = torch.cat((rows(embedded, anchors)[:, :, None], self._mask_embedding().expand(later)), 2)
        hidden, fed = hidden.flatten(1, 2), fed.flatten(1, 2)  # [batch, blocks·γ, d]
        places = (first[..., None] + torch.arange(size, device=first.device)).flatten(1)
        rope = self.rope(places, hidden.dtype)
        mask = self._block_mask(first, places, tokens.shape[1] - 1, hidden.dtype)
        for layer, entries in zip(self.decoder_layers(), shared, strict=True):
            hidden = self.run(self._through, layer, fed, hidden, rope, entries, mask)
        return self.norm(hidden).unflatten(1, (blocks, size))

    def _mask_embedding(self) -> Tensor:
        return self.embed_tokens.weight[self.config.mask_token_id]

    def _through(
        self,
        layer: Layer,
        fed: Tensor,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        shared: tuple[Tensor, Tensor],
        mask: Tensor,
    ) -> Tensor:
        """Run a layer over the places of the blocks, which see the keys of all first places and their own."""
        x = layer.joined(fed, hidden)
        own = layer.self_attn.keys_values(x, rope)
        keys, values = (torch.cat(pair, 2) for pair in zip(shared, own, strict=True))
        attended = attend_with_own(layer.self_attn.queries(x, rope), keys, values, mask, [])
        return layer.finish(attended, layer.residual(hidden))

    def _block_mask(self, first: Tensor, places: Tensor, context: int, dtype: torch.dtype) -> Tensor:
        """Return the additive mask [batch, 1, m, context + m]; a block's first place is among the context's."""
        device, size = first.device, self.config.block_size
        shared = torch.arange(context, device=device) <= first.repeat_interleave(size, 1)[..., None]
        block = torch.arange(places.shape[1], device=device) // size
        depth = torch.arange(places.shape[1], device=device) % size
        own = (block[:, None] == block) & (depth[:, None] >= depth) & (depth > 0)  # [m, m]
        seen = torch.cat((shared, own.expand(len(first), -1, -1)), -1)
        if (window := self.config.sliding_window) is not None:
            keys = torch.cat((torch.arange(context, device=device).expand(len(first), -1), places), 1)
            seen = seen & (places[..., None] - keys[:, None] < window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min / 2)[:, None]


class PEagleDrafter(Eagle3Drafter):
    """Drafts all places in the pass that takes in what was committed."""

    def __init__(self, model: PEagleModel, target: Target):
        super().__init__(model, target)
        with torch.no_grad():
            later = self.fuse(model.mask_hidden.to(self.device, self.dtype))
        self.later = later.expand(self.block_size - 1, -1)
        self.mask_ids = [model.config.mask_token_id] * (self.block_size - 1)

    def session(self, slots: int) -> PEagleSession:
        return PEagleSession(self, slots)


class PEagleSession(AutoregressiveSession):
    """Grows proposals from the laws of the places, which are the same for every path."""

    drafter: PEagleDrafter

    def laws(self, asks: list[DraftRequest], growths: list[Growth]) -> Callable[[list[Parent]], DraftLogits]:
        drafter = self.drafter
        outputs = self.take_in(asks, drafter.mask_ids, drafter.later)
        logits = drafter.logits(torch.stack([part[-drafter.block_size :] for part in outputs]))

        def expand(parents: list[Parent]) -> DraftLogits:
            return DraftLogits(logits[[parent.growth for parent in parents], parents[0].depth])

        return expand


def read(checkpoint: Checkpoint, target: Ends) -> PEagleModel:
    """Return the network of a directory, in float32.

    Raises:
        DeepSpecError: an unsupported configuration, or an unknown, missing or misshapen weight.
    """
    return load_network(PEagleModel(PEagleConfig.read(checkpoint.config)), checkpoint, target)


def load(checkpoint: Checkpoint, target: Target) -> PEagleDrafter:
    """Load a draft, ours or a published one."""
    return PEagleDrafter(read(checkpoint, target), target)


def network(params: PEagleParams, target: Ends) -> PEagleModel:
    """Make the network to train; an EAGLE-3 that it goes on from gains what stands for the target's states."""
    origin = open_origin(params.start, ("eagle3", "peagle"), target)
    if origin is None:
        start = resolve_start(params.start, target, params.layers, params.qk_norm)
        sizes = PEagleConfig.sizes_of(params, target)
        own = {"num_hidden_layers": params.layers, "mask_token_id": target.vocab_size - 1}
        return PEagleModel(PEagleConfig(**sizes | own), start)
    config = PEagleConfig.read(origin.config)
    if "mask_token_id" not in origin.config:
        config = replace(config, mask_token_id=target.vocab_size - 1)
    if "layers" in params.model_fields_set:
        check_kept({"num_hidden_layers": params.layers}, origin)
    model = PEagleModel(replace(config, **go_on(params, origin, config)), params.start)
    model.origin = origin
    return model


ALGORITHM = Algorithm(PEagleParams, (ARCHITECTURE,), load, network, read=read)

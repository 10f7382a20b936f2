"""DFlash 2: DFlash with convolutions over the places of a block, and a selector of paths through its candidates.

Source: Inco AI and z-lab, 18 August 2026 (inco.ai/blog/dflash2); names and shapes are those of their checkpoints.

Each sublayer stands between two convolutions along the block, Conv(x)_t = k_{t,0} ⊙ x_t + k_{t,1} ⊙ x_{t−1}, where the
block's first place has nothing before it. A kernel is one vector a tap, plus a correction for each group of channels
that is read off what goes into the sublayer; one projection gives both sides'. The context is not convolved.

The head's logits U_t name the K likeliest tokens of each place. Among them alone, and knowing the token a before it,
place t has the law p(b) ∝ exp(U_t(b) + ⟨A(a) ⊙ H h_t, B(b)⟩). Training asks U_t for the target's law too, or the right
token would not be among the K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.decoding.drafter import DraftRequest
from deepspec.decoding.tree import DraftLogits, Growth, Parent
from deepspec.drafters.algorithm import Algorithm
from deepspec.drafters.block_drafting import BlockDrafter, Blocks
from deepspec.drafters.block_network import BlockConfig, BlockModel, Layer
from deepspec.drafters.block_start import backbone_as_asked
from deepspec.drafters.checkpoint import Checkpoint, load_network
from deepspec.drafters.network import Outputs
from deepspec.drafters.origin import Origin, check_kept, open_origin
from deepspec.drafters.params import DFlash2Params
from deepspec.drafters.start import resolve_start
from deepspec.errors import DeepSpecError
from deepspec.target.ends import Ends
from deepspec.target.fused import FusedLayer, PackedLinear
from deepspec.target.model import Target

ARCHITECTURE = "DeepSpecDFlash2Model"
PARTS = ("conv_group_size", "selector_rank", "selector_top_k")


@dataclass(frozen=True, kw_only=True)
class DFlash2Config(BlockConfig):
    """Sizes of the network.

    Args:
        conv_kernel_size: taps of a convolution, the place itself among them.
        conv_group_size: channels that share a correction of the kernel.
        selector_rank: of the scores of pairs.
        selector_top_k: K, candidates of a place.
    """

    WHAT: ClassVar[str] = "DFlash 2"

    conv_kernel_size: int = 2
    conv_group_size: int = 16
    selector_rank: int = 256
    selector_top_k: int = 16

    @classmethod
    def own_sizes(cls, params: DFlash2Params) -> dict[str, Any]:
        return {name: getattr(params, name) for name in PARTS}

    @property
    def architecture(self) -> str:
        return ARCHITECTURE


class Convolution(nn.Module):
    """Along the places of a block, before and after one sublayer."""

    def __init__(self, config: DFlash2Config):
        super().__init__()
        d, self.taps, self.group = config.hidden_size, config.conv_kernel_size, config.conv_group_size
        if d % self.group:
            raise DeepSpecError(
                f"conv_group_size {self.group} does not divide the width {d}; choose one that does"
            )
        self.size = config.query_size
        self.base_kernel = nn.Parameter(torch.zeros(2, self.taps, d))  # before, after
        self.kernel_projection = nn.Linear(d, 2 * self.taps * d // self.group, bias=False)

    @torch.no_grad()
    def begin(self) -> None:
        """Begin as no convolution: each place is itself."""
        self.base_kernel.zero_()
        self.base_kernel[:, 0] = 1
        self.kernel_projection.weight.zero_()

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, blocks·size, d] → what the sublayer reads, and the corrections for `after`."""
        corrections = self.kernel_projection(x).unflatten(-1, (2, self.taps, -1))
        return self._convolved(x, corrections[..., 0, :, :], 0), corrections[..., 1, :, :]

    def after(self, y: Tensor, corrections: Tensor) -> Tensor:
        """Convolve the sublayer's output [b, blocks·size, d]."""
        return self._convolved(y, corrections, 1)

    def _convolved(self, x: Tensor, corrections: Tensor, side: int) -> Tensor:
        """corrections [b, blocks·size, taps, groups]"""
        kernel = self.base_kernel[side].to(x.dtype) + corrections.repeat_interleave(self.group, -1)
        kernel = kernel.unflatten(1, (-1, self.size))  # [b, blocks, size, taps, d]
        places = x.unflatten(1, (-1, self.size))
        out = kernel[..., 0, :] * places
        for back in range(1, min(self.taps, self.size)):
            out = out + kernel[..., back, :] * F.pad(places[:, :, :-back], (0, 0, back, 0))
        return out.flatten(1, 2)


class ConvolvedLayer(Layer):
    """A layer of the backbone with a convolution around each sublayer."""

    def __init__(self, config: DFlash2Config, index: int):
        super().__init__(config, index)
        self.attention_conv, self.mlp_conv = Convolution(config), Convolution(config)

    def forward(self, x: Tensor, *context_and_ropes: Any) -> Tensor:
        read, kernel = self.attention_conv.before(self.input_layernorm(x))
        x = x + self.attention_conv.after(self.self_attn(read, *context_and_ropes), kernel)
        read, kernel = self.mlp_conv.before(self.post_attention_layernorm(x))
        return x + self.mlp_conv.after(self.mlp(read), kernel)


class CandidateSelector(nn.Module):
    """Scores pairs of tokens at neighbouring places: ⟨A(a) ⊙ H h_t, B(b)⟩."""

    def __init__(self, config: DFlash2Config):
        super().__init__()
        rank = config.selector_rank
        self.hidden_projection = nn.Linear(config.hidden_size, rank, bias=False)
        self.predecessor_codebook = nn.Parameter(torch.empty(config.vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.empty(config.draft_vocab_size, rank))

    @torch.no_grad()
    def begin(self) -> None:
        """Begin as no correction."""
        nn.init.normal_(self.predecessor_codebook, std=0.02)
        self.successor_codebook.zero_()

    def latent(self, previous: Tensor, hidden: Tensor) -> Tensor:
        """A(a) ⊙ H h of tokens int64 [...] and states [..., d], [..., rank]"""
        return F.embedding(previous, self.predecessor_codebook) * self.hidden_projection(hidden)


class DFlash2Model(BlockModel):
    """The backbone with convolutions and a selector."""

    LAYER = ConvolvedLayer

    def __init__(self, config: DFlash2Config, start: str = "random"):
        super().__init__(config, start)
        for layer in self.decoder_layers():
            for part in (cast(ConvolvedLayer, layer).attention_conv, cast(ConvolvedLayer, layer).mlp_conv):
                part.begin()
        self.candidate_selector.begin()

    def add_heads(self) -> None:
        self.candidate_selector = CandidateSelector(self.config)

    def looked_up(self) -> list[Tensor]:
        return [*super().looked_up(), self.candidate_selector.predecessor_codebook]

    def outputs(self, hidden: Tensor, previous: Tensor) -> Outputs:
        selector = self.candidate_selector
        pairs = (selector.latent(previous, hidden), selector.successor_codebook)
        return Outputs([self.head_factor(hidden), pairs], candidates=self.config.selector_top_k)


class _Into(nn.Module):
    """A sublayer's first projection behind its convolution, whose corrections for what comes out it keeps."""

    def __init__(self, convolution: Convolution, projection: nn.Module):
        super().__init__()
        self.convolution, self.projection = convolution, projection
        self.corrections: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        read, self.corrections = self.convolution.before(x)
        return self.projection(read)


class _OutOf(nn.Module):
    """A sublayer's last projection before its convolution."""

    def __init__(self, into: _Into, projection: nn.Module):
        super().__init__()
        self.into, self.projection = into, projection

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        assert self.into.corrections is not None  # what goes in comes first
        return residual + self.into.convolution.after(self.projection(x), self.into.corrections)


class FusedConvolvedLayer(FusedLayer):
    """`FusedLayer` with its projections between convolutions. x [1, requests·size, d] → the same."""

    def __init__(self, layer: ConvolvedLayer):
        super().__init__(layer)
        attention, mlp = _Into(layer.attention_conv, self.qkv), _Into(layer.mlp_conv, self.gate_up)
        parts: dict[str, nn.Module] = {
            "qkv": attention,
            "out": _OutOf(attention, self.out),
            "gate_up": mlp,
            "down": _OutOf(mlp, self.down),
        }
        for name, part in parts.items():
            self.add_module(name, part)


class DFlash2Drafter(BlockDrafter[DFlash2Model]):
    """Grows proposals through the candidates of each place, each scored after its own parent."""

    def fused(self, layer: Layer) -> FusedLayer:
        return FusedConvolvedLayer(cast(ConvolvedLayer, layer))

    def freeze_heads(self, model: DFlash2Model) -> None:
        """Take the selector's projection packed."""
        selector = model.candidate_selector
        self._gate = PackedLinear(selector.hidden_projection.weight)
        self._before, self._after = selector.predecessor_codebook, selector.successor_codebook

    def laws(
        self, blocks: Blocks, asks: list[DraftRequest], growths: list[Growth]
    ) -> Callable[[list[Parent]], DraftLogits]:
        hidden, base = blocks
        columns = base.shape[-1]
        alone, candidates = base.topk(min(self.config.selector_top_k, columns), -1)  # [requests, γ, K]
        gates = self._gate(hidden)  # [requests, γ, rank]

        def expand(parents: list[Parent]) -> DraftLogits:
            depth, requests = parents[0].depth, [parent.growth for parent in parents]
            latent = self._before[[parent.token for parent in parents]] * gates[requests, depth]  # [m, rank]
            chosen = candidates[requests, depth]  # [m, K]
            pairs = (self._after[chosen] @ latent[..., None])[..., 0]
            scores = alone[requests, depth].float() + pairs.float()
            logits = scores.new_full((len(parents), columns), -torch.inf)
            return DraftLogits(logits.scatter_(1, chosen, scores))

        return expand


def read(checkpoint: Checkpoint, target: Ends) -> DFlash2Model:
    """Return the network of a directory, in float32.

    Raises:
        DeepSpecError: an unsupported configuration, or an unknown, missing or misshapen weight.
    """
    return load_network(DFlash2Model(DFlash2Config.read(checkpoint.config)), checkpoint, target)


def load(checkpoint: Checkpoint, target: Target) -> DFlash2Drafter:
    """Load a draft, ours or a published one."""
    return DFlash2Drafter(read(checkpoint, target), target)


def network(params: DFlash2Params, target: Ends) -> DFlash2Model:
    """Make the network to train; a DFlash that it goes on from gains convolutions and selector."""
    origin = open_origin(params.start, ("dspark", "dflash2"), target)
    if origin is None:
        start = resolve_start(params.start, target, params.layers)
        return DFlash2Model(DFlash2Config.for_target(params, target), start)
    model = DFlash2Model(_grown(params, origin), params.start)
    model.origin = origin
    return model


def _grown(params: DFlash2Params, origin: Origin) -> DFlash2Config:
    asked, config = params.model_fields_set, DFlash2Config.read(origin.config)
    backbone = backbone_as_asked(params, asked, origin, config)
    parts = DFlash2Config.own_sizes(params)
    if "selector_rank" in origin.config:
        check_kept(
            {name: parts[name] for name in ("conv_group_size", "selector_rank") if name in asked}, origin
        )
        parts = {name: parts[name] for name in ("selector_top_k",) if name in asked}
    elif origin.config.get("markov_rank"):
        check_kept({"markov_rank": 0}, origin)
    return replace(config, **parts, **backbone)


ALGORITHM = Algorithm(DFlash2Params, (ARCHITECTURE,), load, network, read=read)

"""DSpark: a block drafter that is parallel in its backbone and sequential in its head.

Source: DeepSeek 2026, "Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation"; the backbone
is DFlash's (`drafters/block_network.py`). The block is [anchor, mask, ..., mask], and its γ
outputs give base logits U_k (DFlash's own layout, `sample_from_anchor: false`, has γ masks behind the anchor, and only
they predict). A Markov head adds B_k = W₂ W₁[x_{k−1}], so token k is drawn knowing token k − 1, and a
confidence head predicts c_k, the chance that token k survives verification, without seeing it.

Directories have the format of DeepSeek's releases (`Qwen3DSparkModel`, embeddings left to the target); a draft that
they do not have, with `context_skip`, causal or windowed layers, a head of low rank, or masks that alone predict, names
another architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deepspec.decoding.drafter import DraftRequest
from deepspec.decoding.growths import LawsAtOnce, Ranking
from deepspec.decoding.tree import DraftLogits, Growth, Parent
from deepspec.drafters.algorithm import Algorithm
from deepspec.drafters.block_drafting import BlockDrafter, Blocks
from deepspec.drafters.block_network import DEEPSEEK, OURS, BlockConfig, BlockModel
from deepspec.drafters.block_start import backbone_as_asked
from deepspec.drafters.checkpoint import Checkpoint, load_network, temperatures
from deepspec.drafters.markov import MarkovHead
from deepspec.drafters.network import Outputs
from deepspec.drafters.origin import Origin, check_kept, open_origin
from deepspec.drafters.params import DSparkParams
from deepspec.drafters.start import resolve_start
from deepspec.target.ends import Ends
from deepspec.target.fused import PackedLinear
from deepspec.target.model import Target
from deepspec.target.native.drafts import RankedTree, SequentialLaws


@dataclass(frozen=True, kw_only=True)
class DSparkConfig(BlockConfig):
    """Sizes of the network, as `config.json` has them."""

    WHAT: ClassVar[str] = "DSpark"

    markov_rank: int  # 0: no sequential head (DFlash)
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True

    @classmethod
    def own_sizes(cls, params: DSparkParams) -> dict[str, Any]:
        return {
            "markov_rank": params.markov_rank,
            "markov_head_type": params.markov_head,
            "enable_confidence_head": params.confidence_head,
            "confidence_head_with_markov": params.markov_rank > 0,
        }


class ConfidenceHead(nn.Module):
    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.with_markov = config.confidence_head_with_markov and config.markov_rank > 0
        self.proj = nn.Linear(config.hidden_size + self.with_markov * config.markov_rank, 1)

    def forward(self, hidden: Tensor, embedded: Tensor | None) -> Tensor:
        """Logits [...] of c_k from h_k [..., d] and e = W₁[x_{k−1}] [..., r]."""
        seen = torch.cat((hidden, embedded), -1) if self.with_markov and embedded is not None else hidden
        return self.proj(seen)[..., 0]


class DSparkModel(BlockModel):
    """The backbone with its two heads."""

    def __init__(self, config: DSparkConfig, start: str = "random"):
        super().__init__(config, start)
        if self.markov_head is not None:
            self.markov_head.begin()

    def add_heads(self) -> None:
        config = self.config
        self.markov_head = MarkovHead(config) if config.markov_rank else None
        self.confident = config.enable_confidence_head
        self.confidence_head = ConfidenceHead(config) if self.confident else None

    def init_from_target(self, target: Ends, channel_std: Tensor) -> None:
        super().init_from_target(target, channel_std)
        if self.markov_head is not None:
            self.markov_head.set_scale()

    def outputs(self, hidden: Tensor, previous: Tensor) -> Outputs:
        factors, embedded, confidence = [self.head_factor(hidden)], None, None
        if self.markov_head is not None:
            embedded = self.markov_head.markov_w1(previous)
            factors.append((self.markov_head.unrolled(embedded, hidden), self.markov_head.markov_w2.weight))
        if self.confidence_head is not None:
            confidence = self.confidence_head(hidden, None if embedded is None else embedded.to(hidden.dtype))
        return Outputs(factors, confidence)


class DSparkDrafter(BlockDrafter[DSparkModel]):
    """Grows proposals from p_k(x) ∝ exp(U_k + W₂ W₁[x_{k−1}]), conditioned on each node's own parent.

    Args:
        temperatures: of the confidence head's logit at each position, by mode "greedy" and "sampled"
            (`decoding.calibration`); none leaves it as trained.
    """

    temperatures: dict[str, list[float]]

    def __init__(
        self, model: DSparkModel, target: Target, temperatures: dict[str, list[float]] | None = None
    ):
        super().__init__(model, target)
        self.temperatures = temperatures or {}

    def freeze_heads(self, model: DSparkModel) -> None:
        """Take the Markov head packed, and what the confidence head makes of each token in a table."""
        self.markov = model.markov_head
        self.at_once: SequentialLaws | None = None
        if self.markov is not None:
            self.w1 = self.markov.markov_w1.weight
            self.w2 = PackedLinear(self.markov.markov_w2.weight)
            if (
                self.markov.kind == "vanilla"
                and self.w2.native is not None
                and model.confidence_head is not None
            ):
                self.at_once = SequentialLaws(self.w1, self.w2.native, self.vocabulary.columns)
        self.grows_trees = self.at_once is not None
        head = model.confidence_head
        self.confident = head is not None
        if head is not None:
            proj = head.proj
            weight, bias = proj.weight[0].float(), float(proj.bias)
            self.of_hidden, of_token = weight[: self.config.hidden_size], weight[self.config.hidden_size :]
            if head.with_markov:
                self.of_token = (self.w1.float() @ of_token + bias).tolist()  # [vocab]
            else:
                self.of_token = [bias] * self.vocab_size

    def laws(
        self, blocks: Blocks, asks: list[DraftRequest], growths: list[Growth]
    ) -> Callable[[list[Parent]], DraftLogits]:
        """Return what `grow` asks: the laws of children, from the blocks and each parent's token."""
        return (_Laws if self.at_once is None else _LawsAtOnce)(self, blocks, asks, growths)


class _Laws:
    """The laws of one proposal each for some requests."""

    def __init__(
        self, drafter: DSparkDrafter, blocks: Blocks, asks: list[DraftRequest], growths: list[Growth]
    ):
        self.drafter, self.asks, self.growths = drafter, asks, growths
        self.hidden, self.base = blocks
        self.doubts = (self.hidden.float() @ drafter.of_hidden).tolist() if drafter.confident else None
        self.states: dict[tuple[int, int], Tensor] = {}  # of the rnn head, after (request, node)

    def __call__(self, parents: list[Parent]) -> DraftLogits:
        drafter, depth = self.drafter, parents[0].depth
        every = len(parents) == len(self.asks) == 1
        requests = slice(None) if every else [parent.growth for parent in parents]
        logits = self.base[requests, depth]
        if drafter.markov is not None:
            embedded = drafter.w1[[parent.token for parent in parents]]
            before = None
            if drafter.markov.kind == "rnn" and depth:
                before = torch.stack(
                    [self.states[p.growth, self.growths[p.growth].parents[p.node]] for p in parents]
                )
            latents, after = drafter.markov.step(embedded, self.hidden[requests, depth], before)
            if drafter.markov.kind == "rnn":
                self.states.update({(p.growth, p.node): s for p, s in zip(parents, after, strict=True)})
            logits = drafter.w2(latents, logits)
        if self.doubts is None:
            return DraftLogits(logits)
        return DraftLogits(logits, [self.confidence(parent) for parent in parents])

    def confidence(self, parent: Parent) -> float:
        """c_k = σ(wᵀ[h_k; W₁[x_{k−1}]] / t_k)"""
        assert self.doubts is not None
        logit = self.doubts[parent.growth][parent.depth] + self.drafter.of_token[parent.token]
        greedy = self.asks[parent.growth].sampling.temperature == 0
        temperatures = self.drafter.temperatures.get("greedy" if greedy else "sampled")
        if temperatures:
            logit /= temperatures[parent.depth]
        return 1 / (1 + math.exp(-min(max(logit, -60.0), 60.0)))


class _LawsAtOnce(_Laws, LawsAtOnce):
    """The same where the kernels grow whole proposals (`decoding.growths.LawsAtOnce`)."""

    @property
    def _grown(self) -> SequentialLaws:
        assert self.drafter.at_once is not None
        return self.drafter.at_once

    def _logits(self, rows: list[int], depth: int) -> Tensor:
        """[depth, rows, columns]"""
        base = self.base if len(rows) == len(self.base) else self.base[rows]
        return base[:, :depth].transpose(0, 1).contiguous()

    def chains(
        self, rows: list[int], depth: int, anchors: list[int], uniforms: Tensor | None, temperature: float
    ) -> tuple[list[list[int]], Tensor | None]:
        logits = self._logits(rows, depth)
        columns, probs = self._grown.chains(logits, torch.tensor(anchors), uniforms, temperature)
        return columns.tolist(), probs

    def trees(
        self, rows: list[int], anchors: list[int], depths: list[int], ranking: Ranking, temperature: float
    ) -> list[RankedTree]:
        depth = max(depths)
        widths = list(ranking.widths[:depth])
        logits = self._logits(rows, depth)
        return self._grown.trees(
            logits, torch.tensor(anchors), depths, widths, ranking.nodes, ranking.beam, temperature
        )


def read(checkpoint: Checkpoint, target: Ends) -> DSparkModel:
    """Return the network of a directory, in float32.

    Raises:
        DeepSpecError: an unsupported configuration, or an unknown, missing or misshapen weight.
    """
    return load_network(DSparkModel(DSparkConfig.read(checkpoint.config)), checkpoint, target)


def load(checkpoint: Checkpoint, target: Target) -> DSparkDrafter:
    """Load a draft of DeepSeek's format, ours or a published one."""
    return DSparkDrafter(read(checkpoint, target), target, temperatures(checkpoint.directory))


def network(params: DSparkParams, target: Ends, asked: Collection[str] | None = None) -> DSparkModel:
    """Make the network to train.

    Args:
        asked: which keys of its section were written; None: those of `params`. A draft that goes on from another
            keeps what is not asked for.
    """
    origin = open_origin(params.start, ("dspark",), target)
    if origin is None:
        start = resolve_start(params.start, target, params.layers)
        return DSparkModel(DSparkConfig.for_target(params, target), start)
    asked = params.model_fields_set if asked is None else asked
    model = DSparkModel(grown(params, asked, origin), params.start)
    model.origin = origin
    if origin.config.get("markov_rank", 0) == 0 and model.markov_head is not None:
        model.markov_head.set_scale()
    return model


def grown(params: DSparkParams, asked: Collection[str], origin: Origin) -> DSparkConfig:
    """Return the sizes of a draft that begins as another, with what is asked for in its section.

    Raises:
        DeepSpecError: it asks for what the other cannot change.
    """
    config = DSparkConfig.read(origin.config)
    backbone = backbone_as_asked(params, asked, origin, config)
    changed: dict[str, Any] = {
        "markov_rank": params.markov_rank,
        "markov_head_type": params.markov_head,
        "enable_confidence_head": params.confidence_head,
    }
    if config.markov_rank:
        check_kept({"markov_rank": params.markov_rank} if "markov_rank" in asked else {}, origin)
        check_kept({"markov_head_type": params.markov_head} if "markov_head" in asked else {}, origin)
        changed = {"enable_confidence_head": params.confidence_head or config.enable_confidence_head}
    if not config.enable_confidence_head:
        changed["confidence_head_with_markov"] = changed.get("markov_rank", config.markov_rank) > 0
    return replace(config, **changed, **backbone)


ALGORITHM = Algorithm(DSparkParams, (DEEPSEEK, OURS), load, network, read=read)

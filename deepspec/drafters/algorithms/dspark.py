"""DSpark: a block drafter that is parallel in its backbone and sequential in its head.

Source: DeepSeek 2026, "Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation"; the backbone
is DFlash's (arXiv 2602.06036). Hidden states of several target layers, joined by `fc` and normed, enter every draft
layer as extra keys and values. The block [anchor, mask, ..., mask] attends to them and, both ways, to itself; its γ
outputs give base logits U_k (DFlash's own layout, `sample_from_anchor: false`, has γ masks behind the anchor, and only
they predict). A Markov head adds B_k = W₂ W₁[x_{k−1}], so token k is drawn knowing token k − 1, and a
confidence head predicts c_k, the chance that token k survives verification, without seeing it.

Directories have the format of DeepSeek's releases (`Qwen3DSparkModel`, embeddings left to the target); a draft that
they do not have, with `context_skip` or masks that alone predict, names another architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.decoding.drafter import Drafter, DraftRequest, GrowingSession
from deepspec.decoding.tree import DraftLogits, Growth, Parent
from deepspec.drafters.algorithm import Algorithm
from deepspec.drafters.checkpoint import Checkpoint, load_network, temperatures
from deepspec.drafters.markov import MarkovHead
from deepspec.drafters.network import (
    MLP,
    Network,
    NormalisedLinear,
    Outputs,
    RMSNorm,
    like_target,
    missing_keys,
)
from deepspec.drafters.origin import Origin, check_kept, open_origin
from deepspec.drafters.params import DSparkParams
from deepspec.drafters.rope import Rope, RopeTable, Scaling, read_rope, written_rope
from deepspec.drafters.start import init_from_target, resolve_start
from deepspec.errors import DeepSpecError
from deepspec.target.attention import ForwardPass, KVCache, attend
from deepspec.target.ends import Ends
from deepspec.target.fused import FusedLayer, PackedLinear, rotate
from deepspec.target.model import Target

PUBLISHED = "Qwen3DSparkModel"
OURS = "DeepSpecDSparkModel"  # no other engine may take it for a published one


@dataclass(frozen=True)
class DSparkConfig:
    """Sizes of the network, as `config.json` has them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    vocab_size: int
    draft_vocab_size: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    block_size: int
    mask_token_id: int
    markov_rank: int  # 0: no sequential head (DFlash)
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    context_skip: bool = False
    sample_from_anchor: bool = True
    max_position_embeddings: int = 8192
    rope_scaling: Scaling | None = None
    windows: tuple[int, ...] = ()  # of each layer, in places; 0, or none named: the whole context
    causal: tuple[
        bool, ...
    ] = ()  # whether a layer's places see only those before them; none named: both ways

    @property
    def query_size(self) -> int:
        """Places of a block: γ, or 1 + γ where the anchor's predicts nothing."""
        return self.block_size + (not self.sample_from_anchor)

    @classmethod
    def read(cls, config: dict) -> DSparkConfig:
        """From a `config.json`, ours or a published one."""
        theta, scaling = read_rope(config)
        found = config | {"rope_theta": theta, "rope_scaling": scaling}
        found.setdefault("draft_vocab_size", config.get("vocab_size"))
        if missing := missing_keys(cls, found):
            raise DeepSpecError(f"config.json of a DSpark draft lacks {', '.join(missing)}")
        known = {name: found[name] for name in cls.__dataclass_fields__ if name in found}
        lists = ("target_layer_ids", "windows", "causal")
        return cls(**known | {name: tuple(known[name]) for name in lists if name in known})

    @classmethod
    def for_target(cls, params: DSparkParams, target: Ends) -> DSparkConfig:
        """Sizes that follow the target's own."""
        layers = params.target_layer_ids or spread_layers(target.num_layers)
        return cls(
            **like_target(target, layers, params.draft_vocab_size),
            num_hidden_layers=params.layers,
            block_size=params.block_size,
            mask_token_id=target.vocab_size - 1,
            markov_rank=params.markov_rank,
            markov_head_type=params.markov_head,
            enable_confidence_head=params.confidence_head,
            confidence_head_with_markov=params.markov_rank > 0,
            context_skip=params.context_skip,
            sample_from_anchor=params.sample_from_anchor,
        )

    def to_dict(self) -> dict:
        """Return the `config.json` of DeepSeek's format, every key written out."""
        last = ("rope_scaling", "windows", "causal")
        sizes = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in last}
        plain = self.sample_from_anchor and not (self.context_skip or self.windows or self.causal)
        kinds = [
            "sliding_attention" if self.window(i) else "full_attention" for i in range(self.num_hidden_layers)
        ]
        return {
            "architectures": [PUBLISHED if plain else OURS],
            "model_type": "qwen3",
            **sizes,
            "target_layer_ids": list(self.target_layer_ids),
            "rope_parameters": written_rope(self),
            "layer_types": kinds,
            "hidden_act": "silu",
            "dtype": "bfloat16",
            "attention_bias": False,
            "tie_word_embeddings": False,
            **({"windows": list(self.windows)} if self.windows else {}),
            **({"causal": list(self.causal)} if self.causal else {}),
        }

    def window(self, layer: int) -> int | None:
        """Return how many places back a layer sees, each place itself among them; None: all."""
        return self.windows[layer] or None if self.windows else None

    def one_way(self, layer: int) -> bool:
        """Return whether a layer's places see only those before them in the block."""
        return bool(self.causal) and self.causal[layer]


def spread_layers(count: int, wanted: int = 5) -> list[int]:
    """`wanted` layer ids from the second to the third last, evenly spaced; fewer where the target is shallow."""
    last = max(count - 3, 0)
    first = min(1, last)
    wanted = min(wanted, last - first + 1)
    return sorted({round(first + i * (last - first) / max(wanted - 1, 1)) for i in range(wanted)})


@dataclass(frozen=True)
class Within:
    """What a causal layer's place sees: itself and what is before it, within a window where there is one."""

    window: int | None

    def __call__(self, request: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        return seen if self.window is None else seen & (query - key < self.window)


class Attention(nn.Module):
    """Over the context and, both ways, the block; the attributes are those of transformers' own (see `FusedLayer`)."""

    def __init__(self, config: DSparkConfig, index: int):
        super().__init__()
        self.layer_idx = index
        self.window, self.causal = config.window(index), config.one_way(index)
        self.sliding_window = Within(self.window) if self.causal else self.window
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(q, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """x [b, n, d] → rotated keys and values, each [b, kv_heads, n, head_dim]."""
        keys = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        values = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return rotate(keys, *rope).transpose(1, 2), values.transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor, rope: tuple, context_rope: tuple, mask: Tensor) -> Tensor:
        """x [b, m, d] attends to context [b, n, d] and itself under mask [b, 1, m, n + m] (additive)."""
        queries = rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))), *rope).transpose(
            1, 2
        )
        context_keys, context_values = self.keys_values(context, context_rope)
        keys, values = self.keys_values(x, rope)
        keys, values = torch.cat((context_keys, keys), 2), torch.cat((context_values, values), 2)
        grouped = mask.repeat(1, 1, queries.shape[1] // keys.shape[1], 1).to(queries.dtype)
        return self.o_proj(attend(queries, keys, values, grouped, None).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: DSparkConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *context_and_ropes: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *context_and_ropes)
        return x + self.mlp(self.post_attention_layernorm(x))


class ConfidenceHead(nn.Module):
    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.with_markov = config.confidence_head_with_markov and config.markov_rank > 0
        self.proj = nn.Linear(config.hidden_size + self.with_markov * config.markov_rank, 1)

    def forward(self, hidden: Tensor, embedded: Tensor | None) -> Tensor:
        """Logits [...] of c_k from h_k [..., d] and e = W₁[x_{k−1}] [..., r]."""
        seen = torch.cat((hidden, embedded), -1) if self.with_markov and embedded is not None else hidden
        return self.proj(seen)[..., 0]


class DSparkModel(Network):
    """The network, trained in blocks."""

    def __init__(self, config: DSparkConfig, start: str = "random"):
        super().__init__(config)
        self.start = start
        d = config.hidden_size
        self.fc = NormalisedLinear(len(config.target_layer_ids) * d, d)
        self.hidden_norm = RMSNorm(d, config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.markov_head = MarkovHead(config) if config.markov_rank else None
        self.confident = config.enable_confidence_head
        self.confidence_head = ConfidenceHead(config) if self.confident else None
        self.context_skip = nn.Linear(self.fc.in_features, d, bias=False) if config.context_skip else None
        self.initialise()
        if self.markov_head is not None:
            self.markov_head.begin()

    def init_from_target(self, target: Ends, channel_std: Tensor) -> None:
        init_from_target(self.decoder_layers(), self.norm, self.fc, target, channel_std)
        if self.markov_head is not None:
            self.markov_head.set_scale()

    def decoder_layers(self) -> list[Layer]:
        """Return its layers, lowest first."""
        return cast("list[Layer]", list(self.layers))  # a ModuleList forgets what it holds

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def context(self, features: Tensor) -> Tensor:
        """Concatenated target features [..., n·d] → H_ctx [..., d]."""
        return self.hidden_norm(self.fc(features))

    def forward(self, features: Tensor, tokens: Tensor, anchors: Tensor) -> Tensor:
        """Hidden states of the blocks that start at the anchors, as in training.

        Args:
            features: [batch, n, layers·d] of every token of the sequences.
            tokens: int64 [batch, n].
            anchors: int64 [batch, blocks], positions of the anchors (>= 1: the context before one is never empty).

        Returns:
            [batch, blocks, γ, d] after the final norm: row k predicts the token at anchor + k + 1.
        """
        batch, blocks = anchors.shape
        size, device = self.config.query_size, features.device
        inputs = torch.full((batch, blocks, size), self.config.mask_token_id, device=device)
        inputs[..., 0] = tokens.gather(1, anchors)
        x = self.embed_tokens(inputs)  # [batch, blocks, size, d]
        if self.context_skip is not None:
            newest = features.gather(1, (anchors - 1)[..., None].expand(-1, -1, features.shape[-1]))
            x = x + self.context_skip(_normed_by_layer(newest, self.config))[:, :, None]
        x = x.flatten(1, 2)
        context = self.context(features)
        positions = (anchors[..., None] + torch.arange(size, device=device)).flatten(1)
        rope = self.rope(positions, x.dtype)
        context_rope = self.rope(torch.arange(features.shape[1], device=device)[None], x.dtype)
        masks: dict[tuple[int | None, bool], Tensor] = {}
        for layer in self.decoder_layers():
            kind = layer.self_attn.window, layer.self_attn.causal
            if kind not in masks:
                masks[kind] = block_mask(anchors, features.shape[1], size, *kind)
            x = self.run(layer, x, context, rope, context_rope, masks[kind])
        return self.norm(x).unflatten(1, (blocks, size))[:, :, size - self.config.block_size :]

    def outputs(self, hidden: Tensor, previous: Tensor) -> Outputs:
        factors, embedded, confidence = [(hidden, self.head)], None, None
        if self.markov_head is not None:
            embedded = self.markov_head.markov_w1(previous)
            factors.append((self.markov_head.unrolled(embedded, hidden), self.markov_head.markov_w2.weight))
        if self.confidence_head is not None:
            confidence = self.confidence_head(hidden, None if embedded is None else embedded.to(hidden.dtype))
        return Outputs(factors, confidence)


def _normed_by_layer(features: Tensor, config: DSparkConfig) -> Tensor:
    """Each target layer's part of features [..., n·d] divided by its root mean square."""
    d = config.hidden_size
    return F.rms_norm(features.unflatten(-1, (-1, d)), (d,), eps=config.rms_norm_eps).flatten(-2)


def block_mask(
    anchors: Tensor, context: int, size: int, window: int | None = None, causal: bool = False
) -> Tensor:
    """Additive float32 mask [batch, 1, m, context + m], m = blocks·size: features before the anchor, the own block."""
    batch, blocks = anchors.shape
    before = torch.arange(context, device=anchors.device) < anchors[..., None]  # [batch, blocks, context]
    own = torch.eye(blocks, dtype=torch.bool, device=anchors.device).expand(batch, -1, -1)
    own = own.repeat_interleave(size, 2)  # [batch, blocks, blocks·size]
    visible = torch.cat((before, own), -1).repeat_interleave(size, 1)[:, None]
    if causal or window is not None:
        queries = (anchors[..., None] + torch.arange(size, device=anchors.device)).flatten(1)  # [batch, m]
        keys = torch.cat((torch.arange(context, device=anchors.device).expand(batch, -1), queries), 1)
        back = queries[:, :, None] - keys[:, None]  # [batch, m, context + m]
        near = back < (context + size if window is None else window)
        visible = visible & (near & (back >= 0) if causal else near)[:, None]
    return torch.zeros(visible.shape, device=anchors.device).masked_fill_(
        ~visible, torch.finfo(torch.float32).min / 2
    )


class DSparkDrafter(Drafter):
    """Grows proposals from p_k(x) ∝ exp(U_k + W₂ W₁[x_{k−1}]), conditioned on each node's own parent.

    Args:
        temperatures: of the confidence head's logit at each position, by mode "greedy" and "sampled"
            (`decoding.calibration`); none leaves it as trained.
    """

    vocab_size: int
    temperatures: dict[str, list[float]]

    def __init__(
        self, model: DSparkModel, target: Target, temperatures: dict[str, list[float]] | None = None
    ):
        config = model.config
        self.config = config
        self.layers = config.target_layer_ids
        self.block_size = config.block_size
        self.vocab_size = target.vocab_size
        self.device, self.dtype = target.device, target.dtype
        self.temperatures = temperatures or {}
        with torch.no_grad():
            self._freeze(model.to(self.device, self.dtype))

    def session(self, slots: int) -> DSparkSession:
        return DSparkSession(self, slots)

    def _freeze(self, model: DSparkModel) -> None:
        """Weights in the form that reads fastest: joined, packed; the confidence of each token in a table."""
        self._rope = RopeTable(Rope.of(self.config), self.device, self.dtype)
        self._embed = model.embed_tokens.weight
        self._fc, self._hidden_norm = PackedLinear(model.fc.folded_weight()), model.hidden_norm
        self._skip = None if model.context_skip is None else PackedLinear(model.context_skip.weight)
        attentions = [layer.self_attn for layer in model.decoder_layers()]
        self._kv = PackedLinear(torch.cat([w.weight for a in attentions for w in (a.k_proj, a.v_proj)]))
        self._k_norms = [a.k_norm for a in attentions]
        self._blocks = [FusedLayer(layer) for layer in model.decoder_layers()]
        self._norm, self._head = model.norm, PackedLinear(model.head)
        self._markov = model.markov_head
        if self._markov is not None:
            self._w1 = self._markov.markov_w1.weight
            self._w2 = PackedLinear(self._markov.markov_w2.weight)
        head = model.confidence_head
        self._confident = head is not None
        if head is not None:
            proj = head.proj
            weight, bias = proj.weight[0].float(), float(proj.bias)
            self._of_hidden, of_token = weight[: self.config.hidden_size], weight[self.config.hidden_size :]
            if head.with_markov:
                self._of_token = (self._w1.float() @ of_token + bias).tolist()  # [vocab]
            else:
                self._of_token = [bias] * self.vocab_size
        self.vocabulary = model.vocabulary()

    def absorb(self, cache: KVCache, rows: list[int], starts: list[int], features: list[Tensor]) -> None:
        """Write context keys and values of new features [m_i, layers·d] behind what each row holds."""
        counts = [len(part) for part in features]
        context = self._hidden_norm(self._fc(torch.cat(features)))[None]
        places = [start + i for start, count in zip(starts, counts, strict=True) for i in range(count)]
        positions = torch.tensor([places], device=self.device)
        step = ForwardPass(positions, cache=cache, rows=rows, starts=starts, counts=counts)
        kv = self._kv(context).unflatten(-1, (len(self._blocks), 2, -1, self.config.head_dim))
        rope = self._rope(positions, max(places))
        for i, norm in enumerate(self._k_norms):
            keys, values = kv[:, :, i].unbind(2)
            step.store(i, rotate(norm(keys), *rope).transpose(1, 2), values.transpose(1, 2))

    def block(
        self, cache: KVCache, rows: list[int], starts: list[int], anchors: list[int], newest: list[Tensor]
    ) -> Tensor:
        """Return the states [requests, γ, d] after the final norm, of the blocks that start at the anchors."""
        size = self.config.query_size
        ids = [[anchor] + [self.config.mask_token_id] * (size - 1) for anchor in anchors]
        x = F.embedding(torch.tensor(ids, device=self.device), self._embed)
        if self._skip is not None:
            x = x + self._skip(_normed_by_layer(torch.stack(newest), self.config))[:, None]
        places = [start + k for start in starts for k in range(size)]
        positions = torch.tensor([places], device=self.device)
        step = ForwardPass(
            positions,
            cache=cache,
            rows=rows,
            starts=starts,
            counts=[size] * len(rows),
            bidirectional=True,
        )
        rope = self._rope(positions, max(starts) + size)
        step.once("rope", lambda: rope)
        x = x.flatten(0, 1)[None]
        for layer in self._blocks:
            x = layer(x, step=step)
        return self._norm(x).view(len(rows), size, -1)[:, size - self.block_size :]

    def laws(
        self, hidden: Tensor, asks: list[DraftRequest], growths: list[Growth]
    ) -> Callable[[list[Parent]], DraftLogits]:
        """Return what `grow` asks: the laws of children, from hidden [requests, γ, d] and each parent's token."""
        base = self._head(hidden)  # [requests, γ, columns]
        doubts = (hidden.float() @ self._of_hidden).tolist() if self._confident else None  # [requests, γ]
        states: dict[tuple[int, int], Tensor] = {}  # of the rnn head, after (request, node)

        def expand(parents: list[Parent]) -> DraftLogits:
            depth = parents[0].depth
            every = len(parents) == len(asks) == 1
            requests = slice(None) if every else [parent.growth for parent in parents]
            logits = base[requests, depth]
            if self._markov is not None:
                embedded = self._w1[[parent.token for parent in parents]]
                before = None
                if self._markov.kind == "rnn" and depth:
                    before = torch.stack(
                        [states[p.growth, growths[p.growth].parents[p.node]] for p in parents]
                    )
                latents, after = self._markov.step(embedded, hidden[requests, depth], before)
                if self._markov.kind == "rnn":
                    states.update({(p.growth, p.node): s for p, s in zip(parents, after, strict=True)})
                logits = self._w2(latents, logits)
            if doubts is None:
                return DraftLogits(logits)
            return DraftLogits(logits, [self._confidence(doubts, asks[p.growth], p) for p in parents])

        return expand

    def _confidence(self, doubts: list[list[float]], ask: DraftRequest, parent: Parent) -> float:
        """c_k = σ(wᵀ[h_k; W₁[x_{k−1}]] / t_k)"""
        logit = doubts[parent.growth][parent.depth] + self._of_token[parent.token]
        temperatures = self.temperatures.get("greedy" if ask.sampling.temperature == 0 else "sampled")
        if temperatures:
            logit /= temperatures[parent.depth]
        return 1 / (1 + math.exp(-min(max(logit, -60.0), 60.0)))


@dataclass
class _Row:
    """What a request's drafting remembers besides its context keys and values."""

    length: int = 0  # of the context that is in the cache
    pending: list[Tensor] = field(default_factory=list)  # features not yet there
    newest: Tensor | None = None  # [layers·d] of the last token with a target pass


class DSparkSession(GrowingSession):
    def __init__(self, drafter: DSparkDrafter, slots: int):
        self.drafter = drafter
        self.cache = KVCache(slots, 256)
        self.rows = [_Row() for _ in range(slots)]

    def begin(self, row: int) -> None:
        self.rows[row] = _Row()

    def extend(self, row: int, tokens: list[int], features: Tensor | None) -> None:
        if features is not None and len(features):
            self.rows[row].pending.append(features)
            self.rows[row].newest = features[-1]

    def move(self, source: int, destination: int) -> None:
        self.cache.move(source, destination, self.rows[source].length)
        self.rows[destination] = self.rows[source]

    def ready(self, row: int) -> bool:
        return self.rows[row].newest is not None

    def laws(self, asks: list[DraftRequest], growths: list[Growth]) -> Callable[[list[Parent]], DraftLogits]:
        rows = [ask.row for ask in asks]
        self._absorb(rows)
        states = [self.rows[row] for row in rows]
        hidden = self.drafter.block(
            self.cache,
            rows,
            [state.length for state in states],
            [ask.anchor for ask in asks],
            [state.newest for state in states],
        )
        return self.drafter.laws(hidden, asks, growths)

    def _absorb(self, rows: list[int]) -> None:
        """Project the features that have come since the last proposal."""
        late = [row for row in rows if self.rows[row].pending]
        if not late:
            return
        features = [torch.cat(self.rows[row].pending) for row in late]
        starts = [self.rows[row].length for row in late]
        longest = max(start + len(part) for start, part in zip(starts, features, strict=True))
        self.cache.reserve(longest + max(len(part) for part in features) + self.drafter.config.query_size)
        self.drafter.absorb(self.cache, late, starts, features)
        for row, part in zip(late, features, strict=True):
            self.rows[row].length += len(part)
            self.rows[row].pending.clear()


def load(checkpoint: Checkpoint, target: Target) -> DSparkDrafter:
    """Load a draft of DeepSeek's format, ours or a published one."""
    network = load_network(DSparkModel(DSparkConfig.read(checkpoint.config)), checkpoint, target)
    return DSparkDrafter(network, target, temperatures(checkpoint.directory))


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
    if "layers" in asked:
        check_kept({"num_hidden_layers": params.layers}, origin)
    if "target_layer_ids" in asked and params.target_layer_ids:
        check_kept({"target_layer_ids": params.target_layer_ids}, origin)
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
    for name in ("block_size", "sample_from_anchor", "context_skip"):
        if name in asked:
            changed[name] = getattr(params, name)
    if "draft_vocab_size" in asked:
        changed["draft_vocab_size"] = min(params.draft_vocab_size or config.vocab_size, config.vocab_size)
    return replace(config, **changed)


ALGORITHM = Algorithm(DSparkParams, (PUBLISHED, OURS), load, network)

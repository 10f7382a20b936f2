"""The networks of block drafters: DFlash's backbone (arXiv 2602.06036), which DSpark, DFlash 2 and causal blocks share.

Hidden states of several target layers, joined by `fc` and normed, enter every draft layer as extra keys and values. The
block [anchor, mask, ..., mask] attends to them and to itself, both ways or, in a causal layer, to the places before.
A subclass adds heads (`add_heads`), or layers of another kind (`LAYER`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.drafters.block_attention import BlockMasks, attend_in_blocks
from deepspec.drafters.low_rank import LowRankHead
from deepspec.drafters.network import MLP, Network, NormalisedLinear, RMSNorm, like_target, missing_keys
from deepspec.drafters.params import BlockParams
from deepspec.drafters.rope import Scaling, read_rope, written_rope
from deepspec.drafters.start import init_from_target
from deepspec.errors import DeepSpecError
from deepspec.target.attention import OneWay, attend
from deepspec.target.ends import Ends
from deepspec.target.fused import rotate

DEEPSEEK = "Qwen3DSparkModel"
OURS = "DeepSpecDSparkModel"  # no other engine may take it for a published one


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Sizes of the backbone, as `config.json` has them."""

    WHAT: ClassVar[str] = "block"  # what it is called in a message

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
    context_skip: bool = False
    sample_from_anchor: bool = True
    max_position_embeddings: int = 8192
    rope_scaling: Scaling | None = None
    windows: tuple[int, ...] = ()  # of each layer, in places; 0, or none named: the whole context
    # Whether a layer's places see only those before them; none named: both ways.
    causal: tuple[bool, ...] = ()
    head_rank: int | None = None

    @property
    def query_size(self) -> int:
        """Places of a block: γ, or 1 + γ where the anchor's predicts nothing."""
        return self.block_size + (not self.sample_from_anchor)

    @classmethod
    def read(cls, config: dict[str, Any]) -> Self:
        """From a `config.json`, ours or a published one.

        Raises:
            DeepSpecError: a missing key.
        """
        theta, scaling = read_rope(config)
        found = config | {"rope_theta": theta, "rope_scaling": scaling}
        found.setdefault("draft_vocab_size", config.get("vocab_size"))
        if missing := missing_keys(cls, found):
            raise DeepSpecError(f"config.json of a {cls.WHAT} draft lacks {', '.join(missing)}")
        known = {each.name: found[each.name] for each in fields(cls) if each.name in found}
        lists = ("target_layer_ids", "windows", "causal")
        return cls(**known | {name: tuple(known[name]) for name in lists if name in known})

    @classmethod
    def for_target(cls, params: BlockParams, target: Ends) -> Self:
        """Sizes that follow the target's own."""
        layers = params.target_layer_ids or spread_layers(target.num_layers)
        return cls(
            **like_target(target, layers, params.draft_vocab_size, params.rope == "target"),
            num_hidden_layers=params.layers,
            block_size=params.block_size,
            mask_token_id=target.vocab_size - 1,
            context_skip=params.context_skip,
            sample_from_anchor=params.sample_from_anchor,
            head_rank=params.head_rank,
            **seen(params, params.layers),
            **cls.own_sizes(params),
        )

    @classmethod
    def own_sizes(cls, params: Any) -> dict[str, Any]:
        """Return what a section says of the parts that are not the backbone's."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Return the `config.json` of DeepSeek's format, every key written out."""
        last = ("rope_scaling", "windows", "causal", "head_rank")
        sizes: dict[str, Any] = {}
        for each in fields(BlockConfig):
            sizes |= {} if each.name in last else {each.name: getattr(self, each.name)}
            if each.name == "mask_token_id":
                sizes |= self.parts()
        kinds = [
            "sliding_attention" if self.window(i) else "full_attention" for i in range(self.num_hidden_layers)
        ]
        return {
            "architectures": [self.architecture],
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
            **({"head_rank": self.head_rank} if self.head_rank else {}),
        }

    def parts(self) -> Mapping[str, Any]:
        """Return the keys of a subclass's own parts."""
        return {each.name: getattr(self, each.name) for each in fields(self)[len(fields(BlockConfig)) :]}

    @property
    def architecture(self) -> str:
        """Return what a `config.json` calls it: DeepSeek's class where that can run it."""
        own = self.context_skip or self.windows or self.causal or self.head_rank
        plain = self.sample_from_anchor and not own
        return DEEPSEEK if plain else OURS

    def window(self, layer: int) -> int | None:
        """Return how many places back a layer sees, each place itself among them; None: all."""
        return self.windows[layer] or None if self.windows else None

    def one_way(self, layer: int) -> bool:
        """Return whether a layer's places see only those before them in the block."""
        return bool(self.causal) and self.causal[layer]


def seen(params: BlockParams, layers: int) -> dict[str, Any]:
    """Return `windows` and `causal` of a configuration whose layers all see what a section says."""
    windows = (params.sliding_window,) * layers if params.sliding_window else ()
    return {"windows": windows, "causal": (True,) * layers if params.causal else ()}


def spread_layers(count: int, wanted: int = 5) -> list[int]:
    """`wanted` layer ids from the second to the third last, evenly spaced; fewer where the target is shallow."""
    last = max(count - 3, 0)
    first = min(1, last)
    wanted = min(wanted, last - first + 1)
    return sorted({round(first + i * (last - first) / max(wanted - 1, 1)) for i in range(wanted)})


class Attention(nn.Module):
    """Over the context and, both ways, the block; the attributes are those of transformers' own (see `FusedLayer`)."""

    def __init__(self, config: BlockConfig, index: int):
        super().__init__()
        self.layer_idx = index
        self.window, self.causal = config.window(index), config.one_way(index)
        self.sliding_window = OneWay(self.window) if self.causal else self.window
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

    def forward(
        self, x: Tensor, context: Tensor, rope: tuple, context_rope: tuple, mask: Tensor | BlockMasks
    ) -> Tensor:
        """x [b, m, d] attends to context [b, n, d] and itself under mask [b, 1, m, n + m] (additive), or two masks."""
        queries = rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))), *rope).transpose(
            1, 2
        )
        before, own = self.keys_values(context, context_rope), self.keys_values(x, rope)
        if isinstance(mask, BlockMasks):
            return self.o_proj(attend_in_blocks(queries, before, own, mask, self.scaling).flatten(2))
        keys, values = (torch.cat(both, 2) for both in zip(before, own, strict=True))
        grouped = mask.repeat(1, 1, queries.shape[1] // keys.shape[1], 1).to(queries.dtype)
        return self.o_proj(attend(queries, keys, values, grouped, None).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: BlockConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *context_and_ropes: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *context_and_ropes)
        return x + self.mlp(self.post_attention_layernorm(x))


class BlockModel(Network):
    """The network, trained in blocks."""

    LAYER: ClassVar[type[Layer]] = Layer

    def __init__(self, config: Any, start: str = "random"):
        super().__init__(config)
        self.start = start
        d = config.hidden_size
        self.fc = NormalisedLinear(len(config.target_layer_ids) * d, d)
        self.hidden_norm = RMSNorm(d, config.rms_norm_eps)
        self.layers = nn.ModuleList(self.LAYER(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.low_rank_head = LowRankHead(config) if config.head_rank else None
        self.add_heads()
        self.context_skip = nn.Linear(self.fc.in_features, d, bias=False) if config.context_skip else None
        self.initialise()

    def add_heads(self) -> None:
        """Make what a subclass has besides the backbone, before weights are drawn."""

    def init_from_target(self, target: Ends, channel_std: Tensor) -> None:
        init_from_target(self.decoder_layers(), self.norm, self.fc, target, channel_std)

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
            x = x + self.context_skip(normed_by_layer(newest, self.config))[:, :, None]
        x = x.flatten(1, 2)
        context = self.context(features)
        positions = (anchors[..., None] + torch.arange(size, device=device)).flatten(1)
        rope = self.rope(positions, x.dtype)
        context_rope = self.rope(torch.arange(features.shape[1], device=device)[None], x.dtype)
        masks: dict[tuple[int | None, bool], Tensor | BlockMasks] = {}
        for layer in self.decoder_layers():
            kind = window, causal = layer.self_attn.window, layer.self_attn.causal
            if kind not in masks and x.is_cpu:
                near = context_mask(anchors, features.shape[1], size, window)
                masks[kind] = BlockMasks(near, additive(own_block(size, window, causal, device)))
            elif kind not in masks:
                masks[kind] = block_mask(anchors, features.shape[1], size, *kind)
            x = self.run(layer, x, context, rope, context_rope, masks[kind])
        return self.norm(x).unflatten(1, (blocks, size))[:, :, size - self.config.block_size :]


def normed_by_layer(features: Tensor, config: BlockConfig) -> Tensor:
    """Each target layer's part of features [..., n·d] divided by its root mean square."""
    d = config.hidden_size
    return F.rms_norm(features.unflatten(-1, (-1, d)), (d,), eps=config.rms_norm_eps).flatten(-2)


def context_mask(anchors: Tensor, context: int, size: int, window: int | None = None) -> Tensor:
    """Additive float32 mask [batch, 1, blocks·size, context]: the features before a block's anchor, within a window."""
    keys = torch.arange(context, device=anchors.device)
    visible = keys < anchors[..., None]  # [batch, blocks, context]
    visible = visible.repeat_interleave(size, 1)
    if window is not None:
        queries = (anchors[..., None] + torch.arange(size, device=anchors.device)).flatten(1)
        visible = visible & (queries[..., None] - keys < window)
    return additive(visible[:, None])


def own_block(size: int, window: int | None, causal: bool, device: torch.device) -> Tensor:
    """Return which places of its block each place sees, bool [size, size]."""
    places = torch.arange(size, device=device)
    back = places[:, None] - places
    near = back < (size if window is None else window)
    return near & (back >= 0) if causal else near


def block_mask(
    anchors: Tensor, context: int, size: int, window: int | None = None, causal: bool = False
) -> Tensor:
    """Additive float32 mask [batch, 1, m, context + m], m = blocks·size: features before the anchor, the own block."""
    batch, blocks = anchors.shape
    own = own_block(size, window, causal, anchors.device).repeat(blocks, blocks)
    same = torch.eye(blocks, dtype=torch.bool, device=anchors.device)
    own = own & same.repeat_interleave(size, 0).repeat_interleave(size, 1)
    before = context_mask(anchors, context, size, window)
    return torch.cat((before, additive(own).expand(batch, 1, -1, -1)), -1)


def additive(visible: Tensor) -> Tensor:
    """Return 0 for what is seen and next to −∞ for what is not, float32."""
    mask = torch.zeros(visible.shape, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(torch.float32).min / 2)

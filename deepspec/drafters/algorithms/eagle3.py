"""EAGLE-3: one decoder layer that drafts token by token from the target's features and its own.

Source: arXiv 2503.01840. Features of several target layers are joined by `fc` into g. The layer's attention reads
[norm(embed(x_{i+1})); norm(g_i)], 2d wide, at RoPE position i; its output h_i gives the logits of x_{i+2}, and takes
g's place where the target has not been yet: at x_{i+2} drafted, the next input is [norm(embed(x_{i+2})); norm(h_i)].

Trained by *training-time test*: γ steps, the first on the target's features, each later one on the layer's own outputs
with the true tokens. A query of step k at place i attends to the keys of the first step up to i and to one entry of
each later step, its own. So the steps of different places never meet, and only the places that a loss looks at
(anchors) are computed: keys and values of all tokens, queries of the anchors.

Directories: `LlamaForCausalLMEagle3`, which engines serve, and DeepSeek's `Qwen3Eagle3Model` (q/k norms).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from deepspec.drafters.algorithm import Algorithm, TrainedParams
from deepspec.drafters.autoregressive import AutoregressiveDrafter
from deepspec.drafters.checkpoint import load_network
from deepspec.drafters.network import (
    MLP,
    Network,
    NormalisedLinear,
    RMSNorm,
    RopeTable,
    like_target,
    missing_keys,
    plain_rope,
)
from deepspec.drafters.start import START, Start, init_from_target, resolve_start
from deepspec.errors import DeepSpecError
from deepspec.target.attention import ForwardPass, attend
from deepspec.target.fused import FusedLayer, PackedLinear, rotate
from deepspec.target.model import Target

SERVED, DEEPSEEK = "LlamaForCausalLMEagle3", "Qwen3Eagle3Model"


class Eagle3Params(TrainedParams):
    """EAGLE-3: one layer that drafts token by token from the target's features and its own outputs."""

    type: Literal["eagle3"]
    block_size: int = Field(5, ge=1, description="γ: steps unrolled in training, tokens drafted at most.")
    target_layer_ids: list[int] | None = Field(None, description="None takes a low, a middle and a high one.")
    draft_vocab_size: int = Field(8192, ge=0, description="Most frequent tokens kept; 0 keeps them all.")
    start: Start = Field("auto", description=START)
    qk_norm: bool = Field(False, description="Qwen3-style layer, DeepSeek's format; else Llama's.")


@dataclass(frozen=True)
class Eagle3Config:
    """Sizes of the network."""

    hidden_size: int
    intermediate_size: int
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
    qk_norm: bool = False
    max_position_embeddings: int = 8192

    @classmethod
    def read(cls, config: dict[str, Any]) -> Eagle3Config:
        """From a `config.json` of either kind.

        Raises:
            DeepSpecError: a missing key, or an option that is not supported.
        """
        for key, supported in _FIXED.items():
            if config.get(key, supported) != supported:
                raise DeepSpecError(f"{key} {config[key]!r} is not supported, only {supported!r}")
        rope_theta = plain_rope(config)
        heads = config.get("num_attention_heads")
        eagle = config.get("eagle_config") or {}
        layers = config.get("target_layer_ids", eagle.get("eagle_aux_hidden_state_layer_ids"))
        found = config | {"target_layer_ids": layers, "rope_theta": rope_theta}
        found.setdefault("head_dim", heads and config.get("hidden_size", 0) // heads)
        found.setdefault("num_key_value_heads", heads)
        found.setdefault("draft_vocab_size", config.get("vocab_size"))
        found.setdefault("num_target_layers", config.get("target_num_hidden_layers"))
        found.setdefault("block_size", config.get("ttt_length", 5))
        found["qk_norm"] = config["architectures"][0] == DEEPSEEK
        if missing := missing_keys(cls, found):
            raise DeepSpecError(f"config.json of an EAGLE-3 draft lacks {', '.join(missing)}")
        known = {name: found[name] for name in cls.__dataclass_fields__ if found.get(name) is not None}
        return cls(**known | {"target_layer_ids": tuple(found["target_layer_ids"])})

    @classmethod
    def for_target(cls, params: Eagle3Params, target: Target) -> Eagle3Config:
        """Sizes that follow the target's own."""
        layers = params.target_layer_ids or default_layers(target.num_layers)
        sizes = like_target(target, layers, params.draft_vocab_size)
        return cls(**sizes, block_size=params.block_size, qk_norm=params.qk_norm)

    def to_dict(self) -> dict[str, Any]:
        """`config.json` with every key that a reader may look for."""
        sizes = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "qk_norm"}
        layers = list(self.target_layer_ids)
        return {
            "architectures": [DEEPSEEK if self.qk_norm else SERVED],
            "model_type": "qwen3" if self.qk_norm else "llama",
            **sizes,
            **_FIXED,
            "target_layer_ids": layers,
            "target_hidden_size": self.hidden_size,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": layers, "use_aux_hidden_state": True},
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "ttt_length": self.block_size,
            "dtype": "bfloat16",
        }


_FIXED = {
    "num_hidden_layers": 1,
    "draft_num_hidden_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "norm_before_residual": False,
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
}


def default_layers(count: int) -> list[int]:
    """EAGLE-3's low, middle and high layer: 1, L/2 − 1 and L − 4, what engines assume; fewer in a shallow target."""
    return sorted({min(max(layer, 0), max(count - 2, 0)) for layer in (1, count // 2 - 1, count - 4)})


class Attention(nn.Module):
    """Reads [norm(embedding); norm(hidden)], 2d wide. The attributes are those of transformers' own (`FusedLayer`)."""

    layer_idx, sliding_window = 0, None

    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        width = 2 * config.hidden_size
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, q, bias=False)
        self.k_proj = nn.Linear(width, kv, bias=False)
        self.v_proj = nn.Linear(width, kv, bias=False)
        self.o_proj = nn.Linear(q, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x [b, n, 2d] → [b, heads, n, head_dim], rotated."""
        return self._rotated(self.q_proj(x), "q_norm", rope)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """x [b, n, 2d] → rotated keys and values, each [b, kv_heads, n, head_dim]."""
        values = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return self._rotated(self.k_proj(x), "k_norm", rope), values

    def _rotated(self, x: Tensor, norm: str, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x.unflatten(-1, (-1, self.head_dim))
        if hasattr(self, norm):
            x = getattr(self, norm)(x)
        return rotate(x, *rope).transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)  # of the embeddings
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def joined(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """[norm(embedding); norm(hidden)] [..., 2d]"""
        return torch.cat((self.input_layernorm(embedded), self.hidden_norm(hidden)), -1)

    def finish(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """Output projection, MLP and their residuals; attended [b, n, heads, head_dim]."""
        hidden = hidden + self.self_attn.o_proj(attended.flatten(2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Model(Network):
    """The network, trained by unrolling it from anchors."""

    def __init__(self, config: Eagle3Config, start: str = "random"):
        super().__init__(config)
        self.start = start
        self.fc = NormalisedLinear(len(config.target_layer_ids) * config.hidden_size, config.hidden_size)
        self.layer = Layer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.initialise()

    def init_from_target(self, target: Target, channel_std: Tensor) -> None:
        init_from_target([self.layer], self.norm, self.fc, target, channel_std)

    def stored_name(self, name: str) -> str:
        place = "layers.0." if self.config.qk_norm else "midlayer."
        return place + name.removeprefix("layer.") if name.startswith("layer.") else name

    def forward(self, features: Tensor, tokens: Tensor, anchors: Tensor) -> Tensor:
        """Hidden states of the drafts that start at the anchors, the true tokens fed.

        Args:
            features: [batch, n, layers·d] of every token of the sequences.
            tokens: int64 [batch, n].
            anchors: int64 [batch, blocks], positions of the anchors (>= 1).

        Returns:
            [batch, blocks, γ, d] after the final norm: row k predicts the token at anchor + k + 1.
        """
        layer, attention = self.layer, self.layer.self_attn
        n = tokens.shape[1]
        fused = self.fc(features)  # g [batch, n, d]
        embedded = self.embed_tokens(tokens)
        joined = layer.joined(embedded[:, 1:], fused[:, :-1])  # place i: x_{i+1} with g_i
        places = torch.arange(n - 1, device=tokens.device)
        keys, values = attention.keys_values(joined, self.rope(places[None], joined.dtype))
        first = anchors - 1  # place of the first step
        seen = places <= first[..., None]  # [batch, blocks, n − 1]
        mask = torch.zeros(seen.shape, dtype=keys.dtype, device=keys.device)
        mask = mask.masked_fill_(~seen, torch.finfo(keys.dtype).min / 2)[:, None]
        hidden = _rows(fused, first)
        steps: list[Tensor] = []
        steps_own: list[tuple[Tensor, Tensor]] = []  # keys and values of the later steps
        for k in range(self.config.block_size):
            fed = _rows(embedded, (anchors + k).clamp(max=n - 1))
            rope = self.rope(first + k, hidden.dtype)
            hidden, own = self.run(
                self._unrolled, fed, hidden, rope, (keys, values, mask), tuple(steps_own), k > 0
            )
            steps_own += own
            steps.append(self.norm(hidden))
        return torch.stack(steps, 2)

    def _unrolled(self, fed, hidden, rope, shared, own, later: bool) -> tuple[Tensor, list]:
        """Run a step of the unrolled pass: the layer's outputs, and of a later step its own keys and values.

        `fed` are the tokens' embeddings, `hidden` the states below, both [batch, blocks, d].
        """
        attention = self.layer.self_attn
        x = self.layer.joined(fed, hidden)
        queries = attention.queries(x, rope)
        new = [attention.keys_values(x, rope)] if later else []
        keys, values, mask = shared
        attended = _attend(queries, keys, values, mask, [*own, *new])
        return self.layer.finish(attended, hidden), new


def load(directory: Path, config: dict[str, Any], target: Target) -> Eagle3Drafter:
    """Load a draft of either format, ours or a published one."""
    return Eagle3Drafter(load_network(Eagle3Model(Eagle3Config.read(config)), directory, target), target)


def network(params: Eagle3Params, target: Target) -> Eagle3Model:
    """Make the network to train."""
    start = resolve_start(params.start, target, 1, params.qk_norm)
    return Eagle3Model(Eagle3Config.for_target(params, target), start)


ALGORITHM = Algorithm(Eagle3Params, (SERVED, DEEPSEEK), load, network)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [batch, n, d], index [batch, m] → [batch, m, d]"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _attend(queries, keys, values, mask, own) -> Tensor:
    """Attention of each query to the shared keys under the mask, and to its own entries of later steps.

    queries [b, heads, m, d]; keys, values [b, kv_heads, n, d]; mask [b, 1, m, n] additive; own entries: keys and
    values [b, kv_heads, m, d] each. Returns [b, m, heads, d].
    """
    groups = queries.shape[1] // keys.shape[1]
    if not own:
        return attend(queries, keys, values, mask.repeat(1, 1, groups, 1), None)
    grouped = queries.unflatten(1, (keys.shape[1], groups))  # [b, kv_heads, groups, m, d]
    scale = queries.shape[-1] ** -0.5
    shared = grouped @ keys[:, :, None].transpose(-1, -2) * scale + mask[:, :, None]
    mine = torch.stack([(grouped * key[:, :, None]).sum(-1) for key, _ in own], -1) * scale
    weights = torch.cat((shared, mine), -1).float().softmax(-1).to(values.dtype)
    out = weights[..., : keys.shape[2]] @ values[:, :, None]
    for i, (_, value) in enumerate(own):
        out = out + weights[..., keys.shape[2] + i, None] * value[:, :, None]
    return out.flatten(1, 2).transpose(1, 2)


class Eagle3Drafter(AutoregressiveDrafter):
    """Drafts from the layer's own hidden states, a pass for each level of the tree."""

    def __init__(self, model: Eagle3Model, target: Target):
        config = model.config
        self.config = config
        self.layers = config.target_layer_ids
        self.block_size = config.block_size
        self.vocab_size = target.vocab_size
        self.device, self.dtype = target.device, target.dtype
        with torch.no_grad():
            model = model.to(self.device, self.dtype)
            self._embed, self._fc = model.embed_tokens.weight, PackedLinear(model.fc.folded_weight())
            self._joined, self._layer = model.layer.joined, FusedLayer(model.layer)
            self._norm, self._head = model.norm, PackedLinear(model.lm_head.weight)
            self.vocabulary = model.vocabulary()
        self._rope = RopeTable(config.rope_theta, config.head_dim, self.device, self.dtype)

    def fuse(self, features: Tensor) -> Tensor:
        """Target features [n, layers·d] → g [n, d]."""
        return self._fc(features)

    def step(self, ids: Tensor, above: Tensor | None, step: ForwardPass) -> Tensor:
        if above is None:
            raise ValueError("each token is read below a state")
        embedded = F.embedding(ids, self._embed)
        rope = self._rope(step.positions, step.length)
        step.once("rope", lambda: rope)
        return self._layer.block(self._joined(embedded, above)[None], above[None], None, step)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [n, columns] of the layer's outputs [n, d]."""
        return self._head(self._norm(hidden))

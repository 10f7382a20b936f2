"""EAGLE-3: one decoder layer that drafts token by token from the target's features and its own.

Source: arXiv 2503.01840. Features of several target layers are joined by `fc` into g. The layer's attention reads
[norm(embed(x_{i+1})); norm(g_i)], 2d wide, at RoPE position i; its output h_i gives the logits of x_{i+2}, and takes
g's place where the target has not been yet: at x_{i+2} drafted, the next input is [norm(embed(x_{i+2})); norm(h_i)].

Trained by *training-time test*: γ steps, the first on the target's features, each later one on the layer's own outputs
with the true tokens. A query of step k at place i attends to the keys of the first step up to i and to one entry of
each later step, its own. So the steps of different places never meet, and only the places that a loss looks at
(anchors) are computed: keys and values of all tokens, queries of the anchors.

Published drafts differ in norms and depth (`Eagle3Config`): RedHat's keep the normed state in the residual, EAGLE-3.1
norms each of the target's states and what is fed back, gpt-oss's norms the states together, and some have further
layers, which read the state alone. All of them train here too.

Directories: `LlamaForCausalLMEagle3`, which engines serve, and DeepSeek's `Qwen3Eagle3Model` (q/k norms).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.drafters.algorithm import Algorithm
from deepspec.drafters.autoregressive import AutoregressiveDrafter
from deepspec.drafters.checkpoint import Checkpoint, load_network
from deepspec.drafters.eagle_network import Layer, attend_with_own, rows
from deepspec.drafters.network import Network, NormalisedLinear, RMSNorm, like_target, missing_keys
from deepspec.drafters.origin import Origin, check_kept, open_origin
from deepspec.drafters.params import Eagle3Params, EagleParams
from deepspec.drafters.rope import Rope, Scaling, read_rope, written_rope
from deepspec.drafters.start import init_from_target, resolve_start
from deepspec.errors import DeepSpecError
from deepspec.target.attention import ForwardPass
from deepspec.target.ends import Ends
from deepspec.target.fused import FusedLayer, PackedLinear, RotaryTable
from deepspec.target.model import Target

SERVED, DEEPSEEK = "LlamaForCausalLMEagle3", "Qwen3Eagle3Model"


@dataclass(frozen=True)
class Eagle3Config:
    """Sizes of the network.

    Args:
        num_hidden_layers: all but the first read the state alone.
        norm_before_residual: the residual adds to the normed state, not to the state as it came.
        norm_before_fc: the target's states are normed together.
        fc_norm: each of them is normed by itself (EAGLE-3.1).
        norm_output: what is fed back is the output behind the last norm (EAGLE-3.1).
        sliding_window: a place sees so many, itself among them; None: all before it.
    """

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
    num_hidden_layers: int = 1
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    rope_scaling: Scaling | None = None
    sliding_window: int | None = None

    @classmethod
    def read(cls, config: dict[str, Any]) -> Self:
        """From a `config.json` of either kind, in our own keys.

        Raises:
            DeepSpecError: a missing key, or an option that is not supported.
        """
        for key, supported in _FIXED.items():
            if config.get(key, supported) != supported:
                raise DeepSpecError(f"{key} {config[key]!r} is not supported, only {supported!r}")
        rope_theta, rope_scaling = read_rope(config)
        heads = config.get("num_attention_heads")
        eagle = config.get("eagle_config") or {}
        layers = config.get("target_layer_ids", eagle.get("eagle_aux_hidden_state_layer_ids"))
        found = config | {"target_layer_ids": layers, "rope_theta": rope_theta}
        found["rope_scaling"] = rope_scaling
        found.setdefault("head_dim", heads and config.get("hidden_size", 0) // heads)
        found.setdefault("num_key_value_heads", heads)
        found.setdefault("draft_vocab_size", config.get("vocab_size"))
        found.setdefault("num_target_layers", config.get("target_num_hidden_layers"))
        found.setdefault("block_size", config.get("ttt_length", 5))
        found["qk_norm"] = config.get("qk_norm", config["architectures"][0] == DEEPSEEK)
        if missing := missing_keys(cls, found):
            raise DeepSpecError(f"config.json of an EAGLE-3 draft lacks {', '.join(missing)}")
        known = {f.name: found[f.name] for f in fields(cls) if found.get(f.name) is not None}
        return cls(**known | {"target_layer_ids": tuple(found["target_layer_ids"])})

    @classmethod
    def for_target(cls, params: Eagle3Params, target: Ends) -> Eagle3Config:
        """Sizes that follow the target's own."""
        new = params.version == "3.1"
        return cls(**cls.sizes_of(params, target), fc_norm=new, norm_output=new)

    @staticmethod
    def sizes_of(params: EagleParams, target: Ends) -> dict[str, Any]:
        """Return the sizes that EAGLE's drafts share."""
        layers = params.target_layer_ids or default_layers(target.num_layers)
        return {
            **like_target(target, layers, params.draft_vocab_size, params.rope == "target"),
            "block_size": params.block_size,
            "qk_norm": params.qk_norm,
            "sliding_window": params.sliding_window,
        }

    def to_dict(self) -> dict[str, Any]:
        """`config.json` with every key that a reader may look for."""
        last = ("qk_norm", "num_hidden_layers", "rope_scaling", "sliding_window", *VARIANTS)
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in last}
        layers = list(self.target_layer_ids)
        return {
            "architectures": [DEEPSEEK if self.qk_norm else SERVED],
            "model_type": "qwen3" if self.qk_norm else "llama",
            **sizes,
            "num_hidden_layers": self.num_hidden_layers,
            "draft_num_hidden_layers": self.num_hidden_layers,
            **_FIXED,
            **{name: getattr(self, name) for name in VARIANTS},
            "target_layer_ids": layers,
            "target_hidden_size": self.hidden_size,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": layers, "use_aux_hidden_state": True},
            "rope_parameters": written_rope(self),
            "ttt_length": self.block_size,
            "dtype": "bfloat16",
            **self._window(),
        }

    def _window(self) -> dict[str, Any]:
        if self.sliding_window is None:
            return {}
        kinds = ["sliding_attention"] * self.num_hidden_layers
        return {"sliding_window": self.sliding_window, "use_sliding_window": True, "layer_types": kinds}


VARIANTS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_FIXED = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False}


def default_layers(count: int) -> list[int]:
    """EAGLE-3's low, middle and high layer: 1, L/2 − 1 and L − 4, what engines assume; fewer in a shallow target."""
    return sorted({min(max(layer, 0), max(count - 2, 0)) for layer in (1, count // 2 - 1, count - 4)})


class Eagle3Model(Network):
    """The network, trained by unrolling it from anchors."""

    def __init__(self, config: Eagle3Config, start: str = "random"):
        super().__init__(config)
        self.start = start
        count, d = len(config.target_layer_ids), config.hidden_size
        self.norms_features = config.norm_before_fc or config.fc_norm
        self.fc = NormalisedLinear(count * d, d)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.input_norm = RMSNorm(count * d, config.rms_norm_eps) if config.norm_before_fc else None
        norms = (RMSNorm(d, config.rms_norm_eps) for _ in range(count))
        self.fc_norm = nn.ModuleList(norms) if config.fc_norm else None
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.initialise()

    def init_from_target(self, target: Ends, channel_std: Tensor) -> None:
        init_from_target(self.decoder_layers(), self.norm, self.fc, target, channel_std)
        with torch.no_grad():
            for norm, deviation in zip(
                self.fc_norm or (), channel_std.chunk(len(self.config.target_layer_ids)), strict=False
            ):
                cast(RMSNorm, norm).weight.fill_(deviation.square().mean().sqrt())  # states keep their size

    def decoder_layers(self) -> list[Layer]:
        """Return its layers, the first of which reads the embeddings too."""
        return cast("list[Layer]", list(self.layers))  # a ModuleList forgets what it holds

    def stored_name(self, name: str) -> str:
        if self.config.qk_norm or self.config.num_hidden_layers > 1 or not name.startswith("layers.0."):
            return name
        return "midlayer." + name.removeprefix("layers.0.")

    def fuse(self, features: Tensor) -> Tensor:
        """Return g [..., d] of target features [..., layers·d]."""
        return self.fc(self.normed(features))

    def normed(self, features: Tensor) -> Tensor:
        """Return what `fc` reads of the target's features [..., layers·d]."""
        if self.input_norm is not None:
            return self.input_norm(features)
        if self.fc_norm is None:
            return features
        parts = features.chunk(len(self.fc_norm), -1)
        return torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)

    def forward(self, features: Tensor, tokens: Tensor, anchors: Tensor) -> Tensor:
        """Hidden states of the drafts that start at the anchors, the true tokens fed.

        Args:
            features: [batch, n, layers·d] of every token of the sequences.
            tokens: int64 [batch, n].
            anchors: int64 [batch, blocks], positions of the anchors (>= 1).

        Returns:
            [batch, blocks, γ, d] after the final norm: row k predicts the token at anchor + k + 1.
        """
        n = tokens.shape[1]
        fused = self.fuse(features)  # g [batch, n, d]
        embedded = self.embed_tokens(tokens)
        shared = self._first_step(embedded[:, 1:], fused[:, :-1])  # place i: x_{i+1} with g_i
        first = anchors - 1  # place of the first step
        hidden = rows(fused, first)
        places = torch.arange(n - 1, device=tokens.device)
        steps: list[Tensor] = []
        steps_own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]  # entries of the later steps
        for k in range(self.config.block_size):
            if k == 0 or self.config.sliding_window is not None:
                mask = self._mask(places, first, k, hidden.dtype)
            fed = rows(embedded, (anchors + k).clamp(max=n - 1))
            rope = self.rope(first + k, hidden.dtype)
            before = self._in_window(steps_own)
            hidden, own = self.run(self._unrolled, fed, hidden, rope, (shared, mask), before, k > 0)
            for entries, new in zip(steps_own, own, strict=True):
                entries += new
            steps.append(self.norm(hidden))
            if self.config.norm_output:
                hidden = steps[-1]
        return torch.stack(steps, 2)

    def _first_step(self, embedded: Tensor, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's keys and values of all places in the first step; inputs [batch, places, d]."""
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rope = self.rope(places, hidden.dtype)
        shared = []
        for layer in self.decoder_layers():
            x = layer.joined(embedded, hidden)
            keys, values = layer.self_attn.keys_values(x, rope)
            shared.append((keys, values))
            if layer is not self.layers[-1]:
                mask = self._mask(places[0], places.expand(len(x), -1), 0, x.dtype)
                attended = attend_with_own(layer.self_attn.queries(x, rope), keys, values, mask, [])
                hidden = layer.finish(attended, layer.residual(hidden))
        return shared

    def _mask(self, places: Tensor, first: Tensor, step: int, dtype: torch.dtype) -> Tensor:
        """Return the additive mask [batch, 1, m, places] of a step; `first` [batch, m] are the places of the first."""
        seen = places <= first[..., None]
        if (window := self.config.sliding_window) is not None:
            seen = seen & (places > first[..., None] + step - window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=places.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min / 2)[:, None]

    def _in_window(
        self, entries: list[list[tuple[Tensor, Tensor]]]
    ) -> tuple[tuple[tuple[Tensor, Tensor], ...], ...]:
        """Return of each layer the entries of earlier steps that the next one still sees."""
        window = self.config.sliding_window
        kept = len(entries[0]) if window is None else min(window - 1, len(entries[0]))
        return tuple(tuple(own[len(own) - kept :]) for own in entries)

    def _unrolled(self, fed, hidden, rope, shared_and_mask, own, later: bool) -> tuple[Tensor, list]:
        """Run a step of the unrolled pass: the last layer's outputs, and of a later step each layer's keys and values.

        `fed` are the tokens' embeddings, `hidden` the states below, both [batch, blocks, d].
        """
        shared, mask = shared_and_mask
        entries = []
        for layer, (keys, values), before in zip(self.decoder_layers(), shared, own, strict=True):
            attention = layer.self_attn
            x = layer.joined(fed, hidden)
            queries = attention.queries(x, rope)
            new = [attention.keys_values(x, rope)] if later else []
            attended = attend_with_own(queries, keys, values, mask, [*before, *new])
            hidden = layer.finish(attended, layer.residual(hidden))
            entries.append(new)
        return hidden, entries


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
            model = model.for_drafting(target)
            self._embed, self._fc = model.embed_tokens.weight, PackedLinear(model.fc.folded_weight())
            self._normed, self._first = model.normed, model.decoder_layers()[0]
            self._layer, *self._further = [FusedLayer(layer) for layer in model.decoder_layers()]
            self._norm, self._head = model.norm, PackedLinear(model.head)
            self.vocabulary = model.vocabulary()
        self._rope = RotaryTable(partial(Rope.of(config).operands, dtype=self.dtype), self.device)

    def fuse(self, features: Tensor) -> Tensor:
        """Target features [n, layers·d] → g [n, d]."""
        return self._fc(self._normed(features))

    def step(self, ids: Tensor, above: Tensor | None, step: ForwardPass) -> Tensor:
        if above is None:
            raise ValueError("each token is read below a state")
        embedded = F.embedding(ids, self._embed)
        rope = self._rope(step.positions, step.length)
        step.once("rope", lambda: rope)
        joined, residual = self._first.joined(embedded, above), self._first.residual(above)
        x = self._layer.block(joined[None], residual[None], None, step)
        for layer in self._further:
            x = layer(x, step=step)
        return self._norm(x[0]) if self.config.norm_output else x[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [n, columns] of what `step` gives [n, d]."""
        return self._head(hidden if self.config.norm_output else self._norm(hidden))


def read(checkpoint: Checkpoint, target: Ends) -> Eagle3Model:
    """Return the network of a directory, in float32.

    Raises:
        DeepSpecError: an unsupported configuration, or an unknown, missing or misshapen weight.
    """
    return load_network(Eagle3Model(Eagle3Config.read(checkpoint.config)), checkpoint, target)


def load(checkpoint: Checkpoint, target: Target) -> Eagle3Drafter:
    """Load a draft of either format, ours or a published one."""
    return Eagle3Drafter(read(checkpoint, target), target)


def network(params: Eagle3Params, target: Ends) -> Eagle3Model:
    """Make the network to train."""
    origin = open_origin(params.start, ("eagle3",), target)
    if origin is None:
        start = resolve_start(params.start, target, 1, params.qk_norm)
        return Eagle3Model(Eagle3Config.for_target(params, target), start)
    config = Eagle3Config.read(origin.config)
    changed = go_on(params, origin, config)
    if "version" in params.model_fields_set:
        new = params.version == "3.1"
        check_kept({"fc_norm": new, "norm_output": new}, origin)
    model = Eagle3Model(replace(config, **changed), params.start)
    model.origin = origin
    return model


def go_on(params: EagleParams, origin: Origin, config: Eagle3Config) -> dict[str, Any]:
    """Return what of the `config` of the draft that it begins as changes, where its section asks for it.

    Raises:
        DeepSpecError: it asks for what the draft cannot change.
    """
    asked = params.model_fields_set
    if "target_layer_ids" in asked and params.target_layer_ids:
        check_kept({"target_layer_ids": params.target_layer_ids}, origin)
    changed: dict[str, Any] = {
        name: getattr(params, name) for name in ("block_size", "sliding_window") if name in asked
    }
    if "draft_vocab_size" in asked:
        changed["draft_vocab_size"] = min(params.draft_vocab_size or config.vocab_size, config.vocab_size)
    return changed


ALGORITHM = Algorithm(Eagle3Params, (SERVED, DEEPSEEK), load, network, read=read)

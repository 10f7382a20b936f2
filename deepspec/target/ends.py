"""The ends of a target: embeddings, head, configuration and tokenizer, without the layers between.

They are all that a drafter shares with its target and all that its law needs beside the post-norm states, so training
on cached features takes the memory of the ends whatever lies between. `load_ends` reads them by key from the shards of
a checkpoint; a file that holds nothing of them is not opened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deepspec.errors import DeepSpecError
from deepspec.target.chat import Templated
from deepspec.target.checkpoint import Checkpoint, name_of, skeleton
from deepspec.target.checks import check_source, stop_tokens
from deepspec.target.fused import FusedLayer, LlamaLayer, PackedLinear, is_llama_shaped
from deepspec.target.head import HeadTransform, head_transform
from deepspec.target.identity import directory_digest, target_record
from deepspec.target.inference import inference
from deepspec.target.native import laws
from deepspec.target.selftest import STATES, Verdict, kept_verdict, refuse
from deepspec.target.source import (
    decoder_layers,
    dtype_name,
    from_pretrained,
    length_limit,
    text_decoder,
)
from deepspec.target.states import keeps_states

H_LAST = -2  # as a layer id: h_last, after the final norm
_NORMS = ("norm", "final_layernorm", "ln_f", "final_norm", "norm_f", "final_layer_norm", "out_norm")


class Ends(Templated, ABC):
    """What of a target does not need its layers.

    Attributes:
        config: of its text model.
        embeddings, head_weight: [vocab, d], in `dtype` on `device`.
        head_transform: what its logits are of the head's product.
        digest: which target it is; empty for one that is not from a directory.
    """

    embeddings: Tensor
    head_weight: Tensor
    head_transform: HeadTransform
    num_layers: int
    dtype: torch.dtype
    device: torch.device

    def __init__(
        self,
        config: Any,
        generation_config: Any,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        weights: str = "dense",
        verdict: Verdict | None = None,
        digest: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.tokenizer = tokenizer
        self.source = source
        self.weights = weights
        self.verdict = verdict or Verdict()
        self.digest = digest
        self.config = config
        self.generation_config = generation_config
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.max_length: int = length_limit(config)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token that ends an answer: the generation config's and the tokenizer's own."""
        own = self.tokenizer.eos_token_id
        return frozenset((*stop_tokens(self.generation_config), *(() if own is None else (own,))))

    @cached_property
    def _head(self) -> PackedLinear:
        return PackedLinear(self.head_weight)

    @inference
    def logits(self, hidden: Tensor) -> Tensor:
        """h_last [..., d] → logits [..., vocab] in the target's dtype."""
        return self.head_transform(self._head(hidden))

    @torch.inference_mode()
    def log_norm(self, hidden: Tensor) -> Tensor:
        """h_last [n, d] → float32 [n], the log-normaliser of the law, in chunks."""
        native = self._head.native if self.head_transform.plain else None
        log_norm = native.log_norm if native else lambda part: self.logits(part).float().logsumexp(-1)
        return torch.cat([log_norm(part) for part in hidden.split(256)])

    @torch.inference_mode()
    def log_norm_of(self, logits: Tensor) -> Tensor:
        """Logits [n, vocab] of states → float32 [n], to the bit what `log_norm` makes of the states."""
        if self._head.native and self.head_transform.plain:
            return laws.log_norm(logits)
        return logits.float().logsumexp(-1)

    @property
    def precision(self) -> str:
        """How it computes, for records: "bfloat16", or "int4 weights, bfloat16"."""
        return (
            dtype_name(self.dtype)
            if self.weights == "dense"
            else f"{self.weights} weights, {dtype_name(self.dtype)}"
        )

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding, of the full-attention layers where there are several kinds."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        rope = rope.get("full_attention") or rope
        return float(rope.get("rope_theta") or getattr(self.config, "rope_theta", None) or 10000.0)

    def last_layers(self, count: int) -> list[FusedLayer]:
        """Return the last decoder layers, lowest first.

        Raises:
            DeepSpecError: there are fewer, or they are of another shape than Llama's, or in 4 bits.
        """
        if count > self.num_layers:
            raise DeepSpecError(f"{self.source} has {self.num_layers} layers, {count} were asked for")
        layers = [] if self.weights != "dense" else self._last(count)
        fused = [layer for layer in layers if isinstance(layer, FusedLayer)]
        if len(fused) < count:
            raise DeepSpecError(
                f"{self.source}: a draft cannot begin as layers of this shape; use `start: random`"
            )
        return fused

    @abstractmethod
    def _last(self, count: int) -> Sequence[nn.Module]:
        """Return the last decoder layers as they are run; none where they cannot be lent."""

    @property
    @abstractmethod
    def last_norm(self) -> Tensor:
        """Weight [d] of the norm behind the last of `last_layers`."""

    @abstractmethod
    def normed(self, hidden: Tensor) -> Tensor:
        """Return h_last [..., d] of the last layer's states [..., d].

        Raises:
            DeepSpecError: no norm is known behind its layers.
        """

    def check_layers(self, layer_ids: Iterable[int]) -> None:
        """Feature layers are -1 (embeddings) to num_layers − 2: engines hand out the last one normed."""
        layer_ids = tuple(layer_ids)
        if layer_ids and not self.verdict.features:
            raise DeepSpecError(
                f"{self.source}: its layers hand out several states a token, which no drafter reads as features; "
                "use medusa, lm, lookup or suffix"
            )
        for layer in layer_ids:
            if not -1 <= layer < self.num_layers - 1:
                raise DeepSpecError(
                    f"target layer {layer} cannot be a feature: this target has layers -1 to {self.num_layers - 2}"
                )


def load_ends(directory: str | Path, device: str | torch.device = "cpu") -> Ends:
    """Read the ends of a target's directory; of its layers nothing is read.

    A draft that begins as the target's last layers reads these when it asks for them.

    Args:
        directory: as the stage `target` writes it, or any checkpoint of transformers with a tokenizer.

    Raises:
        DeepSpecError: no target there, no weights of these names in its files, or a target that its self-test refused.
    """
    directory = Path(directory)
    check_source(str(directory))
    digest = directory_digest(directory)
    ends = StoredEnds(directory, digest, torch.device(device))
    refuse(str(directory), ends.verdict)
    return ends


class StoredEnds(Ends):
    """Ends read by key from a checkpoint."""

    def __init__(self, directory: Path, digest: str, device: torch.device):
        source = str(directory)
        config = from_pretrained(AutoConfig, source)
        self._model = skeleton(source, config)
        self._checkpoint = Checkpoint(directory, self._model)
        text = self._model.config.get_text_config()
        super().__init__(
            text,
            _generation_config(directory, self._model),
            from_pretrained(AutoTokenizer, source),
            source,
            verdict=kept_verdict(digest) or _presumed(text),
            digest=digest,
            chat_template_kwargs=target_record(directory).get("chat_template_kwargs"),
        )
        self._layers = decoder_layers(text_decoder(self._model), text.num_hidden_layers)
        self.num_layers = len(self._layers)
        found = self._checkpoint.ends()
        self.device = device
        self.dtype = _dtype(config, found["embeddings"])
        ready = {name: weight.to(device, self.dtype) for name, weight in found.items() if weight is not None}
        self.embeddings = ready["embeddings"]
        self.head_weight = self.embeddings if found["head"] is found["embeddings"] else ready["head"]
        self.head_transform = head_transform(text, ready.get("bias"))
        self._lent: dict[int, list[FusedLayer]] = {}

    def _last(self, count: int) -> list[FusedLayer]:
        if not self.verdict.trees or not all(is_llama_shaped(layer) for layer in self._layers[-count:]):
            return []
        if count not in self._lent:
            self._lent[count] = [self._read(layer) for layer in self._layers[-count:]]
        return self._lent[count]

    @property
    def last_norm(self) -> Tensor:
        norm = f"{name_of(self._model, text_decoder(self._model))}.norm.weight"
        return self._checkpoint.read([norm])[norm].to(self.device, self.dtype)

    @torch.inference_mode()
    def normed(self, hidden: Tensor) -> Tensor:
        return self._final_norm(hidden)

    @cached_property
    def _final_norm(self) -> nn.Module:
        norm = final_norm(text_decoder(self._model), self.source)
        prefix = name_of(self._model, norm)
        weights = self._checkpoint.read(f"{prefix}.{name}" for name in norm.state_dict())
        norm.load_state_dict(
            {name.removeprefix(f"{prefix}."): weight for name, weight in weights.items()}, assign=True
        )
        return norm.to(self.device, self.dtype)

    def _read(self, layer: nn.Module) -> FusedLayer:
        """Return one of the skeleton's layers with its weights."""
        prefix = name_of(self._model, layer)
        names = {name: f"{prefix}.{name}" for name in layer.state_dict()}
        weights = self._checkpoint.read(names.values())
        layer.load_state_dict({name: weights[whole] for name, whole in names.items()}, assign=True)
        with torch.no_grad():
            fused = FusedLayer(cast(LlamaLayer, layer.to(self.device, self.dtype)))  # its name says so
        layer.to("meta")
        return fused


def final_norm(decoder: nn.Module, source: str) -> nn.Module:
    """Return the norm behind a decoder's layers.

    Raises:
        DeepSpecError: none of a known name.
    """
    for name in _NORMS:
        if isinstance(norm := getattr(decoder, name, None), nn.Module):
            return norm
    raise DeepSpecError(f"{source}: no final norm behind its layers that is known ({', '.join(_NORMS)})")


def _generation_config(directory: Path, model: PreTrainedModel) -> Any:
    if (directory / "generation_config.json").exists():
        return from_pretrained(GenerationConfig, str(directory))
    return model.generation_config


def _dtype(config: Any, embeddings: Tensor | None) -> torch.dtype:
    """Return the dtype in which transformers loads the model: the configuration's, else that of the weights."""
    named = config.dtype or config.get_text_config().dtype
    if named is None and embeddings is not None:
        named = embeddings.dtype
    return getattr(torch, named) if isinstance(named, str) else named


def _presumed(config: Any) -> Verdict:
    """Return the verdict on a target that was never run here: what its configuration says of its layers."""
    reason = keeps_states(config)
    return Verdict(body=STATES, reason=reason) if reason else Verdict()

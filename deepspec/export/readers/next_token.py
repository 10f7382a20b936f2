"""A target's directory with a next-token module: every step computed anew, through transformers' own decoder layer."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from deepspec.export.readers.directory import Directory, Facts, Reading, Unreadable
from deepspec.export.readers.sample import Sample


@dataclass(frozen=True)
class Names:
    """What engines call the parts of a module, below its prefix."""

    joins: str
    embedding_norm: str
    hidden_norm: str
    norm: str
    layer: str = ""
    hidden_first: bool = False


DEEPSEEK = Names("eh_proj", "enorm", "hnorm", "shared_head.norm")  # GLM's too
QWEN = Names("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "layers.0.")
MIMO = Names("input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm", hidden_first=True)


class _Module:
    def __init__(self, source: Directory):
        if source.path is None:
            raise Unreadable("no directory: an engine takes the target's configuration from there")
        self.source = source
        self.names, self.prefix = self._found()
        config = AutoConfig.from_pretrained(source.path).get_text_config()
        self.decoder: Any = self._decoder(config)

    def _found(self) -> tuple[Names, str]:
        for names in (DEEPSEEK, QWEN, MIMO):
            for name in self.source.weights:
                prefix = name.removesuffix(f".{names.joins}.weight") + "."
                if prefix != f"{name}." and f"{prefix}{names.hidden_norm}.weight" in self.source.weights:
                    return names, prefix
        raise Unreadable("no next-token module: an engine would find none to draft with")

    def part(self, name: str, *shape: int) -> Tensor:
        return self.source.take(f"{self.prefix}{name}.weight", *shape)

    def _decoder(self, config: Any) -> Any:
        """Return a decoder of one layer, the module's, with the module's norm behind it."""
        names = self.names
        parts = {
            f"{self.prefix}{name}.weight" for name in (names.joins, names.embedding_norm, names.hidden_norm)
        }
        parts.add(f"{self.prefix}{names.norm}.weight")
        below = f"{self.prefix}{names.layer}"
        layer = [name for name in self.source.weights if name.startswith(below) and name not in parts]
        state = {f"layers.0.{name.removeprefix(below)}": self.source.take(name) for name in layer}
        state |= {
            "norm.weight": self.part(names.norm),
            "embed_tokens.weight": torch.zeros(1, config.hidden_size),
        }
        single = _single(config, any(".experts." in name for name in layer))
        kind = type(AutoModel.from_config(single))
        options = {"config": single, "state_dict": state, "dtype": torch.float32}
        loaded, info = kind.from_pretrained(None, output_loading_info=True, **options)
        if lacking := sorted(info["missing_keys"]):
            raise Unreadable(f"{lacking[0]} is missing: an engine would leave it at its initial value")
        return loaded.eval()

    def normed(self, name: str, x: Tensor) -> Tensor:
        """Norm x [n, d] as the target's norms do, with weights of the module's."""
        norm = deepcopy(self.decoder.norm)
        norm.load_state_dict({"weight": self.part(name, x.shape[-1])})
        return norm(x)

    def last(self, embedded: Tensor, below: Tensor) -> Tensor:
        """Return the output behind the norm at the last place [1, d], of embeddings and states [n, d]."""
        d = below.shape[-1]
        parts = [self.normed(self.names.embedding_norm, embedded), self.normed(self.names.hidden_norm, below)]
        x = (
            torch.cat(parts[::-1] if self.names.hidden_first else parts, -1)
            @ self.part(self.names.joins, d, 2 * d).T
        )
        return self.decoder(inputs_embeds=x[None], use_cache=False).last_hidden_state[0, -1:]


def _single(config: Any, experts: bool) -> Any:
    """Return the target's configuration for one layer of full attention, with experts or without."""
    single = deepcopy(config)
    kinds = {
        "layer_types": ["full_attention"],
        "mlp_layer_types": ["sparse" if experts else "dense"],
        "mlp_only_layers": [] if experts else [0],
        "first_k_dense_replace": 0 if experts else 1,
        "decoder_sparse_step": 1,
    }
    for name, value in kinds.items():
        if getattr(config, name, None) is not None:
            setattr(single, name, value)
    single.num_hidden_layers, single.vocab_size, single.pad_token_id = 1, 1, None
    return single


@torch.no_grad()
def stitched(source: Directory, sample: Sample) -> Reading:
    """Read the module and draft with it, the true tokens fed and each step over all places anew."""
    module = _Module(source)
    logits = []
    for anchor in sample.anchors.tolist():
        below = sample.last[:anchor]
        for _ in range(sample.gamma):
            tokens = sample.tokens[1 : len(below) + 1]
            below = torch.cat((below, module.last(sample.embeddings[tokens], below)))
        logits.append(below[anchor:] @ sample.head.T)
    return Reading(torch.stack(logits), Facts())

"""A target's own next-token modules (MTP): how checkpoints name them, and where a directory keeps them.

A module reads W [norm(embed(x_{i+1})); norm(h_i)], h the target's post-norm state, through one decoder layer of the
target's kind; behind a norm, the target's head gives of it the law of x_{i+2}. transformers leaves modules out when it
loads a model, so a target that is written anew keeps them in a file of their own, under the names that they had.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from deepspec.target.weights import indexed_places, names_in, read_named, weight_places

FILE = "next_token_modules.safetensors"


@dataclass(frozen=True)
class Style:
    """What the parts of a module are called below its prefix.

    Args:
        joins: W [d, 2d].
        embedding_norm, hidden_norm: before it.
        norm: behind the layer.
        layer: how the names of its decoder layer begin.
        embeddings, head: where it brings copies of the target's.
        hidden_first: W reads the state before the embedding.
    """

    joins: str
    embedding_norm: str
    hidden_norm: str
    norm: str
    layer: str = ""
    embeddings: str = "embed_tokens"
    head: str = "lm_head"
    hidden_first: bool = False

    def parts(self) -> dict[str, str]:
        """Return name below the prefix → which part it is, of all but the layer's."""
        named = ("joins", "embedding_norm", "hidden_norm", "norm", "embeddings", "head")
        return {f"{getattr(self, part)}.weight": part for part in named}


STYLES = {
    "deepseek": Style("eh_proj", "enorm", "hnorm", "shared_head.norm", head="shared_head.head"),  # GLM's too
    "qwen": Style("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "layers.0."),
    "mimo": Style("input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm", hidden_first=True),
}


@dataclass(frozen=True)
class Module:
    """A next-token module in a checkpoint.

    Args:
        style: a name in `STYLES`.
        prefix: of all its names.
    """

    style: str
    prefix: str

    @property
    def naming(self) -> Style:
        return STYLES[self.style]


@dataclass(frozen=True)
class Parts:
    """Weights of a module: `parts` as `Style.parts` calls them, and those of its layer by their names below it."""

    parts: dict[str, Tensor]
    layer: dict[str, Tensor]


def modules_of(names: Iterable[str]) -> list[Module]:
    """Return the modules among the names of a checkpoint's weights, in their order."""
    names = set(names)
    found = []
    for style, naming in STYLES.items():
        ends = f"{naming.joins}.weight"
        prefixes = {name.removesuffix(ends) for name in names if name.endswith(ends)}
        found += [
            Module(style, prefix)
            for prefix in prefixes
            if prefix.endswith(".") and f"{prefix}{naming.hidden_norm}.weight" in names
        ]
    return sorted(found, key=lambda module: [int(number) for number in re.findall(r"\d+", module.prefix)])


def stack_of(modules: list[Module]) -> list[Module]:
    """Return the modules that draft together: all of DeepSeek's, each on the states of the last; else the first."""
    stacked = [module for module in modules if module.style == "deepseek"]
    return stacked if stacked == modules else modules[:1]


def places_of(directory: Path) -> dict[str, Path]:
    """Return the file of each weight of a directory, modules in files that transformers does not read among them.

    Raises:
        DeepSpecError: no weights, or files that cannot be read.
    """
    own = directory / FILE
    found = indexed_places(directory) | weight_places(directory)
    return found | (dict.fromkeys(names_in(own), own) if own.exists() else {})


def read_module(directory: Path, module: Module) -> Parts:
    """Read the weights of a module; nothing else of the directory is read.

    Raises:
        DeepSpecError: files that cannot be read.
    """
    places = places_of(directory)
    found = read_named(places, [name for name in places if name.startswith(module.prefix)])
    known, parts, layer = module.naming.parts(), {}, {}
    for name, weight in found.items():
        below = name.removeprefix(module.prefix)
        if below in known:
            parts[known[below]] = weight
        elif below.startswith(module.naming.layer) or not below.startswith(
            "layers."
        ):  # others: of later steps
            layer[below.removeprefix(module.naming.layer)] = weight
    return Parts(parts, layer)


def last_layer(places: Iterable[str], layers: int) -> str | None:
    """Return how the names of a target's last decoder layer begin; None where no name says which it is."""
    last = f".layers.{layers - 1}."
    found = {name[: name.index(last)] + last for name in places if last in name}
    return found.pop() if len(found) == 1 else None


def read_layer(directory: Path, prefix: str) -> Parts:
    """Read a decoder layer of a target, and the norm behind the last one."""
    places = places_of(directory)
    norm = f"{prefix[: prefix.index('.layers.')]}.norm.weight"
    found = read_named(places, [name for name in places if name.startswith(prefix) or name == norm])
    parts = {"norm": found.pop(norm)} if norm in found else {}
    return Parts(parts, {name.removeprefix(prefix): weight for name, weight in found.items()})


def one_layer(config: PreTrainedConfig, experts: bool) -> PreTrainedConfig:
    """Return a target's text configuration for one decoder layer of full attention, without its vocabulary."""
    own, count = deepcopy(config), config.num_hidden_layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) >= count and name.endswith(("_types", "_layers")):
            setattr(own, name, value[count - 1 : count])
    named: dict[str, Any] = {
        "layer_types": ["full_attention"],
        "mlp_layer_types": ["sparse" if experts else "dense"],
        "mlp_only_layers": [] if experts else [0],
        "first_k_dense_replace": 0 if experts else 1,
        "decoder_sparse_step": 1,
    }
    for name, value in named.items():
        if getattr(config, name, None) is not None:
            setattr(own, name, value)
    own.num_hidden_layers, own.vocab_size = 1, 1
    own.pad_token_id = None
    own._attn_implementation = None  # transformers' choice, whatever the target runs on
    return own


def keep_modules(source: Path, directory: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint's next-token modules, if it has any, beside the weights of a target that is made of it."""
    places = places_of(source)
    prefixes = tuple(module.prefix for module in modules_of(places))
    if not prefixes:
        return
    found = read_named(places, [name for name in places if name.startswith(prefixes)])
    dense = (torch.float32, torch.float16, torch.bfloat16)
    kept = {name: w.to(dtype) if w.dtype in dense else w for name, w in sorted(found.items())}
    save_file(
        {name: weight.contiguous() for name, weight in kept.items()}, directory / FILE, {"format": "pt"}
    )

"""A checkpoint of transformers' read by key: some of a model's weights by the names that they have in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from deepspec.errors import DeepSpecError
from deepspec.target.source import from_pretrained, model_class
from deepspec.target.weights import read_named, weight_places


class Checkpoint:
    """The weights of a directory by the names that they have in the model."""

    def __init__(self, directory: Path, model: PreTrainedModel):
        self.directory, self.model = directory, model
        self.places = weight_places(directory)
        self.stored = _names_in_files(model, self.places)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read weights by the model's names.

        Raises:
            DeepSpecError: the files lack one.
        """
        names = list(names)
        if lacking := [name for name in names if name not in self.stored]:
            raise DeepSpecError(
                f"{self.directory}: its weights lack {lacking[0]}; fetch all of its files again"
            )
        found = read_named(self.places, {self.stored[name] for name in names})
        return {name: found[self.stored[name]] for name in names}

    @property
    def names(self) -> tuple[str, str]:
        """Return the model's names of embeddings and head."""
        into, out = (
            name_of(self.model, part)
            for part in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        )
        return f"{into}.weight", f"{out}.weight"

    def named_ends(self) -> dict[str, Tensor]:
        """Read embeddings and head by their names."""
        found = self.ends()
        both = zip(self.names, (found["embeddings"], found["head"]), strict=True)
        return {name: weight for name, weight in both if weight is not None}

    def ends(self) -> dict[str, Tensor | None]:
        """Read `embeddings`, `head` (the same tensor where they are one) and the head's `bias`."""
        head = self.model.get_output_embeddings()
        into, out = self.names
        tied = out in self.model.all_tied_weights_keys or into in self.model.all_tied_weights_keys
        names = [name for name in (into, out) if name in self.stored or not tied]
        found = self.read(names or [into])
        embeddings, weight = found.get(into, found.get(out)), found.get(out, found.get(into))
        if tied and embeddings is not None and weight is not None and torch.equal(embeddings, weight):
            weight = embeddings
        bias = None
        if getattr(head, "bias", None) is not None:
            name = out.removesuffix("weight") + "bias"
            bias = self.read([name])[name]
        return {"embeddings": embeddings, "head": weight, "bias": bias}


def stored_weights(directory: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor] | None:
    """Return some weights of a checkpoint by the model's names, nothing else of its files read.

    Args:
        wanted: says of a name whether it is.

    Returns:
        None where one of them is made of several in the files (experts that transformers puts together).

    Raises:
        DeepSpecError: no model or no weights there.
    """
    model = skeleton(str(directory), from_pretrained(AutoConfig, str(directory)))
    checkpoint = Checkpoint(directory, model)
    names = [name for name in model.state_dict() if wanted(name)]
    ends = checkpoint.named_ends()
    if any(name not in checkpoint.stored and name not in ends for name in names):
        return None
    found = checkpoint.read(name for name in names if name not in ends)
    return found | {name: weight for name, weight in ends.items() if name in names}


def skeleton(source: str, config: Any) -> PreTrainedModel:
    """Return the modules of a model without memory for their weights."""
    try:
        with torch.device("meta"):
            return model_class(config).from_config(config)
    except Exception as error:
        said = " ".join(str(error).split())[:160] or type(error).__name__
        raise DeepSpecError(f"{source}: cannot be loaded as a target: {said}") from error


def name_of(model: nn.Module, module: nn.Module) -> str:
    """Return the name of a module in a model."""
    return next(name for name, other in model.named_modules() if other is module)


def _names_in_files(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Return name in the model → name in the files, of weights that transformers loads as they are."""
    known = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    found = {}
    for name in stored:
        ours, converted = rename_source_key(name, renamings, converters, prefix, known)
        if ours not in known and name in known:
            ours, converted = rename_source_key(name, [], [], prefix, known)
        if converted is None:
            found[ours] = name
    return found

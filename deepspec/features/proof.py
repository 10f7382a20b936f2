"""Which layer's states are these? The first tokens of a conversation are run here, a layer in memory at a time.

A layer id that an engine takes otherwise than it was meant gives states of the right tokens and the right shape, and a
draft that learns from them drafts badly wherever it is served. So the states of some tokens are computed here, by
transformers' own code with the layers on disk, and each layer that an engine hands out must lie nearest to the one that
was asked for.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepspec.errors import DeepSpecError
from deepspec.target.source import decoder_layers, load_model, text_decoder

logger = logging.getLogger(__name__)

TOKENS = 32  # whose states are computed
FAR = 0.5  # of a state's size, in the median over the tokens: no state of this target is as far from its own


def check_layers(states: Tensor, layers: list[int], computed: Tensor, origin: str) -> None:
    """Refuse states of other layers than those that were asked for.

    Args:
        states: an engine's, [tokens, layers, d].
        layers: the engine's ids of them.
        computed: the state before each layer and behind the last, [tokens, num_layers + 1, d].
        origin: where the states are from, for the message.

    Raises:
        DeepSpecError: they lie nearer to another layer's, or far from all.
    """
    for place, layer in enumerate(layers):
        differences = _difference(states[:, place].float(), computed.float())
        nearest = int(differences.argmin())
        if nearest != layer:
            raise DeepSpecError(
                f"{origin}: the states under its layer id {layer} are those of id {nearest} "
                f"({nearest - layer:+d}): layer ids that are off"
            )
        if float(differences[nearest]) > FAR:
            raise DeepSpecError(
                f"{origin}: the states under its layer id {layer} are not this target's: off by "
                f"{float(differences[nearest]):.0%} of their size"
            )


def _difference(states: Tensor, computed: Tensor) -> Tensor:
    """Return how far states [tokens, d] are from each layer's [tokens, layers, d], of their size: [layers]."""
    far = (states[:, None] - computed).norm(dim=-1) / computed.norm(dim=-1).clamp(min=1e-6)
    return far.median(0).values


@torch.no_grad()
def computed_states(directory: Path, ids: list[int], layer_count: int) -> Tensor | None:
    """Compute the state before each layer and behind the last of a text's tokens, [tokens, layers + 1, d].

    Returns:
        None where transformers cannot run this checkpoint here.
    """
    found: list[Tensor] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"])[0].cpu())

    def behind(module: nn.Module, args: tuple, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[0].cpu())

    try:
        with tempfile.TemporaryDirectory() as offloaded:
            model = load_model(
                str(directory), dtype="auto", device_map={"": "disk"}, offload_folder=offloaded
            )
            decoder = text_decoder(model)
            layers = decoder_layers(decoder, layer_count)
            for layer in layers:
                layer.register_forward_pre_hook(before, with_kwargs=True)
            layers[-1].register_forward_hook(behind)
            decoder(input_ids=torch.tensor([ids[:TOKENS]]), use_cache=False)
    except (
        Exception
    ) as error:  # whatever a model's own code makes of it: a quantised checkpoint without a GPU
        logger.warning("%s: layers not proven: %s", directory, " ".join(str(error).split())[:160])
        return None
    return torch.stack(found, 1)

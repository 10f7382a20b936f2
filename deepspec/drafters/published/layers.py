"""Which of the target's layers a foreign draft reads, in our convention: i is the output of decoder layer i.

DeepSeek, z-lab and SpecForge's DFlash say `target_layer_ids`: outputs, as here. vLLM and speculators say
`(eagle_)aux_hidden_state_layer_ids` at the top: inputs, one higher. SGLang and ModelOpt have the same key inside
`eagle_config`: outputs where the first is 1, else inputs (SGLang since May 2026). A negative id counts from the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepspec.errors import DeepSpecError

EAGLE_KEY = "eagle_aux_hidden_state_layer_ids"
AUX_KEY = "aux_hidden_state_layer_ids"


@dataclass(frozen=True)
class Layers:
    """Layers that a draft reads.

    Args:
        ids: None where only the target can say.
        assumed: how they were read, where that was not certain.
        needed: what the target has to say.
    """

    ids: tuple[int, ...] | None
    assumed: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()


def read_layers(config: Mapping[str, Any], count: int, target_layers: int | None) -> Layers:
    """
    Return the layers of an EAGLE-3 draft, or of a block drafter in the speculators format.

    Args:
        count: how many states `fc` reads.
        target_layers: of the target; None where it is not known.

    Raises:
        DeepSpecError: no layer is named and `fc` does not read three, another number than it reads, or a layer that the
            target lacks.
    """
    eagle = config.get("eagle_config") or {}
    if outputs := config.get("target_layer_ids"):
        return _checked(tuple(outputs), count, target_layers, inputs=False)
    if inputs := config.get(EAGLE_KEY) or config.get(AUX_KEY):
        return _checked(tuple(inputs), count, target_layers, inputs=True)
    if ids := eagle.get(EAGLE_KEY):
        outputs_meant = ids[0] == 1
        found = _checked(tuple(ids), count, target_layers, inputs=not outputs_meant)
        said = (
            "outputs of layers, the first being 1"
            if outputs_meant
            else "inputs of layers, the first not being 1"
        )
        return Layers(found.ids, (f"eagle_config's layer ids read as {said}",), found.needed)
    return _eagle_default(count, target_layers)


def block_layers(ids: Sequence[int] | None, layers: int, count: int, target_layers: int | None) -> Layers:
    """
    Return the layers of a DFlash or DSpark draft.

    Args:
        ids: its `target_layer_ids`; None takes z-lab's default, as many as the draft has layers from the second to the
            third last.
        layers: of the draft.

    Raises:
        DeepSpecError: as `read_layers`.
    """
    if ids:
        return _checked(tuple(ids), count, target_layers, inputs=False)
    rule = f"target_layer_ids spread over the depth, {layers} from the second to the third last"
    if target_layers is None:
        return Layers(None, (rule,), ("target_layer_ids, which its config.json does not say",))
    if layers == 1:
        found: tuple[int, ...] = (target_layers // 2,)
    else:
        first, last = 1, target_layers - 3
        found = tuple(round(first + i * (last - first) / (layers - 1)) for i in range(layers))
    return Layers(_checked(found, count, target_layers, inputs=False).ids, (rule,))


def _eagle_default(count: int, target_layers: int | None) -> Layers:
    if count != 3:
        raise DeepSpecError(
            f"config.json names no layers of the target, and fc reads {count} states; engines assume three"
        )
    rule = "target layers 1, L/2 - 1 and L - 4 (outputs), what engines take where none are named"
    if target_layers is None:
        return Layers(None, (rule,), ("layer ids, which its config.json does not say",))
    ids = (1, target_layers // 2 - 1, target_layers - 4)
    return Layers(_checked(ids, count, target_layers, inputs=False).ids, (rule,))


def _checked(ids: tuple[int, ...], count: int, target_layers: int | None, inputs: bool) -> Layers:
    if len(ids) != count:
        raise DeepSpecError(f"config.json names {len(ids)} layers of the target, but fc reads {count} states")
    lowest = 0 if inputs else -1  # the embeddings, in either convention
    if min(ids) < lowest and target_layers is None:
        return Layers(None, (), (f"layer ids {list(ids)}, which count from the end",))
    from_end = 0 if target_layers is None else target_layers
    # Inputs are indices into the L + 1 hidden states of transformers, whose last one is the output of layer L - 1.
    found = tuple((i if i >= lowest else i + from_end + inputs) - inputs for i in ids)
    if target_layers is not None and not all(-1 <= i < target_layers for i in found):
        raise DeepSpecError(
            f"config.json names target layers {list(ids)}, and the target has {target_layers}"
        )
    return Layers(found)

"""Does every layer see as far back as transformers' own, to the token?

In 16 bits a window that is off by one is lost among the errors of rounding: one key in a thousand more. But whether a
token is seen at all is exact in every precision: where it is not, changing it changes no bit. So the states that come
into a layer are turned round over the first tokens, in each layer by itself, and the positions whose outputs change
must be those of transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deepspec.target.attention import ForwardPass
from deepspec.target.source import decoder_layers, text_decoder

if TYPE_CHECKING:
    from deepspec.target.model import Target

FIRST, CHANGED = 4, 16  # tokens that are left alone, then tokens that are changed
SEEN = 0.01  # of a state's elements that change where a token is seen beyond doubt
Shares = list[Tensor]  # of each layer [n], of each position: the elements that change


@torch.inference_mode()
def first_difference(target: Target, model: PreTrainedModel, ids: Tensor) -> tuple[int, int, bool] | None:
    """Return the first (layer, position, whether ours sees more) where our reach is another than the model's own.

    Args:
        model: transformers' own; the layers of both hand out one state a token.
        ids: int64 [n].
    """
    own = decoder_layers(text_decoder(model), model.config.get_text_config().num_hidden_layers)

    def run_own() -> None:
        model(input_ids=ids[None].to(model.device), use_cache=False)

    def run_ours() -> None:
        cache, half = target.cache(1, own), len(ids) // 2
        for first, last in ((0, half), (half, len(ids))):
            cache.reserve(last + 16)
            places = torch.arange(first, last, device=target.device)[None]
            step = ForwardPass(places, cache=cache, starts=[first], counts=[last - first])
            target.forward(ids[None, first:last].to(target.device), step)

    inputs = _inputs(own, run_own)
    theirs = [_changed(own, run_own, inputs, turned) for turned in _TURNS]
    ours = [_changed(target.layers, run_ours, inputs, turned) for turned in _TURNS]
    for layer in range(len(own)):
        if any(float(shares[layer][:FIRST].max()) > 0 for shares in (*theirs, *ours)):
            continue  # what comes later changes it: experts that are run together are rounded together
        more = _beyond_doubt(ours, layer) & _nothing(theirs, layer)
        less = _beyond_doubt(theirs, layer) & _nothing(ours, layer)
        if bool((more | less).any()):
            position = int((more | less).nonzero()[0])
            return layer, position, bool(more[position])
    return None


def _beyond_doubt(shares: list[Shares], layer: int) -> Tensor:
    return torch.stack([share[layer] for share in shares]).amin(0) >= SEEN


def _nothing(shares: list[Shares], layer: int) -> Tensor:
    return torch.stack([share[layer] for share in shares]).amax(0) == 0


def _negated(states: Tensor) -> Tensor:
    return -states


def _rolled(states: Tensor) -> Tensor:
    return states.roll(7, -1)


_TURNS: tuple[Callable[[Tensor], Tensor], ...] = (_negated, _rolled)


def _inputs(layers: nn.ModuleList, run: Callable[[], None]) -> list[Tensor]:
    """Return the states [n, d] that come into each layer."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, options: Any) -> None:
        found.append(_states(args, options)[0].clone())

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _changed(
    layers: nn.ModuleList, run: Callable[[], None], inputs: list[Tensor], turn: Callable[[Tensor], Tensor]
) -> Shares:
    """Of each layer, which share of each position's output changes where its first inputs are turned."""
    turned = [states.clone() for states in inputs]
    for states in turned:
        states[FIRST : FIRST + CHANGED] = turn(states[FIRST : FIRST + CHANGED])
    plain, other = _outputs(layers, run, inputs), _outputs(layers, run, turned)
    return [(a != b).float().mean(-1).cpu() for a, b in zip(plain, other, strict=True)]


def _outputs(layers: nn.ModuleList, run: Callable[[], None], inputs: list[Tensor]) -> list[Tensor]:
    """Each layer's outputs [n, d] for these inputs, whatever the layer below hands out."""
    found: list[list[Tensor]] = [[] for _ in layers]
    with _given(layers, inputs, found):
        run()
    return [torch.cat(parts) for parts in found]


@contextmanager
def _given(layers: nn.ModuleList, inputs: list[Tensor], found: list[list[Tensor]]) -> Iterator[None]:
    def give(index: int) -> Any:
        def hook(module: nn.Module, args: Any, options: Any) -> Any:
            states = _states(args, options)
            first = sum(len(part) for part in found[index])
            own = inputs[index][first : first + states.shape[1]].to(states)[None]
            return ((own, *args[1:]), options) if args else (args, options | {"hidden_states": own})

        return hook

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[index].append((output[0] if isinstance(output, tuple) else output)[0].clone())

        return hook

    handles = []
    for i, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(give(i), with_kwargs=True))
        handles.append(layer.register_forward_hook(keep(i)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _states(args: Any, options: Any) -> Tensor:
    return args[0] if args else options["hidden_states"]

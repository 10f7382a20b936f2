"""Both a target's layers and transformers' own, each run by itself on states that it is given.

Behind many layers in 16 bits, states differ by some percent whoever computes them. A layer that is given the very
states that another was given differs by its own doing alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deepspec.target.attention import ForwardPass
from deepspec.target.source import decoder_layers, text_decoder

if TYPE_CHECKING:
    from deepspec.target.model import Target


class Layerwise:
    """A target and transformers' own model of it over one prompt, layer by layer.

    Args:
        model: transformers' own; the layers of both hand out one state a token.
        ids: int64 [n].
    """

    @torch.inference_mode()
    def __init__(self, target: Target, model: PreTrainedModel, ids: Tensor):
        self._target, self._model, self._ids = target, model, ids
        self._layers = decoder_layers(text_decoder(model), model.config.get_text_config().num_hidden_layers)
        self.inputs = self._recorded()
        """The states [n, d] that come into each layer of transformers' own."""
        self.plain = self.own(self.inputs), self.ours(self.inputs)
        """What each of transformers' own layers and of the target's makes of them."""

    def own(self, inputs: list[Tensor]) -> list[Tensor]:
        """Return the outputs [n, d] of each of transformers' own layers."""
        return _outputs(self._layers, self._run_own, inputs)

    def exact(self) -> list[Tensor]:
        """Return what transformers' own layers make of `inputs` in float32, a layer at a time."""
        with widened(self._layers):
            return self.own(self.inputs)

    def ours(self, inputs: list[Tensor]) -> list[Tensor]:
        """Return the outputs [n, d] of each of the target's layers, from a prefill in two parts."""
        with self._target.one_by_one():
            return _outputs(self._target.layers, self._run_ours, inputs)

    @torch.inference_mode()
    def joined_unlike(self) -> int | None:
        """Return the first of the target's layers whose output depends on whether all run as one call."""
        if not self._target.joined:
            return None
        wanted = range(self._target.num_layers - 1)
        together = self._run_ours(wanted)
        with self._target.one_by_one():
            apart = self._run_ours(wanted)
        return next((layer for layer in wanted if not torch.equal(together[layer], apart[layer])), None)

    def _run_own(self) -> None:
        self._model(input_ids=self._ids[None].to(self._model.device), use_cache=False)

    def _run_ours(self, wanted: Sequence[int] = ()) -> list[Tensor]:
        """Prefill in two parts; return the outputs [n, d] of these layers."""
        target, ids = self._target, self._ids
        found: list[list[Tensor]] = [[] for _ in wanted]
        cache, half = target.cache(1, self), len(ids) // 2
        for first, last in ((0, half), (half, len(ids))):
            cache.reserve(last + 16)
            places = torch.arange(first, last, device=target.device)[None]
            step = ForwardPass(places, cache=cache, starts=[first], counts=[last - first], wanted=wanted)
            target.forward(ids[None, first:last].to(target.device), step)
            for layer, parts in zip(wanted, found, strict=True):
                parts.append(step.features[layer][0])
        return [torch.cat(parts) for parts in found]

    def _recorded(self) -> list[Tensor]:
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, options: Any) -> None:
            found.append(_states(args, options)[0].clone())

        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self._layers]
        try:
            self._run_own()
        finally:
            for handle in handles:
                handle.remove()
        return found


def _outputs(layers: nn.ModuleList, run: Callable[[], object], inputs: list[Tensor]) -> list[Tensor]:
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
        handles.append(layer.register_forward_pre_hook(give(i), with_kwargs=True, prepend=True))
        handles.append(layer.register_forward_hook(keep(i), prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def widened(layers: nn.ModuleList) -> Iterator[None]:
    """Run layers in float32, one at a time: that is all the memory it takes. The last one's output is as ever."""
    kept: dict[Tensor, Tensor] = {}  # tensors of the layer that is in float32 → as they were
    dtype = next(layers.parameters()).dtype

    def widen(module: nn.Module, args: Any, options: Any) -> Any:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and tensor not in kept:
                kept[tensor] = tensor.data
                tensor.data = tensor.data.float()
        return _cast(args, torch.float32), _cast(options, torch.float32)

    def restore(module: nn.Module, args: Any, output: Any) -> Any:
        for tensor, data in kept.items():
            tensor.data = data
        kept.clear()
        return _cast(output, dtype) if module is layers[-1] else None

    handles = []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(widen, with_kwargs=True))
        handles.append(layer.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cast(found: Any, dtype: torch.dtype) -> Any:
    """Return arguments or an output with their floating tensors in this dtype."""
    if isinstance(found, Tensor):
        return found.to(dtype) if found.is_floating_point() else found
    if isinstance(found, tuple):
        return tuple(_cast(one, dtype) for one in found)
    if isinstance(found, dict):
        return {name: _cast(one, dtype) for name, one in found.items()}
    return found


def _states(args: Any, options: Any) -> Tensor:
    return args[0] if args else options["hidden_states"]

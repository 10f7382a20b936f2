"""Passes through transformers' own layers and caches, for targets that our attention cannot run.

Gated delta nets, Mambas, short convolutions and compressed or indexed caches hold a state that cannot be rolled
back. So each sequence keeps the state of a committed boundary; a pass runs on a copy of it, over the tokens that were
accepted since and the new ones. Where all of a pass stood, its own state is the next boundary; where the accepted
tokens have become many, they are run once by themselves and the boundary moves behind them. Such a
pass verifies chains, not trees.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from deepspec.errors import DeepSpecError
from deepspec.target.attention import ForwardPass, KVCache

MOST_AGAIN = 16  # accepted tokens that a pass may have to run again
_REPLACED = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)  # an update makes new tensors
_CACHES = ("past_key_values", "cache_params", "state")


@dataclass
class Sequence:
    """`tokens` have been run; `kept` is the cache behind the first `boundary` of them, `latest` behind them all."""

    tokens: list[int] = field(default_factory=list)
    boundary: int = 0
    kept: Any = None
    latest: Any = None


class StateCache(KVCache):
    """What `KVCache` is to our attention: a sequence a slot. Only the engine's calls that chains need do anything."""

    def __init__(self, slots: int):
        super().__init__(slots, 1 << 40)
        self.sequences = [Sequence() for _ in range(slots)]

    def reserve(self, length: int) -> None:
        """Nothing: these caches grow by themselves."""

    def compact(self, slot: int, start: int, kept: list[int]) -> None:
        """Nothing: what stood of a chain is its beginning, and the next pass says how long that is."""

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another, and what is known behind them."""
        found = self.sequences[source]
        tokens = found.tokens[:length]
        if length == len(found.tokens) and found.latest is not None:
            self.sequences[destination] = Sequence(tokens, length, snapshot(found.latest))
        elif found.boundary > length:
            self.sequences[destination] = Sequence(tokens)
        else:
            self.sequences[destination] = Sequence(tokens, found.boundary, snapshot(found.kept))


class OwnPasses:
    """Runs passes as transformers would: one sequence after another.

    Args:
        model: the decoder without its head.
        stepwise: a state takes one token at a time (Mamba 1 in transformers), so that drafting saves nothing.
        record: called with what the next run is to record (`wanted`, `features`), for the hooks of layers.
    """

    def __init__(self, model: nn.Module, record: Any, stepwise: bool = False):
        self.model, self.stepwise = model, stepwise
        self.record = record
        self.runs = 0  # of the model
        takes = inspect.signature(model.forward).parameters
        self.cache_name = next((name for name in _CACHES if name in takes), None)
        self.positions = "position_ids" in takes

    def __call__(self, ids: Tensor, step: ForwardPass) -> Tensor:
        """As `Target.forward`."""
        if step.given_mask:
            raise DeepSpecError("this target keeps a state that cannot branch: it verifies chains, not trees")
        if step.cache is None:
            self.record(step)
            return self._run(ids, None, 0)[0]
        hidden, features, first = [], [], 0
        for row, start, count in zip(step.rows, step.starts, step.counts, strict=True):
            part = slice(first, first + count)
            first += count
            real = _unpadded(step.positions[0, part].tolist(), start)
            found, seen = self._sequence(step, row, start, ids[0, part].tolist()[:real])
            hidden.append(_padded(found, count))
            features.append({layer: _padded(x, count) for layer, x in seen.items()})
        for layer in features[0]:
            step.features[layer] = torch.cat([seen[layer] for seen in features], 1)
        return torch.cat(hidden, 1)

    def _sequence(
        self, step: ForwardPass, row: int, start: int, new: list[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """h_last [1, new, d] and features of one sequence's new tokens, which begin at `start`."""
        cache = step.cache
        if not isinstance(cache, StateCache):
            raise TypeError("these passes need a StateCache")
        if start == 0:
            cache.sequences[row] = Sequence()
        sequence = cache.sequences[row]
        if start == len(sequence.tokens) and sequence.latest is not None:
            sequence.kept, sequence.boundary = sequence.latest, start
        elif start < sequence.boundary:  # back behind the boundary: all of it again
            sequence.kept, sequence.boundary = None, 0
        again = sequence.tokens[sequence.boundary : start]
        step.fed[row] = len(again)
        before = self.runs
        if len(again) > MOST_AGAIN:
            _, _, sequence.kept = self._recorded(again, sequence.kept, sequence.boundary, frozenset())
            sequence.boundary, again = start, []
        working = snapshot(sequence.kept)
        hidden, features, sequence.latest = self._recorded(
            again + new, working, sequence.boundary, step.wanted
        )
        sequence.tokens = sequence.tokens[:start] + new
        step.runs[row] = self.runs - before
        return hidden[:, len(again) :], {layer: x[:, len(again) :] for layer, x in features.items()}

    def _recorded(
        self, ids: list[int], cache: Any, first: int, wanted: frozenset[int]
    ) -> tuple[Tensor, dict[int, Tensor], Any]:
        """h_last, features and the cache behind `ids`."""
        size = 1 if self.stepwise and cache is not None else len(ids)
        hidden, features = [], []
        for i in range(0, len(ids), size):
            seen = SimpleNamespace(wanted=wanted, features={})
            self.record(seen)
            found, cache = self._run(self._tensor(ids[i : i + size]), cache, first + i)
            hidden.append(found)
            features.append(seen.features)
        return (
            torch.cat(hidden, 1),
            {at: torch.cat([x[at] for x in features], 1) for at in features[0]},
            cache,
        )

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=next(self.model.parameters()).device)

    def _run(self, ids: Tensor, cache: Any, first: int) -> tuple[Tensor, Any]:
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": self.cache_name is not None}
        if self.positions:
            places = torch.arange(first, first + ids.shape[1], device=ids.device)
            inputs["position_ids"] = places.expand(ids.shape)
        if self.cache_name is not None and cache is not None:
            inputs[self.cache_name] = cache
        self.runs += 1
        output = self.model(**inputs)
        return output.last_hidden_state, getattr(output, self.cache_name) if self.cache_name else None


def snapshot(cache: Any) -> Any:
    """Return a copy that running on the original, or on the copy, leaves alone."""
    if type(cache) is not DynamicCache:
        return copy.deepcopy(cache)
    other = copy.copy(cache)
    other.layers = [copy.copy(x) if type(x) in _REPLACED else copy.deepcopy(x) for x in cache.layers]
    return other


def _unpadded(positions: list[int], start: int) -> int:
    """How many tokens are a chain's; the engine fills a pass up behind them."""
    n = next((i for i, at in enumerate(positions) if at != start + i), len(positions))
    if any(at != start for at in positions[n:]):
        raise DeepSpecError("this target keeps a state that cannot branch: it verifies chains, not trees")
    return n


def _padded(x: Tensor, count: int) -> Tensor:
    return x if x.shape[1] == count else torch.cat((x, x.new_zeros(1, count - x.shape[1], *x.shape[2:])), 1)


def keeps_states(config: Any) -> str:
    """Say which of a model's layers hold something else than keys and values, by the cache that transformers makes."""
    try:
        layers = DynamicCache(config=config).layers
    except Exception:  # a configuration without kinds of layers
        return ""
    plain = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    odd = [i for i, layer in enumerate(layers) if type(layer) not in plain]
    return f"layer {odd[0]} keeps a {type(layers[odd[0]]).__name__}" if odd else ""

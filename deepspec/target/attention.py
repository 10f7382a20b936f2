"""The attention through which every target runs: our static KV cache, any mask, any family.

transformers lets a model call a registered function in place of its own attention. Ours writes the new keys and
values into a preallocated cache and attends under the mask of the current `ForwardPass`, so one code path serves plain
decoding, chains, trees, ragged batches and training, for every decoder-only model that supports attention
backends. `ForwardPass` travels as a keyword argument through the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from deepspec.errors import DeepSpecError

NAME = "deepspec"
CACHE_LENGTH = 256  # tokens a slot that a fresh cache takes; it grows


class KVCache:
    """Preallocated keys and values, [slots, kv_heads, max_length, head_dim] a layer, allocated at first use."""

    def __init__(self, slots: int, max_length: int):
        self.slots = slots
        self.max_length = max_length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer; `like` [batch, kv_heads, n, head_dim] gives sizes, dtype and device."""
        if index not in self._layers:
            shape = (self.slots, like.shape[1], self.max_length, like.shape[3])
            self._layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[index]

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens a slot; the cache grows by doubling and keeps what it holds."""
        if length <= self.max_length:
            return
        self.max_length = max(length, 2 * self.max_length)
        for index, (keys, values) in self._layers.items():
            grown = []
            for old in (keys, values):
                new = old.new_zeros(*old.shape[:2], self.max_length, old.shape[3])
                new[:, :, : old.shape[2]] = old
                grown.append(new)
            self._layers[index] = tuple(grown)

    def compact(self, slot: int, start: int, kept: list[int]) -> None:
        """Move the entries `start + kept[i]` to `start + i`: after a tree, only the accepted path stays."""
        if kept == list(range(len(kept))):
            return
        index = torch.tensor(kept) + start
        for keys, values in self._layers.values():
            moved = index.to(keys.device)
            keys[slot, :, start : start + len(kept)] = keys[slot][:, moved]
            values[slot, :, start : start + len(kept)] = values[slot][:, moved]

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        for keys, values in self._layers.values():
            keys[destination, :, :length] = keys[source, :, :length]
            values[destination, :, :length] = values[source, :, :length]


class ForwardPass:
    """One forward pass: which tokens are new, where their keys go, who sees whom.

    With a cache, the new tokens of all requests lie end to end in one row (the model computes no padding), and
    attention alone spreads them out: request i brings `counts[i]` tokens, its keys go to cache row `rows[i]` from
    `starts[i]` on. Without a cache a pass is a plain [batch, n] rectangle.

    Args:
        positions: RoPE position of each new token, [1, sum(counts)] with a cache, [batch, n] without.
        visible: bool [requests, max(counts), keys]; the entries from `starts[i]` on (all, without a cache) are the
            new tokens themselves. None: causal, or where `bidirectional` all that the request has.
        cache, rows, starts, counts: see above; `rows` default to the first ones of the cache, `starts` to 0.
        wanted: layer ids whose outputs to keep in `features` (-1 is the embedding output).
    """

    def __init__(
        self,
        positions: Tensor,
        visible: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        rows: list[int] | None = None,
        starts: list[int] | None = None,
        counts: list[int] | None = None,
        wanted: Iterable[int] = (),
        bidirectional: bool = False,
    ):
        self.positions = positions
        self.cache = cache
        self.bidirectional = bidirectional
        batch, n = positions.shape
        self.counts = counts or [n] * batch
        self.requests, self.n = len(self.counts), max(self.counts)
        self.starts = starts or [0] * self.requests
        self.rows = rows or list(range(self.requests))
        self.length = max(self.starts) + self.n
        self.wanted = frozenset(wanted)
        self.features: dict[int, Tensor] = {}
        self.stored: set[int] = set()  # layers that came through
        self._visible = visible
        self._once: dict = {}
        self._ragged = cache is not None and min(self.counts) < self.n
        if cache is not None:
            if self.length > cache.max_length:
                raise DeepSpecError(f"{self.length} tokens do not fit a KV cache of {cache.max_length}")
            self._plan()

    def _plan(self) -> None:
        """Where each new token goes: its cache row and column, and its place in the spread batch."""
        device = self.positions.device
        first = self.rows[0]
        contiguous = self.rows == list(range(first, first + self.requests))
        self._read = (
            slice(first, first + self.requests) if contiguous else torch.tensor(self.rows, device=device)
        )
        if self.requests > 1:
            spans = list(zip(self.rows, self.starts, self.counts, strict=True))
            rows = [row for row, _, count in spans for _ in range(count)]
            columns = [start + i for _, start, count in spans for i in range(count)]
            self._rows, self._columns = torch.tensor([rows, columns], device=device)
        if self._ragged:
            flat = [i * self.n + j for i, count in enumerate(self.counts) for j in range(count)]
            self._flat = torch.tensor(flat, device=device)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values [1, kv_heads, sum(counts), head_dim]; return all that this pass may attend to,
        [requests, kv_heads, length, head_dim]. Without a cache they are returned as they came."""
        self.stored.add(layer)
        if self.cache is None:
            return keys, values
        all_keys, all_values = self.cache.layer(layer, keys)
        if self.requests == 1:
            row, start = self.rows[0], self.starts[0]
            all_keys[row, :, start : start + self.n] = keys[0]
            all_values[row, :, start : start + self.n] = values[0]
        else:
            all_keys[self._rows, :, self._columns] = keys[0].transpose(0, 1)
            all_values[self._rows, :, self._columns] = values[0].transpose(0, 1)
        return all_keys[self._read, :, : self.length], all_values[self._read, :, : self.length]

    def spread(self, queries: Tensor) -> Tensor:
        """[1, sum(counts), heads, head_dim] → [requests, max(counts), heads, head_dim], padded with zeros."""
        if self.cache is None or self.requests == 1:
            return queries
        shape = (self.requests, self.n, *queries.shape[2:])
        if not self._ragged:
            return queries.reshape(shape)
        padded = queries.new_zeros(self.requests * self.n, *queries.shape[2:])
        padded[self._flat] = queries[0]
        return padded.view(shape)

    def gather(self, spread: Tensor) -> Tensor:
        """The reverse of `spread`."""
        if self.cache is None or self.requests == 1:
            return spread
        flat = spread.flatten(0, 1)
        return (flat[self._flat] if self._ragged else flat)[None]

    def mask(self, dtype: torch.dtype, groups: int, window: int | None) -> Tensor | None:
        """Additive mask [requests, 1, groups·n, keys]; the query heads of a group stand one after another.

        None where everything is seen."""
        return self.once((dtype, groups, window), lambda: self._additive(dtype, groups, window))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is made at most once a pass and shared by its layers."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def _additive(self, dtype: torch.dtype, groups: int, window: int | None) -> Tensor | None:
        if self._sees_all() and (window is None or self.length <= window):
            return None
        visible = self.visible if window is None else self.visible & self._within(window)
        additive = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        additive.masked_fill_(~visible, torch.finfo(dtype).min)
        return additive[:, None].repeat(1, 1, groups, 1)

    def clear(self) -> None:
        """Forget what the last pass left here: for a step that is run again."""
        self._once.clear()
        self.features.clear()
        self.stored.clear()

    def _sees_all(self) -> bool:
        even = not self._ragged and min(self.starts) == max(self.starts)
        return even and self._visible is None and (self.n == 1 or self.bidirectional)

    @property
    def visible(self) -> Tensor:
        if self._visible is None:
            device = self.positions.device
            if self.bidirectional:
                ends = [start + count for start, count in zip(self.starts, self.counts, strict=True)]
                keys = torch.arange(self.length, device=device)
                visible = keys < torch.tensor(ends, device=device)[:, None, None]
                self._visible = visible.expand(-1, self.n, -1)
            else:
                self._visible = causal(self.starts, self.n, self.length, device)
        return self._visible

    def _within(self, window: int) -> Tensor:
        """bool [requests, n, keys]: the key lies less than `window` positions before the query."""
        positions = self.spread(self.positions[..., None, None])[..., 0, 0]  # [requests, n]
        keys = torch.arange(self.length, device=positions.device).repeat(self.requests, 1)
        for row, (start, count) in enumerate(zip(self.starts, self.counts, strict=True)):
            keys[row, start : start + count] = positions[row, :count]
        return positions[:, :, None] - keys[:, None, :] < window


def causal(starts: list[int], n: int, length: int, device: torch.device | None = None) -> Tensor:
    """bool [batch, n, length]: new token i of a row sees its cached tokens and the new ones up to itself."""
    last = torch.tensor(starts, device=device)[:, None, None] + torch.arange(n, device=device)[:, None]
    return torch.arange(length, device=device) <= last


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Grouped-query attention. queries [b, heads, n, d], keys/values [b, kv_heads, L, d] → [b, n, heads, d].

    The query heads that share a key head are laid along the query axis, so keys are never repeated.
    """
    batch, heads, n, dim = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.reshape(batch, kv_heads, heads // kv_heads * n, dim)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.view(batch, heads, n, dim).transpose(1, 2)


def _attention(
    module, query, key, value, attention_mask, scaling=None, step: ForwardPass | None = None, **extra
):
    """The function transformers calls; see `AttentionInterface`."""
    if step is None:
        raise DeepSpecError(
            "a target loaded by DeepSpec is run through Target.forward, not through its own forward"
        )
    if extra.get("s_aux") is not None:
        raise DeepSpecError("targets with attention sinks are not supported")
    keys, values = step.store(module.layer_idx, key, value)
    groups = query.shape[1] // keys.shape[1]
    mask = step.mask(query.dtype, groups, extra.get("sliding_window"))
    query = step.spread(query.transpose(1, 2)).transpose(1, 2)
    softcap = extra.get("softcap")
    if softcap is None:
        attended = attend(query, keys, values, mask, scaling)
    else:
        attended = _softcapped(query, keys, values, mask, scaling, softcap)
    return step.gather(attended), None


def _softcapped(query, keys, values, mask, scaling, softcap):
    """Attention whose scores are squashed to ±softcap (Gemma 2); no fused kernel computes it."""
    batch, heads, n, dim = query.shape
    grouped = query.reshape(batch, keys.shape[1], -1, dim)
    scores = torch.matmul(grouped, keys.transpose(2, 3)) * (scaling or dim**-0.5)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    out = torch.matmul(scores.float().softmax(-1).to(query.dtype), values)
    return out.view(batch, heads, n, dim).transpose(1, 2)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)

"""The attention through which every target runs: our static KV cache, any mask, any family.

transformers lets a model call a registered function in place of its own attention. Ours writes the new keys and
values into a preallocated cache and attends under the mask of the current `Step`, so one code path serves plain
decoding, chains, trees, ragged batches and training, for every decoder-only model that supports attention
backends. `Step` travels as a keyword argument through the model's own forward.
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


class Step:
    """One forward pass: where its keys go and who sees whom.

    Args:
        positions: [batch, n] RoPE position of each new token.
        visible: bool [batch, n, keys]; the last n keys of a row without a cache, or the entries from `starts[b]`
            on with one, are the new tokens themselves. None: causal.
        cache, first_slot: rows `first_slot ... first_slot + batch - 1` of the cache hold the batch.
        starts: cached length of each row before this pass.
        wanted: layer ids whose outputs to keep in `features` (-1 is the embedding output).
    """

    def __init__(
        self,
        positions: Tensor,
        visible: Tensor | None = None,
        cache: KVCache | None = None,
        first_slot: int = 0,
        starts: list[int] | None = None,
        wanted: Iterable[int] = (),
    ):
        self.positions = positions
        self.batch, self.n = positions.shape
        self.cache = cache
        self.first_slot = first_slot
        self.starts = starts or [0] * self.batch
        self.length = max(self.starts) + self.n
        self.wanted = frozenset(wanted)
        self.features: dict[int, Tensor] = {}
        self.stored: set[int] = set()  # layers that came through
        self._visible = visible
        self._once: dict = {}
        if cache is not None and self.length > cache.max_length:
            raise DeepSpecError(f"{self.length} tokens do not fit a KV cache of {cache.max_length}")
        if cache is not None and self.batch > 1:
            device = positions.device
            self._rows = torch.arange(first_slot, first_slot + self.batch, device=device)[:, None]
            starts_column = torch.tensor(self.starts, device=device)[:, None]
            self._columns = starts_column + torch.arange(self.n, device=device)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values [batch, kv_heads, n, head_dim]; return all that this pass may attend to."""
        self.stored.add(layer)
        if self.cache is None:
            return keys, values
        all_keys, all_values = self.cache.layer(layer, keys)
        if self.batch == 1:
            start = self.starts[0]
            all_keys[self.first_slot, :, start : start + self.n] = keys[0]
            all_values[self.first_slot, :, start : start + self.n] = values[0]
        else:
            all_keys[self._rows, :, self._columns] = keys.transpose(1, 2)
            all_values[self._rows, :, self._columns] = values.transpose(1, 2)
        rows = slice(self.first_slot, self.first_slot + self.batch)
        return all_keys[rows, :, : self.length], all_values[rows, :, : self.length]

    def mask(self, dtype: torch.dtype, groups: int, window: int | None) -> Tensor:
        """Additive mask [batch, 1, groups·n, keys]; the query heads of a group stand one after another."""
        return self.once((dtype, groups, window), lambda: self._additive(dtype, groups, window))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is made at most once a pass and shared by its layers."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def _additive(self, dtype: torch.dtype, groups: int, window: int | None) -> Tensor:
        visible = self.visible if window is None else self.visible & self._within(window)
        additive = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        additive.masked_fill_(~visible, torch.finfo(dtype).min)
        return additive[:, None].repeat(1, 1, groups, 1)

    @property
    def visible(self) -> Tensor:
        if self._visible is None:
            self._visible = causal(self.starts, self.n, self.length, self.positions.device)
        return self._visible

    def _within(self, window: int) -> Tensor:
        """bool [batch, n, keys]: the key lies less than `window` positions before the query."""
        keys = torch.arange(self.length, device=self.positions.device).repeat(self.batch, 1)
        for row, start in enumerate(self.starts):
            keys[row, start : start + self.n] = self.positions[row]
        return self.positions[:, :, None] - keys[:, None, :] < window


def causal(starts: list[int], n: int, length: int, device: torch.device | None = None) -> Tensor:
    """bool [batch, n, length]: new token i of a row sees its cached tokens and the new ones up to itself."""
    last = torch.tensor(starts, device=device)[:, None, None] + torch.arange(n, device=device)[:, None]
    return torch.arange(length, device=device) <= last


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Grouped-query attention. queries [b, heads, n, d], keys/values [b, kv_heads, L, d] → [b, n, heads, d].

    The query heads that share a key head are laid along the query axis, so keys are never repeated.
    """
    batch, heads, n, dim = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.reshape(batch, kv_heads, heads // kv_heads * n, dim)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.view(batch, heads, n, dim).transpose(1, 2)


def _attention(module, query, key, value, attention_mask, scaling=None, step: Step | None = None, **extra):
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
    softcap = extra.get("softcap")
    if softcap is None:
        return attend(query, keys, values, mask, scaling), None
    return _softcapped(query, keys, values, mask, scaling, softcap), None


def _softcapped(query, keys, values, mask, scaling, softcap):
    """Attention whose scores are squashed to ±softcap (Gemma 2); no fused kernel computes it."""
    batch, heads, n, dim = query.shape
    grouped = query.reshape(batch, keys.shape[1], -1, dim)
    scores = torch.matmul(grouped, keys.transpose(2, 3)) * (scaling or dim**-0.5)
    scores = torch.tanh(scores / softcap) * softcap + mask
    out = torch.matmul(scores.float().softmax(-1).to(query.dtype), values)
    return out.view(batch, heads, n, dim).transpose(1, 2)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)

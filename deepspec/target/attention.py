"""The attention through which targets run: our static KV cache, any mask, sinks, keys and values of any width.

transformers lets a model call a registered function in place of its own attention. Ours writes the new keys and
values into a preallocated cache and attends under the mask of the current `ForwardPass`, so one code path serves plain
decoding, chains, trees, ragged batches and training. `ForwardPass` travels as a keyword argument through the model's
own forward. What a layer may see beyond that (windows, chunks) comes as the rule by which transformers itself would
have made the mask. A model that asks for anything else is `Unsuited`; `deepspec.target.states` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from deepspec.errors import DeepSpecError
from deepspec.target.native.entries import Entries

NAME = "deepspec"
CACHE_LENGTH = 256  # tokens a slot that a fresh cache takes; it grows
Rule = Callable[..., Tensor]  # (request, head, query position, key position) → whether the key may be seen
_HARMLESS = frozenset(  # what models hand to attention functions besides, and what changes nothing here
    [
        "dropout",
        "sliding_window",
        "position_ids",
        "use_cache",
        "cache_position",
        "past_key_values",
        "position_embeddings",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "num_items_in_batch",
        "indices",
        "token_type_ids",
        "shared_kv_states",
        "per_layer_input",
        "logits_to_keep",
    ]
)


class Unsuited(DeepSpecError):
    """The model asks its attention for something that ours does not know."""


@dataclass(frozen=True)
class OneWay:
    """The rule of a causal layer in a pass that sees both ways: a token sees itself and what is before it.

    Args:
        window: the token itself and those less than so many positions before it; None: all.
    """

    window: int | None = None

    def __call__(self, request: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        return seen if self.window is None else seen & (query - key < self.window)


class KVCache:
    """Preallocated keys and values, [slots, kv_heads, max_length, head_dim] a layer, allocated at first use."""

    def __init__(self, slots: int, max_length: int):
        self.slots = slots
        self.max_length = max_length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._derived: dict[Any, Any] = {}

    def derived(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what follows from where keys and values lie, made anew when they move."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer; new ones [batch, kv_heads, n, width] give sizes, dtype and device."""
        if index not in self._layers:
            self._layers[index] = self._zeros(keys), self._zeros(values)
        return self._layers[index]

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens a slot; the cache grows by doubling and keeps what it holds."""
        if length <= self.max_length:
            return
        self.max_length = max(length, 2 * self.max_length)
        self._derived.clear()
        for index, (keys, values) in self._layers.items():
            self._layers[index] = self._grown(keys), self._grown(values)

    def _zeros(self, new: Tensor) -> Tensor:
        return new.new_zeros(self.slots, new.shape[1], self.max_length, new.shape[3])

    def _grown(self, old: Tensor) -> Tensor:
        new = self._zeros(old)
        new[:, :, : old.shape[2]] = old
        return new

    def compact(self, slot: int, start: int, kept: list[int]) -> None:
        """Move the entries `start + kept[i]` to `start + i`: after a tree, only the accepted path stays."""
        if kept == list(range(len(kept))):
            return
        layers = self._layers.values()
        entries = self.derived(
            (Entries, len(layers)), lambda: Entries.of([x for layer in layers for x in layer])
        )
        if entries is not None:
            entries.compact(slot, start, kept)
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
        largest: of the positions, where that is known.
        judged: the logits of all tokens are asked for; a target that has them in the same call leaves them in `logits`,
            [sum(counts), vocab].
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
        largest: int | None = None,
        judged: bool = False,
    ):
        self.positions = positions
        self._largest = largest
        self.judged, self.logits = judged, cast("Tensor | None", None)
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
        self.fed: dict[int, int] = {}  # of targets that keep a state: cache row → committed tokens run again
        self.runs: dict[int, int] = {}  # likewise: cache row → runs of the model
        self._visible = visible
        self.given_mask = visible is not None
        self._once: dict = {}
        self._ragged = cache is not None and min(self.counts) < self.n
        if cache is not None and self.length > cache.max_length:
            raise DeepSpecError(f"{self.length} tokens do not fit a KV cache of {cache.max_length}")

    @cached_property
    def _read(self) -> slice | Tensor:
        """Return which rows of the cache attention reads."""
        first = self.rows[0]
        if self.rows == list(range(first, first + self.requests)):
            return slice(first, first + self.requests)
        return torch.tensor(self.rows, device=self.positions.device)

    @cached_property
    def _written(self) -> Tensor:
        """Return the cache row and column of each new token, [2, sum(counts)]."""
        spans = list(zip(self.rows, self.starts, self.counts, strict=True))
        rows = [row for row, _, count in spans for _ in range(count)]
        columns = [start + i for _, start, count in spans for i in range(count)]
        return torch.tensor([rows, columns], device=self.positions.device)

    @cached_property
    def _flat(self) -> Tensor:
        """Return the place of each new token in the spread batch."""
        flat = [i * self.n + j for i, count in enumerate(self.counts) for j in range(count)]
        return torch.tensor(flat, device=self.positions.device)

    @property
    def largest(self) -> int:
        """The largest of the positions."""
        return int(self.positions.max()) if self._largest is None else self._largest

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values [1, kv_heads, sum(counts), head_dim]; return all that this pass may attend to.

        They are [requests, kv_heads, length, head_dim]. Without a cache they are returned as they came.
        """
        self.note(layer)
        if self.cache is None:
            return keys, values
        all_keys, all_values = self.cache.layer(layer, keys, values)
        if self.requests == 1:
            row, start = self.rows[0], self.starts[0]
            all_keys[row, :, start : start + self.n] = keys[0]
            all_values[row, :, start : start + self.n] = values[0]
        else:
            rows, columns = self._written
            all_keys[rows, :, columns] = keys[0].transpose(0, 1)
            all_values[rows, :, columns] = values[0].transpose(0, 1)
        return all_keys[self._read, :, : self.length], all_values[self._read, :, : self.length]

    def note(self, layer: int) -> None:
        if layer in self.stored:
            raise Unsuited(f"layer {layer} attends twice in a pass")
        self.stored.add(layer)

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
        """Undo `spread`."""
        if self.cache is None or self.requests == 1:
            return spread
        flat = spread.flatten(0, 1)
        return (flat[self._flat] if self._ragged else flat)[None]

    def mask(self, dtype: torch.dtype, groups: int, rule: int | Rule | None) -> Tensor | None:
        """Additive mask [requests, 1, groups·n, keys]; the query heads of a group stand one after another.

        `rule` is a window (keys less than so many positions before the query) or says itself what is seen; None
        leaves it at the step's own mask. None where everything is seen."""
        return self.once((dtype, groups, rule), lambda: self._additive(dtype, groups, rule))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what is made at most once a pass and shared by its layers."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def _additive(self, dtype: torch.dtype, groups: int, rule: int | Rule | None) -> Tensor | None:
        if self._sees_all() and (rule is None or (isinstance(rule, int) and self.length <= rule)):
            return None
        visible = self.visible if rule is None else self.visible & self._within(rule)
        additive = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        additive.masked_fill_(~visible, torch.finfo(dtype).min)
        return additive[:, None].repeat(1, 1, groups, 1)

    def clear(self) -> None:
        """Forget what the last pass left here: for a step that is run again."""
        self._once.clear()
        self.features.clear()
        self.stored.clear()
        self.logits = None

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

    def _within(self, rule: int | Rule) -> Tensor:
        """bool [requests, n, keys]: what the rule lets each query see."""
        positions = self.spread(self.positions[..., None, None])[..., 0, 0]  # [requests, n]
        keys = torch.arange(self.length, device=positions.device).repeat(self.requests, 1)
        for row, (start, count) in enumerate(zip(self.starts, self.counts, strict=True)):
            keys[row, start : start + count] = positions[row, :count]
        return allowed(rule, positions, keys)


def allowed(rule: int | Rule, queries: Tensor, keys: Tensor) -> Tensor:
    """bool [requests, n, keys] for positions [requests, n] of queries and [requests, keys] of keys."""
    queries, keys = queries[:, :, None], keys[:, None, :]
    if isinstance(rule, int):
        return queries - keys < rule
    first = torch.zeros((), dtype=torch.int64, device=keys.device)
    return rule(first, first, queries, keys)


def causal(starts: list[int], n: int, length: int, device: torch.device | None = None) -> Tensor:
    """bool [batch, n, length]: new token i of a row sees its cached tokens and the new ones up to itself."""
    last = torch.tensor(starts, device=device)[:, None, None] + torch.arange(n, device=device)[:, None]
    return torch.arange(length, device=device) <= last


def tree_mask(parents: list[list[int]], starts: list[int], n: int) -> Tensor:
    """Return which token of a pass sees which: the cached context, its request's anchor and its own ancestors.

    Args:
        parents: of each request's nodes behind its anchor, -1 for a child of the anchor; parents come first.
        starts: where each request's anchor stands.
        n: most tokens of a request, the anchor included.

    Returns:
        bool [requests, n, max(starts) + n]
    """
    visible = torch.zeros(len(parents), n, max(starts) + n, dtype=torch.bool)
    for row, (above, start) in enumerate(zip(parents, starts, strict=True)):
        visible[row, :, : start + 1] = True
        if above:
            size, seen = len(above), [[False] * len(above)]
            for node, parent in enumerate(above):
                own = list(seen[parent + 1])
                own[node] = True
                seen.append(own)
            visible[row, 1 : 1 + size, start + 1 : start + 1 + size] = torch.tensor(seen[1:])
    return visible


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Grouped-query attention. queries [b, heads, n, d], keys/values [b, kv_heads, L, d] → [b, n, heads, d].

    The query heads that share a key head are laid along the query axis, so keys are never repeated.
    """
    batch, heads, n, dim = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.reshape(batch, kv_heads, heads // kv_heads * n, dim)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.view(batch, heads, n, values.shape[3]).transpose(1, 2)


def _attention(
    module, query, key, value, attention_mask, scaling=None, step: ForwardPass | None = None, **extra
):
    """Attend as transformers asks; see `AttentionInterface`."""
    if step is None:
        raise Unsuited("its layers do not hand on what their forward is called with")
    sinks, softcap = extra.pop("s_aux", None), extra.pop("softcap", None)
    rule = _rule(attention_mask)
    if extra.pop("is_causal", True) is False:
        raise Unsuited("its attention looks ahead")
    if unknown := sorted(
        name for name, value in extra.items() if value is not None and name not in _HARMLESS
    ):
        raise Unsuited(f"its attention takes {unknown[0]!r}")
    keys, values = step.store(module.layer_idx, key, value)
    groups = query.shape[1] // keys.shape[1]
    mask = step.mask(query.dtype, groups, rule)
    query = step.spread(_tempered(module, query, step).transpose(1, 2)).transpose(1, 2)
    if softcap is None and sinks is None:
        attended = attend(query, keys, values, mask, scaling)
    else:
        attended = _explicit(query, keys, values, mask, scaling, softcap, sinks)
    return step.gather(attended), None


def _rule(attention_mask: Tensor | None) -> Rule | None:
    """Return what the mask that `_mask` made for this layer is to be."""
    rule = getattr(attention_mask, "rule", None)
    if rule is None:
        raise Unsuited("it makes masks of its own")
    return None if rule is causal_mask_function else rule


def _tempered(module: Any, query: Tensor, step: ForwardPass) -> Tensor:
    """Scale queries [batch, heads, n, d] by where they stand, as Llama 4 does in its layers without positions.

    The model counts the places from its own cache and so from 0 here.
    """
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query

    def scale(positions: Tensor) -> Tensor:
        return torch.log1p(torch.floor((positions.float() + 1) / module.floor_scale)) * module.attn_scale + 1

    counted = torch.arange(query.shape[2], device=query.device)
    ratio = scale(step.positions) / scale(counted)  # [batch, n]
    return (query * ratio[:, None, :, None]).to(query.dtype)


def _explicit(query, keys, values, mask, scaling, softcap, sinks):
    """Compute attention that no fused kernel does.

    Scores are squashed to ±softcap (Gemma 2), and one more logit a head takes its share of the softmax and adds
    nothing (sinks, gpt-oss; [heads]).
    """
    batch, heads, n, dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(batch, kv_heads, -1, dim)
    scores = torch.matmul(grouped, keys.transpose(2, 3)) * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        rows = sinks.to(scores.dtype).view(1, kv_heads, -1, 1).expand(batch, -1, -1, n)
        scores = torch.cat((scores, rows.reshape(batch, kv_heads, -1, 1)), -1)
    shares = scores.float().softmax(-1).to(query.dtype)[..., : keys.shape[2]]
    return torch.matmul(shares, values).view(batch, heads, n, values.shape[3]).transpose(1, 2)


class _RuleMask(Tensor):
    """Stands for a mask: the rule for making one, which the attention of the step at hand applies.

    A model may cut it to the tokens that it goes on with; whatever else it makes of it has no rule."""

    rule: Rule | None = None

    def __getitem__(self, index: Any) -> Tensor:
        part = super().__getitem__(index)
        if isinstance(part, _RuleMask):
            part.rule = self.rule
        return part


def _mask(*args, mask_function: Rule | None = None, device=None, **extra) -> Tensor:
    mask = torch.zeros(1, 1, 1, 1, device=device).as_subclass(_RuleMask)
    mask.rule = mask_function
    return mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)

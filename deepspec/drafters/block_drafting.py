"""Drafting with a block network: the context's keys and values in a cache, a block a proposal, laws by depth."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.decoding.drafter import Drafter, DraftRequest, GrowingSession
from deepspec.decoding.round import padded_size
from deepspec.decoding.tree import DraftLogits, Growth, Parent
from deepspec.drafters.block_network import BlockModel, Layer, normed_by_layer
from deepspec.drafters.network import RMSNorm
from deepspec.drafters.rope import Rope
from deepspec.target.attention import ForwardPass, KVCache
from deepspec.target.fused import FusedLayer, PackedLinear, RotaryTable, rotate
from deepspec.target.model import Target
from deepspec.target.native.context import NativeContext
from deepspec.target.native.layer import Norm, as_one

M = TypeVar("M", bound=BlockModel)


class Late(NamedTuple):
    """Features [m_i, layers·d] of tokens that are not in the cache yet: of which rows, and from where on."""

    rows: list[int]
    starts: list[int]
    features: list[Tensor]

    @property
    def joined(self) -> Tensor:
        """Return the features end to end, [Σ m_i, layers·d]."""
        return _joined(self.features)


class Blocks(NamedTuple):
    """States [requests, γ, d] of a block a request, after the final norm, and their logits [requests, γ, columns]."""

    hidden: Tensor
    base: Tensor


class BlockDrafter(Drafter, Generic[M]):
    """Runs the backbone; a subclass grows proposals from its states (`laws`)."""

    vocab_size: int

    def __init__(self, model: M, target: Target):
        config = model.config
        self.config = config
        self.layers = config.target_layer_ids
        self.block_size = config.block_size
        self.vocab_size = target.vocab_size
        self.device, self.dtype = target.device, target.dtype
        with torch.no_grad():
            model = model.for_drafting(target)
            self._freeze(model)
            self.freeze_heads(model)

    def session(self, slots: int) -> BlockSession:
        return BlockSession(self, slots)

    @abstractmethod
    def laws(
        self, blocks: Blocks, asks: list[DraftRequest], growths: list[Growth]
    ) -> Callable[[list[Parent]], DraftLogits]:
        """Return what `grow` asks: the laws of children, from the blocks and each parent's token."""

    def freeze_heads(self, model: M) -> None:
        """Take a subclass's own parts in the form that reads fastest."""

    def fused(self, layer: Layer) -> FusedLayer:
        """Return a layer for inference."""
        return FusedLayer(layer)

    def _freeze(self, model: M) -> None:
        """Take weights in the form that reads fastest: joined, packed."""
        self._rope = RotaryTable(partial(Rope.of(self.config).operands, dtype=self.dtype), self.device)
        self._embed = model.embed_tokens.weight
        self._fc, self._hidden_norm = PackedLinear(model.fc.folded_weight()), model.hidden_norm
        self._pads = self._fc.native is None
        self._skip = None if model.context_skip is None else PackedLinear(model.context_skip.weight)
        attentions = [layer.self_attn for layer in model.decoder_layers()]
        self._kv = PackedLinear(torch.cat([w.weight for a in attentions for w in (a.k_proj, a.v_proj)]))
        self._k_norms = [a.k_norm for a in attentions]
        self._context = self._native_context()
        self._blocks = [self.fused(layer) for layer in model.decoder_layers()]
        self._norm, self.head = self._taken(model.norm), model.packed_head()
        self._stack = as_one([layer.native for layer in self._blocks]) if self._norm.suits else None
        self.vocabulary = model.vocabulary()

    def _taken(self, norm: RMSNorm) -> Norm:
        """Return a norm for inference."""
        return Norm(norm.weight.detach().to(self.dtype), norm.variance_epsilon)

    def _native_context(self) -> NativeContext | None:
        """Return what writes the context as one call; None where the kernels do not."""
        join, kv = self._fc.native, self._kv.native
        norm, *k_norms = (self._taken(each) for each in (self._hidden_norm, *self._k_norms))
        if join is None or kv is None or not NativeContext.suits(norm, k_norms, self.config.head_dim):
            return None
        return NativeContext(join, norm, kv, k_norms, self.config.head_dim)

    def absorb(self, cache: KVCache, late: Late) -> None:
        """Write context keys and values of new features behind what each row holds."""
        step = self._late_pass(cache, late)
        if self._context is not None:
            self._context(late.joined, self._rope.rows(step.largest), step)
            return
        # As in the target's passes: torch makes a kernel for each new number of tokens.
        count = sum(step.counts)
        padding = padded_size(count) - count if self._pads else 0
        padded = F.pad(late.joined, (0, 0, 0, padding))
        context = self._hidden_norm(self._fc(padded))[None]
        kv = self._kv(context)[:, :count].unflatten(-1, (len(self._blocks), 2, -1, self.config.head_dim))
        rope = self._rope(step.positions, step.largest)
        for i, norm in enumerate(self._k_norms):
            keys, values = kv[:, :, i].unbind(2)
            step.store(i, rotate(norm(keys), *rope).transpose(1, 2), values.transpose(1, 2))

    def _late_pass(self, cache: KVCache, late: Late) -> ForwardPass:
        counts = [part.shape[0] for part in late.features]
        places = [start + i for start, count in zip(late.starts, counts, strict=True) for i in range(count)]
        positions = torch.tensor([places], device=self.device)
        return ForwardPass(
            positions, cache=cache, rows=late.rows, starts=late.starts, counts=counts, largest=max(places)
        )

    def blocks(
        self,
        cache: KVCache,
        rows: list[int],
        starts: list[int],
        anchors: list[int],
        newest: list[Tensor],
        late: Late | None,
    ) -> Blocks:
        """Run the blocks that start at the anchors, once what is late of their contexts is in the cache."""
        size = self.config.query_size
        masks = [self.config.mask_token_id] * (size - 1)
        read = [token for anchor in anchors for token in (anchor, *masks)]
        places = [start + k for start in starts for k in range(size)]
        ids, positions = torch.tensor([read, places], device=self.device)[:, None]
        step = ForwardPass(
            positions,
            cache=cache,
            rows=rows,
            starts=starts,
            counts=[size] * len(rows),
            bidirectional=True,
            largest=max(starts) + size - 1,
        )
        stack = self._stack if self._skip is None else None
        head = self.head.native if isinstance(self.head, PackedLinear) else None
        rope, before = self._rope.rows(step.largest), None
        if stack is not None and self._context is not None and late:
            before = self._context.before(late.joined, rope, self._late_pass(cache, late))
        elif late:
            self.absorb(cache, late)
        if stack is None:
            by_request = ids.view(len(rows), size)
            last, logits = self._norm(self._one_by_one(by_request, newest, step)), None
        else:
            _, _, last, logits = stack.decode(ids, self._embed, self._norm, rope, step, head, before)

        def predicting(x: Tensor) -> Tensor:
            return x.view(len(rows), size, -1)[:, size - self.block_size :]

        hidden = predicting(last)
        return Blocks(hidden, self.head(hidden) if logits is None else predicting(logits))

    def _one_by_one(self, ids: Tensor, newest: list[Tensor], step: ForwardPass) -> Tensor:
        """Run the layers over blocks of ids [requests, size] → [1, requests·size, d]."""
        step.once("rope", lambda: self._rope(step.positions, step.largest))
        x = F.embedding(ids, self._embed)
        if self._skip is not None:
            x = x + self._skip(normed_by_layer(torch.stack(newest), self.config))[:, None]
        x = x.flatten(0, 1)[None]
        for layer in self._blocks:
            x = layer(x, step=step)
        return x


@dataclass
class _Row:
    """What a request's drafting remembers besides its context keys and values."""

    length: int = 0  # of the context that is in the cache
    pending: list[Tensor] = field(default_factory=list)  # features not yet there
    newest: Tensor | None = None  # [layers·d] of the last token with a target pass

    @property
    def known(self) -> int:
        """Tokens of the context, in the cache or not yet."""
        return self.length + sum(part.shape[0] for part in self.pending)


class BlockSession(GrowingSession):
    def __init__(self, drafter: BlockDrafter, slots: int):
        self.drafter = drafter
        self.cache = KVCache(slots, 256)
        self.rows = [_Row() for _ in range(slots)]

    def begin(self, row: int) -> None:
        self.rows[row] = _Row()

    def extend(self, row: int, tokens: list[int], features: Tensor | None) -> None:
        if features is not None and features.shape[0]:
            self.rows[row].pending.append(features)
            self.rows[row].newest = features[-1]

    def share(self, source: int, row: int, tokens: list[int]) -> bool:
        other, own = self.rows[source], self.rows[row]
        own.length = min(other.length, len(tokens))
        if own.length:
            self.cache.move(source, row, own.length)
        if left := len(tokens) - own.length:
            own.pending.append(_joined(other.pending)[:left])
        return True

    def move(self, source: int, destination: int) -> None:
        self.cache.move(source, destination, self.rows[source].length)
        self.rows[destination] = self.rows[source]

    def ready(self, row: int) -> bool:
        return self.rows[row].newest is not None

    def laws(self, asks: list[DraftRequest], growths: list[Growth]) -> Callable[[list[Parent]], DraftLogits]:
        rows = [ask.row for ask in asks]
        states = [self.rows[row] for row in rows]
        late, lengths = self._late(rows), [state.known for state in states]
        blocks = self.drafter.blocks(
            self.cache,
            rows,
            lengths,
            [ask.anchor for ask in asks],
            [state.newest for state in states if state.newest is not None],
            late,
        )
        for state, length in zip(states, lengths, strict=True):
            state.length, state.pending = length, []
        return self.drafter.laws(blocks, asks, growths)

    def _late(self, rows: list[int]) -> Late | None:
        """Return the features that have come since the last proposal, once there is room for them and for a block."""
        waiting = [row for row in rows if self.rows[row].pending]
        if not waiting:
            return None
        states = [self.rows[row] for row in waiting]
        late = Late(waiting, [state.length for state in states], [_joined(state.pending) for state in states])
        most = max(features.shape[0] for features in late.features)
        self.cache.reserve(max(state.known for state in states) + most + self.drafter.config.query_size)
        return late


def _joined(parts: list[Tensor]) -> Tensor:
    """Return parts [m_i, ·] one behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)

"""Drafting by passes of a small network, one a level of the tree: what EAGLE-3 and a draft language model share.

The network has a KV cache of its own. Before each proposal it takes in what was committed since the last one, anchor
included; the trees then grow a level a pass, for all requests together. Keys of drafted tokens are overwritten by the
next proposal.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from deepspec.decoding.drafter import Drafter, DraftRequest, GrowingSession
from deepspec.decoding.tree import MAX_NODES, DraftLogits, Growth, Parent, Vocabulary
from deepspec.target.attention import CACHE_LENGTH, ForwardPass, KVCache


class AutoregressiveDrafter(Drafter):
    """Drafts token by token, feeding each back.

    Attributes:
        on_features: the network reads a state of the target at each place, x_{i+1} beside g_i, and so starts with the
            second token; else it reads tokens alone, from the first.
    """

    on_features: ClassVar[bool] = True
    vocabulary: Vocabulary
    device: torch.device

    def fuse(self, features: Tensor) -> Tensor | None:
        """Target features [n, layers·d] → what `step` reads in the place of outputs, [n, d]."""
        return None

    @abstractmethod
    def step(self, ids: Tensor, above: Tensor | None, step: ForwardPass) -> Tensor:
        """Return the network's outputs [n, d] for tokens int64 [n], each below an output (or fused features) [n, d]."""

    @abstractmethod
    def logits(self, outputs: Tensor) -> Tensor:
        """[n, d] → [n, columns], of the tokens that come next."""

    def session(self, slots: int) -> AutoregressiveSession:
        return AutoregressiveSession(self, slots)

    def run(
        self,
        cache: KVCache,
        rows: list[int],
        starts: list[int],
        counts: list[int],
        ids: list[int],
        above: Tensor | None,
        positions: list[int],
        visible: Tensor | None = None,
    ) -> Tensor:
        """`step`, in the packed form of `ForwardPass`."""
        places = torch.tensor([positions], device=self.device)
        step = ForwardPass(places, visible, cache=cache, rows=rows, starts=starts, counts=counts)
        return self.step(torch.tensor(ids, device=self.device), above, step)


@dataclass
class _Row:
    """What of a request has not been through the network: its tokens, and the target's features of the same tokens."""

    length: int = 0  # places in the cache
    tokens: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)


class AutoregressiveSession(GrowingSession):
    def __init__(self, drafter: AutoregressiveDrafter, slots: int):
        self.drafter = drafter
        self.cache = KVCache(slots, CACHE_LENGTH)
        self.rows = [_Row() for _ in range(slots)]

    def begin(self, row: int) -> None:
        self.rows[row] = _Row()

    def extend(self, row: int, tokens: list[int], features: Tensor | None) -> None:
        self.rows[row].tokens += tokens
        if self.drafter.on_features and features is not None:
            self.rows[row].features.append(features)

    def move(self, source: int, destination: int) -> None:
        self.cache.move(source, destination, self.rows[source].length)
        self.rows[destination] = self.rows[source]

    def ready(self, row: int) -> bool:
        return bool(self.rows[row].tokens) or not self.drafter.on_features

    def laws(self, asks: list[DraftRequest], growths: list[Growth]) -> Callable[[list[Parent]], DraftLogits]:
        roots = self._absorb(asks)
        rows = [ask.row for ask in asks]
        lengths = [self.rows[row].length for row in rows]
        return Expansion(self.drafter, self.cache, rows, lengths, growths, roots).expand

    def _absorb(self, asks: list[DraftRequest]) -> Tensor:
        """Take in what was committed since the last proposal, the anchor included; outputs at the anchors [m, d]."""
        return torch.stack([outputs[-1] for outputs in self.take_in(asks)])

    def take_in(
        self, asks: list[DraftRequest], behind: Sequence[int] = (), below: Tensor | None = None
    ) -> list[Tensor]:
        """Take in what was committed since the last proposal, the anchor included.

        Args:
            behind: tokens that follow each anchor in the same pass, and are not kept.
            below: the states [len(behind), d] that they are read with.

        Returns:
            The outputs [places, d] of each request.
        """
        rows = [ask.row for ask in asks]
        states = [self.rows[row] for row in rows]
        fresh = [self._fresh(state, ask.anchor) for state, ask in zip(states, asks, strict=True)]
        kept, starts = [len(ids) for ids in fresh], [state.length for state in states]
        counts = [count + len(behind) for count in kept]
        positions = [s + i for s, count in zip(starts, counts, strict=True) for i in range(count)]
        features = [part for state in states for part in state.features]
        above = self.drafter.fuse(torch.cat(features)) if features else None
        if above is not None and below is not None:
            above = torch.cat([part for own in above.split(kept) for part in (own, below)])
        self.cache.reserve(max(starts) + 2 * max(counts) + MAX_NODES)
        ids = [token for part in fresh for token in (*part, *behind)]
        outputs = self.drafter.run(self.cache, rows, starts, counts, ids, above, positions)
        for state, count in zip(states, kept, strict=True):
            state.length += count
            state.tokens, state.features = [], []
        return list(outputs.split(counts))

    def _fresh(self, state: _Row, anchor: int) -> list[int]:
        """Return the tokens to take in: the first committed one was the last proposal's anchor, and is in."""
        if not self.drafter.on_features and not state.length:
            return [*state.tokens, anchor]
        return [*state.tokens[1:], anchor]


class Expansion:
    """The trees in the making: outputs of their nodes, and where in the cache their keys lie.

    Args:
        roots: outputs at the anchors [m, d].
        below: request → node → the state [d] that its children are read with; None: the network's own outputs.
    """

    def __init__(
        self,
        drafter: AutoregressiveDrafter,
        cache: KVCache,
        rows: list[int],
        lengths: list[int],
        growths: list[Growth],
        roots: Tensor,
        below: list[dict[int, Tensor]] | None = None,
    ):
        self.drafter, self.cache, self.rows = drafter, cache, rows
        self.lengths, self.growths = lengths, growths
        self.outputs = [{-1: root} for root in roots]  # request → node → [d]
        self.below = below or self.outputs
        self.columns: list[dict[int, int]] = [{} for _ in rows]  # request → node → cache column
        self.roots = roots

    def expand(self, parents: list[Parent]) -> DraftLogits:
        """Return what `grow` asks for."""
        if parents[0].depth == 0:
            return DraftLogits(self.drafter.logits(self.roots[[parent.growth for parent in parents]]))
        return DraftLogits(self.drafter.logits(self.step(parents)))

    def step(self, parents: list[Parent]) -> Tensor:
        """Run the network on nodes of one level, none of them an anchor; outputs [nodes, d]."""
        by_request: dict[int, list[Parent]] = {}
        for parent in parents:
            by_request.setdefault(parent.growth, []).append(parent)
        requests = list(by_request)
        counts = [len(by_request[r]) for r in requests]
        starts = [self.lengths[r] + len(self.columns[r]) for r in requests]
        chains = all(
            len(by_request[r]) == 1 and len(self.columns[r]) == parents[0].depth - 1 for r in requests
        )
        for r, start in zip(requests, starts, strict=True):
            self.columns[r] |= {parent.node: start + i for i, parent in enumerate(by_request[r])}
        visible = None if chains else self._visible(by_request, max(starts) + max(counts), max(counts))
        above = [self.below[p.growth][self.growths[p.growth].parents[p.node]] for p in parents]
        outputs = self.drafter.run(
            self.cache,
            [self.rows[r] for r in requests],
            starts,
            counts,
            [parent.token for parent in parents],
            torch.stack(above),
            [self.lengths[p.growth] - 1 + p.depth for p in parents],
            visible,
        )
        for parent, output in zip(parents, outputs, strict=True):
            self.outputs[parent.growth][parent.node] = output
        return outputs

    def _visible(self, by_request: dict[int, list[Parent]], length: int, most: int) -> Tensor:
        """bool [requests, most, length]: each node sees the context, its ancestors and itself."""
        visible = torch.zeros(len(by_request), most, length, dtype=torch.bool)
        for row, (request, parents) in enumerate(by_request.items()):
            visible[row, :, : self.lengths[request]] = True
            for i, parent in enumerate(parents):
                node = parent.node
                while node >= 0:
                    visible[row, i, self.columns[request][node]] = True
                    node = self.growths[request].parents[node]
        return visible.to(self.drafter.device)

"""Drafting with several next-token modules (MTP), each of which drafts one token more (DeepSeek-V3, arXiv 2412.19437).

Module k reads a token x_j beside the state that module k − 1 has of x_{j−1}, the first beside the target's; of its
output there comes the law of x_{j+1}. Every module has keys of all committed tokens but the first few, so it takes in
what was committed as the first does. A drafted token has no state of the target: one of depth D is read by the modules
behind the D-th, the first of which gives the law of its children.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepspec.decoding.drafter import Drafter, DraftRequest, GrowingSession
from deepspec.decoding.tree import MAX_NODES, DraftLogits, Growth, Parent
from deepspec.drafters.autoregressive import AutoregressiveDrafter, Expansion
from deepspec.target.attention import CACHE_LENGTH, KVCache
from deepspec.target.ends import H_LAST
from deepspec.target.model import Target


class ModuleStack(Drafter):
    """Drafts as many tokens as there are modules.

    Args:
        modules: in the order in which they read one another.
    """

    layers = (H_LAST,)

    def __init__(self, modules: Sequence[AutoregressiveDrafter], target: Target):
        self.modules = list(modules)
        self.block_size = len(self.modules)
        self.vocab_size = target.vocab_size
        self.vocabulary = self.modules[0].vocabulary

    def session(self, slots: int) -> ModuleSession:
        return ModuleSession(self, slots)


@dataclass
class _Row:
    """A request: what has not been through the modules, and of each module what it holds.

    Attributes:
        known: tokens with a target pass.
        tokens, states: those that were not taken in yet, and the target's states of the same tokens.
        lengths: places in each module's cache.
        newest: each module's output at the newest token that it has taken in.
    """

    known: int = 0
    tokens: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    newest: list[Tensor] = field(default_factory=list)


class ModuleSession(GrowingSession):
    drafter: ModuleStack

    def __init__(self, drafter: ModuleStack, slots: int):
        self.drafter = drafter
        self.caches = [KVCache(slots, CACHE_LENGTH) for _ in drafter.modules]
        self.rows = [_Row() for _ in range(slots)]

    def begin(self, row: int) -> None:
        self.rows[row] = _Row()

    def extend(self, row: int, tokens: list[int], features: Tensor | None) -> None:
        state = self.rows[row]
        state.known += len(tokens)
        state.tokens += tokens
        state.states += [] if features is None else [features]

    def move(self, source: int, destination: int) -> None:
        self.rows[destination] = self.rows[source]
        for cache, length in zip(self.caches, self.rows[source].lengths, strict=False):
            cache.move(source, destination, length)

    def ready(self, row: int) -> bool:
        """Whether the last module has a token to read."""
        return self.rows[row].known >= self.drafter.block_size

    def laws(self, asks: list[DraftRequest], growths: list[Growth]) -> Callable[[list[Parent]], DraftLogits]:
        rows, expansions = [ask.row for ask in asks], list[Expansion]()
        for number, roots in enumerate(self._take_in(asks)):
            lengths = [self.rows[row].lengths[number] for row in rows]
            below = expansions[-1].outputs if expansions else None
            module, cache = self.drafter.modules[number], self.caches[number]
            expansions.append(Expansion(module, cache, rows, lengths, growths, roots, below))

        def expand(parents: list[Parent]) -> DraftLogits:
            depth = parents[0].depth
            if depth == 0:
                return expansions[0].expand(parents)
            states = [expansion.step(parents) for expansion in expansions[depth:]]
            return DraftLogits(self.drafter.modules[depth].logits(states[0]))

        return expand

    def _take_in(self, asks: list[DraftRequest]) -> list[Tensor]:
        """Let every module take in what was committed, the anchor included; its outputs at the anchors [asks, d]."""
        states = [self.rows[ask.row] for ask in asks]
        # The first committed token was the last proposal's anchor, and is in.
        ids = [[*state.tokens[1:], ask.anchor] for state, ask in zip(states, asks, strict=True)]
        above = [torch.cat(state.states) for state in states]
        roots = []
        for number, (module, cache) in enumerate(zip(self.drafter.modules, self.caches, strict=True)):
            starts = [state.lengths[number] if state.lengths[number:] else 0 for state in states]
            counts = [len(own) for own in ids]
            cache.reserve(max(starts) + 2 * max(counts) + MAX_NODES)
            outputs = module.run(
                cache,
                [ask.row for ask in asks],
                starts,
                counts,
                [token for own in ids for token in own],
                torch.cat(above),
                [start + i for start, count in zip(starts, counts, strict=True) for i in range(count)],
            ).split(counts)
            roots.append(torch.stack([own[-1] for own in outputs]))
            for i, (state, own) in enumerate(zip(states, outputs, strict=True)):
                if state.newest[
                    number:
                ]:  # the next one reads these tokens beside the outputs at those before
                    above[i] = torch.cat((state.newest[number][None], own[:-1]))
                    state.lengths[number] += counts[i]
                    state.newest[number] = own[-1]
                else:
                    ids[i], above[i] = ids[i][1:], own[:-1]
                    state.lengths.append(counts[i])
                    state.newest.append(own[-1])
        for state in states:
            state.tokens, state.states = [], []
        return roots

"""CUDA graphs of the target's small passes: one launch in place of the hundreds that a GPU would wait for.

A graph replays fixed shapes on fixed memory. So the passes of a decoding round are put into buckets, every index that
changes from round to round lives in a tensor that is filled before the replay, attention reads a fixed stretch of the
cache under an explicit mask, and the caches themselves are kept by the target for the next engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple
from weakref import finalize

import torch
from torch import Tensor

from deepspec.target.attention import CACHE_LENGTH, ForwardPass, KVCache, Rule, allowed

MOST_TOKENS = 256  # a longer pass (a prefill) keeps the GPU busy by itself
_MOST_GRAPHS = 128
_SIGHTS = 2  # a bucket's first pass runs as it is: many buckets never come again

Run = Callable[[Tensor, ForwardPass], Tensor]
Replay = Callable[[], None]


class Bucket(NamedTuple):
    """What a graph is made for."""

    requests: int
    tokens: int  # of all requests
    widest: int  # of one request, rounded up to a power of two
    length: int  # of the cache that attention reads, likewise
    wanted: frozenset[int]
    cache: int
    capacity: int

    @classmethod
    def of(cls, step: ForwardPass) -> Bucket | None:
        """None for a pass that is not replayed: a prefill, or one without a cache."""
        cache, tokens = step.cache, sum(step.counts)
        if cache is None or tokens > MOST_TOKENS or step.bidirectional:
            return None
        if step.rows != list(range(step.requests)):
            return None
        widest = 1 << (step.n - 1).bit_length()
        length = min(max(1 << (step.length - 1).bit_length(), CACHE_LENGTH), cache.max_length)
        return cls(step.requests, tokens, widest, length, step.wanted, id(cache), cache.max_length)


class StaticPass(ForwardPass):
    """A `ForwardPass` of fixed shapes: who goes where and who sees whom is in tensors that `load` fills."""

    cache: KVCache
    _visible: Tensor

    def __init__(self, bucket: Bucket, cache: KVCache, device: torch.device):
        positions = torch.zeros(1, bucket.tokens, dtype=torch.int64, device=device)
        super().__init__(positions, wanted=bucket.wanted)
        self.cache = cache
        self.requests, self.n, self.length = bucket.requests, bucket.widest, bucket.length
        self.ids = torch.zeros_like(positions)
        # Of each token: its request (also its cache row), its cache column, its place in the spread batch.
        self._index = torch.zeros(3, bucket.tokens, dtype=torch.int64, device=device)
        self._visible = torch.zeros(
            bucket.requests, bucket.widest, bucket.length, dtype=torch.bool, device=device
        )

    def load(self, ids: Tensor, step: ForwardPass) -> None:
        """Take over what `step`, of the same bucket, asks for."""
        self.ids.copy_(ids)
        self.positions.copy_(step.positions)
        index = [
            (row, start + i, row * self.n + i)
            for row, (start, count) in enumerate(zip(step.starts, step.counts, strict=True))
            for i in range(count)
        ]
        self._index.copy_(torch.tensor(index).T)
        self._visible.zero_()
        self._visible[:, : step.n, : step.length] = step.visible

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.note(layer)
        row, column, _ = self._index
        kept_keys, kept_values = self.cache.layer(layer, keys, values)
        kept_keys[row, :, column] = keys[0].transpose(0, 1)
        kept_values[row, :, column] = values[0].transpose(0, 1)
        read = slice(self.requests), slice(None), slice(self.length)
        return kept_keys[read], kept_values[read]

    def spread(self, queries: Tensor) -> Tensor:
        padded = queries.new_zeros(self.requests * self.n, *queries.shape[2:])
        padded.index_copy_(0, self._index[2], queries[0])
        return padded.view(self.requests, self.n, *queries.shape[2:])

    def gather(self, spread: Tensor) -> Tensor:
        return spread.flatten(0, 1).index_select(0, self._index[2])[None]

    def _sees_all(self) -> bool:
        return False

    def _within(self, rule: int | Rule) -> Tensor:
        row, column, _ = self._index
        positions = self.spread(self.positions[..., None, None])[..., 0, 0]
        keys = torch.arange(self.length, device=positions.device).repeat(self.requests, 1)
        keys[row, column] = self.positions[0]
        return allowed(rule, positions, keys)


class GraphedPasses:
    """Runs passes, those of a bucket seen before as graphs.

    Args:
        run: (ids, step) → h_last, the model's forward.
        capture: makes a replay of a function; tests pass one that needs no GPU.
    """

    def __init__(self, run: Run, capture: Callable[[Callable[[], None]], Replay] | None = None):
        self.run = run
        self.capture = capture or _captured
        self._seen: Counter[Bucket] = Counter()
        self._graphs: dict[Bucket, tuple[StaticPass, Tensor, Replay]] = {}
        self._spare: dict[int, KVCache] = {}

    def __call__(self, ids: Tensor, step: ForwardPass) -> Tensor:
        """As `Target.forward`; h_last and features are overwritten by the next pass of the same bucket."""
        bucket = Bucket.of(step)
        if bucket is None:
            return self.run(ids, step)
        self._seen[bucket] += 1
        if bucket not in self._graphs:
            if self._seen[bucket] < _SIGHTS or len(self._graphs) >= _MOST_GRAPHS:
                return self.run(ids, step)
            self._graphs[bucket] = self._make(bucket, ids, step)
        static, hidden, replay = self._graphs[bucket]
        static.load(ids, step)
        replay()
        step.features.update(static.features)
        step.stored |= static.stored
        return hidden

    def _make(self, bucket: Bucket, ids: Tensor, step: ForwardPass) -> tuple[StaticPass, Tensor, Replay]:
        if step.cache is None:
            raise ValueError("a pass without a cache is not replayed")
        static = StaticPass(bucket, step.cache, ids.device)
        static.load(ids, step)
        hidden: Tensor | None = None

        def run() -> None:
            nonlocal hidden
            static.clear()
            fresh = self.run(static.ids, static)
            hidden = fresh if hidden is None else hidden.copy_(fresh)

        replay = self.capture(run)
        if hidden is None:
            raise RuntimeError("the pass was recorded without running")
        return static, hidden, replay

    def cache(self, slots: int, owner: object) -> KVCache:
        """Return a cache of so many slots, the one that graphs were made for if no other owner is alive."""
        cache = self._spare.pop(slots, None) or KVCache(slots, CACHE_LENGTH)
        finalize(owner, self._spare.__setitem__, slots, cache)
        return cache


def _captured(run: Callable[[], None]) -> Replay:
    """Record a CUDA graph of `run`, run once beforehand: libraries choose kernels and take workspace at first use."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay

"""Batches made ahead of time: read, decoded and padded on worker threads while the steps before are computed.

A batch is a function of (seed, step) and of the anchors to replay, so when it is made changes nothing of what is in it.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from deepspec.training.batches import Batch, Batches

DEPTH = 2  # steps made ahead, at least


class Prefetcher:
    """Hands out a process's share of each step's batch; inside a `with` block it is made ahead of time.

    Outside the block, and with features that the target computes when they are asked for, each batch is made when it
    is taken. For a CUDA device batches are put into pinned memory, from which they are copied without waiting.

    Args:
        device: that batches are moved to.
        steps: of the whole run; nothing is made beyond them.
        rank, world, parts: as `Batches.make` takes them.
        workers: threads that make batches, each of them a step's.
    """

    def __init__(
        self,
        batches: Batches,
        device: torch.device,
        steps: int,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
        workers: int = 1,
    ):
        self.batches, self.device, self.steps = batches, device, steps
        self._share = rank, world, parts
        self.workers, self.depth = workers, max(DEPTH, workers + 1)
        self._worker: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[int, Future[list[Batch]]]] = deque()
        self._replayed = batches.replayed  # what the batches ahead were made with

    def __enter__(self) -> Prefetcher:
        if self.batches.store.ahead:
            self._worker = ThreadPoolExecutor(
                self.workers, "batches", initializer=_use, initargs=(_index(self.device),)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop()
        if self._worker is not None:
            self._worker.shutdown(wait=True)
            self._worker = None

    def take(self, step: int) -> list[Batch]:
        """Return the parts of a step's batch, on the device; what fails on the worker is raised here."""
        if self._worker is None or step >= self.steps:
            parts = self._make(step)
        else:
            if self._replayed is not self.batches.replayed or (self._ahead and self._ahead[0][0] != step):
                self._drop()
            self._fill(self._worker, step)
            parts = self._ahead.popleft()[1].result()
            self._fill(self._worker, step + 1)
        return [part.to(self.device) for part in parts]

    def _fill(self, worker: ThreadPoolExecutor, step: int) -> None:
        """Ask the workers for `depth` batches from `step` on, those that they were asked for left out."""
        self._replayed = self.batches.replayed
        for number in range(step + len(self._ahead), min(step + self.depth, self.steps)):
            self._ahead.append((number, worker.submit(self._make, number)))

    def _make(self, step: int) -> list[Batch]:
        parts = self.batches.make(step, *self._share)
        return [part.pinned() for part in parts] if self.device.type == "cuda" else parts

    def _drop(self) -> None:
        for _, batch in self._ahead:
            batch.cancel()
        self._ahead.clear()


def _index(device: torch.device) -> int | None:
    """Return the number of a CUDA device, None of another."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _use(index: int | None) -> None:
    """Make a CUDA device the thread's own: pinning would open a context on the first one."""
    if index is not None:
        torch.cuda.set_device(index)

"""Work over many pieces in several processes: results come in order, and a bounded number of pieces is ahead."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from deepspec.errors import DeepSpecError

Piece = TypeVar("Piece")
Result = TypeVar("Result")
ALONE = 4  # pieces that this process does before it starts others
AHEAD = 2  # pieces for each process that are under way or wait to be taken

_work: Callable[[Any], Any] | None = None  # of the pool that is being made; processes are forked with it


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_pieces(things: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Yield lists of so many things; the last may be shorter."""
    things = iter(things)
    return iter(lambda: list(islice(things, size)), [])


def ordered_map(
    work: Callable[[Piece], Result], pieces: Iterable[Piece], processes: int | None = None
) -> Iterator[Result]:
    """Yield `work(piece)` of every piece, in order.

    Processes are forked, so `work` may be anything that needs no thread, and its results must pickle. They are started
    from the fifth piece on, and none where there is one core.

    Args:
        processes: None: as many as there are cores.

    Raises:
        DeepSpecError: a process was killed, by want of memory as a rule; `work` raised it.
    """
    processes = processes or cores()
    if processes == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, pieces)
        return
    pieces = iter(pieces)
    yield from map(work, islice(pieces, ALONE))
    for first in pieces:
        yield from _pooled(work, chain([first], pieces), processes)


def _pooled(work: Callable[[Piece], Result], pieces: Iterable[Piece], processes: int) -> Iterator[Result]:
    global _work
    _work = work
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, initializer=_begin)
    ahead: deque[Future[Result]] = deque()
    try:
        for piece in pieces:
            ahead.append(pool.submit(_call, piece))
            if len(ahead) >= AHEAD * processes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool:
        raise DeepSpecError(
            "a process of this stage was killed; if memory ran out, give it fewer cores (taskset)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _call(piece: Any) -> Any:
    assert _work is not None
    return _work(piece)


def _begin() -> None:
    """End this process with the one that started it, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)

"""Time decoding fairly: what all measurements of speed have in common, whichever runtime decodes.

What is compared decodes the same work (a prompt, a turn, a group of prompts) one after the other, so that a slow
minute of the machine hits all alike; who goes first moves on with each piece of work (`rotated`); all have decoded
before the clock starts (`warm_up`). Seconds are wall-clock time of the whole call less the target's prefill, which
all share (`timed`): drafting, verification, Python and what a draft itself makes of the prompt are all in.

The order and the runs are separate calls, since what is measured is kept run by run and resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

WARM_UP_TOKENS = 32

Item = TypeVar("Item")
Output = TypeVar("Output")
Work_contra = TypeVar("Work_contra", contravariant=True)


class Runtime(Protocol[Work_contra, Output]):
    """What decodes: our engine, a full batch of it, transformers, llama.cpp."""

    def decode(self, work: Work_contra, /) -> Output:
        """Decode a piece of work; all of the call is timed."""

    def prefill_s(self, work: Work_contra, output: Output, /) -> float:
        """Return the seconds of the target's prefill, which are taken off."""


def timed(runtime: Runtime[Work_contra, Output], work: Work_contra) -> tuple[Output, float]:
    """Return what was decoded, and the wall-clock seconds of it less the target's prefill."""
    began = time.perf_counter()
    output = runtime.decode(work)
    seconds = time.perf_counter() - began
    return output, seconds - runtime.prefill_s(work, output)


def rotated(items: Sequence[Item], by: int) -> list[Item]:
    """Return the items in the order of their runs: item `by`, counted round, goes first."""
    by %= len(items)
    return [*items[by:], *items[:by]]


def warm_up(runtimes: Iterable[Runtime[Work_contra, Any]], work: Work_contra) -> None:
    """Decode once with each, off the clock: kernels, caches and compiled shapes are made."""
    for runtime in runtimes:
        runtime.decode(work)


class FirstToken:
    """The prefill of a runtime that does not report it: the time in which it makes the first token alone.

    Args:
        decode: prompt ids → the first token, without a draft.
    """

    def __init__(self, decode: Callable[[list[int]], Any]):
        self._decode = decode
        self._last: tuple[list[int], float] | None = None

    def seconds(self, ids: list[int]) -> float:
        """Return the better of two, after an unmeasured one that makes the kernels for this length.

        Those of the last prompt are remembered: its runs, one after the other, share one figure.
        """
        if self._last is None or self._last[0] is not ids:
            self._last = ids, self._measured(ids)
        return self._last[1]

    def _measured(self, ids: list[int]) -> float:
        self._decode(ids)
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            self._decode(ids)
            seconds.append(time.perf_counter() - began)
        return min(seconds)


class Answering(Generic[Output]):
    """A runtime that answers prompts, with the prefill told by the first token.

    Args:
        answer: (prompt ids, most new tokens) → the output.
    """

    def __init__(
        self, answer: Callable[[list[int], int], Output], max_new_tokens: int, first_token: FirstToken
    ):
        self._answer, self._max_new_tokens, self._first_token = answer, max_new_tokens, first_token

    def decode(self, ids: list[int]) -> Output:
        return self._answer(ids, self._max_new_tokens)

    def prefill_s(self, ids: list[int], output: Output) -> float:
        return self._first_token.seconds(ids)

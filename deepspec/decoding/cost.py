"""What a round costs on this device, measured once: the figures a controller decides with."""

from __future__ import annotations

from statistics import median

from deepspec.decoding.engine import stream
from deepspec.decoding.request import Request
from deepspec.decoding.scheduler import Adaptive
from deepspec.drafters.base import Drafter
from deepspec.target import Target

_CONTEXT, _TOKENS, _REPEATS = 96, 24, 5


def measure(target: Target, drafter: Drafter) -> Adaptive:
    """Seconds of a plain round and of a drafted one, medians of interleaved short greedy runs after a warm-up.

    Of a combined drafter the trained part is timed: it is what costs.
    """
    drafter = getattr(drafter, "trained", drafter)
    prompt = [(7919 * i) % target.vocab_size for i in range(1, _CONTEXT + 1)]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(_REPEATS + 1):
        for drafted in (False, True):
            request = iter([Request(prompt, _TOKENS, stop_ids=frozenset())])
            (run,) = stream(target, drafter if drafted else None, lambda request=request: next(request, None))
            if repeat:
                seconds[drafted].append(run.stats.decode_s / max(run.stats.rounds, 1))
    return Adaptive(plain_s=median(seconds[False]), drafted_s=median(seconds[True]))

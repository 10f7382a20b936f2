"""What a round costs on this device, measured once: the figures a controller decides with."""

from __future__ import annotations

from statistics import median

from deepspec.decoding.engine import generate
from deepspec.decoding.scheduler import Adaptive
from deepspec.drafters.base import Drafter
from deepspec.target import Target

_CONTEXT, _TOKENS, _REPEATS = 96, 24, 5


def measure(target: Target, drafter: Drafter) -> Adaptive:
    """Seconds of a plain round and of a drafted one, medians of interleaved short runs after a warm-up.

    The context is arbitrary but free of repeats, so that a lookup finds nothing and the trained draft is timed.
    """
    prompt = [(7919 * i) % target.vocab_size for i in range(1, _CONTEXT + 1)]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(_REPEATS + 1):
        for drafted in (False, True):
            (run,) = generate(target, drafter if drafted else None, prompt, _TOKENS)
            if repeat:
                seconds[drafted].append(run.stats.decode_s / max(run.stats.rounds, 1))
    return Adaptive(plain_s=median(seconds[False]), drafted_s=median(seconds[True]))

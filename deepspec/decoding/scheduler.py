"""When to draft: a controller that falls back to plain rounds where speculation does not pay.

Decisions use measured costs fixed beforehand and the request's own history, never a token that is still to be
verified, so the output's law is untouched (non-anticipation) and a seed with the same costs reproduces its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

_MEMORY = 0.8  # weight of the past in the running mean of tokens committed per drafted round
_LONGEST_PAUSE = 32


@dataclass(frozen=True)
class Adaptive:
    """Draft while it pays.

    Args:
        plain_s: seconds of a plain round.
        drafted_s: seconds of a round with a draft: draft, verification and host.
    """

    plain_s: float
    drafted_s: float

    def pace(self) -> Pace:
        return Pace(self.drafted_s / self.plain_s)


class Pace:
    """One request's state. A drafted round pays when it commits more than `cost` tokens on average.

    When it does not, drafting pauses for a few plain rounds and is then tried once; each failed trial doubles the
    pause.
    """

    def __init__(self, cost: float):
        self.cost = cost
        self.gain = cost + 1.0  # optimistic: two or three poor rounds are needed to stop
        self.wait = 0
        self.pause = 4

    def drafts(self) -> bool:
        return self.wait == 0

    def observe(self, drafted: bool, committed: int) -> None:
        if not drafted:
            self.wait = max(self.wait - 1, 0)
            return
        self.gain = _MEMORY * self.gain + (1 - _MEMORY) * committed
        if self.gain >= self.cost:
            self.pause = 4
        else:
            self.wait = self.pause
            self.pause = min(2 * self.pause, _LONGEST_PAUSE)

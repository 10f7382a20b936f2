"""Corrects a cost curve by the rounds that follow it: memory and clocks may have changed since it was measured."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_RECENT = 3  # plain rounds whose median is the pace; so many are needed before anything is corrected
_OUTLIER = 2.0  # times what is expected: such a round counts as that, since something else ran
_FORGOTTEN = 1 / 64  # of what drafted rounds took, a round
_HELD = 0.5  # plain rounds' time of drafting and verifying that the curve has right until rounds have shown otherwise
_LEAST, _MOST = 1 / 16, 16.0
_FIRST, _LATER = 4, 64  # drafted rounds behind which a plain one is due: while little is known, and else
# Rounds that take so much more or less than is expected of them: little is known again.
_FOLLOW, _JUMP = 1 / 8, math.log(1.2)


class RoundTimes:
    """What rounds took beside what the curve has for them.

    A controller compares a round with a plain one, so only what comes on top of a plain round matters: its surcharge.
    Plain rounds tell the pace, seconds of now for each of the curve's; at that pace drafted rounds tell the surcharge.
    Where every round drafts, a plain one is due now and then.

    Attributes:
        surcharge: what drafting and verifying cost, for each second that the curve has for them.
    """

    def __init__(self) -> None:
        self.surcharge = 1.0
        self._paces: deque[float] = deque(maxlen=_RECENT)
        self._unbroken = 0  # drafted rounds since the last plain one
        self._drift = 0.0  # how far rounds are from what is expected of them, as a logarithm
        self._took = self._expected = 0.0  # beyond plain rounds, in plain rounds of the curve

    @property
    def plain_is_due(self) -> bool:
        known = len(self._paces) == _RECENT and abs(self._drift) < _JUMP
        return self._unbroken >= (_LATER if known else _FIRST)

    def corrected(self, plain_s: float, round_s: float) -> float:
        """Return what a round costs where the curve has so many seconds for it and for a plain one."""
        return plain_s + self.surcharge * (round_s - plain_s)

    def observe(self, plain: bool, plain_s: float, round_s: float, took_s: float) -> None:
        """End a round.

        Args:
            plain: nothing was drafted in it, and nothing verified.
            plain_s: seconds of a plain round, by the curve.
            round_s: of this round, by the curve.
            took_s: of this round.
        """
        if plain:
            self._paces.append(took_s / plain_s)
            self._unbroken = 0
            return
        self._unbroken += 1
        if len(self._paces) < _RECENT:
            return
        more = max(round_s / plain_s - 1, 0.0)
        likely = 1 + self.surcharge * more
        took = min(took_s / (median(self._paces) * plain_s), _OUTLIER * likely)
        self._drift += _FOLLOW * (math.log(took / likely) - self._drift)
        self._took += took - 1 - _FORGOTTEN * self._took
        self._expected += more - _FORGOTTEN * self._expected
        self.surcharge = min(max((_HELD + self._took) / (_HELD + self._expected), _LEAST), _MOST)

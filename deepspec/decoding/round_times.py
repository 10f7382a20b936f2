"""Corrects a cost curve by the rounds that follow it: memory and clocks may have changed since it was measured."""

from __future__ import annotations

_FOLLOW = 1 / 16  # how fast the pace follows plain rounds
_OUTLIER = 2.0  # times the pace: such a round counts as that, since something else ran
_FORGOTTEN = 1 / 64  # of what drafted rounds took, a round
_HELD = 0.5  # plain rounds' time of drafting and verifying that the curve has right until rounds have shown otherwise
_LEAST, _MOST = 1 / 16, 16.0
_FIRST, _LATER = 4, 64  # drafted rounds behind which a plain one is due: at first, and behind enough of them
_ENOUGH = 3


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
        self._pace = 1.0
        self._plain = 0  # rounds
        self._unbroken = 0  # drafted rounds since the last plain one
        self._took = self._expected = 0.0  # beyond plain rounds, in plain rounds of the curve

    @property
    def plain_is_due(self) -> bool:
        return self._unbroken >= (_FIRST if self._plain < _ENOUGH else _LATER)

    def observe(self, plain_s: float, round_s: float, took_s: float) -> None:
        """End a round.

        Args:
            plain_s: seconds of a plain round, by the curve.
            round_s: of this round, by the curve; the same where it was plain.
            took_s: of this round.
        """
        if round_s == plain_s:
            self._plain += 1
            self._unbroken = 0
            pace = took_s / plain_s
            if self._plain > 1:
                pace = min(max(pace, self._pace / _OUTLIER), self._pace * _OUTLIER)
            self._pace += max(1 / self._plain, _FOLLOW) * (pace - self._pace)
            return
        self._unbroken += 1
        if self._plain:
            took = min(took_s / (self._pace * plain_s), _OUTLIER * round_s / plain_s)
            self._took += took - 1 - _FORGOTTEN * self._took
            self._expected += round_s / plain_s - 1 - _FORGOTTEN * self._expected
            self.surcharge = min(max((_HELD + self._took) / (_HELD + self._expected), _LEAST), _MOST)

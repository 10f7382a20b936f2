"""When a request drafts, and when drafting pauses because it does not pay."""

from __future__ import annotations

from collections.abc import Callable

_CREDIT = 2.0  # plain rounds that a request's drafts may lose before they have to earn them
_MOST_KEPT = 6.0  # of what it has earned
_TRIAL = 0.5  # plain rounds that they may lose when they are tried again
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 64


class DraftPacer:
    """When a request drafts. A drafted round pays when it commits more tokens than the plain rounds it costs.

    An account in plain rounds: a drafted round adds what it committed and takes what it cost. Overdrawn, drafting
    pauses for a few plain rounds and is then tried again; each failed trial doubles the pause. So no more is ever
    lost than the account begins with, what was earned before (of which little is kept: contexts change), and the
    trials. What an account begins with is more than chance alone would take from a draft that pays.

    Args:
        cost: of the round just ended, in plain rounds.
        plainly: whether this round drafts nothing, whatever the account says.
    """

    def __init__(self, cost: Callable[[], float], plainly: Callable[[], bool] = lambda: False):
        self.cost = cost
        self.plainly = plainly
        self.credit = self.account = _CREDIT
        self.wait = 0
        self.pause = _FIRST_PAUSE

    def drafts(self) -> bool:
        return self.wait == 0 and not self.plainly()

    def observe(self, committed: float) -> None:
        """End the round. Whoever was to draft pays for it, even where nothing drafted was worth verifying."""
        self._settle(committed - self.cost())

    def _settle(self, gain: float, requests: int = 1) -> None:
        """Take in a round's gain; a pause is the longer the more requests have shown that it is due."""
        if self.wait:
            self.wait -= 1
            return
        self.account = min(self.account + gain, _MOST_KEPT)
        if self.account < 0:
            self.account = _TRIAL
            self.wait = min(requests * self.pause, _LONGEST_PAUSE)
            self.pause = min(2 * self.pause, _LONGEST_PAUSE)
        elif self.account >= self.credit:
            self.pause = _FIRST_PAUSE


class SharedPacer(DraftPacer):
    """One pace and one account for all requests: each pays in what it committed and takes out what the round cost.

    The account is no larger than a single request's, and begins with less: the more requests a round has, the fewer
    rounds it takes to tell a poor draft from bad luck, and the more a lost round costs. For the same reason a pause is
    longer then. What does not pay in a full batch may in a smaller one, where verified tokens are nearly free: a pause
    ends where half of the requests that it began with have gone.
    """

    def __init__(self, cost: Callable[[], float], plainly: Callable[[], bool] = lambda: False):
        super().__init__(cost, plainly)
        self.begun = False
        self.committed: list[float] = []
        self.paused = 0  # requests of the round that began the pause
        self.may_pay = True

    def drafts(self) -> bool:
        return self.may_pay and super().drafts()

    def open(self, requests: int, may_pay: Callable[[], bool]) -> None:
        """Begin a round; whether a draft may pay in it is asked where none is paused."""
        self.credit = _CREDIT / 2 * (1 + 1 / requests)
        if not self.begun:
            self.begun, self.account = True, self.credit
        if self.wait and 2 * requests <= self.paused:
            self.wait, self.pause = 0, _FIRST_PAUSE
        self.may_pay = not self.wait and may_pay()

    def observe(self, committed: float) -> None:
        self.committed.append(committed)

    def close(self) -> None:
        """End the round: all its requests have been observed."""
        if self.committed:
            requests, waiting = len(self.committed), self.wait
            self._settle(sum(self.committed) - requests * self.cost(), requests)
            if self.wait and not waiting:
                self.paused = requests
            self.committed.clear()

"""Suffix matching: what followed the longest end of the context that has been seen before. No training.

A suffix automaton (Blumer et al. 1985), grown token by token, finds that longest match in amortised constant time
(SAM decoding, arXiv 2411.10666). A long match is a good sign, so the draft is as long as the match deserves
(SuffixDecoding, arXiv 2411.04975), and a running count of how often matches of each length went on as they did
before gives the `survival` that controllers weigh. Texts given at construction are searched besides the request's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from deepspec.decoding.drafter import Proposal
from deepspec.drafters.algorithms.lookup import IndexSession, TrainingFreeDrafter, continued
from deepspec.drafters.params import SuffixParams

_SEPARATOR = -1  # between the texts of a corpus; no token
_REFRESHED = 32  # states whose latest place is kept exactly, from the longest match down
_LENGTHS = 24  # match lengths told apart by `Odds`
_PRIOR = 6.0  # observations of a length that the prior of `Odds` is worth
_STRETCH = 2  # draft tokens for a token of match


class Match(NamedTuple):
    length: int
    end: int  # index of the token that followed the occurrence


class SuffixAutomaton:
    """All substrings of a growing token list, in at most 2n states; state 0 is the empty one.

    A state stands for the substrings that end at the same places: `length` is that of the longest, `end` the latest
    of these places (index just after), `link` the state of the longest suffix that also ends elsewhere.
    """

    def __init__(self, tokens: Iterable[int] = ()):
        self.tokens: list[int] = []
        self.follow: list[dict[int, int]] = []
        self.link: list[int] = []
        self.length: list[int] = []
        self.end: list[int] = []
        self.whole = self._state({}, -1, 0, 0)
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Amortised constant time."""
        self.tokens.append(token)
        size = len(self.tokens)
        whole = self._state({}, 0, size, size)
        state = self.whole
        while state >= 0 and token not in self.follow[state]:
            self.follow[state][token] = whole
            state = self.link[state]
        if state >= 0:
            self.link[whole] = self._extension(state, token)
        self.whole = whole
        self._refresh(self.link[whole], size)

    def longest(self, token: int) -> Match | None:
        """Return the longest end of `tokens + [token]` that occurs in `tokens`, at its latest occurrence."""
        return self.step(self.whole, self.length[self.whole], token)[2]

    def step(self, state: int, length: int, token: int) -> tuple[int, int, Match | None]:
        """Go on matching a text of which `length` tokens, ending in `state`, are matched so far.

        Returns:
            state and length after `token`, and the match, or None where even the token alone is new.
        """
        while state >= 0 and token not in self.follow[state]:
            state = self.link[state]
            length = self.length[state] if state >= 0 else 0
        if state < 0:
            return 0, 0, None
        state = self.follow[state][token]
        return state, length + 1, Match(length + 1, self.end[state])

    def _state(self, follow: dict[int, int], link: int, length: int, end: int) -> int:
        self.follow.append(follow)
        self.link.append(link)
        self.length.append(length)
        self.end.append(end)
        return len(self.link) - 1

    def _extension(self, state: int, token: int) -> int:
        """Return the state whose longest string is that of `state` and `token`; split it off if there is none."""
        target = self.follow[state][token]
        if self.length[target] == self.length[state] + 1:
            return target
        clone = self._state(
            dict(self.follow[target]), self.link[target], self.length[state] + 1, self.end[target]
        )
        self.link[target] = clone
        while state >= 0 and self.follow[state].get(token) == target:
            self.follow[state][token] = clone
            state = self.link[state]
        return clone

    def _refresh(self, state: int, end: int) -> None:
        """Give the suffixes that occurred before their later place.

        A text of one repeated token has a state for each of its lengths: going through the longest few bounds the
        work, and the others keep a place that is right, if not the latest.
        """
        for _ in range(_REFRESHED):
            if state <= 0:
                return
            self.end[state] = end
            state = self.link[state]


class Odds:
    """How often a match of each length went on for one more token: running means on top of a prior.

    Every token that agrees makes the match one longer, so one table serves all depths of a proposal. The prior was
    fitted to greedy answers of a small chat model (docs/lab-notes.md).
    """

    def __init__(self) -> None:
        lengths = range(1, _LENGTHS + 1)
        self.tried = {m: _PRIOR for m in lengths}
        self.right = {m: _PRIOR * (1 - 1.5 / (m + 0.9)) for m in lengths}

    def note(self, length: int, right: bool) -> None:
        length = min(length, _LENGTHS)
        self.tried[length] += 1
        self.right[length] += right

    def survival(self, length: int, count: int) -> list[float]:
        """Chance that the first 1, 2, ... `count` tokens after a match of `length` all agree."""
        chances, chance = [], 1.0
        for m in range(length, length + count):
            m = min(m, _LENGTHS)
            chance *= self.right[m] / self.tried[m]
            chances.append(chance)
        return chances


class SuffixIndex:
    """One request's own automaton, its place in the corpus, and the last proposal, to be judged by what comes."""

    def __init__(self, min_match: int, corpus: SuffixAutomaton | None, odds: Odds):
        self.min_match = min_match
        self.own = SuffixAutomaton()
        self.corpus = corpus
        self.place = (0, 0)  # state and length matched in the corpus
        self.odds = odds
        self.guess: list[int] = []
        self.matched = 0  # length of the match that led to the guess
        self.start = 0  # index of its first token in the context

    def append(self, token: int) -> None:
        self._judge(token)
        self.own.append(token)
        if self.corpus is not None:
            self.place = self.corpus.step(*self.place, token)[:2]

    def proposal(self, anchor: int, room: int) -> Proposal:
        self._judge(anchor)
        self.guess = []
        source, match = self._longest(anchor)
        if match is None or match.length < self.min_match:
            return Proposal()
        count = min(room, _STRETCH * match.length)
        if source is self.own:
            self.guess = continued(source.tokens, match.end, anchor, count)
        else:
            end = source.tokens.index(_SEPARATOR, match.end)
            self.guess = source.tokens[match.end : min(end, match.end + count)]
        self.matched, self.start = match.length, len(self.own.tokens) + 1
        survival = self.odds.survival(match.length, len(self.guess))
        return Proposal.chain(self.guess, survival=survival, free=True)

    def _longest(self, anchor: int) -> tuple[SuffixAutomaton, Match | None]:
        """Return the longest match and where it is; of two equally long ones the request's own."""
        match = self.own.longest(anchor)
        if self.corpus is not None:
            elsewhere = self.corpus.step(*self.place, anchor)[2]
            if (
                elsewhere
                and (match is None or elsewhere.length > match.length)
                and self.corpus.tokens[elsewhere.end] != _SEPARATOR
            ):
                return self.corpus, elsewhere
        return self.own, match

    def _judge(self, token: int) -> None:
        """Compare the context's next token with the one proposed for its place.

        The context is the judge, not the verification: a proposal that was cut short is not taken to have failed.
        """
        k = len(self.own.tokens) - self.start
        if 0 <= k < len(self.guess):
            right = self.guess[k] == token
            self.odds.note(self.matched + k, right)
            if not right:
                self.guess = []


class SuffixDrafter(TrainingFreeDrafter):
    """Proposes what followed the longest match of the context's end, if at least `min_match` tokens match.

    Args:
        corpus: texts as token ids, such as earlier answers, that are searched as well (they take half a
            kilobyte of memory a token).
    """

    architecture = "DeepSpecSuffix"

    def __init__(self, block_size: int, min_match: int, corpus: Iterable[list[int]] = ()):
        super().__init__(block_size, min_match)
        texts = SuffixAutomaton(token for text in corpus for token in (*text, _SEPARATOR))
        self.corpus = texts if texts.tokens else None

    def session(self, slots: int) -> IndexSession:
        odds = Odds()
        return IndexSession(lambda: SuffixIndex(self.min_match, self.corpus, odds), self.block_size, slots)


ALGORITHM = SuffixDrafter.algorithm(SuffixParams)

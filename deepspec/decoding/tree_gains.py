"""Whether a tree is worth more than a chain: what either could have brought in rounds in which a tree was drafted."""

from __future__ import annotations

import math

_FOLLOW = 1 / 8  # how fast the mean follows what is seen
_DEAR = 0.15  # of a round: where a tree's draft costs so much more than a chain's, chains are drafted first
_AGAIN = 64  # rounds of chains, after which a tree is tried again


class TreeGains:
    """The gain of trees over chains for about so many requests.

    A tree that was drafted has its likeliest path, so both are known of it: the expected tokens a second of what is
    verified of the tree, and of what would have been verified of the path, had a chain been drafted.
    """

    def __init__(self) -> None:
        self._gain: float | None = None  # a logarithm
        self._chains = 0  # rounds since the last tree

    def pays(self, tree_s: float, chain_s: float, plain_s: float) -> bool:
        """Return whether a tree is to be drafted.

        Args:
            tree_s, chain_s: seconds of drafting the one and the other.
            plain_s: of a pass over one token a request.
        """
        if self._chains >= _AGAIN:
            return True
        if self._gain is None:
            return tree_s - chain_s < _DEAR * (chain_s + plain_s)
        return self._gain > 0

    def tree(self, ratio: float) -> None:
        """End a round of trees, which were worth so many times what chains would have been."""
        seen = math.log(ratio)
        self._gain = seen if self._gain is None else self._gain + _FOLLOW * (seen - self._gain)
        self._chains = 0

    def chain(self) -> None:
        """End a round in which chains were drafted, where trees could have been."""
        self._chains += 1

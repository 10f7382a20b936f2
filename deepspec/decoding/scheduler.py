"""Controllers: what is drafted and how much of it is verified; when drafting pauses is `pacing.py`.

Non-anticipation. Whatever looks at a sampled token before deciding whether to verify it changes the output's law:
drop the drafts that look poor, and the ones that remain look better than the drafter is (DSpark, DeepSeek 2026, §3.2
and appendix A: a token of probability 0.70 comes out with 0.85). So a controller here decides from costs measured
beforehand, from what the context's own history showed, and from survival estimates that do not see their own token.
The estimate of level j may depend on the token of level j − 1; that is why levels are admitted in descending order
and the first one that does not pay ends the search. A global optimum over all prefixes would let level j speak for
or against the verification of the token before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

from deepspec.decoding.cost import CostCurve
from deepspec.decoding.pacing import DraftPacer, SharedPacer
from deepspec.decoding.round_times import RoundTimes
from deepspec.decoding.shapes import Shape
from deepspec.decoding.tree import Proposal
from deepspec.decoding.tree_gains import TreeGains

_LONGEST_LOOK = 16  # tokens of a draft
_FIRST_GUESS = 0.8  # chance that a token without an estimate follows its accepted parent, before any was seen
_FOLLOW = 0.05  # how fast that guess follows what is seen
_HOPED = 4.0  # tokens that the guess counts for
_FORGOTTEN = 1 / 256  # of what was seen, a round: contexts change, and a draft that lost is tried again
_REMEMBERED = 64.0  # tokens at most, so that what was long true is given up as soon
_CONTEXT_STEP = 64  # tokens: contexts that differ by less are priced alike
_RARELY = 1024  # rounds without a draft, after which one is tried whatever is expected of it


class Controller:
    """Verifies every proposal whole, in every round; the others build on it.

    The engine asks in each round: `round`, `DraftPacer.drafts` of each request, `shape` where one drafts, `select` once
    all have drafted; and tells it afterwards: `observe` of each verified proposal, `DraftPacer.observe` of each
    request, `took` of the round.

    Attributes:
        looks_up: whether proposals may be free; the engine sets it.
    """

    looks_up = True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was seen: a fresh engine with the same seeds decodes the same tokens."""
        self._follows: dict[int, float] = {}  # depth → chance that its token follows an accepted parent

    def round(self, requests: int, context: float | None = None) -> None:
        """Begin a round with `requests` in flight, whose contexts have so many tokens on average (None: unknown)."""

    def shape(self, asked: Shape) -> Shape:
        """Return what is drafted in this round, where `asked` may be a tree or a chain."""
        return asked

    def took(self, seconds: float) -> None:
        """End a round whose drafts and target pass, verdict included, took so long."""

    def pacer(self) -> DraftPacer | None:
        """When a fresh request drafts; None: in every round."""
        return None

    def select(self, proposals: list[Proposal]) -> list[Proposal]:
        """Return what of each request's proposal is verified in one target pass, never more than was given."""
        return proposals

    def observe(self, proposal: Proposal, accepted: list[int]) -> None:
        """Note that the path of nodes `accepted` of a verified proposal stood."""
        if proposal.survival is not None:
            return
        for depth in range(1, proposal.judged(accepted) + 1):
            known = self._follows.get(depth, _FIRST_GUESS)
            self._follows[depth] = known + _FOLLOW * ((len(accepted) >= depth) - known)

    def survival(self, proposal: Proposal) -> list[float]:
        """Estimated chance of the path down to each node.

        A proposal that brings none, such as a lookup's, gets the running mean of such proposals by depth, shared
        evenly by the nodes of a level.
        """
        if proposal.survival is not None:
            return proposal.survival
        depths = proposal.depths
        reached, chances = 1.0, {}
        for depth in range(1, max(depths, default=0) + 1):
            reached *= self._follows.get(depth, _FIRST_GUESS)
            chances[depth] = reached / depths.count(depth)
        survival: list[float] = []
        for depth, parent in zip(depths, proposal.parents, strict=True):
            survival.append(min(chances[depth], survival[parent] if parent >= 0 else 1.0))
        return survival


class Fixed(Controller):
    """Verifies the first `length` levels of every proposal (None: all of them)."""

    def __init__(self, length: int | None = None):
        super().__init__()
        self.length = length

    def select(self, proposals: list[Proposal]) -> list[Proposal]:
        return proposals if self.length is None else [p.cut(self.length) for p in proposals]


class Threshold(Controller):
    """Cuts every path at the first node whose conditional confidence c_k = a_k / a_{k−1} is below `least`.

    a_k is the path's survival; c_k the chance of its k-th token alone, the quantity that DSpark's Figure 5 sweeps.
    """

    def __init__(self, least: float):
        super().__init__()
        self.least = least

    def select(self, proposals: list[Proposal]) -> list[Proposal]:
        return [self._cut(proposal) for proposal in proposals]

    def _cut(self, proposal: Proposal) -> Proposal:
        survival = self.survival(proposal)
        kept: list[int] = []
        standing = {-1}
        for node, parent in enumerate(proposal.parents):
            above = survival[parent] if parent >= 0 else 1.0
            if parent in standing and survival[node] >= self.least * above:
                standing.add(node)
                kept.append(node)
        return proposal.keep(kept)


class CostStop(Controller):
    """Each request by itself: nodes in descending survival, while expected tokens per second rise.

    With n nodes a round of R requests is taken to last T_draft(R) + T(R, R·(1 + n)), as though the others did the
    same, and to commit 1 + Σa tokens a request. A node pays while its a / Σa exceeds ΔT / T. Drafting pauses for a
    request whose drafted rounds commit less than they cost.

    Where a token was sampled the search stops at the first node that does not pay, on the lower convex hull of T:
    there none that pays comes after it, so a step in the curve cannot end the search early. Where proposals are
    functions of the context alone nothing can be anticipated, and the best n of all is taken on T itself. Where trees
    may be drafted or chains, each round drafts what has been worth more for so many requests (`tree_gains.py`).

    Args:
        curve: measured costs of this target and drafter on this device.
        corrected: by what rounds take. How much is drafted then depends on the machine's minutes, and with it which
            tokens a seed draws, if not their law. Greedy text is the same.
    """

    def __init__(self, curve: CostCurve, corrected: bool = False):
        self.measured = curve
        self.corrected = corrected
        # By context, and whether proposals are drawn: the curve there and its hull.
        self._curves: dict[tuple[int, bool], tuple[CostCurve, CostCurve]] = {}
        # By requests in flight. They are of the machine, so no `reset` forgets them.
        self._times: dict[int, RoundTimes] = {}
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self._drawn = False  # proposals, the last time there were any
        self._context: float | None = None
        self.curve, self.hull = self._at(None)
        self.cost = 1.0  # of the last round, in plain rounds
        self.plainly = False  # this round, to see what a plain one takes
        self.sharers = 1.0  # requests in that round for each one that drafted
        self._now: RoundTimes | None = None
        self._gains: dict[int, TreeGains] = {}  # by requests in flight
        self._requests = 1
        # Whether that round was plain, and by the curve seconds of a plain one and of it.
        self._last = True, 0.0, 0.0

    def round(self, requests: int, context: float | None = None) -> None:
        self._context, self._requests = context, requests
        self.curve, self.hull = self._at(context)
        if self.corrected:
            self._now = self._times.setdefault(requests.bit_length(), RoundTimes())
            self.plainly = self._now.plain_is_due

    def _at(self, context: float | None) -> tuple[CostCurve, CostCurve]:
        """Return the curve and its hull for contexts of about so many tokens; None: as it was measured."""
        step = -1 if context is None else round(context / _CONTEXT_STEP)
        if (step, self._drawn) not in self._curves:
            curve = self.measured if context is None else self.measured.at(step * _CONTEXT_STEP)
            curve = curve.drawn() if self._drawn else curve
            self._curves[step, self._drawn] = curve, curve.convex()
        return self._curves[step, self._drawn]

    def shape(self, asked: Shape) -> Shape:
        """Return `asked`, or a chain where trees have not been worth what they cost for so many requests."""
        chain, costs = asked.settled(False), self.curve
        if chain is asked or not costs.chain_drafts:
            return asked
        gains, requests = self._tree_gains, self._requests
        plain_s = costs.verify(requests, requests)
        if gains.pays(costs.draft(requests), costs.draft(requests, chains=True), plain_s):
            return asked
        gains.chain()
        return chain

    @property
    def _tree_gains(self) -> TreeGains:
        return self._gains.setdefault(self._requests.bit_length(), TreeGains())

    def took(self, seconds: float) -> None:
        if self._now:
            self._now.observe(*self._last, seconds)

    def pacer(self) -> DraftPacer | None:
        # All requests wait while the drafts are made and verified: whoever drafted owes that to all of them.
        return DraftPacer(lambda: 1 + (self.cost - 1) * self.sharers, lambda: self.plainly)

    def select(self, proposals: list[Proposal]) -> list[Proposal]:
        requests = len(proposals)
        if not any(proposal.tokens for proposal in proposals):
            plain_s = self.curve.verify(requests, requests)
            self._last = True, plain_s, plain_s
            self.cost, self.sharers = 1.0, float(requests)
            return proposals
        drawn = any(proposal.probs is not None for proposal in proposals)
        if drawn != self._drawn:
            self._drawn = drawn
            self.curve, self.hull = self._at(self._context)
        sharing = sum(bool(proposal.tokens) for proposal in proposals)
        drafting = sum(bool(proposal.tokens) and not proposal.free for proposal in proposals)
        trees = any(not (proposal.free or proposal.is_chain) for proposal in proposals)
        draft_s = self.curve.draft(drafting, chains=not trees) if drafting else 0.0
        selected = self._choose(proposals, draft_s)
        if trees and self.curve.chain_drafts:
            chain_s = self.curve.draft(drafting, chains=True)
            chains = self._choose([proposal.keep(proposal.likeliest_path) for proposal in proposals], chain_s)
            self._tree_gains.tree(self._worth(selected, draft_s) / self._worth(chains, chain_s))
        verified = sum(len(proposal.tokens) for proposal in selected)
        plain_s = self.curve.verify(requests, requests)
        plain = not verified and not drafting
        self._last = plain, plain_s, draft_s + self.curve.verify(requests, requests + verified)
        self.sharers = requests / sharing
        self.cost = self._seconds(self.curve, requests, requests + verified, draft_s) / plain_s
        return selected

    def _worth(self, selected: list[Proposal], draft_s: float) -> float:
        """Return the expected tokens a second of a round in which this is verified."""
        expected = len(selected) + sum(sum(self.survival(proposal)) for proposal in selected)
        tokens = len(selected) + sum(len(proposal.tokens) for proposal in selected)
        return expected / self._seconds(self.curve, len(selected), tokens, draft_s)

    def _seconds(self, curve: CostCurve, requests: int, tokens: float, draft_s: float) -> float:
        """Seconds of a round, by the curve or as rounds have corrected it."""
        round_s = draft_s + curve.verify(requests, tokens)
        return self._now.corrected(curve.verify(requests, requests), round_s) if self._now else round_s

    def _choose(self, proposals: list[Proposal], draft_s: float) -> list[Proposal]:
        requests = len(proposals)

        def seconds(curve: CostCurve, n: int) -> float:
            return self._seconds(curve, requests, requests * (1 + n), draft_s)

        return [self._best_nodes([proposal], seconds)[0] for proposal in proposals]

    def _best_nodes(
        self, group: list[Proposal], seconds: Callable[[CostCurve, int], float]
    ) -> list[Proposal]:
        """Return the nodes of a group of requests that share a budget; seconds(curve, n) is the cost of n of them."""
        survivals = [self.survival(proposal) for proposal in group]
        nodes = [
            (chance, row, node) for row, part in enumerate(survivals) for node, chance in enumerate(part)
        ]
        # Parents come before their children: of equal survivals the one with the lower index does.
        nodes.sort(key=lambda entry: (-entry[0], *entry[1:]))
        chances = [chance for chance, _, _ in nodes]
        if all(proposal.probs is None for proposal in group):
            count = global_best(chances, len(group), lambda n: seconds(self.curve, n))
        else:
            count = first_drop(chances, len(group), lambda n: seconds(self.hull, n))
        kept: list[list[int]] = [[] for _ in group]
        for _, row, node in nodes[:count]:
            kept[row].append(node)
        return [proposal.keep(sorted(part)) for proposal, part in zip(group, kept, strict=True)]


class PrefixScheduler(CostStop):
    """DSpark's hardware-aware prefix scheduler (Algorithm 1): one verification budget for all requests in flight.

    The levels (r, j) of all requests are sorted by survival a_{r,j} = Π_{i≤j} c_{r,i} and admitted in that order while
    Θ = (R + Σa) · SPS(R, R + admitted) rises, SPS being 1 / (T_draft + T); the first drop ends the search. Drafting
    pauses for all requests together: the draft's pass is shared, and so is the decision whether it pays. Once it is
    known whether proposals are free, behind the first round at the latest, nothing is drafted that could not pay if as
    much of it stood as has of what came before.
    """

    def reset(self) -> None:
        super().reset()
        self._pacer = SharedPacer(lambda: self.cost, lambda: self.plainly)
        self._free, self._begun = False, not self.looks_up
        self._stood, self._judged = _HOPED * _FIRST_GUESS, _HOPED  # drafted tokens whose parent was accepted
        self._undrafted = 0  # rounds

    def observe(self, proposal: Proposal, accepted: list[int]) -> None:
        super().observe(proposal, accepted)
        self._learn(len(accepted), proposal.judged(accepted))

    def _learn(self, stood: float, judged: float) -> None:
        """Take in how much of what was judged stood, or was expected to."""
        if not math.isfinite(stood):
            return
        kept = min(1.0, _REMEMBERED / (self._judged + judged))
        self._stood, self._judged = kept * (self._stood + stood), kept * (self._judged + judged)

    def round(self, requests: int, context: float | None = None) -> None:
        super().round(requests, context)
        self._stood += _FORGOTTEN * (_HOPED * _FIRST_GUESS - self._stood)
        self._judged += _FORGOTTEN * (_HOPED - self._judged)
        self._pacer.close()
        due = not self._begun or self._undrafted >= _RARELY
        self._pacer.open(requests, lambda: due or self._may_pay(requests))
        self._begun = True

    def select(self, proposals: list[Proposal]) -> list[Proposal]:
        self._free = self._free or any(proposal.free for proposal in proposals)
        selected = super().select(proposals)
        for proposal, kept in zip(proposals, selected, strict=True):
            if proposal.tokens and not kept.tokens:
                # What the draft itself expects is all that is known of it.
                first = zip(proposal.parents, self.survival(proposal), strict=True)
                self._learn(min(sum(chance for parent, chance in first if parent < 0), 1.0), 1)
        self._undrafted = 0 if any(proposal.tokens for proposal in proposals) else self._undrafted + 1
        return selected

    def _may_pay(self, requests: int) -> bool:
        """Whether a round could pay in which as large a share of the tokens stands as has so far.

        Of what is looked up, which costs nothing to ask for, most may stand.
        """
        follows = _FIRST_GUESS if self._free else self._stood / self._judged
        draft_s = 0.0 if self._free else self.curve.draft(requests, chains=True)
        plain_s, stands, expected = self.curve.verify(requests, requests), 1.0, 1.0
        most = plain_s - self._seconds(self.hull, requests, requests, draft_s)
        for length in range(1, _LONGEST_LOOK + 1):
            stands *= follows
            expected += stands
            round_s = self._seconds(self.hull, requests, requests * (1 + length), draft_s)
            gain = expected * plain_s - round_s
            if gain > 0 or gain <= most:  # it rises but once: chances fall, and the hull is convex
                return gain > 0
            most = gain
        return False

    def pacer(self) -> DraftPacer | None:
        return self._pacer

    def _choose(self, proposals: list[Proposal], draft_s: float) -> list[Proposal]:
        requests = len(proposals)
        return self._best_nodes(
            proposals, lambda curve, n: self._seconds(curve, requests, requests + n, draft_s)
        )


def first_drop(chances: list[float], certain: float, seconds: Callable[[int], float]) -> int:
    """How many of `chances` (descending) to verify: while (certain + Σ chances) / seconds(n) rises."""
    expected, rate = certain, certain / seconds(0)
    for n, chance in enumerate(chances, 1):
        expected += chance
        if expected / seconds(n) <= rate:
            return n - 1
        rate = expected / seconds(n)
    return len(chances)


def global_best(chances: list[float], certain: float, seconds: Callable[[int], float]) -> int:
    """How many of `chances` (descending) to verify for the highest (certain + Σ chances) / seconds(n) of all n."""
    sums = accumulate(chances, initial=certain)
    rates = [expected / seconds(n) for n, expected in enumerate(sums)]
    return rates.index(max(rates))

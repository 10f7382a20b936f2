"""The cost curve: seconds of a target pass by its tokens, and of a draft. Controllers decide with it.

How it is measured: `pass_times.py`; where measured curves are kept: `profiles.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from deepspec.errors import DeepSpecError

Points = list[tuple[float, float]]  # (x, seconds), x ascending


@dataclass(frozen=True)
class CostCurve:
    """Seconds of a round's parts.

    Args:
        passes: requests in a target pass → (their new tokens in all, seconds).
        drafts: requests that draft together → seconds; empty without a drafter, or with one that costs nothing.
        identity: what the figures belong to: device, precision, target, versions, threads, code, drafter.
        context: tokens of each request's context where the passes were measured.
        slopes: (new tokens of a request, seconds that each further token of its context adds to its pass); empty
            where that was not measured.
        chain_drafts: as `drafts`, of chains, where those are of trees; empty where they are not.
        verdict: seconds that each token adds which was drawn from the draft's law; 0 where that was not measured.
    """

    passes: dict[int, Points]
    drafts: dict[int, float] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    context: int = 0
    slopes: Points = field(default_factory=list)
    chain_drafts: dict[int, float] = field(default_factory=dict)
    verdict: float = 0.0

    def __post_init__(self) -> None:
        if not self.passes or not all(self.passes.values()):
            raise DeepSpecError("a cost curve needs at least one measured pass")

    def at(self, context: float) -> CostCurve:
        """Return the curve where requests have so many tokens of context on average.

        More tokens never cost less, nor does any pass less than half of what was measured: noise could say so.
        """
        if not self.slopes:
            return self
        return replace(
            self,
            passes={
                requests: self._moved(requests, points, context) for requests, points in self.passes.items()
            },
            context=round(context),
        )

    def drawn(self) -> CostCurve:
        """Return the curve where what is verified was drawn: the target's law of each token is made, and compared."""
        if not self.verdict:
            return self
        passes = {
            requests: [(tokens, seconds + (tokens - requests) * self.verdict) for tokens, seconds in points]
            for requests, points in self.passes.items()
        }
        return replace(self, passes=passes, verdict=0.0)

    def _moved(self, requests: int, points: Points, context: float) -> Points:
        more = requests * (context - self.context)
        moved = [
            max(seconds + more * interpolate(self.slopes, tokens / requests), seconds / 2)
            for tokens, seconds in points
        ]
        return [
            (tokens, seconds) for (tokens, _), seconds in zip(points, accumulate(moved, max), strict=True)
        ]

    def verify(self, requests: int, tokens: float) -> float:
        """Seconds of a pass over `tokens` new tokens of `requests` requests together, the anchors among them.

        Linear in the tokens between measured points and beyond them, linear in the requests between measured
        batches; beyond the largest batch its own line goes on, since cost goes by the total.
        """
        batches = sorted(self.passes)
        requests = min(max(requests, batches[0]), batches[-1])
        if requests in self.passes:
            return interpolate(self.passes[requests], tokens)
        i = bisect_left(batches, requests)
        return interpolate(
            [(b, interpolate(self.passes[b], tokens)) for b in batches[i - 1 : i + 1]], requests
        )

    def draft(self, requests: int, chains: bool = False) -> float:
        """Seconds in which `requests` requests draft together, or draft but chains; 0 without a drafter."""
        drafts = self.chain_drafts if chains and self.chain_drafts else self.drafts
        return interpolate(sorted(drafts.items()), requests) if drafts else 0.0

    def convex(self) -> CostCurve:
        """Return the lower convex hull in the tokens: never above the curve, equal to it where it matters most.

        A step (two tokens may cost what eight do) makes every single token beyond the first look unprofitable; on
        the hull its price is spread over the tokens that share it.
        """
        hulls = {requests: _lower_hull(points) for requests, points in self.passes.items()}
        return replace(self, passes=hulls)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        passes = {requests: [list(point) for point in points] for requests, points in self.passes.items()}
        return {
            "identity": self.identity,
            "passes": keyed(passes),
            "drafts": keyed(self.drafts),
            "context": self.context,
            "slopes": [list(point) for point in self.slopes],
            "chain_drafts": keyed(self.chain_drafts),
            "verdict": self.verdict,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CostCurve:
        """Read what `to_json` wrote.

        Raises:
            DeepSpecError: it is no cost curve.
        """
        try:
            passes = {int(requests): read_points(pairs) for requests, pairs in value["passes"].items()}
            slopes = read_points(value["slopes"]) if value.get("slopes") else []
            return cls(
                passes,
                _seconds(value["drafts"]),
                dict(value["identity"]),
                int(value.get("context") or 0),
                slopes,
                _seconds(value.get("chain_drafts") or {}),
                float(value.get("verdict") or 0.0),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DeepSpecError(f"not a cost curve: {error!r}") from None


def _seconds(table: dict[str, Any]) -> dict[int, float]:
    return {int(requests): float(seconds) for requests, seconds in table.items()}


def keyed(table: dict[int, Any]) -> dict[str, Any]:
    """Return the table as JSON keeps it: its keys in order, as strings."""
    return {str(key): table[key] for key in sorted(table)}


def read_points(pairs: Any) -> Points:
    """Return pairs as JSON holds them as points, in order.

    Raises:
        ValueError: they are none, or seconds are not above 0.
    """
    points = sorted((float(x), float(seconds)) for x, seconds in pairs)
    if not points or min(seconds for _, seconds in points) <= 0:
        raise ValueError("seconds must be above 0")
    return points


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return the value at x, piecewise linear through the points, the outer segments prolonged."""
    if len(points) == 1:
        return points[0][1]
    i = min(max(bisect_left(points, (x,)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1 : i + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _lower_hull(points: Points) -> Points:
    """Return the points on the lower convex hull (Andrew's monotone chain)."""
    hull: Points = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull

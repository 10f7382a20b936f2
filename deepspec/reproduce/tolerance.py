"""Decide how far a metric may be from the committed one.

Exact where the same inputs must give the same tokens, else a stated tolerance.

What is the same is read from the two evaluation records, not assumed: device, CPU, packages, precision, target, draft
and, where the controller decides by it, the cost curve. A metric is judged by its last word
(`dspark.humaneval@T=0.tau`); `KINDS` has the kinds with their rules.

The pace: how much faster or slower plain decoding is now than when it was committed, the median over tasks. A busy
hour slows everything alike, and a rate is judged after that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import median
from typing import Any

from deepspec.errors import DeepSpecError
from deepspec.files import digest

COUNTED = 0.10
TIMED = 0.30
EXACT, OVERLAP = "exact", "the intervals overlap"
ELSEWHERE = "the same; not compared on another device or CPU"
KINDS = {  # kind of metric → its rule where everything is the same, and where something differs
    "`lossless`, `passed`": (EXACT, EXACT),
    "τ, and whatever is no time": (EXACT, f"±{COUNTED:.0%}, or inside the committed 95 % interval"),
    "the same, with `low` and `high` of an interval beside it (the paper's ratios)": (EXACT, OVERLAP),
    "speed-ups": (f"±{TIMED:.0%}, or {OVERLAP}", ELSEWHERE),
    "tokens/s, milliseconds": (f"±{TIMED:.0%} at the pace of now", ELSEWHERE),
    "digests of the tokens, and of the acceptance by position": (EXACT, "not compared"),
}
VERDICTS = ("lossless", "passed")
SPEEDUPS = ("*speedup*",)
RATES = ("*tokens_per_second*",)
TIMES = ("*seconds", "*_ms", "*_s")
PACE = "baseline_tokens_per_second"
IDENTITY = ("outputs", "acceptance")
ENDS = ("low", "high")

Number = float | int | str | None
Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """A fact about how something was measured that is not what it was. `decides`: tokens may change with it."""

    name: str
    then: Any
    now: Any
    decides: bool = True


@dataclass(frozen=True)
class Row:
    """One metric, committed and now. `matches` is None where the two cannot be compared."""

    metric: str
    committed: Number
    now: Number
    tolerance: str
    matches: bool | None

    @property
    def verdict(self) -> str:
        if self.matches is None:
            return "not compared"
        if not self.matches:
            return "DIFFERS"
        return "same" if self.committed == self.now else "within"


@dataclass(frozen=True)
class Figures:
    """Metrics of all files by name, and the evaluation records behind them by drafter."""

    metrics: Mapping[str, Number]
    records: Mapping[str, Mapping[str, Any]]


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Number]:
    """Nested metrics under dotted names."""
    flat: dict[str, Number] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse(words: Iterable[str]) -> dict[str, float]:
    """Parse `PATTERN=SHARE`: pattern → relative tolerance.

    Raises:
        DeepSpecError: it is not of that form.
    """
    found = {}
    for word in words:
        pattern, _, share = word.rpartition("=")
        try:
            found[pattern] = float(share)
        except ValueError:
            found[pattern] = math.nan
        if not pattern or not found[pattern] >= 0:
            raise DeepSpecError(f"--tolerance {word}: expected PATTERN=SHARE, such as '*.speedup=0.5'")
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """List the differences between two evaluation records of a drafter.

    What one of them does not say is no difference.
    """
    pairs = [(name, then.get(name), now.get(name), True) for name in ("device", "dtype", "seed")]
    pairs += [("processes", then.get("processes"), now.get("processes"), False)]
    made = [record.get("provenance", {}) for record in (then, now)]
    pairs += [("cpu", *(each.get("cpu") for each in made), True)]
    packages = [each.get("packages", {}) for each in made]
    pairs += [
        (name, *(each.get(name) for each in packages), name != "python")
        for name in sorted(set(packages[0]) | set(packages[1]))
    ]
    pairs += [(name, then.get(name), now.get(name), True) for name in ("target_digest", "draft_digest")]
    pairs += [("cost curve", _curve(then), _curve(now), _asked(then))]
    if _controller(then).get("corrected"):
        pairs += [("seconds of rounds", "they corrected the cost curve", "they correct it anew", True)]
    return [
        Difference(name, old, new, decides)
        for name, old, new, decides in pairs
        if old != new and None not in (old, new)
    ]


def compare(
    then: Figures, now: Figures, recomputed: bool, chosen: Mapping[str, float] | None = None
) -> list[Row]:
    """Compare every committed metric with the new one, and tokens and acceptance for every record.

    Args:
        recomputed: the drafts were trained again, not pulled.
        chosen: relative tolerances by pattern of a metric's name, in place of the table's.
    """
    changed = {
        name: differences(record, now.records[name])
        for name, record in then.records.items()
        if name in now.records
    }
    bounds = [_intervals(figures.records) for figures in (then, now)]
    stated = [_stated(figures.metrics) for figures in (then, now)]
    old, new = ({**figures.metrics, **_identities(figures.records)} for figures in (then, now))
    pace = _pace(old, new)
    rows = []
    for metric, committed in old.items():
        drafter = metric.split(".")[0]
        facts = changed.get(drafter, [fact for found in changed.values() for fact in found])
        known = stated if metric in stated[0] else bounds
        before, after = (each.get(metric) for each in known)
        given = _Given(facts, recomputed, pace, before, after, metric in stated[0])
        tolerance = next((share for name, share in (chosen or {}).items() if fnmatchcase(metric, name)), None)
        judged = (
            _judge(metric, committed, new.get(metric), given)
            if tolerance is None
            else (f"±{tolerance:.0%}", _near(committed, new.get(metric), tolerance))
        )
        rows.append(Row(metric, committed, new.get(metric), *judged))
    return rows


def one(metric: str, old: Number, new: Number, exact: bool) -> Row:
    """Compare one metric that is no time: exactly, or within the share of the table."""
    if exact or new is None:
        return Row(metric, old, new, EXACT, old == new)
    return Row(metric, old, new, f"±{COUNTED:.0%}", _near(old, new, COUNTED))


@dataclass(frozen=True)
class _Given:
    """What a metric is judged by, beside its two values. `stated`: the intervals are the metric's own, beside it."""

    facts: list[Difference]
    recomputed: bool
    pace: float
    then: Interval | None
    now: Interval | None
    stated: bool


def _judge(metric: str, old: Number, new: Number, given: _Given) -> tuple[str, bool | None]:
    """Return the tolerance in words, and whether the metric is within it."""
    if new is None and old is not None:
        return "must be there", False
    overlap = _overlap(given.then, given.now)
    word = metric.rsplit(".", 1)[-1]
    speedup, rate, time = (
        any(fnmatchcase(word, name) for name in names) for names in (SPEEDUPS, RATES, TIMES)
    )
    if (speedup or rate or time) and any(fact.name in ("device", "cpu") for fact in given.facts):
        return "another device", None
    if speedup:
        return f"±{TIMED:.0%} or intervals overlap", _near(old, new, TIMED) or overlap
    if rate or time:
        pace = given.pace if rate else 1 / given.pace
        return f"±{TIMED:.0%} at {given.pace:.2f}× the pace", _near(old, new, TIMED, pace)
    exact = not given.recomputed and not any(fact.decides for fact in given.facts)
    if word in IDENTITY and not exact:
        return "draft or machine differ", None
    if exact or word in VERDICTS:
        return "exact", old == new
    if given.stated:
        return ("an interval's end", None) if word in ENDS else ("intervals overlap", overlap)
    return f"±{COUNTED:.0%} or in the interval", _near(old, new, COUNTED) or _inside(new, given.then)


def _pace(old: Mapping[str, Number], new: Mapping[str, Number]) -> float:
    """Return how much faster plain decoding is now; 1 where none was measured."""
    paces = [(value, new.get(metric)) for metric, value in old.items() if metric.endswith(PACE)]
    ratios = [
        now / then
        for then, now in paces
        if isinstance(then, float | int) and isinstance(now, float | int) and then and now
    ]
    return median(ratios) if ratios else 1.0


def _near(old: Number, new: Number, share: float, scale: float = 1.0) -> bool:
    if not isinstance(old, float | int) or not isinstance(new, float | int):
        return old == new
    return old == new or abs(new / scale - old) <= share * abs(old)


def _inside(value: Number, interval: Interval | None) -> bool:
    return interval is not None and isinstance(value, float | int) and interval[0] <= value <= interval[1]


def _overlap(first: Interval | None, second: Interval | None) -> bool:
    return first is not None and second is not None and first[0] <= second[1] and second[0] <= first[1]


def _intervals(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Interval]:
    """Return the 95 % intervals under the names that `deepspec/report/inputs.py` gives the metrics."""
    found: dict[str, Interval] = {}
    for drafter, record in records.items():
        parts = {drafter: record["summary"]}
        parts |= {f"{drafter}.{task}": entry for task, entry in record["tasks"].items()}
        for prefix, figures in parts.items():
            for name in ("tau", "speedup"):
                if bounds := figures.get(f"{name}_ci95"):
                    low, high = bounds
                    found[f"{prefix}.{name}"] = low, high
    return found


def _stated(metrics: Mapping[str, Number]) -> dict[str, Interval]:
    """Return the intervals that metrics bring: `low` and `high` under the same prefix."""
    found = {}
    for metric in metrics:
        low, high = (metrics.get(f"{metric.rpartition('.')[0]}.{end}") for end in ENDS)
        if isinstance(low, float | int) and isinstance(high, float | int):
            found[metric] = low, high
    return found


def _identities(records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Digests of what was decoded, by task: the tokens, and how many were accepted at each position."""
    found = {}
    for drafter, record in records.items():
        for task, entry in record["tasks"].items():
            accepted = [entry.get(key) for key in ("accept_rate_by_position", "reached_by_position")]
            found[f"{drafter}.{task}.outputs"] = digest(json.dumps(entry.get("output_hashes")))
            found[f"{drafter}.{task}.acceptance"] = digest(json.dumps(accepted))
    return found


def _asked(record: Mapping[str, Any]) -> bool:
    """Check whether its controller decides by the cost curve."""
    return _controller(record).get("type") not in ("fixed", "threshold")


def _controller(record: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = record.get("decode", {}).get("controller", {})
    return found


def _curve(record: Mapping[str, Any]) -> str | None:
    """Digest of the cost curve's figures, as numbers: JSON has 1 and 1.0, and a ratio times its base is rounded."""
    costs = record.get("round_costs")
    if not costs:
        return None
    passes = {
        key: [[f"{x:.12g}", f"{seconds:.12g}"] for x, seconds in points]
        for key, points in costs.get("passes", {}).items()
    }
    tables = [
        {key: f"{seconds:.12g}" for key, seconds in (costs.get(table) or {}).items()}
        for table in ("drafts", "chain_drafts")
    ]
    more = [f"{value:.12g}" for point in costs.get("slopes") or [] for value in point]
    return digest(json.dumps([passes, *tables, more, f"{costs.get('verdict') or 0:.12g}"], sort_keys=True))

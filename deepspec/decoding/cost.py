"""What a target pass and a draft cost on this device: the curve that controllers decide with.

Measured once by real passes (`measure_passes`, `measure_drafts`) and kept in the user's cache under everything the
figures depend on, so that every later run decides with the same numbers: a seed reproduces its tokens.
"""

from __future__ import annotations

import json
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from deepspec.decoding.drafter import Drafter, DraftRequest
from deepspec.decoding.request import Sampling
from deepspec.decoding.sampling import best
from deepspec.decoding.shapes import CHAIN, Shape
from deepspec.device import describe_device
from deepspec.errors import DeepSpecError
from deepspec.files import digest, write_json
from deepspec.lineage import code_digest
from deepspec.target.attention import ForwardPass, KVCache
from deepspec.target.model import Target
from deepspec.target.states import MOST_AGAIN, StateCache

BATCHES = (1, 4, 16)
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # new tokens a request
CONTEXT = 256
_TURNS, _FEWEST, _SECONDS = 30, 7, 15.0  # a batch; see `_turns`
_DRAFT = 0  # what is tried beside passes of 1 token
FED = MOST_AGAIN // 2  # accepted tokens that a target with a state runs again in a pass of a chain
_COMMITTED = 3  # tokens that a drafter takes in before it proposes again
Points = list[tuple[float, float]]  # (x, seconds), x ascending
Watch = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class CostCurve:
    """Seconds of a round's parts.

    Args:
        passes: requests in a target pass → (their new tokens in all, seconds).
        drafts: requests that draft together → seconds; empty without a drafter, or with one that costs nothing.
        identity: what the figures belong to: device, precision, target, versions, threads, code, drafter.
    """

    passes: dict[int, Points]
    drafts: dict[int, float] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.passes or not all(self.passes.values()):
            raise DeepSpecError("a cost curve needs at least one measured pass")

    def verify(self, requests: int, tokens: float) -> float:
        """Seconds of a pass over `tokens` new tokens of `requests` requests together, the anchors among them.

        Linear in the tokens between measured points and beyond them, linear in the requests between measured
        batches; beyond the largest batch its own line goes on, since cost goes by the total.
        """
        batches = sorted(self.passes)
        requests = min(max(requests, batches[0]), batches[-1])
        if requests in self.passes:
            return _line(self.passes[requests], tokens)
        i = bisect_left(batches, requests)
        return _line([(b, _line(self.passes[b], tokens)) for b in batches[i - 1 : i + 1]], requests)

    def draft(self, requests: int) -> float:
        """Seconds in which `requests` requests draft together; 0 without a drafter."""
        return _line(sorted(self.drafts.items()), requests) if self.drafts else 0.0

    def convex(self) -> CostCurve:
        """Return the lower convex hull in the tokens: never above the curve, equal to it where it matters most.

        A step (two tokens may cost what eight do) makes every single token beyond the first look unprofitable; on
        the hull its price is spread over the tokens that share it.
        """
        hulls = {requests: _lower_hull(points) for requests, points in self.passes.items()}
        return CostCurve(hulls, self.drafts, self.identity)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        passes = {requests: [list(point) for point in points] for requests, points in self.passes.items()}
        return {"identity": self.identity, "passes": _keyed(passes), "drafts": _keyed(self.drafts)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CostCurve:
        """Read what `to_json` wrote.

        Raises:
            DeepSpecError: it is no cost curve.
        """
        try:
            passes = {int(requests): _points(pairs) for requests, pairs in value["passes"].items()}
            drafts = {int(requests): float(seconds) for requests, seconds in value["drafts"].items()}
            return cls(passes, drafts, dict(value["identity"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DeepSpecError(f"not a cost curve: {error!r}") from None


def load_or_measure(
    target: Target,
    drafter: Drafter | None = None,
    path: str | Path | None = None,
    batches: Sequence[int] = BATCHES,
    shape: Shape = CHAIN,
    force: bool = False,
    watch: Watch | None = None,
) -> CostCurve:
    """Return the stored curve of this target and drafter on this device; measure and store what is missing of it.

    A file that is corrupt, or belongs to something else, is measured again. A drafter without a `digest` cannot be
    told from another: its time is measured each time.

    Args:
        path: a folder for the files; None: `profiles` in the user's cache.
        batches: requests in flight that must have been measured; others are interpolated.
        shape: of the trees that are drafted.
        force: measure all anew.
        watch: called with (passes done, passes in all) during a measurement.
    """
    folder = profiles_folder() if path is None else Path(path)
    identity = _identity(target)
    passes = _kept(
        folder,
        identity,
        batches,
        force,
        lambda missing: measure_passes(target, missing, watch=watch),
        _points,
    )
    ratios: dict[int, float] = {}
    if drafter is not None:
        identity = _identity(target, drafter, shape)
        ratios = _kept(
            folder if identity["drafter"] else None,
            identity,
            batches,
            force,
            lambda missing: measure_drafts(target, drafter, missing, shape=shape),
            float,
        )
    drafts = {requests: ratio * _line(passes[requests], requests) for requests, ratio in ratios.items()}
    return CostCurve(passes, drafts, identity)


def profiles_folder() -> Path:
    """Where curves are kept: `$XDG_CACHE_HOME/deepspec/profiles`, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepspec" / "profiles"


def profile_path(target: Target, drafter: Drafter | None = None, shape: Shape = CHAIN) -> Path:
    """Where the passes of this target are kept, or, with a drafter, its drafting times."""
    return profiles_folder() / _file_name(_identity(target, drafter, shape))


@torch.inference_mode()
def measure_passes(
    target: Target,
    batches: Sequence[int] = BATCHES,
    widths: Sequence[int] = WIDTHS,
    context: int = CONTEXT,
    watch: Watch | None = None,
) -> dict[int, Points]:
    """Measure the seconds of verification passes as the engine runs them: forward, logits, best tokens on the host.

    A machine's speed drifts by more than what widths differ by, so a width's cost is the median, over turns in which
    all widths run, of its ratio to that turn's passes over one token a request; seconds are that ratio times the
    median of those passes. More tokens never cost less: what says otherwise is noise, and is evened out.

    A target that keeps a state runs accepted tokens again where a chain did not stand whole: passes over more than
    one token a request are measured with `FED` such tokens, which count as no new ones.

    Raises:
        DeepSpecError: the target has too few positions.
    """
    widths = sorted({1, *widths})
    fed = 0 if target.verdict.trees else FED
    context = _context_for(target, context, max(widths) + fed)
    cache = _filled_cache(target, max(batches), context, max(widths) + 1)
    done, total = 0, (1 + _TURNS) * len(batches) * (len(widths) + 1)

    def seconds_of(requests: int, width: int) -> float:
        nonlocal done
        start = context
        if fed and width > 1:
            _pass(target, cache, context, requests, fed + 2)  # a chain of which `fed` tokens stand
            start += fed
        began = time.perf_counter()
        _pass(target, cache, start, requests, width)
        seconds = time.perf_counter() - began
        done += 1
        if watch:
            watch(done, total)
        return seconds

    passes: dict[int, Points] = {}
    for requests in batches:
        turns = _turns(partial(seconds_of, requests), widths)
        one = median(seconds for turn in turns for seconds in turn.plain)
        ratios = [median(turn.ratio(width) for turn in turns) for width in widths]
        passes[requests] = [
            (requests * width, one * ratio) for width, ratio in zip(widths, _rising(ratios), strict=True)
        ]
        done = total * len(passes) // len(batches)  # turns that the time did not allow
    if watch:
        watch(total, total)
    return passes


@dataclass(frozen=True)
class _Turn:
    """Seconds of one turn: of what was tried, and of the passes over one token a request before and after it."""

    tried: dict[int, float]
    plain: tuple[float, float]

    def ratio(self, what: int) -> float:
        return 1.0 if what == 1 else self.tried[what] / (sum(self.plain) / 2)


def _turns(seconds_of: Callable[[int], float], tried: Sequence[int]) -> list[_Turn]:
    """Try each once a turn, between two of 1; the first turn is a warm-up (oneDNN builds its kernels by shape).

    There are `_TURNS` of them, or, where they take more than `_SECONDS` together, as many as that allows, though
    never fewer than `_FEWEST`.
    """
    turns: list[_Turn] = []
    began = 0.0
    while len(turns) < 1 + _TURNS:
        if len(turns) == 1:
            began = time.perf_counter()
        if len(turns) > _FEWEST and time.perf_counter() - began > _SECONDS:
            break
        before = seconds_of(1)
        found = {what: seconds_of(what) for what in tried if what != 1}
        turns.append(_Turn(found, (before, seconds_of(1))))
    return turns[1:]


def _context_for(target: Target, context: int, width: int) -> int:
    """Return the tokens of context for passes of up to `width` new ones.

    Raises:
        DeepSpecError: the target has too few positions.
    """
    context = min(context, target.max_length - width - 1)
    if context < 1:
        raise DeepSpecError(f"{target.source}: {target.max_length} positions are too few to measure passes")
    return context


def _filled_cache(target: Target, slots: int, context: int, width: int) -> KVCache | StateCache:
    """Return a cache in which every row holds `context` tokens."""
    cache = KVCache(slots, context + width) if target.verdict.trees else StateCache(slots)
    ids = torch.randint(target.vocab_size, (1, context), generator=_rng()).to(target.device)
    positions = torch.arange(context, device=target.device)[None]
    target.forward(ids, ForwardPass(positions, cache=cache, rows=[0], starts=[0]))
    for row in range(1, slots):
        cache.move(0, row, context)
    return cache


def _pass(target: Target, cache: KVCache | StateCache, context: int, requests: int, width: int) -> None:
    """One verification pass of `width` tokens a request on average; ends with its results on the host.

    Neighbours bring one more and one less: a controller leaves proposals uneven, and that costs a few percent.
    """
    counts = [width] * requests
    if width > 1:
        for i in range(requests // 2):
            counts[2 * i : 2 * i + 2] = width - 1, width + 1
    ids = torch.full((1, requests * width), 1, device=target.device)
    positions = torch.cat([torch.arange(context, context + count) for count in counts])[None]
    step = ForwardPass(positions.to(target.device), cache=cache, starts=[context] * requests, counts=counts)
    best(target.logits(target.forward(ids, step)[0]))


@torch.inference_mode()
def measure_drafts(
    target: Target,
    drafter: Drafter,
    batches: Sequence[int] = BATCHES,
    context: int = CONTEXT,
    shape: Shape = CHAIN,
) -> dict[int, float]:
    """Measure how long requests take in their newest tokens and draft together, greedily, in passes over one token.

    Each is timed between two such passes of the target for as many requests, and the median of the ratios taken:
    draft and pass meet the same moments of the machine.

    Of a drafter that asks a lookup first, its trained part is timed: it is what costs.
    """
    drafter = drafter.trained
    rng = _rng()
    context = _context_for(target, context, 2)
    cache = _filled_cache(target, max(batches), context, 2)
    session = drafter.session(max(batches))
    for row in range(max(batches)):
        session.begin(row)
        session.extend(row, *_taken_in(target, drafter, context, rng))
    news = _taken_in(target, drafter, _COMMITTED, rng)

    def seconds_of(requests: int, what: int) -> float:
        asks = [DraftRequest(row, 1, Sampling(), rng, drafter.block_size, shape) for row in range(requests)]
        began = _clock(target)
        if what == _DRAFT:
            for row in range(requests):
                session.extend(row, *news)
            session.propose(asks)
        else:
            _pass(target, cache, context, requests, 1)
        return _clock(target) - began

    ratios = {}
    for requests in batches:
        turns = _turns(partial(seconds_of, requests), [_DRAFT])
        ratios[requests] = median(turn.ratio(_DRAFT) for turn in turns)
    return ratios


def _taken_in(
    target: Target, drafter: Drafter, count: int, rng: torch.Generator
) -> tuple[list[int], Tensor | None]:
    """Random tokens and, for a drafter that reads them, random features [count, layers·d]."""
    tokens = torch.randint(target.vocab_size, (count,), generator=rng).tolist()
    if not drafter.layers:
        return tokens, None
    features = torch.randn(count, len(drafter.layers) * target.hidden_size, generator=rng)
    return tokens, features.to(target.device, target.dtype)


def _clock(target: Target) -> float:
    """Seconds; on a GPU all that was launched has ended."""
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
    return time.perf_counter()


def _rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _identity(target: Target, drafter: Drafter | None = None, shape: Shape | None = None) -> dict[str, Any]:
    """Everything the figures depend on; the code itself is part of it."""
    identity = {
        "device": describe_device(target.device),  # with the threads and torch's version
        "precision": target.precision,
        "graphs": target.graphs,
        "target": target.digest,
        "code": code_digest(__name__),
    }
    if drafter is None:
        return identity
    drafter = drafter.trained
    return identity | {
        "drafter": drafter.digest,
        "drafter_code": code_digest("deepspec.drafters.registry"),
        "shape": repr(shape),
    }


def _kept(
    folder: Path | None,
    identity: dict[str, Any],
    batches: Sequence[int],
    force: bool,
    measure: Callable[[list[int]], dict[int, Any]],
    parse: Callable[[Any], Any],
) -> dict[int, Any]:
    """Return the table stored under `identity`; measure and add the batches that it lacks. No folder: keep nothing."""
    path = folder and folder / _file_name(identity)
    table = _read(path, identity, parse) if path and not force else {}
    if missing := [requests for requests in batches if requests not in table]:
        table |= measure(missing)
        if path:
            _write(path, {"identity": identity, "measured": _keyed(table)})
    return table


def _read(path: Path, identity: dict[str, Any], parse: Callable[[Any], Any]) -> dict[int, Any]:
    """Return what the file holds of this identity; nothing if it is absent, corrupt or foreign."""
    with suppress(OSError, AttributeError, KeyError, TypeError, ValueError):
        stored = json.loads(path.read_text())
        if stored["identity"] == identity:
            return {int(requests): parse(value) for requests, value in stored["measured"].items()}
    return {}


def _write(path: Path, value: dict[str, Any]) -> None:
    with suppress(OSError):  # a read-only home costs a measurement in each run, no more
        write_json(path, value)


def _file_name(identity: dict[str, Any]) -> str:
    return f"{digest(json.dumps(identity, sort_keys=True))}.json"


def _keyed(table: dict[int, Any]) -> dict[str, Any]:
    return {str(key): table[key] for key in sorted(table)}


def _points(pairs: Any) -> Points:
    points = sorted((float(x), float(seconds)) for x, seconds in pairs)
    if not points or min(seconds for _, seconds in points) <= 0:
        raise ValueError("seconds must be above 0")
    return points


def _line(points: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear through the points, the outer segments prolonged."""
    if len(points) == 1:
        return points[0][1]
    i = min(max(bisect_left(points, (x,)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1 : i + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _rising(values: Sequence[float]) -> list[float]:
    """Return values that never fall, in the middle of the highest so far and the lowest to come."""
    highest = accumulate(values, max)
    lowest = [*accumulate(reversed(values), min)][::-1]
    return [(high + low) / 2 for high, low in zip(highest, lowest, strict=True)]


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

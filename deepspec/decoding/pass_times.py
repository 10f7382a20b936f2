"""Measure what a target pass and a draft cost on this device, by real passes, as ratios to a pass over one token.

A machine's speed drifts by more than what widths differ by. So what is compared runs in the same turn, between two
passes over one token, and medians of ratios over turns are taken.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from statistics import median, quantiles

import torch
from torch import Tensor

from deepspec.decoding.cost import Points
from deepspec.decoding.drafter import Drafter, DraftRequest
from deepspec.decoding.judge import judge
from deepspec.decoding.request import Request, Sampling
from deepspec.decoding.round import Turn
from deepspec.decoding.sampling import best
from deepspec.decoding.shapes import CHAIN, Shape
from deepspec.decoding.slot import Slot
from deepspec.decoding.tree import Proposal
from deepspec.errors import DeepSpecError
from deepspec.target.attention import ForwardPass, KVCache
from deepspec.target.model import Target
from deepspec.target.states import MOST_AGAIN, StateCache

logger = logging.getLogger(__name__)

BATCHES = (1, 4, 16)
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # new tokens a request
CONTEXT = 256  # tokens
FARTHER = 1024  # a context beside which what more of it costs is seen
_FEW_WIDTHS = (1, 4, 8, 16, 32)
_LEAST = 1e-9  # plain passes: what costs nothing that could be seen
_TURNS, _FEWEST, _SECONDS = 30, 7, 15.0  # a batch; see `_turns`
# How many times the quickest tenth of equal passes the slowest may take, where they are no shorter than a turn of the
# system's scheduler.
_STEADY, _SHORT_S = 2.0, 0.005
_DRAFT, _DRAWN, _LIKELIEST = 0, -1, -2  # what is tried beside passes of 1 token
_JUDGED = 8  # tokens of a verdict that is timed
FED = MOST_AGAIN // 2  # accepted tokens that a target with a state runs again in a pass of a chain
_COMMITTED = 3  # tokens that a drafter takes in before it proposes again
Watch = Callable[[int, int], None]  # (done, total)


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


@torch.inference_mode()
def measure_slopes(target: Target, widths: Sequence[int] = _FEW_WIDTHS) -> Points:
    """Measure what each further token of context adds to one request's pass, in plain passes, by its new tokens.

    Passes at `CONTEXT` and at `FARTHER` run in the same turns. None are measured, and no points returned, of a target
    whose layers keep a state, or with too few positions for the two to differ.
    """
    widths = sorted({1, *widths})
    near, far = (_context_for(target, context, max(widths)) for context in (CONTEXT, FARTHER))
    if not target.verdict.trees or far < 2 * near:
        return []
    cache = _filled_cache(target, 1, far, max(widths) + 1)

    def seconds_of(what: int) -> float:
        """Time a pass over `what` tokens; below 0, over -what at the farther context."""
        began = time.perf_counter()
        _pass(target, cache, far if what < 0 else near, 1, abs(what))
        return time.perf_counter() - began

    turns = _turns(seconds_of, [*widths, *(-width for width in widths)])
    more = [median(turn.ratio(-width) - turn.ratio(width) for turn in turns) for width in widths]
    return [
        (width, max(ratio / (far - near), _LEAST)) for width, ratio in zip(widths, _rising(more), strict=True)
    ]


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


@torch.inference_mode()
def measure_verdict(target: Target) -> float:
    """Measure what a token adds to a round which was drawn from a draft's law, in plain passes over one token.

    The target's law of it is made, and the rule's verdict found; likeliest tokens need neither. The draft's law is
    taken to have all tokens, which is the most that it can.
    """
    rng = _rng()
    context = _context_for(target, CONTEXT, 1)
    cache = _filled_cache(target, 1, context, 2)
    logits = torch.randn(1 + _JUDGED, target.vocab_size, generator=rng).to(target.device, target.dtype)
    laws = torch.randn(_JUDGED, target.vocab_size, generator=rng).softmax(-1)
    tokens = laws.argmax(-1).tolist()

    def seconds_of(what: int) -> float:
        sampling = Sampling(1.0 if what == _DRAWN else 0.0)
        extra = {"probs": laws, "places": tokens} if what == _DRAWN else {}
        slot = Slot(Request([0], 1, sampling=sampling), target, target.max_length)
        turn = Turn(0, slot, Proposal.chain(tokens, vocab_size=target.vocab_size, **extra))
        began = _clock(target)
        if what == 1:
            _pass(target, cache, context, 1, 1)
        else:
            judge([turn], logits, None)
        return _clock(target) - began

    turns = _turns(seconds_of, [_DRAWN, _LIKELIEST])
    more = median(turn.ratio(_DRAWN) - turn.ratio(_LIKELIEST) for turn in turns)
    return max(more / _JUDGED, _LEAST)


@dataclass(frozen=True)
class _Turn:
    """Seconds of one turn: of what was tried, and of the passes over one token a request before and after it."""

    tried: dict[int, float]
    plain: tuple[float, float]

    def ratio(self, what: int) -> float:
        return 1.0 if what == 1 else self.tried[what] / (sum(self.plain) / 2)


def _turns(seconds_of: Callable[[int], float], tried: Sequence[int]) -> list[_Turn]:
    """Try each once a turn, between two of 1, after a turn to warm up (oneDNN builds its kernels by shape).

    There are `_TURNS` of them, or, where they take more than `_SECONDS` together, as many as that allows, though
    never fewer than `_FEWEST`.
    """

    def turn() -> _Turn:
        before = seconds_of(1)
        found = {what: seconds_of(what) for what in tried if what != 1}
        return _Turn(found, (before, seconds_of(1)))

    turn()
    began = time.perf_counter()
    turns: list[_Turn] = []
    while len(turns) < _TURNS:
        if len(turns) >= _FEWEST and time.perf_counter() - began > _SECONDS:
            break
        turns.append(turn())
    low, *_, high = quantiles([seconds for turn in turns for seconds in turn.plain], n=10)
    if high > _STEADY * low and low > _SHORT_S:
        logger.warning(
            "the same pass took %.1f to %.1f ms while costs were measured: something else runs on this machine, and "
            "the cost controller will decide by what it left; `deepspec profile --force` measures again",
            1e3 * low,
            1e3 * high,
        )
    return turns


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


def _rising(values: Sequence[float]) -> list[float]:
    """Return values that never fall, in the middle of the highest so far and the lowest to come."""
    highest = accumulate(values, max)
    lowest = [*accumulate(reversed(values), min)][::-1]
    return [(high + low) / 2 for high, low in zip(highest, lowest, strict=True)]

"""Calibration of a drafter's confidence: Sequential Temperature Scaling (DSpark, DeepSeek 2026, §3.2).

A controller weighs drafted tokens by Π_{i≤j} c_i, the estimated chance that the first j of a block are accepted, so
it is the *product* that must mean what it says. Position by position, from left to right, the logit of c_j is
divided by a temperature chosen on a grid so that the expected calibration error of the product up to j is least;
what was chosen before stays. Greedy and sampled drafting are accepted by different laws and get their own.

Blocks are arrays: `logits` [blocks, γ] of c_j, NaN where a block was cut before j, `accepted` [blocks], how many of
its tokens stood, and `drafted` [blocks], how many there were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import Engine
from deepspec.decoding.request import Request, Sampling
from deepspec.decoding.round import Round
from deepspec.errors import DeepSpecError
from deepspec.files import write_json
from deepspec.target.model import Target

CALIBRATION = "calibration.json"  # in a draft directory

TEMPERATURES = {
    "greedy": 0.0,
    "sampled": 1.0,
}  # the modes, and the sampler's temperature that stands for each
BINS = 15
_GRID = np.exp2(np.linspace(-2.5, 2.5, 101))
_LEAST = 100  # blocks that must have reached a position before its temperature is moved
_EVEN = 0.002  # errors so close count as equal
_CERTAIN = 1e-6


@dataclass(frozen=True)
class Blocks:
    """Verified blocks: logits float64 [blocks, γ] (NaN: cut off, or no estimate), accepted, drafted int64 [blocks]."""

    logits: np.ndarray
    accepted: np.ndarray
    drafted: np.ndarray

    def __len__(self) -> int:
        return len(self.accepted)

    def and_also(self, other: Blocks) -> Blocks:
        return Blocks(
            np.concatenate((self.logits, other.logits)),
            np.concatenate((self.accepted, other.accepted)),
            np.concatenate((self.drafted, other.drafted)),
        )

    def stood(self, position: int) -> np.ndarray:
        """1.0 where the first position + 1 tokens were accepted, [blocks]."""
        return (self.accepted > position).astype(np.float64)


@dataclass(frozen=True)
class Bin:
    """A row of a reliability table: among `count` predictions in [low, high), their mean and what came."""

    low: float
    high: float
    count: int
    predicted: float
    observed: float


def survival(logits: np.ndarray, temperatures: list[float] | None = None) -> np.ndarray:
    """Π_{i≤j} σ(logit_i / t_i), [blocks, γ]; NaN stays NaN. Without temperatures: as the drafter was trained."""
    scaled = logits if temperatures is None else logits / np.asarray(temperatures)
    return np.cumprod(1 / (1 + np.exp(-scaled)), axis=1)


def fit(blocks: Blocks) -> list[float]:
    """Return the temperatures [γ]. A position that fewer than 100 blocks reached keeps 1."""
    temperatures: list[float] = []
    held = np.ones(len(blocks))  # the calibrated product up to the position before
    for position, logits in enumerate(blocks.logits.T):
        known = ~np.isnan(logits)
        temperature = 1.0
        if (known & (blocks.accepted >= position)).sum() >= _LEAST:
            outcome = blocks.stood(position)[known]
            predictions = held[known] / (1 + np.exp(-logits[known] / _GRID[:, None]))  # [grid, blocks]
            temperature = float(_GRID[_best(predictions, outcome)])
        held = held / (1 + np.exp(-logits / temperature))
        temperatures.append(temperature)
    return temperatures


def _best(predictions: np.ndarray, outcome: np.ndarray) -> int:
    """Index of the grid's best row: the least error, and of those as good the least Brier score.

    As good are all whose error is what chance alone would show: few blocks cannot tell them apart, and picking the
    least of them would fit noise. A proper score can; it also prefers sharp predictions to the same one for all,
    which may be calibrated and is worth nothing.
    """
    errors = np.array([ece(row, outcome) for row in predictions])
    chance = np.array([_chance_ece(row) for row in predictions])
    brier = ((predictions - outcome) ** 2).mean(1)
    return int(np.where(errors <= np.maximum(chance, errors.min() + _EVEN), brier, np.inf).argmin())


def _chance_ece(predicted: np.ndarray) -> float:
    """Return the error expected of perfect predictions: the mean of |N(0, σ²)| in each bin."""
    variances = np.bincount(_bins(predicted, BINS), predicted * (1 - predicted), BINS)
    return float(np.sqrt(2 / math.pi * variances).sum() / max(len(predicted), 1))


def _bins(predicted: np.ndarray, bins: int) -> np.ndarray:
    return np.minimum((predicted * bins).astype(np.int64), bins - 1)


def ece(predicted: np.ndarray, outcome: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error.

    It is Σ over equal bins of |mean prediction − mean outcome|, weighted by their counts.
    """
    gaps = np.bincount(_bins(predicted, bins), predicted - outcome, bins)
    return float(np.abs(gaps).sum() / max(len(predicted), 1))


def reliability(predicted: np.ndarray, outcome: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Return the bins behind `ece` that hold anything."""
    place = _bins(predicted, bins)
    return [
        Bin(
            i / bins, (i + 1) / bins, int(own.sum()), float(predicted[own].mean()), float(outcome[own].mean())
        )
        for i in range(bins)
        if (own := place == i).any()
    ]


def auc(predicted: np.ndarray, outcome: np.ndarray) -> float | None:
    """Chance that what came was predicted higher than what did not; None where only one of the two was seen."""
    came = outcome > 0
    if came.all() or not came.any():
        return None
    _, place, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # ties share theirs
    wins = ranks[came].sum() - came.sum() * (came.sum() + 1) / 2
    return float(wins / (came.sum() * (~came).sum()))


def quality(blocks: Blocks, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """How much a confidence head's products are worth: errors, ranking, curves.

    Args:
        before, after: predicted products [blocks, γ] (NaN: cut off), as trained and calibrated.

    Returns:
        {"blocks": n, "ece": {"before": x, "after": y}, "auc": z of the calibrated products, "reliability": {"before":
        [bins], "after": [bins]} of all positions together, "thresholds": [{"threshold", "accepted", "rejected",
        "acceptance_rate"}]}: tokens that are verified, and stand or fall, where each block is cut at the first
        position whose own chance c_j is below the threshold (DSpark, Figure 5).
    """
    known = ~np.isnan(after)
    outcome = (blocks.accepted[:, None] > np.arange(after.shape[1]))[known].astype(np.float64)
    curves = {"before": before[known], "after": after[known]}
    return {
        "blocks": len(blocks),
        "ece": {"before": survival_ece(before, blocks), "after": survival_ece(after, blocks)},
        "auc": auc(curves["after"], outcome),
        "reliability": {
            name: [asdict(row) for row in reliability(values, outcome)] for name, values in curves.items()
        },
        "thresholds": _thresholds(blocks, after),
    }


def _thresholds(blocks: Blocks, products: np.ndarray) -> list[dict[str, float | None]]:
    above = np.concatenate((np.ones((len(products), 1)), products[:, :-1]), axis=1)
    own = products / np.maximum(above, _CERTAIN)  # c_j; NaN stays NaN, which is below every threshold
    rows: list[dict[str, float | None]] = []
    for threshold in np.arange(20) / 20:
        kept = np.cumprod(own >= threshold, axis=1).sum(1)  # [blocks]
        stood = int(np.minimum(blocks.accepted, kept).sum())
        verified = int(kept.sum())
        rate = stood / verified if verified else None
        rows.append(
            {
                "threshold": float(threshold),
                "accepted": stood,
                "rejected": verified - stood,
                "acceptance_rate": rate,
            }
        )
    return rows


def survival_ece(predicted: np.ndarray, blocks: Blocks) -> float:
    """Calibration error of predicted products [blocks, γ] (NaN: cut off), the mean over the positions."""
    known = ~np.isnan(predicted)
    errors = [
        ece(predicted[own, position], blocks.stood(position)[own])
        for position, own in enumerate(known.T)
        if own.any()
    ]
    return float(np.mean(errors))


def collect(
    target: Target,
    drafter: Drafter,
    prompts: list[list[int]],
    temperature: float,
    max_new_tokens: int = 128,
    seeds: list[int] | None = None,
    batch_size: int = 8,
) -> Blocks:
    """Decode the prompts with whole blocks of the draft alone, and pair each block's confidences with its acceptance.

    Args:
        drafter: alone or behind a lookup, which is not asked. Its confidences are taken as they were trained.
        prompts: token ids.
        seeds: of the prompts; None: 0, 1, ...
    """
    drafter = drafter.trained
    rows: list[list[float]] = []
    accepted: list[int] = []
    drafted: list[int] = []

    def watch(done: Round) -> None:
        if done.proposal.tokens:
            rows.append(conditional_logits(done.proposal.survival or []))
            accepted.append(done.accepted)
            drafted.append(len(done.proposal.tokens))

    sampling = Sampling(temperature)
    requests = iter(
        [
            Request(ids, max_new_tokens, sampling=sampling, seed=seed, id=i)
            for i, (ids, seed) in enumerate(zip(prompts, seeds or range(len(prompts)), strict=True))
        ]
    )
    with as_trained(drafter):
        engine = Engine(target, drafter, batch_size=batch_size, on_round=watch)
        for generation in engine.run(lambda: next(requests, None)):
            if generation.error:
                raise DeepSpecError(f"prompt {generation.id}: {generation.error}")
    logits = np.full((len(rows), drafter.block_size), np.nan)
    for row, own in zip(logits, rows, strict=True):
        row[: len(own)] = own
    return Blocks(logits, np.array(accepted, dtype=np.int64), np.array(drafted, dtype=np.int64))


@contextmanager
def as_trained(drafter: Drafter) -> Iterator[None]:
    """Without the temperatures of an earlier calibration."""
    known = drafter.temperatures
    if known is not None:
        drafter.temperatures = {}
    try:
        yield
    finally:
        if known is not None:
            drafter.temperatures = known


def conditional_logits(survival: list[float]) -> list[float]:
    """Return the logits of the conditional chances a_k / a_{k−1}."""
    logits, above = [], 1.0
    for chance in survival:
        own = min(max(chance / above if above > 0 else 0.0, _CERTAIN), 1 - _CERTAIN)
        logits.append(math.log(own / (1 - own)))
        above = chance
    return logits


def calibrate(
    target: Target,
    drafter: Drafter,
    prompts: list[list[int]],
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Return what `calibration.json` holds: temperatures by mode, fitted to all prompts, and errors of unseen prompts.

    For the errors the prompts are split in halves: each half is judged with temperatures fitted to the other.
    Where that is no better than the confidence as trained (few blocks, or a head that needs none), it stays as it is.

    Returns:
        {"greedy": [γ], "sampled": [γ], "quality": {mode: see `quality`}}

    Raises:
        DeepSpecError: fewer than two prompts that give blocks, or a drafter without a confidence head.
    """
    if drafter.trained.temperatures is None:
        raise DeepSpecError(f"{type(drafter).__name__} has no confidence head to calibrate")
    seeds = [seed + i for i in range(len(prompts))]
    result: dict[str, Any] = {"quality": {}}
    for mode, temperature in TEMPERATURES.items():
        first, second = (
            collect(
                target, drafter, prompts[half::2], temperature, max_new_tokens, seeds[half::2], batch_size
            )
            for half in (0, 1)
        )
        if not (len(first) and len(second)):
            raise DeepSpecError("calibration needs two prompts or more, with answers of several tokens")
        both = first.and_also(second)
        unseen = survival(first.logits, fit(second)), survival(second.logits, fit(first))
        found = quality(both, survival(both.logits), np.concatenate(unseen))
        better = found["ece"]["after"] < found["ece"]["before"]
        result[mode] = fit(both) if better else [1.0] * both.logits.shape[1]
        result["quality"][mode] = found
    return result


def save(directory: str | Path, calibration: dict[str, Any]) -> None:
    """Write `calibration.json` into a draft's directory."""
    write_json(Path(directory) / CALIBRATION, calibration)

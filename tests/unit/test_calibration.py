"""Sequential temperature scaling: what was distorted is found again, and only what the data can tell is moved."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from deepspec.decoding.calibration import (
    Blocks,
    auc,
    calibrate,
    collect,
    ece,
    fit,
    quality,
    reliability,
    save,
    survival,
    survival_ece,
)
from deepspec.decoding.drafter import Drafter, Session
from deepspec.decoding.tree import DraftLogits, Vocabulary, grow
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.errors import DeepSpecError
from deepspec.target.model import load_target


def whole(logits: np.ndarray, accepted: np.ndarray) -> Blocks:
    """Blocks of which none was cut."""
    return Blocks(logits, accepted, np.full(len(accepted), logits.shape[1]))


def simulated(distortion: list[float], count: int = 20000, seed: int = 0) -> Blocks:
    """Blocks whose true logits are known; the drafter reports them times `distortion`."""
    rng = np.random.default_rng(seed)
    true = rng.normal(0.8, 1.5, (count, len(distortion)))
    stands = rng.random(true.shape) < 1 / (1 + np.exp(-true))
    return whole(true * distortion, np.cumprod(stands, axis=1).sum(1))


def test_a_distortion_is_undone_position_by_position():
    blocks = simulated([2.0, 1.0, 0.6, 3.0])
    assert fit(blocks) == pytest.approx([2.0, 1.0, 0.6, 3.0], rel=0.25)


def test_the_error_falls_to_its_noise():
    blocks, unseen = simulated([2.5, 2.5, 2.5]), simulated([2.5, 2.5, 2.5], seed=1)
    before = survival_ece(survival(unseen.logits), unseen)
    after = survival_ece(survival(unseen.logits, fit(blocks)), unseen)
    assert before > 0.04 and after < 0.01


def test_it_is_the_product_that_is_calibrated():
    """Tokens that stand or fall together: every c_j is right by itself, their product is far too low."""
    rng = np.random.default_rng(2)
    together = rng.random(20000) < 0.8
    logits = np.full((20000, 4), np.log(0.8 / 0.2))
    blocks = whole(logits, np.where(together, 4, 0))
    temperatures = fit(blocks)
    assert temperatures[0] == pytest.approx(1.0, rel=0.05)
    assert max(temperatures[1:]) < 0.5
    error = survival_ece(survival(logits, temperatures), blocks)
    assert error < 0.2 * survival_ece(survival(logits), blocks)


def test_sharp_predictions_are_not_given_up_for_the_mean():
    """With half of all blocks standing, one prediction of 0.5 for all would be calibrated too."""
    rng = np.random.default_rng(3)
    likely = rng.random(5000) < 0.5
    stands = rng.random(5000) < np.where(likely, 0.9, 0.1)
    blocks = whole(np.where(likely, 1.0, -1.0)[:, None] * np.log(9), stands.astype(np.int64))
    (temperature,) = fit(blocks)
    assert temperature == pytest.approx(1.0, rel=0.15)


def test_few_blocks_do_not_move_what_is_right():
    temperatures = np.array([fit(simulated([1.0, 1.0], count=600, seed=seed)) for seed in range(8)])
    assert np.abs(np.log(temperatures)).mean() < 0.15


def test_positions_that_few_blocks_reached_keep_their_confidence():
    blocks = simulated([3.0, 3.0], count=130)
    assert fit(blocks)[1] == 1.0
    assert fit(simulated([3.0, 3.0], count=20)) == [1.0, 1.0]
    assert fit(whole(np.empty((0, 3)), np.empty(0, dtype=np.int64))) == [1.0] * 3


def test_what_was_cut_off_counts_for_nothing():
    whole = simulated([2.0, 0.5], count=4000)
    cut = Blocks(whole.logits.copy(), np.minimum(whole.accepted, 1), whole.drafted)
    cut.logits[:, 1] = np.nan
    both = whole.and_also(cut)
    assert fit(both)[0] == pytest.approx(2.0, rel=0.25)
    assert fit(both)[1] == pytest.approx(0.5, rel=0.25)
    assert np.isnan(survival(both.logits)[-1]).tolist() == [False, True]


def test_the_calibration_error_is_the_weighted_gap_of_the_bins():
    predicted = np.array([0.05, 0.05, 0.95, 1.0])
    outcome = np.array([0.0, 1.0, 1.0, 1.0])
    assert ece(predicted, outcome, bins=10) == pytest.approx((2 * 0.45 + 2 * 0.025) / 4)
    low, high = reliability(predicted, outcome, bins=10)
    assert (low.low, low.count, low.predicted, low.observed) == (0.0, 2, pytest.approx(0.05), 0.5)
    assert (high.high, high.count, high.observed) == (1.0, 2, 1.0)


class Guesser(Drafter):
    """Drafts the target's likeliest token from a table, right now and then, with a made-up confidence."""

    block_size = 4

    def __init__(self, vocab: int):
        self.vocab_size = vocab
        self.temperatures = {"greedy": [9.0] * 4}
        self.table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(1))
        self.seen: list[dict] = []

    def session(self, slots):
        return GuesserSession(self)


class GuesserSession(Session):
    def __init__(self, drafter):
        self.drafter = drafter

    def begin(self, row):
        pass

    def extend(self, row, tokens, features):
        pass

    def move(self, source, destination):
        pass

    def propose(self, asks):
        drafter = self.drafter
        drafter.seen.append(drafter.temperatures)
        growths = [
            ask.shape.growth(Vocabulary(drafter.vocab_size), ask.sampling, min(4, ask.room), ask.rng)
            for ask in asks
        ]

        def expand(parents):
            rows = drafter.table[[parent.token for parent in parents]]
            return DraftLogits(rows, [0.9 - 0.1 * parent.depth for parent in parents])

        return grow(growths, [ask.anchor for ask in asks], expand)


@pytest.fixture(scope="module")
def target(tiny_target):
    return load_target(tiny_target)


PROMPTS = [[5, 9, 14, 3], [100, 101, 102], [7] * 9, [33, 2, 33, 2]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_blocks_carry_the_confidence_as_trained(target, temperature):
    drafter = Guesser(target.vocab_size)
    blocks = collect(target, drafter, PROMPTS, temperature, max_new_tokens=12)
    chances = 1 / (1 + np.exp(-blocks.logits))
    expected = np.broadcast_to([0.9, 0.8, 0.7, 0.6], chances.shape)
    known = ~np.isnan(chances)
    assert np.allclose(chances[known], expected[known])
    assert (blocks.accepted <= known.sum(1)).all()
    assert not known.all(), "no block was cut at the end of an answer"
    assert drafter.seen[0] == {} and drafter.temperatures == {"greedy": [9.0] * 4}


def test_only_a_confidence_can_be_calibrated(target):
    with pytest.raises(DeepSpecError, match="LookupDrafter has no confidence head"):
        calibrate(target, LookupDrafter(4, 1), PROMPTS)
    with pytest.raises(DeepSpecError, match="two prompts or more"):
        calibrate(target, Guesser(target.vocab_size), PROMPTS[:1], max_new_tokens=8)


def test_the_record_has_both_modes_and_their_errors(target, tmp_path):
    record = calibrate(target, Guesser(target.vocab_size), PROMPTS, max_new_tokens=24)
    save(tmp_path, record)
    assert json.loads((tmp_path / "calibration.json").read_text()) == record
    for mode in ("greedy", "sampled"):
        found = record["quality"][mode]
        assert len(record[mode]) == 4 and found["blocks"] > 40
        for when in ("before", "after"):
            assert 0 <= found["ece"][when] <= 1
            counts = sum(row["count"] for row in found["reliability"][when])
            assert counts == found["thresholds"][0]["accepted"] + found["thresholds"][0]["rejected"]


def test_the_area_under_the_curve_counts_pairs():
    predicted, outcome = np.array([0.1, 0.4, 0.4, 0.9]), np.array([0.0, 1.0, 0.0, 1.0])
    pairs = [(a > b) + 0.5 * (a == b) for a in predicted[outcome == 1] for b in predicted[outcome == 0]]
    assert auc(predicted, outcome) == pytest.approx(np.mean(pairs))
    assert auc(predicted, np.ones(4)) is None


def test_a_threshold_cuts_a_block_at_the_first_position_below_it():
    chances = np.array([[0.9, 0.3, 0.8], [0.6, 0.9, np.nan]])
    blocks = Blocks(np.log(chances / (1 - chances)), np.array([2, 1]), np.array([3, 2]))
    rows = {row["threshold"]: row for row in quality(blocks, *[survival(blocks.logits)] * 2)["thresholds"]}
    assert (rows[0.0]["accepted"], rows[0.0]["rejected"]) == (3, 2)
    assert (rows[0.5]["accepted"], rows[0.5]["rejected"]) == (
        2,
        1,
    )  # 0.3 cuts the first block after one token
    assert (rows[0.95]["accepted"], rows[0.95]["acceptance_rate"]) == (0, None)

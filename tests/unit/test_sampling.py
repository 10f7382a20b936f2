"""The sampler draws from exactly the law it states."""

from __future__ import annotations

import pytest
import torch

from deepspec.decoding.request import Sampling
from deepspec.decoding.sampling import draw, probabilities, sample
from deepspec.errors import DeepSpecError

DRAWS = 20_000


def chi_square(counts: torch.Tensor, law: torch.Tensor) -> float:
    """The statistic over the tokens that can come."""
    expected = law * counts.sum()
    possible = expected > 0
    assert not counts[~possible].any()
    return float(((counts - expected)[possible] ** 2 / expected[possible]).sum())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.6),
        Sampling(1.3, top_k=5),
        Sampling(1.0, top_p=0.7),
        Sampling(0.9, top_p=0.9, min_p=0.1),
        Sampling(1.0, top_k=6, top_p=0.8),
    ],
)
def test_draws_follow_the_law(sampling):
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 12, generator=rng) * 2
    law = probabilities(logits, sampling)[0].double()
    assert float(law.sum()) == pytest.approx(1, abs=1e-6)
    tokens = sample(logits.expand(DRAWS, -1), sampling, lambda row: float(torch.rand((), generator=rng)))
    counts = torch.bincount(torch.tensor(tokens), minlength=12).double()
    assert chi_square(counts, law) < 26  # 11 degrees of freedom: p = 0.006


def test_the_inverse_cdf_is_exact_across_runs_of_tokens():
    probs = torch.zeros(1, 1000)
    probs[0, [3, 255, 256, 999]] = torch.tensor([0.25, 0.25, 0.25, 0.25])
    points = torch.tensor([0.0, 0.2499, 0.2501, 0.4999, 0.5001, 0.7499, 0.7501, 0.9999], dtype=torch.float64)
    drawn = draw(probs.expand(8, -1), points).tolist()
    assert drawn == [3, 3, 255, 255, 256, 256, 999, 999]


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert (probabilities(logits, Sampling(1.0, top_p=0.8)) > 0).tolist() == [[True, True, False, False]]
    assert (probabilities(logits, Sampling(1.0, top_p=0.81)) > 0).tolist() == [[True, True, True, False]]


def test_top_p_over_a_flat_law_of_many_tokens_sorts_them_all():
    probs = probabilities(torch.zeros(1, 5000), Sampling(1.0, top_p=0.5))
    assert torch.allclose(probs.sum(), torch.tensor(1.0)) and bool((probs > 0).all())


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": -2}, {"min_p": 2}]
)
def test_bad_samplers_are_refused(bad):
    with pytest.raises(DeepSpecError):
        Sampling(**bad)

"""The closed-form gradients against autograd, and the figures against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deepspec.training import losses
from deepspec.training.losses import TargetLaw, confidence_loss, expected_tau, head_loss, position_weights

N, D, R, VOCAB, KEPT = 37, 6, 3, 20, 13


@pytest.fixture
def inputs():
    rng = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    full_head = random(VOCAB, D)
    target_hidden = random(N, D)
    labels = torch.randint(-1, KEPT, (N,), generator=rng)
    law = TargetLaw(target_hidden, (target_hidden @ full_head.T).logsumexp(-1), labels)
    leaves = [random(N, D), random(N, R), random(KEPT, R)]
    return [leaf.requires_grad_() for leaf in leaves], full_head[:KEPT], law, torch.rand(N, generator=rng)


def reference(leaves, head, law, weights, ce, tv):
    """The definitions, written with autograd and the whole logits at once."""
    hidden, markov, w2 = leaves
    log_q = (hidden @ head.T + markov @ w2.T).log_softmax(-1)
    p = (law.hidden @ head.T - law.log_norm[:, None]).exp()
    known = law.labels >= 0
    cross_entropy = -log_q.gather(1, law.labels.clamp(min=0)[:, None])[:, 0] * known
    distance = (log_q.exp() - p).abs().sum(-1) + (1 - p.sum(-1))
    alpha = torch.minimum(log_q.exp(), p).sum(-1)
    return (weights * (ce * cross_entropy + tv * distance)).sum(), alpha


@pytest.mark.parametrize(("ce", "tv"), [(0.1, 0.9), (1.0, 0.0), (0.0, 1.0)])
def test_head_loss_and_its_gradients_match_autograd(inputs, ce, tv, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 10)
    leaves, head, law, weights = inputs
    loss, alpha, _ = head_loss(*leaves, head, law, weights, ce, tv)
    expected, expected_alpha = reference(leaves, head, law, weights, ce, tv)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(alpha.double(), expected_alpha, atol=1e-5)
    found = torch.autograd.grad(3 * loss, leaves)
    for mine, theirs in zip(found, torch.autograd.grad(3 * expected, leaves), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_a_position_of_weight_zero_has_no_gradient(inputs):
    leaves, head, law, weights = inputs
    weights[5] = 0
    loss, _, _ = head_loss(*leaves, head, law, weights, 0.1, 0.9)
    (gradient,) = torch.autograd.grad(loss, leaves[:1])
    assert not gradient[5].any() and gradient[6].any()


def test_confidence_loss_is_least_at_the_acceptance_chance():
    alpha, weights = torch.tensor([0.3, 0.8]), torch.ones(2)
    best = confidence_loss(torch.logit(alpha), alpha, weights)
    for shift in (-0.5, 0.5):
        assert confidence_loss(torch.logit(alpha) + shift, alpha, weights) > best


def test_expected_tau_multiplies_along_each_block():
    alpha = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.5, 0.5]])
    valid = torch.tensor([[True, True], [True, True], [True, False]])
    assert expected_tau(alpha, valid).tolist() == [3.0, 1.0, 1.5]


def test_position_weights_decay_from_one():
    weights = position_weights(4, 2.0)
    assert weights[0] == 1 and torch.allclose(weights, F.relu(weights))
    assert weights[2] == pytest.approx(torch.exp(torch.tensor(-1.0)).item())

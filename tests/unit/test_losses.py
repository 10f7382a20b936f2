"""The closed-form gradients against autograd in float64, and the figures against their definitions."""

from __future__ import annotations

import pytest
import torch

from deepspec.drafters.loss_params import LossParams
from deepspec.drafters.position_weights import DPace, Geometric
from deepspec.kernels import kernels
from deepspec.target.head import PLAIN, HeadTransform
from deepspec.target.native.losses import Coefficients, Theirs, position_losses
from deepspec.training import losses
from deepspec.training.losses import (
    TargetLaw,
    confidence_loss,
    expected_tau,
    head_loss,
)

BLOCKS, GAMMA, D, R, VOCAB, KEPT, TOKENS = 9, 4, 6, 3, 20, 13, 24
N = BLOCKS * GAMMA


def mixture(**weights: float) -> LossParams:
    """Of the terms named, and no others."""
    return LossParams(**{"ce": 0.0, "tv": 0.0} | weights)


MIXTURES = {
    "ce": mixture(ce=1),
    "kl": mixture(kl=1),
    "tv": mixture(tv=1),
    "lk": mixture(lk=1),
    "lk_mixed": mixture(lk_mixed=1),
    "dspark": mixture(ce=0.1, tv=0.9),
    "all": mixture(ce=0.3, kl=0.2, tv=0.4, lk=0.5, lk_mixed=0.6),
}
WEIGHINGS = {"geometric": Geometric(3.0), "dpace": DPace(0.5)}


class Case:
    """Factors that all require gradients, a target over the whole vocabulary, and blocks cut short."""

    def __init__(self, kept: int = KEPT, transform: HeadTransform = PLAIN):
        rng = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        full_head = random(VOCAB, D)
        hidden, places = random(TOKENS, D), torch.randint(TOKENS, (N,), generator=rng)
        labels = torch.randint(-1 if kept < VOCAB else 0, kept, (N,), generator=rng)
        log_norm = transform(hidden @ full_head.T).logsumexp(-1)
        mine = transform.rows(torch.arange(kept))
        self.law = TargetLaw(hidden, log_norm, full_head[:kept], places, labels, mine)
        self.valid = torch.rand(BLOCKS, GAMMA, generator=rng).lt(0.8).cumprod(-1).bool()
        self.leaves = [random(N, D), random(kept, D), random(N, R), random(kept, R)]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def loss(
        self,
        mixture: LossParams,
        weigh=WEIGHINGS["geometric"],
        budget: int | None = None,
        candidates: int | None = None,
        measured: bool = True,
    ):
        factors = [tuple(self.leaves[:2]), tuple(self.leaves[2:])]
        return head_loss(factors, self.law, mixture, weigh, self.valid, budget, candidates, measured)

    def reference(self, mixture: LossParams, weigh, candidates: int | None = None):
        """The definitions, written with autograd and the whole logits at once: loss and α."""
        x, head, latents, w2 = self.leaves
        law, alone = self.law, x @ head.T
        kept = alone >= alone.topk(candidates or len(head)).values[:, -1:]
        log_q = (alone + latents @ w2.T).masked_fill(~kept, -torch.inf).log_softmax(-1)
        log_p = (law.transform(law.hidden @ law.head.T) - law.log_norm[:, None])[law.places]
        p, q = log_p.exp() * kept, log_q.exp()
        log_q = log_q.masked_fill(~kept, 0.0)
        known = (law.labels >= 0) & kept.gather(1, law.labels.clamp(min=0)[:, None])[:, 0]
        chances = q.gather(1, law.labels.clamp(min=0)[:, None])[:, 0] * known
        cross_entropy = torch.where(known, -chances.clamp(min=1e-30).log(), 0.0)
        divergence = (p * (log_p - log_q)).sum(-1)
        distance = (q - p).abs().sum(-1) + (1 - p.sum(-1))
        alpha = torch.minimum(p, q).sum(-1)
        blend = torch.exp(-3 * alpha.detach())
        value = (
            mixture.ce * cross_entropy
            + mixture.kl * divergence
            + mixture.tv * distance
            - mixture.lk * alpha.log()
            + mixture.lk_mixed * (blend * divergence + (1 - blend) * distance / 2)
        )
        weights = weigh(chances.detach().view(BLOCKS, GAMMA), self.valid).flatten()
        return (value * weights).sum(), alpha


@pytest.mark.parametrize("kept", [KEPT, VOCAB])
@pytest.mark.parametrize("weighing", WEIGHINGS)
@pytest.mark.parametrize("name", MIXTURES)
def test_losses_and_their_gradients_match_autograd_in_float64(name, weighing, kept):
    case = Case(kept)
    found = case.loss(MIXTURES[name], WEIGHINGS[weighing], budget=3 * GAMMA * kept * 4)
    expected, alpha = case.reference(MIXTURES[name], WEIGHINGS[weighing])
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert torch.allclose(found.alpha, alpha, atol=1e-9)
    gradients = torch.autograd.grad(3 * found.loss, case.leaves)
    for mine, theirs in zip(gradients, torch.autograd.grad(3 * expected, case.leaves), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-9)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_law_among_candidates_is_learnt_as_one_of_a_vocabulary_of_their_own(name):
    case = Case()
    found = case.loss(MIXTURES[name], budget=3 * GAMMA * KEPT * 4, candidates=5)
    expected, alpha = case.reference(MIXTURES[name], WEIGHINGS["geometric"], candidates=5)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert torch.allclose(found.alpha, alpha, atol=1e-9)
    gradients = torch.autograd.grad(3 * found.loss, case.leaves)
    for mine, theirs in zip(gradients, torch.autograd.grad(3 * expected, case.leaves), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-9)


@pytest.mark.parametrize("candidates", [None, 5])
@pytest.mark.parametrize("name", ["ce", "kl", "dspark"])
def test_what_a_loss_does_not_need_is_left_out_of_its_steps_and_changes_no_bit(name, candidates, monkeypatch):
    case, asked, original = Case(), [], TargetLaw.logits
    whole = case.loss(MIXTURES[name], candidates=candidates)
    gradients = torch.autograd.grad(whole.loss, case.leaves)
    monkeypatch.setattr(TargetLaw, "logits", lambda *of: asked.append(of) or original(*of))
    found = case.loss(MIXTURES[name], candidates=candidates, measured=False)
    assert bool(asked) == (name != "ce"), "labels need no law of the target"
    assert found.measured == (name == "dspark") != bool(found.alpha.isnan().all())
    assert torch.equal(found.loss, whole.loss) and torch.equal(found.weights, whole.weights)
    for mine, theirs in zip(torch.autograd.grad(found.loss, case.leaves), gradients, strict=True):
        assert torch.equal(mine, theirs)


TRANSFORMS = {
    "scale": HeadTransform(scale=0.25),
    "softcap": HeadTransform(softcap=3.0),
    "bias": HeadTransform(bias=torch.linspace(-1, 1, VOCAB, dtype=torch.float64)),
    "all": HeadTransform(0.5, 2.0, torch.linspace(-1, 1, VOCAB, dtype=torch.float64)),
}


@pytest.mark.parametrize("part", TRANSFORMS)
@pytest.mark.parametrize("name", ["kl", "tv", "all"])
def test_the_loss_sees_what_the_targets_head_makes_of_its_product(part, name):
    case = Case(KEPT, TRANSFORMS[part])
    found = case.loss(MIXTURES[name], WEIGHINGS["geometric"], budget=3 * GAMMA * KEPT * 4)
    expected, alpha = case.reference(MIXTURES[name], WEIGHINGS["geometric"])
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert torch.allclose(found.alpha, alpha, atol=1e-9)
    gradients = torch.autograd.grad(3 * found.loss, case.leaves)
    for mine, theirs in zip(gradients, torch.autograd.grad(3 * expected, case.leaves), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-9)


def test_no_tensor_over_the_vocabulary_exceeds_the_budget(monkeypatch):
    case, sizes, original = Case(), [], losses._position_losses

    def watched(logits, *rest):
        sizes.append(logits.numel() * 4)
        return original(logits, *rest)

    monkeypatch.setattr(losses, "_position_losses", watched)
    budget = 2 * GAMMA * KEPT * 4
    case.loss(MIXTURES["dspark"], budget=budget)
    assert max(sizes) == budget and len(sizes) == -(-BLOCKS // 2)


@pytest.mark.skipif(kernels() is None, reason="no kernels here")
@pytest.mark.parametrize("columns", [VOCAB, 4099])
@pytest.mark.parametrize("theirs", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_kernel_computes_what_torch_does(name, measured, dtype, theirs, columns):
    rng = torch.Generator().manual_seed(1)
    logits, law = (4 * torch.randn(n, columns, generator=rng) for n in (7, 5))
    logits, law = logits.to(dtype), law.to(theirs)
    places = torch.tensor([0, 1, 1, 4, 3, 0, 2])
    law[2] = logits[6].to(theirs)  # laws that are next to equal
    labels = torch.tensor([0, -1, 3, columns - 1, 17, -1, 2])
    given = Theirs(law, law.float().logsumexp(-1) + 0.1, places)
    known = given if measured or MIXTURES[name].with_kl or MIXTURES[name].with_overlap else None
    measured = measured or MIXTURES[name].with_overlap
    reference = None if known is None else losses.law_of(Theirs(*(x.clone() for x in known)), True)
    expected = losses._position_losses(logits.clone(), reference, labels, MIXTURES[name], measured)
    gradient = logits.clone()
    by = Coefficients(*losses._weights_of(MIXTURES[name]), losses.LK_DECAY, losses._LEAST_ALPHA)
    found = position_losses(gradient, known, labels, by, measured)
    for mine, torchs in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-5, equal_nan=True)
    precision = {"rtol": 5e-3, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-5}
    torch.testing.assert_close(gradient.float(), expected[0].float(), **precision)
    alone = logits[3:4].clone()
    here = None if known is None else known._replace(places=places[3:4])
    own = position_losses(alone, here, labels[3:4], by, measured)[0]
    torch.testing.assert_close(own, found[0][3:4], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(alone[0], gradient[3])
    if known is not None:
        apart = logits.clone()
        position_losses(apart, Theirs(law[places], known.log_norms[places], None), labels, by, measured)
        assert torch.equal(apart, gradient)


@pytest.mark.skipif(kernels() is None, reason="no kernels here")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["logits", "law"])
def test_what_is_not_finite_is_not_finite_in_the_loss(where, bad):
    logits, law = torch.randn(2, 40), torch.randn(2, 40)
    (logits if where == "logits" else law)[1, 33] = bad
    by = Coefficients(0.1, 0.0, 0.9, 0.0, 0.0, 3.0, 1e-6)
    given = Theirs(law, law.logsumexp(-1), torch.arange(2))
    terms, alphas, _ = position_losses(logits, given, torch.tensor([1, 2]), by, True)
    assert terms[0].isfinite().all() and alphas[0].isfinite()
    assert not (terms[1].isfinite().all() and logits[1].isfinite().all())


@pytest.mark.skipif(kernels() is None, reason="no kernels here")
@pytest.mark.parametrize("candidates", [None, 5])
def test_our_kernel_takes_larger_chunks(candidates, monkeypatch):
    case, rows = Case(), []
    case.leaves = [leaf.detach().float().requires_grad_() for leaf in case.leaves]
    hidden, log_norm, head = (x.float() for x in (case.law.hidden, case.law.log_norm, case.law.head))
    case.law = TargetLaw(hidden, log_norm, head, case.law.places, case.law.labels)
    monkeypatch.setattr(losses, "BUDGET", {"cpu": 2 * GAMMA * KEPT * 4})
    monkeypatch.setattr(losses, "OUR_BUDGET", 3 * GAMMA * KEPT * 4)
    original = TargetLaw.logits
    monkeypatch.setattr(TargetLaw, "logits", lambda law, part: rows.append(part) or original(law, part))
    case.loss(MIXTURES["dspark"], candidates=candidates)
    assert len(rows) == -(-BLOCKS // (3 if candidates is None else 2))


@pytest.mark.skipif(kernels() is None, reason="no kernels here")
def test_the_kernel_reads_nothing_that_is_not_there():
    logits, law, labels = torch.randn(3, 20), torch.randn(2, 20), torch.tensor([1, 2, 3])
    given = Theirs(law, law.logsumexp(-1), torch.tensor([0, 1, 1]))
    by = Coefficients(0.1, 0.0, 0.9, 0.0, 0.0, 3.0, 1e-6)
    with pytest.raises(IndexError, match="a label is not one of 20"):
        position_losses(logits, given, torch.tensor([1, 20, 3]), by, True)
    for places in (torch.tensor([0, 1, 2]), torch.tensor([0, -1, 1]), None):
        with pytest.raises(IndexError, match="a place is not one of 2"):
            position_losses(logits, given._replace(places=places), labels, by, True)
    for wrong, theirs in ((logits, None), (torch.randn(20, 3).T, given)):
        with pytest.raises(ValueError, match="read in order, and all terms but CE"):
            position_losses(wrong, theirs, labels, by, True)
    double = given._replace(log_norms=given.log_norms.double())
    one, other = logits.clone(), logits.clone()
    position_losses(one, given, labels, by, True)
    position_losses(other, double, labels, by, True)
    assert torch.equal(one, other) and not torch.equal(one, logits)


def test_a_frozen_head_costs_no_gradient():
    case = Case()
    case.leaves[1].requires_grad_(False)
    case.loss(MIXTURES["dspark"]).loss.backward()
    assert case.leaves[1].grad is None and case.leaves[0].grad is not None


def test_positions_that_do_not_count_have_no_gradient():
    case = Case()
    (gradient,) = torch.autograd.grad(case.loss(MIXTURES["all"], WEIGHINGS["dpace"]).loss, case.leaves[:1])
    moved = gradient.abs().sum(-1).view(BLOCKS, GAMMA) > 0
    assert torch.equal(moved, case.valid) and not bool(case.valid.all())


def test_lk_has_a_gradient_where_the_laws_hardly_meet_and_tv_has_none():
    head = torch.eye(2, dtype=torch.float64)
    hidden = torch.tensor([[20.0, 0.0]], dtype=torch.float64)
    law = TargetLaw(hidden, hidden.logsumexp(-1), head, torch.tensor([0]), torch.tensor([0]))
    sizes = {}
    for name in ("tv", "lk"):
        x = torch.tensor([[0.0, 12.0]], dtype=torch.float64, requires_grad=True)
        valid = torch.ones(1, 1, dtype=torch.bool)
        head_loss([(x, head)], law, MIXTURES[name], Geometric(1.0), valid).loss.backward()
        sizes[name] = float(x.grad.abs().max())
    assert sizes["tv"] < 1e-4 and sizes["lk"] == pytest.approx(1, abs=0.01)


def test_dpace_weighs_a_position_by_what_hangs_on_it():
    chances = torch.tensor([[1.0, 0.0, 1.0], [0.5, 0.5, 0.5]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    weights = DPace(0.5)(chances, valid)
    assert weights[0].tolist() == [2.0, 1.0, 0.5]  # q̃ = 1, ½, 1: reached 1, ½, ½
    assert weights[1].tolist() == [0.75 + 0.5625, 0.5625, 0.0]


def test_confidence_loss_is_least_at_the_acceptance_chance():
    alpha, weights = torch.tensor([0.3, 0.8]), torch.ones(2)
    best = confidence_loss(torch.logit(alpha), alpha, weights)
    for shift in (-0.5, 0.5):
        assert confidence_loss(torch.logit(alpha) + shift, alpha, weights) > best


def test_expected_tau_multiplies_along_each_block():
    alpha = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.5, 0.5]])
    valid = torch.tensor([[True, True], [True, True], [True, False]])
    assert expected_tau(alpha, valid).tolist() == [3.0, 1.0, 1.5]


def test_geometric_weights_decay_from_one():
    weights = Geometric(2.0)(torch.zeros(1, 4), torch.tensor([[True, True, True, False]]))
    assert weights[0].tolist() == pytest.approx([1.0, 0.6065, 0.3679, 0.0], abs=1e-4)

"""The losses by which a draft learns its target's law, in chunks of blocks, with gradients in closed form.

For a position with draft logits z (over the draft vocabulary), q = softmax(z), target law p (over the whole
vocabulary, of which the draft vocabulary's part is used) and data token x*:

    ce    −log q(x*)                        ∂/∂z = q − 1[x*]
    kl    Σ_v p log(p/q)                    ∂/∂z = P q − p,  P = Σ_v p(v) over the draft vocabulary
    tv    ‖q − p‖₁ = Σ_v |q(v) − p(v)|      ∂/∂z = q ⊙ (s − Σ_v q(v) s(v)) =: g,  s = sign(q − p)
    lk    −log α                            ∂/∂z = g / (2 α)
    lk_mixed  λ·KL + (1 − λ)·½‖q − p‖₁      with λ = exp(−3 α), held fixed

where α = Σ_v min(p, q) = 1 − ½‖q − p‖₁ is the chance that a token drawn from q is accepted (Leviathan et al. 2023).
The DSpark paper's loss is 0.1·ce + 0.9·tv (DeepSeek 2026, §3.1). `lk` and `lk_mixed` are the LK
losses (arXiv 2602.23881); weights by position may be D-PACE's (arXiv 2605.18810). LK has a gradient where p and q
hardly meet and TV has none. Probability that p puts outside the draft vocabulary adds a constant to TV and nothing
to KL and α. The confidence head's BCE, −α log c − (1 − α) log(1 − c), holds α fixed.

Positions of a block are weighed (`drafters/position_weights.py`): later tokens are reached less often.

Logits of all positions never exist at once. A chunk's loss and gradients are computed together, in the forward pass,
so no float32 tensor over the vocabulary is larger than `budget` bytes (or one block's logits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.drafters.network import largest
from deepspec.target.head import PLAIN, HeadTransform
from deepspec.target.native import laws
from deepspec.target.native.losses import Coefficients, Theirs, position_losses

if TYPE_CHECKING:
    from deepspec.drafters.loss_params import LossParams

BUDGET = {"cpu": 20 << 20}  # bytes of one chunk's logits: what stays in a CPU's cache, what fills a GPU
GPU_BUDGET = 256 << 20
OUR_BUDGET = 128 << 20  # our kernel goes row by row, and the products lay the head out anew for each chunk
_LEAST_ALPHA = 1e-6
LK_DECAY = 3.0
Law = tuple[Tensor, Tensor, Tensor]  # p [n, V], Σ p and Σ p log p, [n] both


class Weighing(Protocol):
    """How much each position of a block counts."""

    def __call__(self, chances: Tensor, valid: Tensor) -> Tensor:
        """Return weights [blocks, γ] from q(x*) [blocks, γ] and valid [blocks, γ]."""

    def total(self, valid: Tensor) -> Tensor:
        """Return the divisor of the weighted sum over valid [..., γ] positions."""


@dataclass(frozen=True)
class TargetLaw:
    """What a loss needs of the target at N positions: p(v) = exp(transform(head · hidden) − log_norm).

    hidden [M, d] post-norm and log_norm [M], the log-sum-exp over the whole vocabulary, of M tokens; head [V, d] the
    draft vocabulary's rows; places [N] the token that each position's law is of; labels [N] the data token as an index
    into the draft vocabulary (−1: not in it).
    """

    hidden: Tensor
    log_norm: Tensor
    head: Tensor
    places: Tensor
    labels: Tensor
    transform: HeadTransform = PLAIN

    def logits(self, part: slice) -> Theirs:
        """Return the logits of the tokens that a part of the positions asks for.

        Blocks overlap: what several ask of one token is computed once.
        """
        asked, rows = self.places[part], None
        places, found = asked.unique(return_inverse=True)
        if len(places) < len(asked):
            asked, rows = places, found
        logits, log_norm = F.linear(self.hidden[asked], self.head), self.log_norm[asked]
        seen = logits if self.transform.plain else self.transform(logits.to(log_norm.dtype))
        return Theirs(seen, log_norm, rows)


def law_of(theirs: Theirs, with_kl: bool) -> Law:
    """Return p [n, V], Σ p [n] and Σ p log p [n] (zero unless asked for) of n positions."""
    logits, log_norm, rows = theirs
    log_p = logits.to(log_norm.dtype).sub_(log_norm[:, None])
    p = log_p.exp() if with_kl else log_p.exp_()
    inside = p.sum(-1)
    negentropy = _dot(p, log_p) if with_kl else torch.zeros_like(inside)
    return (p, inside, negentropy) if rows is None else (p[rows], inside[rows], negentropy[rows])


class HeadLoss(NamedTuple):
    """Of N positions; only `loss` has a gradient."""

    loss: Tensor  # the weighted sum
    alpha: Tensor  # [N]
    terms: Tensor  # [N, 3]: CE, KL (zero unless asked for) and TV
    weights: Tensor  # [N]
    measured: bool  # whether α and TV are known; else both are NaN


class _HeadLoss(torch.autograd.Function):
    """See `head_loss`. `factors` are x₁, W₁, x₂, W₂, ...: logits are Σ xᵢ Wᵢᵀ."""

    @staticmethod
    def forward(
        ctx,
        law: TargetLaw,
        mixture: LossParams,
        weigh: Weighing,
        valid,
        budget: int,
        candidates: int | None,
        measured: bool,
        *factors,
    ):
        inputs, matrices = factors[::2], factors[1::2]
        wanted = ctx.needs_input_grad[7:]
        n, gamma = len(law.labels), valid.shape[-1]
        x_grads = [torch.empty_like(x) if wanted[2 * i] else None for i, x in enumerate(inputs)]
        w_grads = [
            torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
            if wanted[2 * i + 1]
            else None
            for i, w in enumerate(matrices)
        ]
        alpha = law.log_norm.new_empty(n)
        weights, terms = torch.empty_like(alpha), alpha.new_empty(n, 3)
        blocks = max(budget // (4 * len(law.head) * gamma), 1)
        for start in range(0, n, blocks * gamma):
            part = slice(start, start + blocks * gamma)
            logits = F.linear(inputs[0][part], matrices[0])
            kept = None if candidates is None else largest(logits, candidates)
            for x, w in zip(inputs[1:], matrices[1:], strict=True):
                logits.addmm_(x[part], w.T)
            theirs = law.logits(part) if measured or mixture.with_kl else None
            labels = law.labels[part]
            if kept is None and laws.can_read(logits) and (theirs is None or laws.can_read(theirs.logits)):
                by = Coefficients(*_weights_of(mixture), LK_DECAY, _LEAST_ALPHA)
                terms[part], alpha[part], chances = position_losses(logits, theirs, labels, by, measured)
                dz = logits
            else:
                both = logits, None if theirs is None else law_of(theirs, mixture.with_kl), labels
                if kept is not None:
                    both = _among(kept, *both)
                dz, terms[part], alpha[part], chances = _position_losses(*both, mixture, measured)
            here = valid[start // gamma : start // gamma + blocks]
            weights[part] = weigh(chances.view(-1, gamma), here).flatten()
            dz = dz.to(inputs[0].dtype)
            by_row = weights[part, None].to(dz.dtype)  # on the small side of the products
            for x, w, x_grad, w_grad in zip(inputs, matrices, x_grads, w_grads, strict=True):
                if x_grad is not None:
                    x_grad[part] = (dz @ w).mul_(by_row)
                if w_grad is not None:
                    w_grad += dz.T @ (x[part] * by_row)
        grads = [grad for pair in zip(x_grads, w_grads, strict=True) for grad in pair]
        ctx.save_for_backward(*grads)
        ctx.dtypes = [factor.dtype for factor in factors]
        ctx.mark_non_differentiable(alpha, terms, weights)
        return (_value(terms, alpha, mixture) * weights).sum(), alpha, terms, weights

    @staticmethod
    def backward(ctx, grad, *_):
        scaled = [
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, None, None, None, None, None, *scaled


def _weights_of(mixture: LossParams) -> tuple[float, float, float, float, float]:
    return mixture.ce, mixture.kl, mixture.tv, mixture.lk, mixture.lk_mixed


def _among(
    kept: Tensor, logits: Tensor, law: Law | None, labels: Tensor
) -> tuple[Tensor, Law | None, Tensor]:
    """Return logits, the target's law and labels where a position's vocabulary is `kept` [n, V] alone."""
    logits = logits.masked_fill_(~kept, torch.finfo(logits.dtype).min / 2)
    known = (labels >= 0) & kept.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    labels = labels.masked_fill(~known, -1)
    if law is None:
        return logits, None, labels
    p = law[0].masked_fill_(~kept, 0.0)
    return logits, (p, p.sum(-1), torch.special.xlogy(p, p).sum(-1)), labels


def _value(terms: Tensor, alpha: Tensor, mixture: LossParams) -> Tensor:
    """Return the loss of each position [n], from its terms [n, 3] and α."""
    ce, kl, distance = terms.unbind(-1)
    if not mixture.with_overlap:
        return mixture.ce * ce + mixture.kl * kl
    alpha = alpha.clamp(min=_LEAST_ALPHA)
    blend = torch.exp(-LK_DECAY * alpha)
    mixed = blend * kl + (1 - blend) * distance / 2
    total = mixture.ce * ce + mixture.kl * kl + mixture.tv * distance
    return total - mixture.lk * alpha.log() + mixture.lk_mixed * mixed


def _position_losses(
    logits: Tensor, law: Law | None, labels: Tensor, mixture: LossParams, measured: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ∂loss/∂logits [n, V], terms [n, 3], α [n] and q(x*) [n] of a chunk, in float32 or more. Overwrites p.

    Nearly all of the time goes to passes over [n, V], so what can be done in place is, and row-wise factors stay out.

    Args:
        law: the target's; None where only labels count.
        measured: whether α and TV are asked for, which CE and KL do not need.
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    known = (labels >= 0).to(precise)
    index = labels.clamp(min=0)[:, None]
    q = logits.softmax(-1, dtype=precise)
    largest, place = q.max(-1, keepdim=True)
    norm = logits.gather(1, place).to(precise) - largest.log()  # log-sum-exp of the logits
    log_chances = (logits.gather(1, index).to(precise) - norm)[:, 0]
    with_kl = mixture.with_kl
    p, inside, negentropy = law if law is not None else (q, torch.zeros_like(known), torch.zeros_like(known))
    divergence = torch.zeros_like(inside)
    if with_kl:
        divergence = negentropy - _dot(p, logits.to(precise)) + norm[:, 0] * inside
    if measured:
        difference = q - p if with_kl else torch.sub(q, p, out=p)
        # ‖q − p‖₁ = 2 − 2 Σ min(p, q), both laws summing to one
        distance = torch.linalg.vector_norm(difference, 1, -1) + (1 - inside).clamp_(min=0)
        alpha = 1 - distance / 2
    else:
        distance = alpha = torch.full_like(inside, torch.nan)
    by_ce, by_kl, by_tv = _coefficients(alpha, known, mixture)
    if not mixture.with_overlap:
        dz = q.mul_((by_ce + by_kl * inside)[:, None])
    else:
        sign = difference.sign_()
        centre = by_ce + by_kl * inside - by_tv * _dot(q, sign)
        if mixture.lk or mixture.lk_mixed:
            dz = sign.mul_(by_tv[:, None]).add_(centre[:, None]).mul_(q)
        else:
            dz = torch.add(centre[:, None], sign, alpha=mixture.tv, out=sign).mul_(q)
    if with_kl:
        dz.sub_(p.mul_(by_kl[:, None]))
    dz.scatter_add_(1, index, -by_ce[:, None])
    terms = torch.stack((-log_chances * known, divergence, distance), -1)
    return dz, terms, alpha, log_chances.exp() * known


def _coefficients(alpha: Tensor, known: Tensor, mixture: LossParams) -> tuple[Tensor, Tensor, Tensor]:
    """Return the coefficients [n] of q − 1[x*], P q − p and g in ∂loss/∂z."""
    if not mixture.with_overlap:
        return mixture.ce * known, torch.full_like(known, mixture.kl), torch.zeros_like(known)
    alpha = alpha.clamp(min=_LEAST_ALPHA)
    blend = torch.exp(-LK_DECAY * alpha)
    by_kl = mixture.kl + mixture.lk_mixed * blend
    by_tv = mixture.tv + mixture.lk / (2 * alpha) + mixture.lk_mixed * (1 - blend) / 2
    return mixture.ce * known, by_kl, by_tv


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute the dot products of rows, [n, V] · [n, V] → [n], without a product of that size."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]


def head_loss(
    factors: Sequence[tuple[Tensor, Tensor]],
    law: TargetLaw,
    mixture: LossParams,
    weigh: Weighing,
    valid: Tensor,
    budget: int | None = None,
    candidates: int | None = None,
    measured: bool = True,
) -> HeadLoss:
    """Compute the mixture of losses over N = blocks·γ positions, block by block.

    Args:
        factors: (x [N, m], W [V, m]) pairs; the draft's logits are Σ x Wᵀ. Gradients go to those that require them.
        law: the target at the same positions.
        mixture: how much each term counts.
        weigh: the positions of a block.
        valid: bool [blocks, γ]; others do not count.
        budget: bytes of the largest tensor over the vocabulary; None: 20 MiB on a CPU, 128 MiB with our kernel,
            256 MiB on a GPU.
        candidates: the draft's vocabulary at a position is so many tokens, those of the largest x₁ W₁ᵀ; None: all.
        measured: whether α and TV are asked for where the loss does not need them. Without them the target's law is
            not computed for CE, and fewer passes over it are made for KL.
    """
    measured = measured or mixture.with_overlap
    ours = candidates is None and laws.can_read(factors[0][0].detach())
    budget = budget or (OUR_BUDGET if ours else BUDGET.get(valid.device.type, GPU_BUDGET))
    flat = [tensor for pair in factors for tensor in pair]
    whole = law, mixture, weigh, valid, budget, candidates, measured
    loss, alpha, terms, weights = _HeadLoss.apply(*whole, *flat)
    return HeadLoss(loss, alpha, terms, weights, measured)


def confidence_loss(scores: Tensor, alpha: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of the BCE of confidence logits [N] against the acceptance rate α [N]."""
    losses = F.binary_cross_entropy_with_logits(scores.float(), alpha.clamp(0, 1), reduction="none")
    return (losses * weights).sum()


def expected_tau(alpha: Tensor, valid: Tensor) -> Tensor:
    """Return the expected tokens committed per verification of each block: 1 + Σ_k Π_{i≤k} α_i.

    alpha, valid: [blocks, γ]; the product runs along each block before blocks are averaged (never a product of
    averages). Returns [blocks].
    """
    return 1 + (alpha * valid).cumprod(-1).sum(-1)

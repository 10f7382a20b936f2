"""The DSpark loss, in chunks of positions, with gradients in closed form.

For a position with draft logits z (over the draft vocabulary), q = softmax(z), target law p (over the whole
vocabulary, of which the draft vocabulary's part is used) and data token x*:

    CE   = −log q(x*)                        ∂/∂z = q − 1[x*]
    TV   = ‖q − p‖₁ = Σ_v |q(v) − p(v)|      ∂/∂z = q ⊙ (s − Σ_v q(v) s(v)),  s = sign(q − p)
    α    = Σ_v min(p(v), q(v))               the chance that a token drawn from q is accepted
    BCE  = −α log c − (1 − α) log(1 − c)     c the confidence head's output, α held fixed

(DeepSeek 2026, DSpark §3.1.) Probability that p puts outside the draft vocabulary adds a constant to TV and nothing
to α. Logits of all positions never exist at once: a chunk's loss and gradients are computed together, in the
forward pass, so memory is bounded by `chunk` × draft vocabulary in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256  # positions; 8 MiB of float32 at 8,192 draft tokens stays in the cache of a CPU


@dataclass(frozen=True)
class TargetLaw:
    """What a loss needs of the target at N positions: p(v) = exp(head · hidden − log_norm).

    hidden [N, d] post-norm, log_norm [N] the log-sum-exp over the whole vocabulary, labels [N] the data token as an
    index into the draft vocabulary (−1: not in it).
    """

    hidden: Tensor
    log_norm: Tensor
    labels: Tensor


class _HeadLoss(torch.autograd.Function):
    """Σ weights · (ce · CE + tv · TV) over N positions, and α of each."""

    @staticmethod
    def forward(ctx, hidden, markov, w2, head, law: TargetLaw, weights, ce: float, tv: float):
        hidden_grad, markov_grad = torch.empty_like(hidden), torch.empty_like(markov)
        w2_grad = torch.zeros_like(w2)
        alpha = torch.empty(len(hidden), device=hidden.device)
        losses = torch.empty(len(hidden), 2, device=hidden.device)  # CE and TV of each position
        for rows in torch.arange(len(hidden), device=hidden.device).split(CHUNK):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            logits = F.linear(hidden[part], head) + F.linear(markov[part], w2)
            target_logits = F.linear(law.hidden[part], head)
            dz, losses[part], alpha[part] = _position_losses(
                logits.float(), target_logits.float(), law.log_norm[part], law.labels[part], ce, tv
            )
            dz = dz.mul_(weights[part, None]).to(hidden.dtype)
            hidden_grad[part] = dz @ head
            markov_grad[part] = dz @ w2
            w2_grad += dz.T @ markov[part]
        ctx.save_for_backward(hidden_grad, markov_grad, w2_grad)
        total = (losses * weights[:, None]).sum(0)
        ctx.mark_non_differentiable(alpha, losses)
        return ce * total[0] + tv * total[1], alpha, losses

    @staticmethod
    def backward(ctx, grad, *_):
        hidden_grad, markov_grad, w2_grad = ctx.saved_tensors
        return hidden_grad * grad, markov_grad * grad, w2_grad * grad, None, None, None, None, None


def _position_losses(logits, target_logits, log_norm, labels, ce, tv):
    """(∂loss/∂logits [n, V], [CE, TV] [n, 2], α [n]) of a chunk, all float32."""
    log_q = logits.log_softmax(-1)
    q = log_q.exp()
    p = (target_logits - log_norm[:, None].to(q.dtype)).exp_()
    known = (labels >= 0).to(q.dtype)
    index = labels.clamp(min=0)[:, None]
    cross_entropy = -log_q.gather(1, index)[:, 0] * known
    missing = (1 - p.sum(-1)).clamp_(min=0)  # of p, outside the draft vocabulary
    difference = q - p
    distance = difference.abs().sum(-1) + missing
    sign = difference.sign_()
    dz = q * (sign - (q * sign).sum(-1, keepdim=True)).mul_(tv) if tv else torch.zeros_like(q)
    if ce:
        dz.add_(q * (ce * known)[:, None])
        dz.scatter_add_(1, index, (-ce * known)[:, None])
    # ‖q − p‖₁ = 2 − 2 Σ min(p, q), both laws summing to one
    return dz, torch.stack((cross_entropy, distance), -1), 1 - distance / 2


def head_loss(
    hidden: Tensor,
    markov: Tensor,
    w2: Tensor,
    head: Tensor,
    law: TargetLaw,
    weights: Tensor,
    ce: float,
    tv: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted CE and TV of N positions.

    Args:
        hidden: [N, d] draft hidden states; markov: [N, r] rows W₁[x_{k−1}]; w2: [V, r]; head: [V, d], frozen.
        law: the target at the same positions.
        weights: float32 [N]; 0 leaves a position out.
        ce, tv: weights of the two terms.

    Returns:
        The weighted sum (differentiable in hidden, markov and w2), α [N], and [CE, TV] [N, 2].
    """
    return _HeadLoss.apply(hidden, markov, w2, head, law, weights, ce, tv)


def confidence_loss(scores: Tensor, alpha: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the BCE of confidence logits [N] against the acceptance chance α [N]."""
    losses = F.binary_cross_entropy_with_logits(scores.float(), alpha.clamp(0, 1), reduction="none")
    return (losses * weights).sum()


def position_weights(gamma: int, decay: float, device: torch.device | None = None) -> Tensor:
    """exp(−(k − 1)/γ_w) for k = 1..γ: later tokens of a block are reached less often."""
    return torch.exp(-torch.arange(gamma, device=device) / decay)


def expected_tau(alpha: Tensor, valid: Tensor) -> Tensor:
    """Tokens committed per verification that each block promises: 1 + Σ_k Π_{i≤k} α_i.

    alpha, valid: [blocks, γ]; the product runs along each block before blocks are averaged (never a product of
    averages). Returns [blocks].
    """
    return 1 + (alpha * valid).cumprod(-1).sum(-1)

"""The sampler: logits → probabilities → one draw by inverse CDF. The law it defines is what must be preserved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.decoding.request import Sampling
from deepspec.target.native import laws

_RUN = 256
_PARTIAL = 1024  # how many of the largest probabilities are sorted before a full sort is tried


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits [..., vocab] → float32 probabilities [..., vocab] of the sampler (temperature > 0).

    Cuts are applied in the order top-k, top-p, min-p, each on the renormalised rest; the result sums to 1.
    """
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        scaled = logits.to(torch.float32) / sampling.temperature
        kept = scaled.topk(sampling.top_k, -1).values[..., -1:]
        probs = _softmax(scaled.masked_fill(scaled < kept, float("-inf")), 1.0)
    else:
        probs = _softmax(logits, sampling.temperature)
    if sampling.top_p < 1:
        probs = _renormalised(probs, probs >= _top_p_threshold(probs, sampling.top_p))
    if sampling.min_p > 0:
        probs = _renormalised(probs, probs >= sampling.min_p * probs.amax(-1, keepdim=True))
    return probs


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    if laws.can_read(logits):
        return laws.probabilities(logits, temperature)
    return logits.to(torch.float32, copy=True).div_(temperature).softmax(-1)


def sample(logits: Tensor, sampling: Sampling, uniform: Callable[[int], float]) -> list[int]:
    """One token for each row of logits [batch, vocab] (temperature > 0); `uniform(row)` is the row's randomness.

    The nucleus is never computed: a token drawn from the uncut law is kept where the mass of the likelier ones is
    below top_p, else drawn again, which is the nucleus' own law. No vocabulary is sorted on the way.
    """
    probs = probabilities(logits, replace(sampling, top_p=1.0, min_p=0.0))
    rows = list(range(len(probs)))

    def drawn_of(part: Tensor) -> Tensor:
        uniforms = torch.tensor([uniform(row) for row in rows], dtype=torch.float64, device=probs.device)
        return draw(part, uniforms)

    if sampling.top_p == 1 and sampling.min_p == 0:
        return drawn_of(probs).tolist()
    least = sampling.min_p * probs.amax(-1)
    tokens = [-1] * len(probs)
    while rows:
        part = probs if len(rows) == len(probs) else probs[rows]
        drawn = drawn_of(part)
        own = part.gather(1, drawn[:, None])
        kept = ~(own[:, 0] < least[rows])  # a NaN is kept: the engine reports it
        if sampling.top_p < 1:
            kept &= ~((part * (part > own)).sum(-1) >= sampling.top_p)
        for row, token, keep in zip(rows, drawn.tolist(), kept.tolist(), strict=True):
            tokens[row] = token if keep else -1
        rows = [row for row in rows if tokens[row] < 0]
    return tokens


def best(logits: Tensor) -> tuple[list[int], Tensor]:
    """logits [n, vocab] → the first likeliest token of each row, and its logit [n] (not finite where the row is not).

    In two levels, like `draw`: the largest of each run is found by vector instructions, an argmax over it all is not.
    """
    if laws.can_read(logits):
        columns, highest = laws.best(logits)
        return columns.tolist(), highest
    runs = F.pad(logits, (0, -logits.shape[-1] % _RUN), value=float("-inf")).unflatten(-1, (-1, _RUN))
    tops = runs.amax(-1)  # [n, runs]
    highest, run = tops.max(-1)
    inside = runs[torch.arange(len(runs), device=runs.device), run]  # [n, _RUN]
    return (run * _RUN + inside.argmax(-1)).tolist(), highest


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: probs [batch, vocab], uniform [batch] in [0, 1) → token ids [batch]; impossible ones never come.

    In two levels, runs of tokens and then tokens of the run: one pass over the vocabulary instead of a full cumsum.
    """
    if probs.dtype == torch.float32 and laws.can_read(probs):
        return laws.draw(probs, uniform)
    vocab = probs.shape[-1]
    runs = F.pad(probs, (0, -vocab % _RUN)).unflatten(-1, (-1, _RUN))  # [batch, runs, _RUN]
    before = runs.sum(-1).double().cumsum(-1)  # [batch, runs]
    point = uniform[:, None].to(before) * before[:, -1:]
    run = torch.searchsorted(before, point, right=True).clamp_(max=before.shape[-1] - 1)
    inside = runs.gather(1, run[..., None].expand(-1, -1, _RUN))[:, 0].double().cumsum(-1)  # [batch, _RUN]
    start = before.gather(1, run) - inside[:, -1:]
    token = torch.searchsorted(inside, point - start, right=True)
    # Rounding between the two sums may point just outside the run: take its first or last possible token.
    token = torch.maximum(token, torch.searchsorted(inside, torch.zeros_like(inside[:, -1:]), right=True))
    token = torch.minimum(token, torch.searchsorted(inside, inside[:, -1:].contiguous()))
    return (run * _RUN + token)[:, 0].clamp_(max=vocab - 1)


def _top_p_threshold(probs: Tensor, top_p: float) -> Tensor:
    """Return the smallest probability kept, [..., 1]: the largest ones whose mass first reaches top_p.

    Almost always they are among the first thousand; only then is a sort of the whole vocabulary avoided.
    """
    largest = probs.topk(min(_PARTIAL, probs.shape[-1]), -1).values
    mass = largest.cumsum(-1)
    if bool((mass[..., -1] < top_p).any()):
        largest = probs.sort(-1, descending=True).values
        mass = largest.cumsum(-1)
    first = (mass - largest < top_p).sum(-1, keepdim=True) - 1
    return largest.gather(-1, first)


def _renormalised(probs: Tensor, keep: Tensor) -> Tensor:
    probs = probs * keep
    return probs / probs.sum(-1, keepdim=True)

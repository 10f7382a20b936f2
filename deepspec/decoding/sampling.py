"""The sampler: logits → probabilities → one draw by inverse CDF. The law it defines is what must be preserved."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.decoding.request import Sampling

_PARTIAL = 1024  # how many of the largest probabilities are sorted before a full sort is tried


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits [..., vocab] → float32 probabilities [..., vocab] of the sampler (temperature > 0).

    Cuts are applied in the order top-k, top-p, min-p, each on the renormalised rest; the result sums to 1.
    """
    scaled = logits.float() / sampling.temperature
    if sampling.top_k and sampling.top_k < scaled.shape[-1]:
        kept = scaled.topk(sampling.top_k, -1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < kept, float("-inf"))
    probs = scaled.softmax(-1)
    if sampling.top_p < 1:
        probs = _renormalised(probs, probs >= _top_p_threshold(probs, sampling.top_p))
    if sampling.min_p > 0:
        probs = _renormalised(probs, probs >= sampling.min_p * probs.amax(-1, keepdim=True))
    return probs


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: probs [..., vocab], uniform [...] in [0, 1) → token ids [...]. Impossible tokens never come."""
    cdf = probs.cumsum(-1, dtype=torch.float64)
    point = uniform[..., None].to(cdf) * cdf[..., -1:]
    return torch.searchsorted(cdf, point, right=True)[..., 0].clamp_(max=probs.shape[-1] - 1)


def _top_p_threshold(probs: Tensor, top_p: float) -> Tensor:
    """The smallest probability kept, [..., 1]: the largest ones whose mass first reaches top_p.

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

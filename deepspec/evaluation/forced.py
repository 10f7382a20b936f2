"""Forced decoding: a drafter's rounds along an answer that is known, without a decoding pass of the target.

At T = 0 the tokens that the target writes tell its verdict on any proposal: it stands as far as it is the same. Where
tokens are drawn they still tell it of proposals that are functions of the context alone, a lookup's: an accepted token
is the one that was drawn (`decoding.verify.walk`). So the rounds of a lookup at any temperature, and of every chain and
tree at T = 0, are counted exactly along one answer. Those of sampled proposals are not, and have to be decoded.

Engine and drafter are the real ones. Of the target the features are read that a trained draft wants, in one pass over
prompt and answer; what its other passes would have taken follows from the plain run beside it (`price`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepspec.decoding.cost import CostCurve
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import PREFILL, generate
from deepspec.decoding.request import Generation
from deepspec.decoding.shapes import Shape
from deepspec.target.attention import CACHE_LENGTH, ForwardPass, KVCache
from deepspec.target.model import Target


class ForcedTarget(Target):
    """A target that writes a known answer whatever is proposed, to one request at a time.

    Args:
        ids: of the prompt and the answer.
        layers: whose features drafters will want.
    """

    def __init__(self, target: Target, ids: list[int], layers: Sequence[int] = ()):
        vars(self).update(vars(target))  # tokenizer, stop tokens and limits are the target's own
        self._ids = torch.tensor(ids, device=target.device)
        self._features = features(target, ids, layers)

    def forward(self, ids: Tensor, step: ForwardPass) -> Tensor:
        """Return the position of each token, [1, n, 1], which is all that `logits` asks of a state."""
        known = step.positions[0].clamp(max=len(self._ids) - 1)
        for layer in step.wanted:
            step.features[layer] = self._features[layer][:, known]
        return step.positions[..., None]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return 1 for the answer's next token and 0 for all others, [n, vocab]."""
        following = self._ids[(hidden + 1).clamp(max=len(self._ids) - 1)]  # [n, 1]
        return torch.zeros(len(hidden), self.vocab_size, device=hidden.device).scatter_(1, following, 1.0)

    def cache(self, slots: int, owner: object) -> KVCache:
        """Return a cache that stays empty."""
        return KVCache(slots, CACHE_LENGTH)


@torch.inference_mode()
def features(target: Target, ids: list[int], layers: Sequence[int]) -> dict[int, Tensor]:
    """Return the outputs [1, len(ids), d] of layers, by passes over up to `PREFILL` tokens; none without layers."""
    if not layers:
        return {}
    cache = target.cache(1, ids)
    cache.reserve(len(ids))
    parts = []
    for start in range(0, len(ids), PREFILL):
        part = torch.tensor([ids[start : start + PREFILL]], device=target.device)
        size = part.shape[1]
        positions = torch.arange(start, start + size, device=target.device)[None]
        step = ForwardPass(positions, cache=cache, rows=[0], starts=[start], counts=[size], wanted=layers)
        target.forward(part, step)
        parts.append(step.features)
    return {layer: torch.cat([part[layer] for part in parts], 1) for layer in layers}


def decode_forced(
    forced: ForcedTarget, drafter: Drafter | None, prompt_ids: list[int], max_new_tokens: int, tree: Shape
) -> Generation:
    """Decode the answer that `forced` writes, at most as many tokens as it was decoded with."""
    (generation,) = generate(
        forced, drafter, prompt_ids, max_new_tokens=max_new_tokens, tree=tree, timed=True
    )
    return generation


def price(generation: Generation, plain: Generation, plain_s: float, curve: CostCurve) -> float:
    """Return the seconds of a forced run, and set those of its verification.

    Its drafts are as they were timed; a pass over n tokens is taken to last as long as one of the plain run, all that
    is around it included, times what the curve has for n tokens over what it has for one, in the middle of the answer.
    """
    stats = generation.stats
    here = curve.at(len(generation.prompt_ids) + len(generation.tokens) / 2)
    ratios = [here.verify(1, 1 + nodes) / here.verify(1, 1) for nodes in stats.verified]
    a_pass = plain_s / plain.stats.rounds if plain.stats.rounds else 0.0
    stats.verify_s, stats.host_s = a_pass * sum(ratios), 0.0
    return stats.verify_s + stats.draft_s

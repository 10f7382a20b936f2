"""Judge a round: by which rule each request's proposal is verified, and what of it stands."""

from __future__ import annotations

import math

from torch import Tensor

from deepspec.decoding.request import Sampling
from deepspec.decoding.round import Turn
from deepspec.decoding.sampling import best, probabilities, sample
from deepspec.decoding.tree import Proposal
from deepspec.decoding.verify import block_at_once, rule_for, takes_at_once, walk


def judge(turns: list[Turn], logits: Tensor, rule: str | None) -> None:
    """Set what of each proposal stands and the target's token after it; a request may fail.

    Args:
        logits: [total, vocab] of all anchors and proposals, one after the other.
        rule: for sampled proposals; see `Engine`.
    """
    tokens, highest = best(logits)
    if all(turn.slot.request.sampling.temperature == 0 for turn in turns):
        for turn in turns:
            turn.nodes, turn.token = _walk_best(turn.proposal, tokens[turn.offset :])
    else:
        _judge_sampled(turns, logits, tokens, rule)
    finite = [math.isfinite(each) for each in highest.tolist()]
    for turn in turns:
        if not all(finite[turn.offset : turn.offset + turn.size]):
            turn.slot.error = "the target's logits are not finite"


def _judge_sampled(turns: list[Turn], logits: Tensor, likeliest: list[int], rule: str | None) -> None:
    samplings = {turn.slot.request.sampling for turn in turns}
    if not any(turn.proposal.tokens for turn in turns) and len(samplings) == 1:
        tokens = sample(logits, samplings.pop(), lambda row: turns[row].slot.uniform())
        for turn, token in zip(turns, tokens, strict=True):
            turn.token = token
        return
    laws = _laws(turns, logits)
    for turn in turns:
        if turn.slot.request.sampling.temperature == 0:
            turn.nodes, turn.token = _walk_best(turn.proposal, likeliest[turn.offset :])
        else:
            own = logits[turn.offset : turn.offset + turn.size]
            turn.nodes, turn.token = _verify(turn, own, laws.get(turn.row), rule)


def _laws(turns: list[Turn], logits: Tensor) -> dict[int, Tensor]:
    """Return row → the target's law [1 + nodes, vocab] at each place of a sampled proposal, one call a sampler."""
    together: dict[Sampling, list[Turn]] = {}
    for turn in turns:
        sampling = turn.slot.request.sampling
        if turn.proposal.probs is not None and sampling.temperature > 0:
            together.setdefault(sampling, []).append(turn)
    laws: dict[int, Tensor] = {}
    for sampling, own in together.items():
        places = [turn.offset + place for turn in own for place in range(turn.size)]
        whole = places == list(range(logits.shape[0]))
        found = probabilities(logits if whole else logits[places], sampling).cpu()
        begin = 0
        for turn in own:
            laws[turn.row] = found[begin : begin + turn.size]
            begin += turn.size
    return laws


def _verify(turn: Turn, logits: Tensor, laws: Tensor | None, rule: str | None) -> tuple[list[int], int]:
    """By the rule that fits a sampled request's proposal.

    Row node + 1 of logits [1 + nodes, vocab] is the node's, in `laws` too.
    """
    slot, proposal, sampling = turn.slot, turn.proposal, turn.slot.request.sampling
    if laws is None:
        return walk(proposal, lambda node: slot.pick(probabilities(logits[node + 1], sampling)))
    verify = rule_for(proposal, rule)
    if takes_at_once(verify, proposal, laws):
        return block_at_once(proposal, laws, slot.uniforms)
    return verify(proposal, lambda node: laws[node + 1], slot.uniform, slot.pick)


def _walk_best(proposal: Proposal, tokens: list[int]) -> tuple[list[int], int]:
    """Greedy acceptance; tokens[node + 1] is the target's after a node, tokens[0] its own after the anchor."""
    return walk(proposal, lambda node: tokens[node + 1])

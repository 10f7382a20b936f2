"""Lossless verification: which drafted tokens stand, and which token the target puts after them.

Every rule here leaves the target's law untouched; `tests/unit/test_verify.py` proves it by enumerating all draws on
a small vocabulary. A rule sees the target's probabilities through `law(node)`, [vocab] at a node of the proposal
(-1 is the anchor), and takes its randomness from `uniform()`, so the same code runs under enumeration.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from deepspec.drafters.base import Proposal

Law = Callable[[int], Tensor]
Uniform = Callable[[], float]
Pick = Callable[[Tensor], int]


def walk(proposal: Proposal, choose: Callable[[int], int]) -> tuple[list[int], int]:
    """Deterministic proposals (a chain or a tree that is a function of the context alone).

    The target's own token is drawn at the node by `choose(node)`; while a child carries it, walk there.
    Optimal for a given tree: E[accepted] is the sum of the target's path probabilities over its nodes.

    Returns:
        The accepted nodes in order, and the target's token after the last of them.
    """
    children = proposal.children()
    node, accepted = -1, []
    while True:
        token = choose(node)
        if (node, token) not in children:
            return accepted, token
        node = children[node, token]
        accepted.append(node)


def standard(proposal: Proposal, law: Law, uniform: Uniform, pick: Pick) -> tuple[list[int], int]:
    """Token-wise rejection of a sampled chain (Leviathan 2023, Chen 2023): accept x with min(1, p(x)/q(x))."""
    for k, token in enumerate(proposal.tokens):
        p, q = law(k - 1), proposal.law(k)
        if uniform() >= float(p[token]) / float(q[token]):
            return list(range(k)), pick((p - q).clamp_(min=0))
    last = len(proposal.tokens)
    return list(range(last)), pick(law(last - 1))


def block(proposal: Proposal, law: Law, uniform: Uniform, pick: Pick) -> tuple[list[int], int]:
    """Block verification of a sampled chain (arXiv 2403.10444): never worse than token-wise, optimal for one path.

    P_i is the chance that the first i tokens stand as a block; the longest i whose own uniform falls below h_i is
    accepted, then the next token comes from norm((P_i p_{i+1} − q_{i+1})₊), or from p after a whole block.
    """
    gamma = len(proposal.tokens)
    chance, best, rest = 1.0, 0, None
    for i in range(gamma + 1):
        p = law(i - 1)
        if i == gamma:
            h, residual = chance, p
        else:
            residual = (chance * p - proposal.law(i)).clamp_(min=0)
            mass = float(residual.sum())
            h = mass / (mass + 1 - chance) if mass + 1 - chance > 0 else 1.0
        if i == 0 or uniform() < h:
            best, rest = i, residual
        if i < gamma:
            token = proposal.tokens[i]
            chance = min(1.0, chance * float(p[token]) / float(proposal.law(i)[token]))
    if (
        float(rest.sum()) <= 0
    ):  # p equals q here and the block was certain to go on: only rounding comes this way
        rest = law(best - 1)
    return list(range(best)), pick(rest)


CHAIN_RULES = {"block": block, "standard": standard}

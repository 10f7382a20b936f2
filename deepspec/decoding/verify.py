"""Lossless verification: which drafted tokens stand, and which token the target puts after them.

Every rule here leaves the target's law untouched; `tests/unit/test_verify.py` proves it by enumerating all draws on
a small vocabulary. A rule sees the target's probabilities through `law(node)`, [vocab] at a node of the proposal
(-1 is the anchor), and takes its randomness from `uniform()` and `pick(weights)`, so the same code runs under
enumeration. It returns the accepted nodes in order, and the target's token after the last of them.

What is drafted below a sampled token may depend on it; whether that token is verified may not (non-anticipation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspec.decoding.shapes import Chain, Shape
from deepspec.decoding.tree import Proposal
from deepspec.errors import DeepSpecError, nearest
from deepspec.target.native import laws

Law = Callable[[int], Tensor]
Uniform = Callable[[], float]
Pick = Callable[[Tensor], int]
Rule = Callable[[Proposal, Law, Uniform, Pick], tuple[list[int], int]]


def walk(proposal: Proposal, choose: Callable[[int], int]) -> tuple[list[int], int]:
    """Deterministic proposals (a chain or a tree that is a function of the context alone).

    The target's own token is drawn at the node by `choose(node)`; while a child carries it, walk there.
    Optimal for a given tree: E[accepted] is the sum of the target's path probabilities over its nodes.
    """
    children = proposal.children()
    accepted: list[int] = []
    node = -1
    while True:
        token = choose(node)
        if (node, token) not in children:
            return accepted, token
        node = children[node, token]
        accepted.append(node)


def drawn_walk(proposal: Proposal, law: Law, uniform: Uniform, pick: Pick) -> tuple[list[int], int]:
    """`walk` where the target's tokens are drawn from its law."""
    return walk(proposal, lambda node: pick(law(node)))


def standard(proposal: Proposal, law: Law, uniform: Uniform, pick: Pick) -> tuple[list[int], int]:
    """Token-wise rejection of a sampled chain (Leviathan 2023, Chen 2023): accept x with min(1, p(x)/q(x))."""
    for k, token in enumerate(proposal.tokens):
        p = law(k - 1)
        if not uniform() < float(p[token]) / proposal.chance(k):  # a law that has no numbers accepts nothing
            return list(range(k)), pick(_rest(p, proposal, k))
    last = len(proposal.tokens)
    return list(range(last)), pick(law(last - 1))


def block(proposal: Proposal, law: Law, uniform: Uniform, pick: Pick) -> tuple[list[int], int]:
    """Block verification of a sampled chain (arXiv 2403.10444): never worse than token-wise, optimal for one path.

    P_i is the chance that the first i tokens stand as a block, and m_i the mass of (P_i p_{i+1} − q_{i+1})₊. The
    longest i whose own uniform falls below h_i = m_i / (m_i + 1 − P_i) is accepted, then the next token comes from that
    excess, normalised; a whole block stands with P_γ, and the next token comes from p.
    """
    gamma = len(proposal.tokens)
    chances = [1.0]
    for i, token in enumerate(proposal.tokens):
        # In this order what is no number stays none, and nothing is accepted by it.
        chances.append(min(chances[-1] * float(law(i - 1)[token]) / proposal.chance(i), 1.0))
    best = 0
    for i in range(1, gamma + 1):
        h = chances[i]
        if i < gamma:
            mass = _excess_mass(law(i - 1), proposal.row(i), proposal.columns, h)
            remaining = mass + 1 - h
            h = 1.0 if remaining <= 0 else mass / remaining
        if uniform() < h:
            best = i
    p = law(best - 1)
    return list(range(best)), pick(_rest(p, proposal, best, chances[best]) if best < gamma else p)


def block_at_once(proposal: Proposal, p: Tensor, uniforms: Callable[[int], Tensor]) -> tuple[list[int], int]:
    """`block` as one call, where the kernels take it: the same draws give the same tokens.

    Args:
        p: the target's laws, [1 + nodes, vocab].
        uniforms: n → the next n numbers of the request's own randomness, float64 [n].
    """
    assert proposal.probs is not None and proposal.places is not None
    count = len(proposal.tokens)
    rows = proposal.laws
    q = proposal.probs if rows is None or rows == list(range(count)) else proposal.probs[rows]
    drawn = proposal.tokens, proposal.places, uniforms(count + 1)
    accepted, token = laws.block(p, q, proposal.columns, *drawn)
    return list(range(accepted)), token


def takes_at_once(rule: Rule, proposal: Proposal, p: Tensor) -> bool:
    """Return whether `block_at_once` can stand for a rule."""
    q = proposal.probs
    return rule is block and q is not None and proposal.places is not None and _for_kernels(p, q)


def _for_kernels(p: Tensor, q: Tensor) -> bool:
    """Return whether the kernels take two laws together."""
    return p.dtype == q.dtype == torch.float32 and laws.can_read(p) and laws.can_read(q)


def _rest(p: Tensor, proposal: Proposal, node: int, scale: float = 1.0) -> Tensor:
    """Return (scale·p − q)₊ with q a node's law; p where nothing is above: they are equal, but for rounding."""
    q = proposal.row(node)
    if _for_kernels(p, q):
        rest, mass = laws.remainder(p, q, proposal.columns, scale)
    else:
        rest = (scale * p - proposal.law(node)).clamp_(min=0)
        mass = float(rest.sum())
    return rest if mass > 0 else p


def _excess_mass(p: Tensor, q: Tensor, columns: Tensor | None, scale: float) -> float:
    """Return Σ (scale·p − q)₊, q of these columns of p, or of all.

    Tokens that a draft cannot propose are not looked at one by one: theirs is what of p is not its columns'.
    """
    if _for_kernels(p, q):
        return laws.excess(p, q, columns, scale)
    own = p if columns is None else p[columns]
    mass = float((scale * own).sub_(q).clamp_(min=0).sum())
    return mass if columns is None else mass + scale * max(0.0, 1 - float(own.sum()))


def recursive(proposal: Proposal, law: Law, uniform: Uniform, pick: Pick) -> tuple[list[int], int]:
    """Recursive rejection over the siblings of a sampled tree (SpecInfer, arXiv 2305.09781; EAGLE, 2401.15077).

    A child x stands with min(1, p(x)/q(x)); where it falls, p ← norm((p − q)₊) and q loses x, as the next sibling
    was drawn without it. When all have fallen the token comes from what is left of p.
    """
    below = _below(proposal)
    accepted: list[int] = []
    node = -1
    while True:
        p, siblings = _unit(law(node)), below.get(node, [])
        q = _unit(proposal.law(siblings[0])) if siblings else p
        for child in siblings:
            token = proposal.tokens[child]
            if uniform() < float(p[token]) / float(q[token]):
                break
            p, _ = _excess(p, q)
            q = _without(q, token)
        else:
            return accepted, pick(p)
        node = child
        accepted.append(node)


def traversal(proposal: Proposal, law: Law, uniform: Uniform, pick: Pick) -> tuple[list[int], int]:
    """Traversal verification of a sampled tree (arXiv 2505.12398): leaves first, so that a path is judged as a whole.

    Walk down first children with r(v) = min(1, r(u)·p_u(v)/q_u(v)), r(anchor) = 1. A node with no child left stands
    with chance r, and the next token comes from its p. Where it falls, its parent u takes the loss: with
    S = Σ (r·p − q)₊, p ← norm((r·p − q)₊), q loses the token, r ← S/(S + 1 − r), and u's next child is tried.
    On a chain it accepts as block verification does.
    """
    below = _below(proposal)

    def visit(node: int, r: float) -> _Stop:
        p, children = _unit(law(node)), below.get(node, [])
        q = _unit(proposal.law(children[0])) if children else p
        return _Stop(node, r, p, q, iter(children))

    path = [visit(-1, 1.0)]
    while True:
        stop = path[-1]
        child = next(stop.untried, None)
        if child is not None:
            path.append(visit(child, stop.chance(proposal.tokens[child])))
        elif stop.node < 0 or uniform() < stop.r:
            return [passed.node for passed in path[1:]], pick(stop.p)
        else:
            path.pop()
            path[-1].lose(proposal.tokens[stop.node])


@dataclass
class _Stop:
    """A node on traversal's way: its chance r to stand, and what its fallen children have left of p and q."""

    node: int
    r: float
    p: Tensor
    q: Tensor  # of a leaf it is not read
    untried: Iterator[int]

    def chance(self, token: int) -> float:
        return min(1.0, self.r * float(self.p[token]) / float(self.q[token]))

    def lose(self, token: int) -> None:
        self.p, mass = _excess(self.p, self.q, self.r)
        left = mass + 1 - self.r
        self.r = mass / left if left > 0 else 1.0
        self.q = _without(self.q, token)


RULES: dict[str, Rule] = {
    "standard": standard,
    "block": block,
    "recursive": recursive,
    "traversal": traversal,
}
_CHAINS_ONLY = ("standard", "block")


def check_rule(verify: str | Rule | None, shape: Shape | None) -> None:
    """Refuse a rule that is unknown or can never fit what `shape` (None: a chain) proposes.

    Args:
        verify: a name of `RULES`, a rule of your own, or None for the best one.
    """
    if verify is None:
        return
    if isinstance(verify, str) and verify not in RULES:
        raise DeepSpecError(
            f"unknown verification rule {verify!r}{nearest(verify, RULES)}; known: {', '.join(RULES)}"
        )
    shape = shape or Chain()
    kind = type(shape).__name__
    if shape.draws is None:
        raise DeepSpecError(f"{kind} trees are not drawn: the walk verifies them; leave the rule out")
    if verify in _CHAINS_ONLY and shape.draws != "chain":
        raise DeepSpecError(
            f"rule {verify!r} verifies chains only; use recursive or traversal with {kind} trees"
        )


def rule_for(proposal: Proposal, verify: str | Rule | None) -> Rule:
    """Return the rule for a proposal: `verify` where it was drawn, the walk where it is deterministic.

    None takes the best for what was drawn: block verification of a chain, traversal of a tree.
    """
    if proposal.probs is None:
        return drawn_walk
    if verify is None:
        verify = "block" if proposal.is_chain else "traversal"
    if verify in _CHAINS_ONLY and not proposal.is_chain:
        raise DeepSpecError(f"rule {verify!r} verifies chains only, and a tree was drawn")
    return RULES[verify] if isinstance(verify, str) else verify


def _below(proposal: Proposal) -> dict[int, list[int]]:
    """Node → its children, in the order in which they were drawn; leaves are absent."""
    below: dict[int, list[int]] = {}
    for node, parent in enumerate(proposal.parents):
        below.setdefault(parent, []).append(node)
    return below


def _unit(law: Tensor) -> Tensor:
    """Return a law [vocab] in float64, scaled to sum to 1."""
    law = law.double()
    return law / law.sum()


def _excess(p: Tensor, q: Tensor, r: float = 1.0) -> tuple[Tensor, float]:
    """norm((r·p − q)₊) and the mass before it was normalised.

    Where there is no mass r is 0, so that this law is never drawn from, or p equals q, where only rounding comes.
    """
    excess = (r * p - q).clamp_(min=0)
    mass = float(excess.sum())
    return (excess / mass, mass) if mass > 0 else (p, 0.0)


def _without(q: Tensor, token: int) -> Tensor:
    """q once `token` is out of it."""
    q = q.clone()
    q[token] = 0
    return q / q.sum() if float(q.sum()) > 0 else q

"""Exact laws by enumeration: random tables over three tokens, and runs whose every decision is explored."""

from __future__ import annotations

import math

import torch

VOCAB = 3


class Tables:
    """Random conditional laws p(· | prefix) and q(· | prefix) in float64; sparse ones hold impossible tokens."""

    def __init__(self, seed: int, sparse: bool = False):
        self.rng = torch.Generator().manual_seed(seed)
        self.sparse = sparse
        self.known: dict[tuple, torch.Tensor] = {}

    def __call__(self, name: str, prefix: tuple[int, ...]) -> torch.Tensor:
        if (name, prefix) not in self.known:
            weights = torch.rand(VOCAB, generator=self.rng, dtype=torch.float64) ** 2 + 1e-3
            if self.sparse:
                weights[torch.randperm(VOCAB, generator=self.rng)[: len(prefix) % 2 + 1]] = 0
            self.known[name, prefix] = weights / weights.sum()
        return self.known[name, prefix]

    def target(self, sequence: tuple[int, ...], start: int = 0) -> float:
        """The target's probability of sequence[start:] after sequence[:start]."""
        return math.prod(float(self("p", sequence[:i])[sequence[i]]) for i in range(start, len(sequence)))


class Branching:
    """Replays scripted decisions and explores the rest: each run has a probability, and all runs sum to one."""

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.place, self.probability = 0, 1.0
        self.open: list[list[int]] = []

    def choose(self, weights: list[float]) -> int:
        if self.place == len(self.script):
            first, *others = (choice for choice, weight in enumerate(weights) if weight > 0)
            self.open += [[*self.script, other] for other in others]
            self.script.append(first)
        choice = self.script[self.place]
        self.place += 1
        self.probability *= weights[choice]
        return choice

    def pick(self, weights: torch.Tensor) -> int:
        weights = weights.double()
        return self.choose((weights / weights.sum()).tolist())

    def uniform(self) -> Coin:
        return Coin(self)


class Coin:
    """A uniform number of which only comparisons are asked: each is a branch with its exact probability."""

    def __init__(self, branching: Branching):
        self.branching = branching

    def __lt__(self, bound: float) -> bool:
        chance = min(max(float(bound), 0.0), 1.0)
        return self.branching.choose([chance, 1 - chance]) == 0

    def __ge__(self, bound: float) -> bool:
        return not self < bound


def enumerate_runs(run) -> list[tuple[float, object]]:
    """Every (probability, outcome) of a function of a `Branching`."""
    results, scripts = [], [[]]
    while scripts:
        branching = Branching(scripts.pop())
        outcome = run(branching)
        results.append((branching.probability, outcome))
        scripts += branching.open
    return results


def path_of(tree, node: int) -> tuple[int, ...]:
    """Tokens from the anchor down to `node` of a proposal or a growth."""
    path: list[int] = []
    while node >= 0:
        path.append(tree.tokens[node])
        node = tree.parents[node]
    return tuple(reversed(path))

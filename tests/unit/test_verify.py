"""The law of every verification rule, by enumerating all drafts and all decisions on a small vocabulary."""

from __future__ import annotations

import itertools

import pytest
import torch

from deepspec.decoding.verify import block, standard, walk
from deepspec.drafters.base import Proposal

VOCAB = 3


class Tables:
    """Random conditional laws p(· | prefix) and q(· | prefix) in float64."""

    def __init__(self, seed: int):
        self.rng = torch.Generator().manual_seed(seed)
        self.known: dict[tuple, torch.Tensor] = {}

    def __call__(self, name: str, prefix: tuple[int, ...]) -> torch.Tensor:
        if (name, prefix) not in self.known:
            weights = torch.rand(VOCAB, generator=self.rng, dtype=torch.float64) ** 2 + 1e-3
            self.known[name, prefix] = weights / weights.sum()
        return self.known[name, prefix]


class Branching:
    """Replays scripted decisions and explores the rest: each run has a probability, and all runs sum to one."""

    def __init__(self) -> None:
        self.script: list[int] = []
        self.place, self.probability = 0, 1.0
        self.open: list[tuple[list[int], int]] = []

    def choose(self, weights: list[float]) -> int:
        if self.place == len(self.script):
            self.script.append(0)
            self.open += [(self.script[:-1], i) for i in range(1, len(weights))]
        choice = self.script[self.place]
        self.place += 1
        self.probability *= weights[choice]
        return choice

    def pick(self, weights: torch.Tensor) -> int:
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


def enumerate_runs(run) -> list[tuple[float, tuple[int, ...]]]:
    """Every (probability, outcome) of a function of a `Branching`."""
    results, scripts = [], [[]]
    while scripts:
        branching = Branching()
        branching.script = scripts.pop()
        outcome = run(branching)
        results.append((branching.probability, outcome))
        scripts += [[*done, choice] for done, choice in branching.open]
    return results


def law_of(outcomes, tables: Tables, length: int) -> dict[tuple[int, ...], float]:
    """Probability of each sequence of `length` tokens: the committed ones, then the target's own."""
    law = dict.fromkeys(itertools.product(range(VOCAB), repeat=length), 0.0)
    for probability, committed in outcomes:
        for sequence in law:
            if sequence[: len(committed)] == committed[:length]:
                law[sequence] += probability * target_probability(tables, sequence, len(committed))
    return law


def target_probability(tables: Tables, sequence: tuple[int, ...], start: int = 0) -> float:
    result = 1.0
    for i in range(start, len(sequence)):
        result *= float(tables("p", sequence[:i])[sequence[i]])
    return result


def largest_error(outcomes, tables: Tables, length: int) -> float:
    law = law_of(outcomes, tables, length)
    return max(abs(found - target_probability(tables, sequence)) for sequence, found in law.items())


def chain_run(rule, tables: Tables, gamma: int):
    """Draw a chain from q, verify it, return the committed tokens."""

    def run(branching: Branching) -> tuple[int, ...]:
        tokens: list[int] = []
        for _ in range(gamma):
            tokens.append(branching.pick(tables("q", tuple(tokens))))
        laws = torch.stack([tables("q", tuple(tokens[:k])) for k in range(gamma)])
        proposal = Proposal.chain(tokens, probs=laws)
        accepted, last = rule(
            proposal,
            lambda node: tables("p", tuple(tokens[: node + 1])).clone(),
            branching.uniform,
            branching.pick,
        )
        return (*(tokens[node] for node in accepted), last)

    return run


def tree_run(proposal: Proposal, tables: Tables):
    def run(branching: Branching) -> tuple[int, ...]:
        def choose(node: int) -> int:
            path: list[int] = []
            while node >= 0:
                path.append(proposal.tokens[node])
                node = proposal.parents[node]
            return branching.pick(tables("p", tuple(reversed(path))))

        accepted, last = walk(proposal, choose)
        return (*(proposal.tokens[node] for node in accepted), last)

    return run


@pytest.mark.parametrize("gamma", [1, 2, 3])
@pytest.mark.parametrize("rule", [standard, block])
@pytest.mark.parametrize("seed", range(4))
def test_chain_rules_preserve_the_target_law(rule, gamma, seed):
    tables = Tables(seed)
    outcomes = enumerate_runs(chain_run(rule, tables, gamma))
    assert sum(probability for probability, _ in outcomes) == pytest.approx(1, abs=1e-12)
    assert largest_error(outcomes, tables, gamma + 1) < 1e-12


TREES = {
    "chain": Proposal.chain([0, 1, 2]),
    "wide": Proposal([0, 1, 2], [-1, -1, -1]),
    "static": Proposal([0, 2, 1, 0, 2], [-1, -1, 0, 0, 2]),
    "nothing": Proposal(),
}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("seed", range(3))
def test_the_walk_preserves_the_target_law_on_any_tree(name, seed):
    tables = Tables(seed)
    outcomes = enumerate_runs(tree_run(TREES[name], tables))
    assert largest_error(outcomes, tables, 4) < 1e-12


def test_block_verification_commits_at_least_as_much_as_the_standard_rule():
    gains = []
    for seed in range(20):
        tau = {}
        for rule in (standard, block):
            outcomes = enumerate_runs(chain_run(rule, Tables(seed), 3))
            tau[rule] = sum(probability * len(committed) for probability, committed in outcomes)
        gains.append(tau[block] - tau[standard])
    assert min(gains) > -1e-9
    assert max(gains) > 0.01


def test_the_enumeration_catches_a_broken_rule():
    """Resampling from p instead of the residual is the classical mistake."""

    def broken(proposal, law, uniform, pick):
        accepted, last = standard(proposal, law, uniform, lambda weights: -1)
        if len(accepted) < len(proposal.tokens):
            return accepted, pick(law(len(accepted) - 1))
        return accepted, pick(law(len(accepted) - 1)) if last == -1 else last

    tables = Tables(0)
    assert largest_error(enumerate_runs(chain_run(broken, tables, 2)), tables, 3) > 0.01


def test_draft_probabilities_over_a_part_of_the_vocabulary_are_scattered():
    proposal = Proposal.chain(
        [4], probs=torch.tensor([[0.25, 0.75]]), columns=torch.tensor([1, 4]), vocab_size=6
    )
    assert proposal.law(0).tolist() == [0, 0.25, 0, 0, 0.75, 0]

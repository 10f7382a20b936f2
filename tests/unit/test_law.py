"""The law of what the engine writes at temperature > 0, by chi-square on a tiny target.

`test_verify.py` proves the rules on tables; here they run in the engine, behind its sampler, masks and caches.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from deepspec.decoding import verify
from deepspec.decoding.drafter import Drafter, Session
from deepspec.decoding.engine import Engine
from deepspec.decoding.request import Request, Sampling
from deepspec.decoding.sampling import probabilities
from deepspec.decoding.shapes import BestFirst, Sampled
from deepspec.decoding.tree import Chain, DraftLogits, Vocabulary, grow
from deepspec.decoding.verify import standard
from deepspec.target.attention import ForwardPass
from deepspec.target.model import load_target
from tests.tiny import cached_target

DRAWS, LENGTH, BATCH = 4_000, 3, 64
CERTAIN = 1e-30  # the faults below come out under 1e-100; one of a quarter of their size is still caught
PROMPT = 77
SAMPLING = Sampling(temperature=1.0, top_k=3)


@pytest.fixture(scope="module")
def target():
    return load_target(cached_target(vocab=300, layers=2, hidden=32))


def next_laws(target, contexts: list[list[int]]) -> torch.Tensor:
    """The target's logits [contexts, vocab] after contexts of one length, by full forwards."""
    step = ForwardPass(torch.arange(len(contexts[0])).expand(len(contexts), -1))
    with torch.inference_mode():
        return target.logits(target.forward(torch.tensor(contexts), step)[:, -1])


@pytest.fixture(scope="module")
def expected(target) -> dict[tuple[int, ...], float]:
    """Sequence → probability under the request's sampler, of all that can come."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        laws = probabilities(next_laws(target, [[PROMPT, *path] for path in law]), SAMPLING)
        law = {
            (*path, token): chance * float(probs[token])
            for (path, chance), probs in zip(law.items(), laws, strict=True)
            for token in probs.nonzero()[:, 0].tolist()
        }
    assert len(law) == 3**LENGTH
    return law


class MarkovDrafter(Drafter):
    """Draws from a table of logits by the last token alone: the target's own after [prompt, token], disturbed."""

    block_size = LENGTH - 1

    def __init__(self, target):
        contexts = [[PROMPT, token] for token in range(target.vocab_size)]
        table = next_laws(target, contexts)
        noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(1))
        self.table = table + 0.5 * noise
        self.vocabulary = Vocabulary(target.vocab_size)

    def session(self, slots: int) -> Session:
        return MarkovSession(self)


class MarkovSession(Session):
    def __init__(self, drafter: MarkovDrafter):
        self.drafter = drafter

    def begin(self, row): ...

    def extend(self, row, tokens, features): ...

    def move(self, source, destination): ...

    def propose(self, asks):
        vocabulary, depth = self.drafter.vocabulary, self.drafter.block_size
        growths = [ask.shape.growth(vocabulary, ask.sampling, min(depth, ask.room), ask.rng) for ask in asks]

        def expand(parents):
            return DraftLogits(self.drafter.table[[parent.token for parent in parents]])

        return grow(growths, [ask.anchor for ask in asks], expand)


@pytest.fixture(scope="module")
def drafter(target):
    return MarkovDrafter(target)


def p_value(target, drafter, expected, shape, rule) -> float:
    """Of the chi-square between what the engine wrote in all draws and the target's law."""
    requests = iter(
        [
            Request([PROMPT], LENGTH, sampling=SAMPLING, seed=seed, stop_ids=frozenset())
            for seed in range(DRAWS)
        ]
    )
    engine = Engine(target, drafter, batch_size=BATCH, tree=shape, verify=rule)
    found: Counter[tuple[int, ...]] = Counter()
    accepted, drafted = 0, 0
    for run in engine.run(lambda: next(requests, None)):
        found[tuple(run.tokens)] += 1
        accepted += sum(run.stats.accepted)
        drafted += sum(run.stats.drafted)
    assert 0.3 * drafted < accepted < 0.9 * drafted  # both outcomes of a draft are looked at
    assert sum(found.values()) == DRAWS and set(found) <= set(expected)
    statistic = sum((found[path] - DRAWS * p) ** 2 / (DRAWS * p) for path, p in expected.items())
    halves = torch.tensor([len(expected) - 1, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(*halves))


CASES = {
    "standard": (Chain(), "standard"),
    "block": (Chain(), "block"),
    "recursive": (Sampled((2, 1)), "recursive"),
    "traversal": (Sampled((2, 1)), "traversal"),
    "walk": (BestFirst(2, None, 4), None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_engine_writes_the_targets_law(target, drafter, expected, name):
    assert p_value(target, drafter, expected, *CASES[name]) > 0.01


def resampling_from_p(proposal, law, uniform, pick):
    """`standard`, but for where the next token comes from after a rejection."""
    accepted, _ = standard(proposal, law, uniform, lambda weights: -1)
    return accepted, pick(law(len(accepted) - 1))


def test_the_same_test_catches_a_broken_chain_rule(target, drafter, expected):
    assert p_value(target, drafter, expected, Chain(), resampling_from_p) < CERTAIN


def test_the_same_test_catches_the_tree_rule_of_public_code(target, drafter, expected, monkeypatch):
    """Traversal with r(u) ← S."""
    lose = verify._Stop.lose

    def broken(self, token):
        mass = float((self.r * self.p - self.q).clamp(min=0).sum())
        lose(self, token)
        self.r = mass

    monkeypatch.setattr(verify._Stop, "lose", broken)
    assert p_value(target, drafter, expected, Sampled((2, 1)), "traversal") < CERTAIN

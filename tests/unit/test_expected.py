"""Expected rounds on a text: against all outcomes, and against the rounds that the engine takes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from deepspec.decoding.engine import Engine
from deepspec.decoding.request import Generation, Request, Sampling
from deepspec.decoding.tree import Chain
from deepspec.drafters.base import Drafter
from deepspec.drafters.checkpoint import load_drafter, stored_weights, write_drafter
from deepspec.evaluation.expected import Text, chances, rounds
from deepspec.target import Target, load_target
from tests.tiny import make_network, make_target

SIZES = {
    "dspark": {"layers": 1, "block_size": 3, "markov_rank": 4, "target_layer_ids": [0, 1]},
    "eagle3": {"block_size": 3, "draft_vocab_size": 480},
    "medusa": {"heads": 3, "layers": 1},
    "lm": {"block_size": 3, "from_layers": [0, 3]},
}
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15]]
LIMIT = 9


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Target:
    return load_target(make_target(tmp_path_factory.mktemp("target"), "llama"))


@pytest.fixture(scope="module", params=list(SIZES))
def drafter(request, target: Target, tmp_path_factory) -> Drafter:
    network = make_network(target, request.param, **SIZES[request.param])
    directory: Path = tmp_path_factory.mktemp("drafts") / request.param
    write_drafter(directory, network.description(), stored_weights(network), target, {})
    return load_drafter(directory, target)


def run(
    target: Target, drafter: Drafter | None, prompts: list[list[int]], sampling: Sampling, seed: int = 0
) -> list[Generation]:
    requests = iter(
        [Request(ids, LIMIT, sampling, seed + i, frozenset(), i) for i, ids in enumerate(prompts)]
    )
    engine = Engine(target, drafter, 16, Chain(), "standard")
    return sorted(engine.run(lambda: next(requests, None)), key=lambda done: done.id)


def by_enumeration(table: list[list[float]]) -> float:
    """Rounds of every outcome of every block, weighed by its chance."""

    def mean(s: int) -> float:
        if s >= len(table):
            return 0.0
        total = 1.0
        for outcome in itertools.product([True, False], repeat=len(table[s])):
            weight = 1.0
            for stands, chance in zip(outcome, table[s], strict=True):
                weight *= chance if stands else 1 - chance
            stood = next((k for k, stands in enumerate(outcome) if not stands), len(outcome))
            total += weight * mean(s + stood + 1)
        return total

    return mean(0)


@pytest.mark.parametrize("tokens", [1, 2, 3, 6])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_mean_over_all_outcomes_of_all_blocks(tokens, length):
    table = torch.rand(tokens, 3, generator=torch.Generator().manual_seed(tokens))
    cut = table[:, :length].tolist()
    assert rounds(table, length).total == pytest.approx(by_enumeration(cut), rel=1e-6)


def test_certain_blocks_and_hopeless_ones():
    assert rounds(torch.ones(8, 3), 3).total == 2
    assert rounds(torch.ones(9, 3), 3).total == 3
    assert rounds(torch.zeros(8, 3), 3).total == 8


def test_greedy_rounds_are_the_engines(target: Target, drafter: Drafter):
    runs = run(target, drafter, PROMPTS, Sampling())
    texts = [Text(done.prompt_ids, done.tokens) for done in runs]
    found = chances(target, drafter, texts, Sampling(), batch_size=2)
    for done, table in zip(runs, found, strict=True):
        assert set(table.flatten().tolist()) <= {0.0, 1.0}
        assert rounds(table, drafter.block_size).total == done.stats.rounds


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_p=0.9)])
def test_the_mean_over_texts_is_the_engines(target: Target, drafter: Drafter, sampling: Sampling):
    prompts = PROMPTS[:1] * 200
    drafted = [done.stats.rounds for done in run(target, drafter, prompts, sampling)]
    texts = [Text(done.prompt_ids, done.tokens) for done in run(target, None, prompts, sampling, seed=10_000)]
    found = chances(target, drafter, texts, sampling, batch_size=200)
    expected = [rounds(table, drafter.block_size).total for table in found]
    error = np.hypot(*(np.std(values) / len(values) ** 0.5 for values in (drafted, expected)))
    assert abs(np.mean(drafted) - np.mean(expected)) < 4 * error
    assert np.std(expected) < np.std(drafted)
    assert np.mean(expected) < LIMIT  # something stands

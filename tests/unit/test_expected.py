"""Expected rounds on a text: against all outcomes, against the laws the engine drafts by and the rounds it takes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import Engine, generate
from deepspec.decoding.request import Generation, Request, Sampling
from deepspec.decoding.sampling import probabilities
from deepspec.decoding.shapes import Chain
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.drafters.checkpoint import stored_weights, write_drafter
from deepspec.drafters.load import load_drafter
from deepspec.errors import DeepSpecError
from deepspec.target.attention import ForwardPass
from deepspec.target.model import Target, load_target
from paper.expectation import Text, chances, rounds
from tests.tiny import cached_target, make_network

BLOCK = {"layers": 1, "block_size": 3, "target_layer_ids": [0, 1]}
SIZES = {
    "dspark": {"markov_rank": 4, **BLOCK},
    "dspark-rnn": {"markov_rank": 4, "markov_head": "rnn", **BLOCK},
    "dflash": BLOCK,
    "eagle3": {"block_size": 3, "draft_vocab_size": 480},
    "medusa": {"heads": 3, "layers": 1},
    "lm": {"block_size": 3, "from_layers": [0, 3]},
}
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15]]
LIMIT = 9


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Target:
    return load_target(cached_target("llama"))


@pytest.fixture(scope="module")
def drafters(target: Target, tmp_path_factory) -> dict[str, Drafter]:
    found = {}
    for name, sizes in SIZES.items():
        network = make_network(target, name.split("-")[0], **sizes)
        directory = tmp_path_factory.mktemp("drafts") / name
        write_drafter(directory, network.description(), stored_weights(network), target, {})
        found[name] = load_drafter(directory, target)
    return found


def run(
    target: Target,
    drafter: Drafter | None,
    prompts: list[list[int]],
    sampling: Sampling,
    seed: int = 0,
    **extra,
) -> list[Generation]:
    requests = iter(
        [
            Request(ids, LIMIT, sampling=sampling, seed=seed + i, stop_ids=frozenset(), id=i)
            for i, ids in enumerate(prompts)
        ]
    )
    engine = Engine(target, drafter, batch_size=16, tree=Chain(), verify="standard", **extra)
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
    found = rounds(table, length)
    assert found.total == pytest.approx(by_enumeration(table[:, :length].tolist()), rel=1e-6)
    assert found.reached[0] >= found.stood[0] >= (found.reached[1] if length > 1 else 0)


def test_certain_blocks_and_hopeless_ones():
    assert rounds(torch.ones(8, 3), 3).total == 2
    assert rounds(torch.ones(9, 3), 3).total == 3
    assert rounds(torch.zeros(8, 3), 3).total == 8


@pytest.mark.parametrize("name", SIZES)
def test_a_chance_is_of_the_laws_that_the_engine_drafted_by(name: str, target: Target, drafters):
    """At every place that its blocks reached, of a text that it wrote with them."""
    drafter, sampling, rounds_seen = drafters[name], Sampling(1.0), []
    (done,) = run(target, drafter, PROMPTS[:1], sampling, seed=3, on_round=rounds_seen.append)
    proposals = [(seen.proposal, seen.accepted) for seen in rounds_seen if seen.proposal.tokens]
    others = [Text(PROMPTS[1], [20, 21]), Text(PROMPTS[2], [30])]
    (found, *_) = chances(target, drafter, [Text(done.prompt_ids, done.tokens), *others], sampling)
    ids = done.prompt_ids + done.tokens
    hidden = target.forward(torch.tensor([ids]), ForwardPass(torch.arange(len(ids))[None]))
    law = probabilities(target.logits(hidden)[0, len(done.prompt_ids) - 1 :], sampling)
    s = checked = 0
    for proposal, accepted in proposals:
        for k in range(min(accepted + 1, len(proposal.tokens))):
            token = done.tokens[s + k]
            chance = min(1.0, float(proposal.law(k)[token]) / float(law[s + k, token]))
            assert float(found[s, k]) == pytest.approx(chance, rel=1e-3, abs=1e-6), (s, k)
            checked += 1
        s += accepted + 1
    assert checked > len(proposals) > 1


def test_greedy_rounds_are_the_engines(target: Target, drafters):
    fewer = 0
    for name, drafter in drafters.items():
        prompts = PROMPTS + [[n, n + 1] for n in range(20, 28)]
        runs = run(target, drafter, prompts, Sampling())
        texts = [Text(done.prompt_ids, done.tokens) for done in runs]
        for done, table in zip(runs, chances(target, drafter, texts, Sampling(), batch_size=4), strict=True):
            assert rounds(table, drafter.block_size).total == done.stats.rounds, name
            fewer += done.stats.rounds < LIMIT
    assert fewer


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_p=0.9)])
def test_the_mean_over_texts_is_the_engines(target: Target, drafters, sampling: Sampling):
    drafter, prompts = drafters["lm"], PROMPTS[:1] * 300
    drafted = [done.stats.rounds for done in run(target, drafter, prompts, sampling)]
    plain = run(target, None, prompts, sampling, seed=10_000)
    texts = [Text(done.prompt_ids, done.tokens) for done in plain]
    found = chances(target, drafter, texts, sampling, batch_size=300)
    expected = [rounds(table, drafter.block_size).total for table in found]
    error = np.hypot(*(np.std(values) / len(values) ** 0.5 for values in (drafted, expected)))
    assert abs(np.mean(drafted) - np.mean(expected)) < 4 * error
    assert np.std(expected) < np.std(drafted)
    assert np.mean(expected) < LIMIT  # something stands


def test_after_a_prompt_of_one_token_the_first_block_is_empty(target: Target, drafters):
    (done,) = generate(target, None, [[7]], LIMIT)
    (table,) = chances(target, drafters["dspark"], [Text([7], done.tokens)], Sampling(1.0))
    assert not table[0].any() and table[1].any()


def test_what_is_looked_up_has_no_law(target: Target):
    with pytest.raises(DeepSpecError, match="LookupDrafter has no law"):
        chances(target, LookupDrafter(4, 1), [Text([5, 6], [7])], Sampling(1.0))

"""Targets whose layers keep a state: chains are lossless, trees are refused, and what it costs is counted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from benchmarks.tiny_families import tiny_model
from deepspec.decoding.drafter import Drafter, Proposal, Session
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Sampling
from deepspec.decoding.sampling import probabilities
from deepspec.decoding.shapes import BestFirst
from deepspec.drafters.algorithms.dspark import DSparkDrafter
from deepspec.errors import DeepSpecError
from deepspec.target.attention import ForwardPass
from deepspec.target.model import load_target
from tests.tiny import make_draft, make_tokenizer

FAMILIES = ["qwen3_next", "falcon_h1", "lfm2", "kimi_linear", "jamba"]


@pytest.fixture(scope="module", params=FAMILIES)
def hybrid(request, tmp_path_factory):
    return written(request.param, tmp_path_factory.mktemp(request.param))


def written(family: str, path):
    tiny_model(family).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return load_target(path)


class Guesser(Drafter):
    """Proposes the tokens of a known answer, of which some are spoiled."""

    block_size = 6

    def __init__(self, answers: dict[tuple[int, ...], list[int]], every: int):
        self.answers, self.every = answers, every

    def session(self, slots: int) -> Session:
        return _Guesses(self, slots)


class _Guesses(Session):
    def __init__(self, drafter: Guesser, slots: int):
        self.drafter, self.rows = drafter, [[] for _ in range(slots)]

    def begin(self, row: int) -> None:
        self.rows[row] = []

    def extend(self, row: int, tokens: list[int], features) -> None:
        self.rows[row] += tokens

    def move(self, source: int, destination: int) -> None:
        self.rows[destination] = self.rows[source]

    def propose(self, asks) -> list[Proposal]:
        return [Proposal.chain(self._guess([*self.rows[ask.row], ask.anchor])[: ask.room]) for ask in asks]

    def _guess(self, tokens: list[int]) -> list[int]:
        for prompt, answer in self.drafter.answers.items():
            if tuple(tokens[: len(prompt)]) == prompt:
                first = len(tokens) - len(prompt)
                coming = list(enumerate(answer))[first : first + 6]
                return [(token + 3) % 500 if i % self.drafter.every == 2 else token for i, token in coming]
        return []


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(100, 500, (5 + i % 40,), generator=generator).tolist() for i in range(count)]


@pytest.mark.parametrize("every", [3, 5, 1000])
def test_a_partly_wrong_chain_leaves_the_answer_as_it_is(hybrid, every):
    some = prompts(12)
    plain = generate(hybrid, None, some, 24, batch_size=5)
    answers = {tuple(p): g.tokens for p, g in zip(some, plain, strict=True)}
    drafted = generate(hybrid, Guesser(answers, every), some, 24, batch_size=5)
    assert [g.tokens for g in drafted] == [g.tokens for g in plain]
    assert sum(sum(g.stats.accepted) for g in drafted) > 12


def test_features_of_a_chain_are_those_of_one_pass(hybrid):
    ids = torch.tensor([prompts(40)[-1]])
    n = ids.shape[1]
    whole = ForwardPass(torch.arange(n)[None], wanted=[0, 1])
    expected = hybrid.forward(ids, whole)
    cache, owner = hybrid.cache(1, whole), whole
    for first, last in ((0, 17), (17, 18), (18, 23), (20, 30), (30, n)):  # the third part is rolled back
        places = torch.arange(first, last)[None]
        step = ForwardPass(places, cache=cache, starts=[first], counts=[last - first], wanted=[0, 1])
        hidden = hybrid.forward(ids[:, first:last], step)
        assert torch.allclose(hidden, expected[:, first:last], atol=1e-3)
        assert torch.allclose(step.features[1], owner.features[1][:, first:last], atol=1e-3)


def test_a_tree_is_refused_in_one_line(hybrid):
    drafter = Guesser({}, 3)
    with pytest.raises(DeepSpecError, match=r"verifies chains, not trees: layer \d keeps a \w+$"):
        generate(hybrid, drafter, prompts(1)[0], 4, tree=BestFirst(2, 3, 6))


def test_a_drawn_chain_keeps_the_law(tmp_path):
    target = written("qwen3_next", tmp_path / "target")
    drafter = DSparkDrafter(make_draft(target), target)
    prompt, sampling = prompts(3)[2], Sampling(1.0, top_k=4)
    count = 1200
    drawn = generate(target, drafter, [prompt] * count, 3, temperature=1.0, top_k=4, batch_size=64)
    assert sum(sum(g.stats.verified) for g in drawn) > count
    found = Counter(tuple(g.tokens[:2]) for g in drawn)
    law = {}
    first = _law(target, prompt, sampling)
    for token in first.nonzero()[:, 0].tolist():
        second = _law(target, [*prompt, token], sampling)
        law |= {
            (token, other): float(first[token] * second[other]) for other in second.nonzero()[:, 0].tolist()
        }
    assert set(found) <= set(law)
    likely = [pair for pair, p in law.items() if p * count >= 5]
    rest = count - sum(found[pair] for pair in likely)
    observed = [*(found[pair] for pair in likely), rest]
    expected = [*(law[pair] * count for pair in likely), count * (1 - sum(law[pair] for pair in likely))]
    if expected[-1] < 1:
        observed, expected = (
            observed[:-1],
            [e * sum(observed[:-1]) / sum(expected[:-1]) for e in expected[:-1]],
        )
    assert chisquare(observed, expected).pvalue > 1e-3


def _law(target, ids: list[int], sampling: Sampling) -> torch.Tensor:
    hidden = target.forward(torch.tensor([ids]), ForwardPass(torch.arange(len(ids))[None]))
    return probabilities(target.logits(hidden[0, -1]), sampling)

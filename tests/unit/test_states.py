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
from deepspec.decoding.tree import DraftLogits, Vocabulary, grow
from deepspec.decoding.verify import standard
from deepspec.errors import DeepSpecError
from deepspec.target.attention import ForwardPass
from deepspec.target.model import load_target
from tests.tiny import make_tokenizer

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


class Near(Drafter):
    """Draws from the target's own laws after a prompt and one more token, disturbed."""

    block_size = 2

    def __init__(self, target, prompt: list[int], tokens: list[int]):
        noise = torch.Generator().manual_seed(1)
        self.laws = {
            token: logits + 0.5 * torch.randn(logits.shape, generator=noise)
            for token in tokens
            for logits in [_logits(target, [*prompt, token])]
        }
        self.other = torch.zeros(target.vocab_size)
        self.vocabulary = Vocabulary(target.vocab_size)

    def session(self, slots: int) -> Session:
        return _Near(self)


class _Near(Session):
    def __init__(self, drafter: Near):
        self.drafter = drafter

    def begin(self, row: int) -> None: ...

    def extend(self, row: int, tokens: list[int], features) -> None: ...

    def move(self, source: int, destination: int) -> None: ...

    def propose(self, asks) -> list[Proposal]:
        near = self.drafter
        growths = [ask.shape.growth(near.vocabulary, ask.sampling, min(2, ask.room), ask.rng) for ask in asks]

        def expand(parents) -> DraftLogits:
            return DraftLogits(torch.stack([near.laws.get(parent.token, near.other) for parent in parents]))

        return grow(growths, [ask.anchor for ask in asks], expand)


def p_value(target, rule=None, count: int = 200) -> float:
    """Of the chi-square between the first two tokens that are written and the target's law of them."""
    prompt, sampling = prompts(3)[2], Sampling(1.0, top_k=3)
    first = probabilities(_logits(target, prompt), sampling)
    likely = first.nonzero()[:, 0].tolist()
    law = {
        (one, other): float(first[one] * second[other])
        for one in likely
        for second in [probabilities(_logits(target, [*prompt, one]), sampling)]
        for other in second.nonzero()[:, 0].tolist()
    }
    drafter = Near(target, prompt, likely)
    drawn = generate(
        target, drafter, [prompt] * count, 3, temperature=1.0, top_k=3, batch_size=64, verify=rule
    )
    accepted, verified = (
        sum(sum(getattr(g.stats, name)) for g in drawn) for name in ("accepted", "verified")
    )
    assert 0.3 * verified < accepted < 0.9 * verified and verified > count  # both outcomes are looked at
    found = Counter(tuple(g.tokens[:2]) for g in drawn)
    assert set(found) <= set(law) and len(law) == 9
    scale = count / sum(law.values())  # they are sums in float32
    return chisquare([found[pair] for pair in law], [p * scale for p in law.values()]).pvalue


def resampling_from_p(proposal, law, uniform, pick):
    """`standard`, but for where the next token comes from after a rejection."""
    accepted, _ = standard(proposal, law, uniform, lambda weights: -1)
    return accepted, pick(law(len(accepted) - 1))


def test_a_drawn_chain_keeps_the_law_and_the_same_test_catches_a_broken_rule(tmp_path):
    target = written("qwen3_next", tmp_path / "target")
    assert p_value(target) > 1e-3
    assert p_value(target, resampling_from_p) < 1e-6


def _logits(target, ids: list[int]) -> torch.Tensor:
    hidden = target.forward(torch.tensor([ids]), ForwardPass(torch.arange(len(ids))[None]))
    return target.logits(hidden[0, -1])

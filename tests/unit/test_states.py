"""Targets whose layers keep a state: chains are lossless, trees are refused, and what it costs is counted."""

from __future__ import annotations

import pytest
import torch

from benchmarks.tiny_families import tiny_model
from deepspec.decoding import pass_times
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Sampling
from deepspec.decoding.shapes import BestFirst
from deepspec.errors import DeepSpecError
from deepspec.evaluation.contest import DecodingConfig
from deepspec.evaluation.trace import trace
from deepspec.target import states
from deepspec.target.attention import ForwardPass
from deepspec.target.model import load_target
from tests.drafting import Guesser
from tests.laws import Case, MarkovDrafter, exact_law, p_value
from tests.tiny import make_tokenizer

FAMILIES = ["qwen3_next", "falcon_h1", "lfm2", "kimi_linear", "jamba"]
CASE = Case(prompt=(286, 348, 237, 167, 460), length=3, sampling=Sampling(1.0, top_k=2), draws=240)


def written(family: str, path):
    tiny_model(family).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return load_target(path)


@pytest.fixture(scope="module", params=FAMILIES)
def hybrid(request, tmp_path_factory):
    return written(request.param, tmp_path_factory.mktemp(request.param))


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(100, 500, (5 + i % 40,), generator=generator).tolist() for i in range(count)]


def test_a_partly_wrong_chain_leaves_the_answer_as_it_is(hybrid):
    """Of two prompts each, a third, a fifth and none of the guesses are wrong; rows move as requests end."""
    some = prompts(6)
    plain = [g.tokens for g in generate(hybrid, None, some, 24, batch_size=4)]
    spoiled = [3, 5, 1000]
    known = {
        tuple(p): (answer, spoiled[i % 3]) for i, (p, answer) in enumerate(zip(some, plain, strict=True))
    }
    drafted = generate(hybrid, Guesser(known), some, 24, batch_size=4)
    assert [g.tokens for g in drafted] == plain
    assert sum(sum(g.stats.accepted) for g in drafted) > 30


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
    with pytest.raises(DeepSpecError, match=r"verifies chains, not trees: layer \d keeps a \w+$"):
        generate(hybrid, Guesser({}), prompts(1)[0], 4, tree=BestFirst(2, 3, 6))


def test_a_chain_is_shown_token_by_token(hybrid):
    """As an evaluation shows a few generations."""
    (prompt,) = prompts(1)
    drafter = MarkovDrafter(hybrid, CASE)
    shown = trace(hybrid, DecodingConfig("draft", drafter), prompt, 1.0, 6, seed=0)
    assert len(shown["tokens"]) == 6 and {token["origin"] for token in shown["tokens"]} <= {"draft", "target"}


@pytest.fixture(scope="module")
def delta_net(tmp_path_factory):
    """A gated delta net with its drafter and its law."""
    target = written("olmo_hybrid", tmp_path_factory.mktemp("olmo_hybrid"))
    return target, MarkovDrafter(target, CASE), exact_law(target, CASE), CASE


def test_a_drawn_chain_keeps_the_law(delta_net):
    assert p_value(*delta_net) > 0.01


def test_the_same_test_catches_a_state_that_rejected_tokens_have_changed(delta_net, monkeypatch):
    monkeypatch.setattr(states, "snapshot", lambda cache: cache)
    assert p_value(*delta_net) < 1e-6


def test_tokens_that_run_again_and_passes_are_counted(delta_net):
    target, prompt = delta_net[0], prompts(9)[8]
    (plain,) = generate(target, None, [prompt], 40)
    known = {tuple(prompt): (plain.tokens, 4)}
    stats = generate(target, Guesser(known), [prompt], 40)[0].stats
    start = boundary = len(prompt) - 1
    fed, passes = [], []
    for accepted, verified in zip(stats.accepted, stats.verified, strict=True):
        fed.append(start - boundary)
        passes.append(1 + (start - boundary > states.MOST_AGAIN))
        boundary = start if passes[-1] == 2 else boundary
        start += 1 + accepted
        boundary = start if accepted == verified else boundary
    assert (stats.fed, stats.passes) == (fed, passes)
    assert sum(fed) > 0 and (set(plain.stats.fed), set(plain.stats.passes)) == ({0}, {1})


def test_a_cost_curve_has_the_tokens_that_run_again(delta_net, monkeypatch):
    target, seen = delta_net[0], []
    forward = target.forward

    def watched(ids, step):
        hidden = forward(ids, step)
        seen.append((step.counts[0], step.fed.get(0)))
        return hidden

    monkeypatch.setattr(target, "forward", watched)
    passes = pass_times.measure_passes(target, (1,), (1, 4), context=9)
    assert [tokens for tokens, _ in passes[1]] == [1, 4]
    assert set(seen[1:]) == {(1, 0), (pass_times.FED + 2, 0), (4, pass_times.FED)}

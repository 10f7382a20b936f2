"""A draft that learns while it decodes: no token changes, nor the law of any; nothing of it outlives an answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deepspec.decoding.drafter import DraftRequest
from deepspec.decoding.engine import Engine, generate
from deepspec.decoding.request import Request, Sampling
from deepspec.decoding.shapes import BestFirst, Chain, Sampled
from deepspec.drafters.algorithms.suffix import SuffixDrafter
from deepspec.drafters.checkpoint import draft_digest, write_drafter
from deepspec.drafters.load import load_drafter
from deepspec.drafters.lookup_first import LookupFirst
from deepspec.errors import DeepSpecError
from deepspec.features.local import OnlineFeatures
from deepspec.features.sequences import Sequence
from deepspec.target.model import load_target
from deepspec.training.adapt import Adaptation, AdaptingSession, Learner, load_adapting
from deepspec.training.batches import Batch, Batches
from tests.drafting import make, write
from tests.laws import Case, exact_law, p_value, taught
from tests.tiny import cached_target

PROMPT = [5, 9, 14, 3, 77, 20]
FAST = Adaptation(every=4, blocks=8, context=32, lr=1e-2)


@pytest.fixture(scope="module")
def llama():
    return load_target(cached_target("llama"))


@pytest.fixture(scope="module")
def drafts(llama, tmp_path_factory):
    """Name → the directory of an untrained draft, written when it is asked for."""
    root = tmp_path_factory.mktemp("drafts")

    def of(name: str):
        return root / name if (root / name).exists() else write(make(name, llama), llama, root / name)

    return of


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """How many blocks each step learns from."""
    taken: list[int] = []
    real = Learner.step
    monkeypatch.setattr(
        Learner, "step", lambda self, batch: taken.append(batch.anchors.shape[1]) or real(self, batch)
    )
    return taken


@pytest.mark.parametrize("shape", [Chain(), BestFirst(3, None, 8)], ids=["chain", "tree"])
@pytest.mark.parametrize("name", ["dspark", "dflash2", "eagle3", "peagle-1", "mtp", "medusa"])
def test_learning_changes_no_token(name, shape, llama, drafts, steps):
    directory = drafts(name)
    before = draft_digest(directory)
    (plain,) = generate(llama, None, PROMPT, 48)
    (adapted,) = generate(llama, load_adapting(directory, llama, FAST), PROMPT, 48, tree=shape)
    assert adapted.tokens == plain.tokens
    assert len(steps) > 3 and max(steps) == FAST.blocks
    assert draft_digest(directory) == before


@pytest.fixture(scope="module")
def last(llama, drafts) -> tuple[AdaptingSession, Batch]:
    """A session at the end of an answer, and the blocks of its last step."""
    kept: list[tuple[AdaptingSession, Batch]] = []
    real = AdaptingSession._batch

    def batch(self, states):
        kept.append((self, real(self, states)))
        return kept[-1][1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AdaptingSession, "_batch", batch)
        generate(llama, load_adapting(drafts("dspark"), llama, FAST), PROMPT, 48)
    return kept[-1]


def test_a_step_teaches_what_the_target_said(last):
    session, batch = last
    learner = Learner(session.drafter)

    def right() -> float:
        with torch.no_grad():
            return float(learner.objective.acceptance(batch).mean())

    before = right()
    for _ in range(30):
        learner.step(batch)
    assert right() > 1.1 * before


def test_it_drafts_by_what_it_has_learnt(last, llama, drafts, tmp_path):
    """Its law is that of the learnt weights, written down and loaded."""
    session, _ = last
    learnt = load_drafter(write(session.learner.network, llama, tmp_path / "learnt"), llama)

    def law(drafter) -> torch.Tensor:
        own = drafter.session(1)
        own.begin(0)
        rng = torch.Generator().manual_seed(0)
        own.extend(0, PROMPT, torch.randn(len(PROMPT), 2 * 64, generator=rng))
        (proposal,) = own.propose([DraftRequest(0, 7, Sampling(1.0), rng, 9, Chain())])
        return torch.stack([proposal.law(k) for k in range(3)])

    torch.testing.assert_close(law(session.inner.drafter), law(learnt), atol=1e-5, rtol=1e-4)
    assert (law(learnt) - law(load_drafter(drafts("dspark"), llama))).abs().max() > 0.01


def test_the_steps_are_those_of_training(llama, drafts, steps):
    """A block's target law and features are those of a pass over the whole text."""
    seen = []
    real = AdaptingSession._batch

    def batch(self, states):
        seen.append((list(self.tokens), real(self, states)))
        return seen[-1][1]

    drafter = load_adapting(drafts("eagle3"), llama, replace(FAST, context=200))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AdaptingSession, "_batch", batch)
        (out,) = generate(llama, drafter, PROMPT, 40)
    tokens, found = seen[-1]
    assert tokens == [*PROMPT, *out.tokens][: len(tokens)] and len(tokens) > 30
    row = Sequence(tokens, [1] * len(tokens), [1] * len(tokens))
    features = OnlineFeatures(llama, [row], drafter.draft.layers)
    expected = Batches(features, [0], 1, 1, drafter.block_size, 0).at([0], found.anchors)
    for name in ("features", "tokens", "hidden", "places", "labels", "valid"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs.to(ours.dtype), atol=0.05, rtol=0.02)  # theirs: bfloat16
    first = int(found.anchors[0, 0])
    torch.testing.assert_close(found.log_norm[:, first:], expected.log_norm[:, first:], atol=1e-3, rtol=1e-3)


CASE = Case(prompt=(77, 5, 9, 140, 3, 20, 8), length=4, sampling=Sampling(1.0, top_k=3), draws=800)
SHORT = replace(CASE, length=3, draws=400)
EAGER = Adaptation(every=1, blocks=4, context=16, lr=3e-3)


@pytest.fixture(scope="module")
def deeper():
    return load_target(cached_target(vocab=300, layers=3, hidden=32))


@pytest.fixture
def learnt(deeper, tmp_path):
    """A taught draft that goes on learning."""

    def of(name: str, case: Case):
        taught(name, deeper, case, tmp_path / "draft")
        return load_adapting(tmp_path / "draft", deeper, EAGER)

    return of


@pytest.mark.parametrize(
    ("name", "shape", "rule"),
    [("dspark", Chain(), "block"), ("eagle3", Sampled((2, 1)), "traversal")],
    ids=["chain", "tree"],
)
def test_the_law_is_the_targets_while_the_draft_learns(name, shape, rule, deeper, learnt, steps):
    drafter = learnt(name, CASE)
    assert p_value(deeper, drafter, exact_law(deeper, CASE), CASE, shape, rule, batch=1) > 0.01
    assert len(steps) > CASE.draws


def test_the_same_test_catches_a_law_that_was_not_drawn_from(deeper, learnt, monkeypatch):
    """That of the weights after the step, reported for tokens that were drawn before it."""

    def propose(self, asks):
        drawn = self.inner.propose(asks)
        with torch.inference_mode(False):
            self._learn()
        rng = torch.Generator().manual_seed(0)
        again = self.inner.propose([replace(ask, rng=rng) for ask in asks])
        return [
            replace(old, probs=torch.cat((new.probs[:1].clamp(min=1e-3), old.probs[1:])))
            if old.tokens
            else old
            for old, new in zip(drawn, again, strict=True)
        ]

    monkeypatch.setattr(AdaptingSession, "propose", propose)
    drafter = learnt("dspark", SHORT)
    drafter.how = replace(EAGER, lr=0.1)
    assert p_value(deeper, drafter, exact_law(deeper, SHORT), SHORT, Chain(), "standard", batch=1) < 1e-6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_before_the_first_step_it_is_the_draft_itself(temperature, llama, drafts):
    late = load_adapting(drafts("dspark"), llama, Adaptation(every=1000))
    for drafter in (late, LookupFirst(SuffixDrafter(4, 2), late)):
        alone = load_drafter(drafts("dspark"), llama)
        alone = LookupFirst(SuffixDrafter(4, 2), alone) if drafter is not late else alone
        (one,), (other,) = (
            generate(llama, each, PROMPT, 60, temperature=temperature, seed=3) for each in (alone, drafter)
        )
        assert one.tokens == other.tokens and one.stats.accepted == other.stats.accepted


def test_an_answer_begins_with_the_draft_of_the_disk(llama, drafts, steps):
    """Whatever was answered before; so a seed gives the same tokens."""
    engine = Engine(llama, load_adapting(drafts("dspark"), llama, FAST))
    asked = [PROMPT, [100, 101, 102], PROMPT]
    requests = iter([Request(ids, 40, sampling=Sampling(1.0), seed=1, stop_ids=frozenset()) for ids in asked])
    first, _, last = engine.run(lambda: next(requests, None))
    assert first.tokens == last.tokens and first.stats.accepted == last.stats.accepted
    assert len(steps) > 20


def test_a_gradient_that_is_not_finite_teaches_nothing(llama, drafts, monkeypatch):
    drafter = load_adapting(drafts("medusa"), llama, FAST)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.nan))
    plain, adapted = (generate(llama, each, PROMPT, 40)[0] for each in (drafter.draft, drafter))
    assert adapted.stats.accepted == plain.stats.accepted


def test_it_takes_one_request_at_a_time(llama, drafts):
    drafter = load_adapting(drafts("dspark"), llama)
    with pytest.raises(DeepSpecError, match="one request at a time, not 2") as caught:
        generate(llama, drafter, [PROMPT, PROMPT], 8)
    assert "\n" not in str(caught.value)


def test_what_has_no_network_on_the_targets_states_is_refused(llama, drafts, tmp_path):
    with pytest.raises(DeepSpecError, match="a lm does not learn while it decodes"):
        load_adapting(drafts("lm"), llama)
    write_drafter(tmp_path / "suffix", SuffixDrafter(4, 2).config, {}, llama, {})
    with pytest.raises(DeepSpecError, match="a suffix does not learn while it decodes"):
        load_adapting(tmp_path / "suffix", llama)

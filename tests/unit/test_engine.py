"""The engine against a plain full forward, alone and in ragged batches, with chains and trees."""

from __future__ import annotations

import pytest
import torch

from deepspec.decoding.drafter import Drafter, Session
from deepspec.decoding.engine import Engine, generate, stream
from deepspec.decoding.request import Request
from deepspec.decoding.round import RoundClock
from deepspec.decoding.scheduler import Controller
from deepspec.decoding.shapes import BestFirst
from deepspec.decoding.tree import Proposal
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.drafters.lookup_first import LookupFirst
from deepspec.errors import DeepSpecError
from deepspec.target.attention import ForwardPass, KVCache
from deepspec.target.model import load_target
from tests.tiny import FAMILIES, cached_target

PROMPTS = [[5, 9, 14, 3, 77, 20], [100, 101, 102], [7] * 70, [33, 2, 33, 2, 33, 2, 33]]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def target(request):
    return load_target(cached_target(request.param))


@pytest.fixture(scope="module")
def llama():
    return load_target(cached_target("llama"))


def greedy(target, prompt: list[int], count: int) -> list[int]:
    """Plain greedy decoding by a full forward for every token."""
    tokens = list(prompt)
    for _ in range(count):
        step = ForwardPass(torch.arange(len(tokens))[None])
        logits = target.logits(target.forward(torch.tensor([tokens]), step))
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in target.stop_ids:
            break
    return tokens[len(prompt) :]


class Oracle(Drafter):
    """Knows the continuation and hides it in a tree among wrong branches: every shape of acceptance comes up."""

    block_size = 6

    def __init__(self, answers: dict[int, list[int]], right: int):
        self.answers, self.right = answers, right

    def session(self, slots):
        return OracleSession(self, slots)


class OracleSession(Session):
    def __init__(self, oracle, slots):
        self.oracle, self.known = oracle, [[] for _ in range(slots)]

    def begin(self, row):
        self.known[row] = []

    def extend(self, row, tokens, features):
        self.known[row] = self.known[row] + tokens

    def move(self, source, destination):
        self.known[destination] = self.known[source]

    def propose(self, asks):
        return [self._propose([*self.known[ask.row], ask.anchor], ask.room) for ask in asks]

    def _propose(self, known, room):
        answer = next(a for a in self.oracle.answers.values() if a[: len(known)] == known)
        following = answer[len(known) : len(known) + min(self.oracle.right, room)]
        tokens, parents, spine = [], [], -1
        for token in following:
            tokens += [(token + 1) % 500, token]  # a wrong sibling before the right node
            parents += [spine, spine]
            spine = len(tokens) - 1
        return Proposal(tokens, parents)


def test_plain_decoding_is_the_full_forward(target):
    for prompt, run in zip(PROMPTS, generate(target, None, PROMPTS, 24), strict=True):
        assert run.tokens == greedy(target, prompt, 24)
        assert run.stats.tau == 1


@pytest.mark.parametrize("right", [0, 1, 3])
@pytest.mark.parametrize("together", [True, False])
def test_trees_change_no_token(target, right, together):
    plain = generate(target, None, PROMPTS, 24)
    drafter = Oracle({i: p + g.tokens for i, (p, g) in enumerate(zip(PROMPTS, plain, strict=True))}, right)
    runs = (
        generate(target, drafter, PROMPTS, 24)
        if together
        else [generate(target, drafter, p, 24)[0] for p in PROMPTS]
    )
    for mine, theirs in zip(runs, plain, strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.stats.committed == len(mine.tokens)
        assert mine.stats.tau > (1.5 if right == 3 else 0)


def test_lookup_changes_no_token_and_pays_on_repetition(llama):
    plain = generate(llama, None, PROMPTS, 40)
    drafted = generate(llama, LookupDrafter(5, 2), PROMPTS, 40)
    assert [run.tokens for run in drafted] == [run.tokens for run in plain]


def test_refill_gives_each_request_its_own_answer(llama):
    requests = [Request(p, 3 + 5 * i, seed=i, stop_ids=frozenset(), id=i) for i, p in enumerate(PROMPTS * 3)]
    queue = iter(requests)
    done = {run.id: run for run in stream(llama, None, lambda: next(queue, None), batch_size=3)}
    assert len(done) == len(requests)
    for request in requests:
        alone = generate(llama, None, request.prompt_ids, request.max_new_tokens)[0].tokens
        assert done[request.id].tokens[: len(alone)] == alone
        assert len(done[request.id].tokens) == request.max_new_tokens


def test_a_follow_up_enqueued_while_others_run_is_served(llama):
    waiting = [Request(PROMPTS[0], 4, id="first")]
    seen = []
    for run in stream(llama, None, lambda: waiting.pop() if waiting else None, batch_size=2):
        seen.append(run.id)
        if run.id == "first":
            waiting.append(Request(run.prompt_ids + run.tokens, 4, id="second"))
    assert seen == ["first", "second"]


def test_sampling_does_not_depend_on_the_company_in_a_batch(llama):
    alone = [
        generate(llama, None, p, 16, temperature=1.0, seed=4 + i)[0].tokens for i, p in enumerate(PROMPTS)
    ]
    together = [run.tokens for run in generate(llama, None, PROMPTS, 16, temperature=1.0, seed=4)]
    assert alone == together


def test_one_bad_request_leaves_the_others_alone(llama):
    queue = iter([Request([], id="empty"), Request(PROMPTS[1], 4, id="good"), Request([10**6], id="outside")])
    done = {run.id: run for run in stream(llama, None, lambda: next(queue, None), batch_size=2)}
    assert done["empty"].error == "the prompt is empty"
    assert "vocabulary" in done["outside"].error
    assert done["good"].finish_reason in ("length", "stop")


def test_bad_arguments_are_named(llama):
    with pytest.raises(DeepSpecError, match="prompt is empty"):
        generate(llama, None, [])
    with pytest.raises(DeepSpecError, match="temperature"):
        generate(llama, None, [1], temperature=-1)
    with pytest.raises(DeepSpecError, match="5000 tokens"):
        generate(llama, None, [1] * 5000)
    with pytest.raises(DeepSpecError, match="verification rule"):
        generate(llama, None, [1], verify="guess")
    with pytest.raises(DeepSpecError, match="batch_size"):
        Engine(llama, batch_size=0)
    with pytest.raises(DeepSpecError, match="too large; a pass takes 256"):
        generate(llama, LookupDrafter(4, 1), [1], tree=BestFirst(width=8, depth=6, nodes=300))


def test_a_drafter_of_another_vocabulary_is_refused(llama):
    drafter = LookupDrafter(4, 1)
    drafter.vocab_size = 300
    with pytest.raises(DeepSpecError, match="vocabulary has 300 tokens, the target's 512"):
        generate(llama, drafter, [1])


def test_a_cache_limit_bounds_the_prompt_and_the_answer(llama):
    queue = iter([Request([3] * 40, id="long"), Request([3] * 20, 50, stop_ids=frozenset(), id="fits")])
    runs = Engine(llama, batch_size=2, max_length=32).run(lambda: next(queue, None))
    done = {run.id: run for run in runs}
    assert done["long"].error == "the prompt has 40 tokens; the cache takes 32, an answer included"
    assert len(done["fits"].tokens) == 12 and done["fits"].finish_reason == "length"


def test_a_bad_prompt_in_a_batch_leaves_the_others_alone(llama):
    good, bad, other = generate(llama, None, [PROMPTS[0], [], PROMPTS[1]], 6)
    assert bad.error == "the prompt is empty" and bad.finish_reason == "error"
    assert good.tokens == generate(llama, None, PROMPTS[0], 6)[0].tokens
    assert other.tokens == generate(llama, None, PROMPTS[1], 6)[0].tokens


def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(llama):
    whole = generate(llama, None, PROMPTS[0], 24)[0].tokens
    text = llama.tokenizer.decode(whole[:9])
    stop = text[-3:]
    drafter = Oracle({0: PROMPTS[0] + whole}, 5)
    for run in (
        generate(llama, None, PROMPTS[0], 24, stop=stop)[0],
        generate(llama, drafter, PROMPTS[0], 24, stop=(stop, "never there"))[0],
    ):
        assert run.finish_reason == "stop"
        assert run.tokens == whole[: len(run.tokens)]
        assert stop in llama.tokenizer.decode(run.tokens)
        assert stop not in llama.tokenizer.decode(run.tokens[:-1])


def test_logits_that_are_not_finite_stop_the_request(llama, monkeypatch):
    monkeypatch.setattr(llama, "logits", lambda hidden: torch.full((len(hidden), 512), float("nan")))
    for temperature in (0.0, 1.0):
        with pytest.raises(DeepSpecError, match="not finite"):
            generate(llama, None, [1, 2, 3], 4, temperature=temperature)


def test_streamed_tokens_are_the_result(llama):
    seen = []
    (run,) = generate(llama, LookupDrafter(4, 1), PROMPTS[3], 20, on_tokens=lambda t, n: seen.append((t, n)))
    assert [token for tokens, _ in seen for token in tokens] == run.tokens
    assert all(0 <= accepted <= len(tokens) for tokens, accepted in seen)


def test_a_stop_token_inside_an_accepted_draft_ends_the_answer(llama):
    answer = generate(llama, None, PROMPTS[0], 12)[0].tokens
    drafter = Oracle({0: PROMPTS[0] + answer}, 6)
    stop = answer[3]
    request = Request(PROMPTS[0], 12, stop_ids=frozenset({stop}))
    queue = iter([request])
    (run,) = Engine(llama, drafter).run(lambda: next(queue, None))
    assert run.tokens == answer[: answer.index(stop) + 1]
    assert run.finish_reason == "stop"


def test_features_are_the_layers_outputs(llama):
    ids = torch.tensor([PROMPTS[0]])
    whole = ForwardPass(torch.arange(6)[None], wanted=(-1, 1))
    llama.forward(ids, whole)
    assert torch.equal(whole.features[-1], llama.embeddings[ids])
    cache = KVCache(1, 32)
    llama.forward(ids[:, :4], ForwardPass(torch.arange(4)[None], cache=cache))
    rest = ForwardPass(torch.arange(4, 6)[None], cache=cache, starts=[4], counts=[2], wanted=(1,))
    llama.forward(ids[:, 4:], rest)
    assert torch.allclose(rest.features[1], whole.features[1][:, 4:], atol=1e-5)


def test_no_draft_reaches_beyond_what_may_be_committed(llama):
    drafter = LookupDrafter(8, 1)
    seen = []
    queue = iter([Request(PROMPTS[3], 5)])
    engine = Engine(llama, drafter, on_round=seen.append)
    (run,) = engine.run(lambda: next(queue, None))
    assert len(run.tokens) <= 5 and any(each.proposal.tokens for each in seen)
    assert all(each.accepted <= len(each.proposal.tokens) <= 4 for each in seen)


def test_rounds_name_their_request_and_add_up_to_its_answer(llama):
    seen = []
    waiting = iter([Request(prompt, 9, id=f"p{i}") for i, prompt in enumerate(PROMPTS)])
    engine = Engine(llama, LookupDrafter(4, 1), batch_size=2, on_round=seen.append)
    runs = list(engine.run(lambda: next(waiting, None)))
    assert len(runs) == len(PROMPTS)
    for run in runs:
        rounds = [each for each in seen if each.request_id == run.id]
        assert [token for each in rounds for token in each.tokens] == run.tokens
        assert [len(each.tokens) - 1 for each in rounds] == run.stats.accepted
        assert [len(each.proposal.tokens) for each in rounds] == run.stats.verified


def test_a_draft_of_another_vocabulary_is_refused_behind_a_lookup_too(llama):
    class Foreign(LookupDrafter):
        vocab_size = llama.vocab_size + 1

    draft = Foreign(4, 1)
    for drafter in (draft, LookupFirst(LookupDrafter(4, 1), draft)):
        with pytest.raises(DeepSpecError, match=f"vocabulary has {draft.vocab_size} tokens, the target's"):
            generate(llama, drafter, PROMPTS[0], 4)


@pytest.mark.parametrize("timed", [False, True])
def test_a_gpu_is_waited_for_only_when_its_seconds_are_asked_for(llama, monkeypatch, timed):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    gpu = torch.device("cuda")
    clock = RoundClock(gpu, timed)
    clock.lap("draft_s")
    assert waits == ([gpu, gpu] if timed else [])


def test_the_last_layer_is_no_feature(llama):
    with pytest.raises(DeepSpecError, match="layer 3 cannot"):
        llama.check_layers([3])


class EveryOther(Controller):
    """Drafts in every other round and verifies two levels."""

    def pacer(self):
        return self

    def reset(self):
        self.count = 0

    def drafts(self):
        self.count += 1
        return self.count % 2 == 0

    def observe(self, *seen):
        pass

    def select(self, proposals):
        return [proposal.cut(2) for proposal in proposals]


def test_a_controller_changes_no_token(llama):
    plain = generate(llama, None, PROMPTS, 24)
    drafter = Oracle({i: p + g.tokens for i, (p, g) in enumerate(zip(PROMPTS, plain, strict=True))}, 4)
    runs = generate(llama, drafter, PROMPTS, 24, controller=EveryOther())
    assert [run.tokens for run in runs] == [run.tokens for run in plain]
    assert {depth for run in runs for depth in run.stats.drafted} >= {0, 2}

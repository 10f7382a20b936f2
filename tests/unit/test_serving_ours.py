"""Our engine counted as engines count: from the prompt's own token on, the last verification in full."""

import pytest

from deepspec.decoding.drafter import Drafter, Session
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Sampling
from deepspec.decoding.tree import Proposal
from deepspec.serving import ours
from deepspec.serving.protocols import Counts
from deepspec.target.model import load_target

PROMPT = [5, 9, 14, 3, 77, 20]
FAR = 64


@pytest.fixture(scope="module")
def target(tiny_target):
    return load_target(tiny_target)


@pytest.fixture(scope="module")
def truth(target):
    """What the target goes on with, beyond a stop token too."""
    tokens = list(PROMPT)
    for _ in range(FAR):
        (out,) = generate(target, None, tokens, max_new_tokens=1)
        tokens += out.tokens
    return tokens[len(PROMPT) :]


class Knowing(Drafter):
    """Proposes the truth, but for every `wrong`-th token of the text."""

    block_size = 8

    def __init__(self, truth, wrong=None):
        self.text, self.wrong = PROMPT + truth, wrong
        self.asked = []  # (length of the context with the anchor, room)

    def session(self, slots):
        return KnowingSession(self)


class KnowingSession(Session):
    def __init__(self, drafter):
        self.drafter, self.length = drafter, 0

    def begin(self, row):
        self.length = 0

    def extend(self, row, tokens, features):
        self.length += len(tokens)

    def move(self, source, destination):
        """One row."""

    def propose(self, asks):
        (ask,) = asks
        assert ask.sampling == Sampling()
        start, drafter = self.length + 1, self.drafter
        drafter.asked.append((start, ask.room))
        tokens = drafter.text[start : start + min(ask.room, ask.shape.nodes)]
        wrong = drafter.wrong
        return [
            Proposal.chain([t + 1 if wrong and (start + i) % wrong == 0 else t for i, t in enumerate(tokens)])
        ]


def test_drafting_starts_after_the_token_that_the_prompt_s_pass_gives(target, truth):
    drafter = Knowing(truth)
    ours.decode(target, drafter, PROMPT, 8, 3)
    assert drafter.asked[0] == (len(PROMPT) + 1, 8 - 1 + 3 + 1 - 1)


def test_a_perfect_draft_is_accepted_in_full_to_the_end(target, truth):
    done = ours.decode(target, Knowing(truth), PROMPT, 9, 3)
    assert done.drafted == done.plain == truth[:9]
    # 8 tokens after the first in rounds of 4; the engine that stops at 9 has verified the same.
    assert done.counts == Counts(2, 6, 6, (2, 2, 2))


def test_the_last_verification_counts_in_full(target, truth):
    done = ours.decode(target, Knowing(truth), PROMPT, 7, 3)
    assert done.counts == Counts(2, 6, 6, (2, 2, 2)), "6 tokens are wanted, the second round brings 8"
    assert done.drafted == truth[:7]


def test_wrong_tokens_are_counted_where_they_are(target, truth):
    done = ours.decode(target, Knowing(truth, wrong=3), PROMPT, 30, 4)
    assert done.drafted == done.plain == truth[:30]
    assert done.counts == Counts(10, 40, 20, (10, 10, 0, 0)), "two tokens and the target's own, ten times"


def test_a_stop_token_ends_the_count_but_not_within_a_verification(target, truth, monkeypatch):
    stop = truth[5]
    before = truth.index(stop)
    monkeypatch.setattr(type(target), "stop_ids", property(lambda self: frozenset({stop})))
    done = ours.decode(target, Knowing(truth), PROMPT, 30, 4)
    assert done.plain == done.drafted == truth[: before + 1]
    rounds = -(-before // 5)
    assert done.counts == Counts(rounds, 4 * rounds, 4 * rounds, (rounds,) * 4)


def test_seconds_end_where_the_answer_does(target, truth, monkeypatch):
    stop = truth[5]
    monkeypatch.setattr(type(target), "stop_ids", property(lambda self: frozenset({stop})))
    pair = ours.decode(target, Knowing(truth), PROMPT, 30, 4).pair
    assert pair.drafted_tokens == pair.plain_tokens == truth.index(stop) + 1


def test_rounds_without_a_draft_are_no_verifications_of_one(target, truth):
    class Shy(Knowing):
        def session(self, slots):
            session = KnowingSession(self)
            propose = session.propose
            session.propose = lambda asks: propose(asks) if len(self.asked) % 2 else self.silent()
            return session

        def silent(self):
            self.asked.append(None)
            return [Proposal()]

    done = ours.decode(target, Shy(truth), PROMPT, 8, 2)
    assert done.plain == done.drafted
    assert done.counts.mean_accepted_length == 3 and done.counts.drafts < 7 - done.counts.accepted


def test_seconds_are_of_both_ways(target, truth):
    pair = ours.decode(target, Knowing(truth), PROMPT, 9, 3).pair
    assert pair.plain_s > 0 and pair.drafted_s > 0
    assert pair.plain_tokens == pair.drafted_tokens == 9

"""Lookup and suffix drafters and the combined one: what they propose, row by row."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from deepspec.decoding.drafter import Drafter, DraftRequest, Session
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Sampling
from deepspec.decoding.shapes import Chain
from deepspec.decoding.tree import Proposal
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.drafters.algorithms.suffix import Odds, SuffixAutomaton, SuffixDrafter, SuffixIndex
from deepspec.drafters.lookup_first import LookupFirst
from deepspec.target.model import load_target
from tests.tiny import make_target


def ask(row: int, anchor: int, room: int = 99, **options) -> DraftRequest:
    return DraftRequest(row, anchor, Sampling(), torch.Generator(), room, **options)


def proposed(drafter: Drafter, context: list[int], **options) -> list[int]:
    """The tokens proposed after `context`, whose last token is the anchor."""
    session = drafter.session(1)
    session.begin(0)
    session.extend(0, context[:-1], None)
    (proposal,) = session.propose([ask(0, context[-1], **options)])
    assert proposal.is_chain and proposal.probs is None
    return proposal.tokens


def test_lookup_proposes_what_followed_the_latest_match():
    assert proposed(LookupDrafter(3, 2), [1, 2, 7, 8, 9, 1, 2, 5, 6, 4, 1, 2]) == [5, 6, 4]


def test_lookup_proposes_nothing_without_a_match():
    assert proposed(LookupDrafter(3, 2), [1, 2, 3, 4, 2]) == []
    assert proposed(LookupDrafter(3, 4), [1]) == []


def test_lookup_takes_a_repetition_to_go_on():
    assert proposed(LookupDrafter(5, 2), [1, 2, 3, 1, 2]) == [3, 1, 2, 3, 1]
    assert proposed(LookupDrafter(4, 1), [6, 6]) == [6, 6, 6, 6]


def test_a_proposal_keeps_to_the_room_and_to_the_nodes_of_the_shape():
    context = [1, 2, 3, 4, 5, 1]
    assert proposed(LookupDrafter(4, 1), context, room=3) == [2, 3, 4]
    assert proposed(LookupDrafter(4, 1), context, shape=Chain(2)) == [2, 3]


def test_rows_are_apart_and_move():
    session = LookupDrafter(2, 1).session(3)
    for row, context in ((0, [1, 2, 1, 3]), (2, [1, 5, 6])):
        session.begin(row)
        session.extend(row, context, None)
    assert [p.tokens for p in session.propose([ask(2, 1), ask(0, 1)])] == [[5, 6], [3, 1]]
    session.move(2, 0)
    session.begin(2)
    assert [p.tokens for p in session.propose([ask(0, 1), ask(2, 1)])] == [[5, 6], []]


class Trained(Drafter):
    """Always proposes the anchor + 100, and notes what it was asked and told."""

    layers = (3,)
    block_size = 1

    def __init__(self):
        self.calls: list[list[int]] = []
        self.told: list[tuple] = []

    def session(self, slots: int) -> Session:
        drafter = self

        class TrainedSession(Session):
            def begin(self, row):
                drafter.told.append(("begin", row))

            def extend(self, row, tokens, features):
                drafter.told.append((row, tokens, features))

            def propose(self, asks):
                drafter.calls.append([ask.row for ask in asks])
                return [Proposal.chain([ask.anchor + 100]) for ask in asks]

            def move(self, source, destination):
                drafter.told.append(("move", source, destination))

        return TrainedSession()


def test_lookup_first_hands_all_unmatched_rows_to_the_trained_draft_in_one_call():
    trained = Trained()
    drafter = LookupFirst(LookupDrafter(2, 1), trained)
    assert drafter.layers == (3,) and drafter.block_size == 2
    session = drafter.session(4)
    features = torch.zeros(3, 8)
    for row in range(3):
        session.begin(row)
        session.extend(row, [row, 9, 8], features)
    proposals = session.propose([ask(2, 5), ask(1, 1), ask(0, 6)])
    assert [p.tokens for p in proposals] == [[105], [9, 8], [106]]
    assert trained.calls == [[2, 0]]
    assert (0, [0, 9, 8], features) in trained.told and ("begin", 1) in trained.told
    session.propose([ask(1, 1)])
    assert trained.calls == [[2, 0]]  # nothing left to ask
    session.move(2, 0)
    assert trained.told[-1] == ("move", 2, 0)
    assert session.propose([ask(0, 2)])[0].tokens == [9, 8]


@pytest.mark.parametrize("drafter", [LookupDrafter(5, 2), SuffixDrafter(6, 1, corpus=[[5, 6, 7, 8] * 3])])
def test_no_token_changes_and_repetition_pays(tmp_path, drafter):
    target = load_target(make_target(tmp_path, vocab=300, layers=2))
    prompts = [[5, 6, 7, 8] * 4, [9, 10, 11], [3] * 12, [20, 21, 20, 21, 20]]
    plain = generate(target, None, prompts, max_new_tokens=40)
    drafted = generate(target, drafter, prompts, max_new_tokens=40, batch_size=3)
    assert [run.tokens for run in drafted] == [run.tokens for run in plain]
    assert sum(run.stats.rounds for run in drafted) < sum(run.stats.rounds for run in plain)


def longest_match(tokens: list[int], anchor: int) -> tuple[int, int] | None:
    """By trying everything: the length of the longest end of tokens + [anchor] within tokens, and its latest end."""
    context = [*tokens, anchor]
    for length in range(len(tokens), 0, -1):
        for end in range(len(tokens), length - 1, -1):
            if tokens[end - length : end] == context[-length:]:
                return length, end
    return None


@pytest.mark.parametrize("alphabet", [1, 2, 3, 8])
def test_the_automaton_finds_the_longest_match_at_its_latest_place(alphabet):
    for seed in range(20):
        rng = random.Random(seed)
        automaton = SuffixAutomaton()
        for _ in range(30):
            for anchor in range(alphabet + 1):
                assert automaton.longest(anchor) == longest_match(automaton.tokens, anchor)
            automaton.append(rng.randrange(alphabet))


def test_the_automaton_stays_small_and_right_on_one_repeated_token():
    automaton = SuffixAutomaton([7] * 500 + [8])
    assert len(automaton.link) <= 2 * 501
    length, end = automaton.longest(7)
    assert length == 1 and automaton.tokens[end - 1] == 7
    assert SuffixAutomaton([7] * 500).longest(7) == (500, 500)


def test_a_longer_match_is_trusted_with_a_longer_draft():
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert proposed(SuffixDrafter(6, 1), [*text, 99, 3]) == [4, 5]
    assert proposed(SuffixDrafter(6, 1), [*text, 2, 3]) == [4, 5, 6, 7]
    assert proposed(SuffixDrafter(6, 1), [*text, 1, 2, 3, 4, 5]) == [6, 7, 8, 9, 10, 11]
    assert proposed(SuffixDrafter(6, 3), [*text, 2, 3]) == []


def test_the_longest_match_wins_over_a_later_one():
    context = [1, 2, 3, 4, 9, 3, 5, 9, 2, 3]
    assert proposed(SuffixDrafter(1, 1), context) == [4]
    assert proposed(LookupDrafter(1, 1), context) == [5]


def test_a_corpus_is_searched_too_and_no_text_runs_into_the_next():
    drafter = SuffixDrafter(8, 1, corpus=[[1, 2, 3], [5, 6, 7, 2]])
    assert proposed(drafter, [9, 5, 6]) == [7, 2]
    assert proposed(drafter, [9, 3]) == []  # a text ends there
    assert proposed(drafter, [1, 2]) == [3]
    assert proposed(drafter, [6, 4, 9, 6]) == [4, 9]  # of equal matches the request's own


def first_survival(followers: list[int]) -> float:
    """Survival of a one-token draft after token 1, which was followed by each of `followers` before."""
    session = SuffixDrafter(1, 1).session(1)
    session.begin(0)
    session.extend(0, [1, followers[0]], None)
    for follower in followers[1:]:
        session.propose([ask(0, 1)])
        session.extend(0, [1, follower], None)
    return session.propose([ask(0, 1)])[0].survival[0]


def test_survival_is_what_became_of_earlier_matches():
    (prior,) = Odds().survival(1, 1)
    assert first_survival(list(range(100, 140))) < prior / 2
    assert first_survival([2] * 40) > 0.9 > prior


def test_survival_falls_along_the_draft():
    session = SuffixDrafter(8, 1).session(1)
    session.begin(0)
    session.extend(0, [*range(30), 5, 6, 7], None)
    (proposal,) = session.propose([ask(0, 8)])
    assert proposal.tokens == [9, 10, 11, 12, 13, 14, 15, 16]
    assert all(a > b for a, b in itertools.pairwise(proposal.survival))


def test_the_context_judges_a_draft_whatever_part_of_it_was_verified():
    odds = Odds()
    index = SuffixIndex(2, None, odds)
    for token in (1, 2, 3, 4, 5, 6, 1):
        index.append(token)
    assert index.proposal(2, room=9).tokens == [3, 4, 5, 6]
    for token in (2, 3):  # the draft was cut to one token, and the target's own next one is 4
        index.append(token)
    index.proposal(4, room=9)
    fresh = Odds()
    assert [odds.right[m] - fresh.right[m] for m in (2, 3, 4)] == pytest.approx([1, 1, 0])
    assert [odds.tried[m] - fresh.tried[m] for m in (2, 3, 4)] == pytest.approx([1, 1, 0])
    index.append(4)
    index.append(9)  # the second draft said 5
    assert odds.tried[4] - fresh.tried[4] == 1 and odds.right[4] == fresh.right[4]

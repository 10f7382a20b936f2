"""What is counted along a known answer is what decoding would have counted, and takes no pass of the target for it."""

from __future__ import annotations

import pytest
import torch

from deepspec.decoding.cost import CostCurve
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Generation, Stats
from deepspec.decoding.shapes import CHAIN, BestFirst, Chain
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.drafters.algorithms.suffix import SuffixDrafter
from deepspec.drafters.load import load_drafter
from deepspec.evaluation.contest import Computed, Contest, DecodingConfig
from deepspec.evaluation.forced import ForcedTarget, decode_forced, features, price
from deepspec.evaluation.runs import PLAIN
from deepspec.messages.prompt import Chat
from deepspec.target.attention import ForwardPass
from deepspec.target.model import Target, load_target
from tests.drafting import make, write

CURVE = CostCurve({1: [(1, 0.5), (5, 1.0)]})
PROMPT = [5, 6, 7, 8, 5, 6, 7, 9, 5, 6]
TOKENS = 24


@pytest.fixture(scope="module")
def target(tiny_target):
    return load_target(tiny_target)


@pytest.fixture
def passes(target, monkeypatch) -> list[int]:
    """Tokens of each pass of the target that a test makes."""
    made: list[int] = []
    real = Target.forward

    def forward(self, ids, step):
        if self is target:
            made.append(ids.shape[1])
        return real(self, ids, step)

    monkeypatch.setattr(Target, "forward", forward)
    return made


def rounds(generation: Generation) -> tuple:
    return generation.tokens, generation.stats.accepted, generation.stats.verified


@pytest.mark.parametrize("shape", [Chain(1), CHAIN, BestFirst(4, 2, 4), BestFirst(8, 3, 12)], ids=repr)
@pytest.mark.parametrize("name", ["dspark", "dflash", "eagle3", "medusa", "lm"])
def test_a_trained_drafts_greedy_rounds_are_those_of_decoding(target, passes, tmp_path, name, shape):
    drafter = load_drafter(write(make(name, target), target, tmp_path / "draft"), target)
    decoded = generate(target, drafter, PROMPT, max_new_tokens=TOKENS, tree=shape)[0]
    forced = ForcedTarget(target, PROMPT + decoded.tokens, drafter.layers)
    passes.clear()
    assert rounds(decode_forced(forced, drafter, PROMPT, TOKENS, shape)) == rounds(decoded)
    assert passes == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafter", [LookupDrafter(4, 1), SuffixDrafter(8, 1)], ids=["lookup", "suffix"])
def test_a_lookups_rounds_are_those_of_decoding_at_any_temperature(target, passes, drafter, temperature):
    decoded = generate(
        target, drafter, PROMPT, max_new_tokens=TOKENS, temperature=temperature, top_k=3, seed=7
    )[0]
    assert sum(decoded.stats.verified) > 0
    passes.clear()
    forced = ForcedTarget(target, PROMPT + decoded.tokens)
    assert rounds(decode_forced(forced, drafter, PROMPT, TOKENS, CHAIN)) == rounds(decoded)
    assert passes == []


def test_an_answer_that_stops_ends_the_forced_run_there(target):
    stop = next(iter(target.stop_ids))
    answer = [5, 6, 7, stop]
    forced = ForcedTarget(target, PROMPT + answer)
    found = decode_forced(forced, LookupDrafter(4, 1), PROMPT, TOKENS, CHAIN)
    assert (found.tokens, found.finish_reason) == (answer, "stop")


def test_features_are_those_of_one_pass_over_all_tokens(target, monkeypatch):
    monkeypatch.setattr("deepspec.evaluation.forced.PREFILL", 4)  # in three passes
    found = features(target, PROMPT, [0, 2])
    step = ForwardPass(torch.arange(len(PROMPT))[None], wanted=[0, 2])
    target.forward(torch.tensor([PROMPT]), step)
    for layer in (0, 2):
        torch.testing.assert_close(found[layer], step.features[layer], rtol=1e-4, atol=1e-4)


def test_a_pass_is_priced_by_the_plain_run_and_the_curve():
    plain = Generation(0, [1], [2] * 4, "length", Stats([0] * 4, [0] * 4, verified=[0] * 4))
    drafted = Generation(0, [1], [2] * 4, "length", Stats([2, 0], [4, 0], draft_s=0.25, verified=[4, 0]))
    # A plain pass took 8 / 4 = 2 s, one over 5 tokens takes twice as long on the curve: 4 + 2 s, and the drafts.
    assert price(drafted, plain, 8.0, CURVE) == pytest.approx(6.25)
    assert (drafted.stats.verify_s, drafted.stats.host_s) == (6.0, 0.0)


def test_computed_configurations_are_run_along_the_answers_and_marked(target, passes):
    lookup = LookupDrafter(4, 1)
    chat = Chat.of_turns(["one two one two one", "and two?"])
    decoded = Contest(target, [DecodingConfig(PLAIN), DecodingConfig("lookup", lookup)], TOKENS, 0)
    before = decoded.prompt("talk", chat, 1.0, 0)
    many = len(passes)
    passes.clear()
    computed = Computed([DecodingConfig("lookup", lookup)], PLAIN, CURVE)
    after = Contest(target, [DecodingConfig(PLAIN)], TOKENS, 0, computed=computed).prompt(
        "talk", chat, 1.0, 0
    )
    assert (after["lookup"].accepted, after["lookup"].output) == (
        before["lookup"].accepted,
        before["lookup"].output,
    )
    assert (after["lookup"].computed, after[PLAIN].computed, before["lookup"].computed) == (
        True,
        False,
        False,
    )
    assert after["lookup"].seconds > 0
    assert len(passes) == many - before["lookup"].rounds - 2  # nor its prefill in either turn


def test_a_plain_run_is_cut_where_no_turn_follows(target):
    chat = Chat.of_turns(["one two", "and two?"])
    whole = Contest(target, [DecodingConfig(PLAIN)], TOKENS, 0).prompt("talk", chat, 0.0, 0)[PLAIN]
    cut = Contest(target, [DecodingConfig(PLAIN)], TOKENS, 0, 5).prompt("talk", chat, 0.0, 0)[PLAIN]
    assert [len(turn) for turn in whole.accepted] == [TOKENS, TOKENS]
    assert [len(turn) for turn in cut.accepted] == [TOKENS, 5]
    assert cut.prompt_tokens == whole.prompt_tokens, "the second turn sees the whole first answer"

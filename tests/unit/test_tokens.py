"""Conversations: ids verbatim, the mask on the answers alone, whatever the chat template."""

import pytest

from deepspec.answers.conversation import Conversation, UnusableError
from deepspec.answers.turns import answer_text, between_turns, end_of_answer, generation_prompt
from deepspec.errors import DeepSpecError
from deepspec.messages.prompt import Prompt
from tests.fake_target import CHATML, DEAF, INST, PLAIN, TEMPLATES, FakeTarget

TURNS = ("How are you?", "And your cat?", "Bye.")
USER = {"role": "user", "content": "Hello"}


@pytest.fixture(params=TEMPLATES, name="target")
def each_target(request):
    return FakeTarget(TEMPLATES[request.param])


def converse(target, answers, turns=TURNS, max_new_tokens=64, max_length=4096):
    """Answers are (text, stop token or None)."""
    conversation = Conversation(target, Prompt.of_turns("p", "seed", turns), max_new_tokens, max_length)
    for text, stop in answers:
        tokens = target.ids(text) + ([] if stop is None else [stop])
        conversation.add_answer(tokens, "length" if stop is None else "stop")
    return conversation


@pytest.mark.parametrize("template", ["chatml", "llama", "gemma"])
def test_a_conversation_is_what_the_template_renders(template):
    """Where the target stops as its template says, and its tokens are those of the text, all ids agree."""
    target = FakeTarget(TEMPLATES[template])
    conversation = converse(target, [("Fine.", target.end), ("Asleep", target.end), ("Bye!", target.end)])
    rendered = target.chat_ids(conversation.messages, add_generation_prompt=False)
    assert rendered[: len(conversation.input_ids)] == conversation.input_ids
    assert target.text(rendered[len(conversation.input_ids) :]).strip() == ""
    assert conversation.prompt_ids is None


def test_the_mask_covers_exactly_the_answers(target):
    conversation = converse(target, [("Fine.", target.end), ("Asleep", target.eos), ("By", None)])
    masked = [i for i, m in zip(conversation.input_ids, conversation.loss_mask, strict=True) if m]
    expected = [*target.ids("Fine."), target.end, *target.ids("Asleep"), target.eos, *target.ids("By")]
    assert masked == expected
    assert [m["content"] for m in conversation.messages if m["role"] == "assistant"] == [
        "Fine.",
        "Asleep",
        "By",
    ]
    assert conversation.finish_reasons == ["stop", "stop", "length"]


def test_every_answer_follows_the_generation_prompt(target):
    conversation = converse(target, [("Fine.", target.eos), ("Asleep", target.end)], TURNS[:2])
    opening = generation_prompt(target)
    starts = [
        i for i in range(1, len(conversation.loss_mask)) if conversation.loss_mask[i - 1 : i + 1] == [0, 1]
    ]
    assert len(starts) == 2
    assert bool(opening) == (target.tokenizer.chat_template != INST)
    assert all(conversation.input_ids[i - len(opening) : i] == opening for i in starts)


def test_ids_are_kept_as_generated_even_if_text_would_tokenise_otherwise():
    target = FakeTarget()
    broken = target.ids("é")[:1]  # half of a character: decoding and encoding again gives other ids
    conversation = Conversation(target, Prompt.of_turns("p", "seed", TURNS), 64, 4096)
    first = conversation.prompt_ids
    conversation.add_answer([*broken, target.end], "stop")
    assert target.ids(conversation.messages[-1]["content"]) != broken
    assert conversation.prompt_ids[: len(first) + 2] == [*first, *broken, target.end]


def test_the_template_s_own_end_of_turn_is_not_repeated_after_another_stop_token():
    target = FakeTarget()
    conversation = converse(target, [("Fine.", target.eos)])
    text = target.text(conversation.prompt_ids)
    assert "Fine.<eos>\n<|start|>user\nAnd your cat?<|end|>\n<|start|>assistant\n" in text
    assert "Fine.<eos><|end|>" not in text


def test_blanks_before_the_template_s_end_of_turn_go_with_it():
    target = FakeTarget(INST)
    assert target.text(between_turns(target, [USER], USER)) == "<bos>[INST] Hello [/INST]"


def test_a_template_without_end_of_turn_loses_nothing():
    target = FakeTarget(PLAIN)
    before = [USER, {"role": "assistant", "content": "x"}]
    assert target.text(between_turns(target, before[:1], USER)) == "\nuser: Hello\nassistant: "
    assert end_of_answer(target) == target.end


def test_an_answer_that_was_cut_short_ends_the_conversation():
    target = FakeTarget()
    conversation = converse(target, [("Fine", None)])
    assert conversation.prompt_ids is None
    assert conversation.rows()[0]["finish_reasons"] == ["length"]


def test_a_turn_that_does_not_fit_is_not_asked():
    target = FakeTarget()
    first = len(Conversation(target, Prompt.of_turns("p", "seed", TURNS), 64, 4096).prompt_ids)
    conversation = converse(target, [("Fine.", target.end)], max_length=first + 20)
    assert conversation.prompt_ids is None
    assert conversation.messages[-1] == {"role": "assistant", "content": "Fine."}


def test_room_is_bounded_by_answer_and_conversation():
    target = FakeTarget()
    prompt = Prompt.of_turns("p", "seed", TURNS)
    length = len(Conversation(target, prompt, 64, 4096).prompt_ids)
    assert Conversation(target, prompt, 64, 4096).room == 64
    assert Conversation(target, prompt, 64, length + 5).room == 5


def test_a_prompt_longer_than_the_conversation_may_be_is_unusable():
    target = FakeTarget()
    with pytest.raises(UnusableError, match="no room for an answer within 16 tokens"):
        Conversation(target, Prompt.of_turns("p", "seed", TURNS), 64, 16)
    target.max_length = 20
    with pytest.raises(UnusableError, match="within 20 tokens"):
        Conversation(target, Prompt.of_turns("p", "seed", TURNS), 64, 4096)


@pytest.mark.parametrize(
    ("tokens", "reason", "message"),
    [
        ([], "stop", "no such last token"),
        ([10], "stop", "no such last token"),
        ([10, 3, 10], "length", "a stop token stands inside"),
        ([3, 3], "stop", "a stop token stands inside"),
        ([10], "error", "ended with 'error'"),
        ([10] * 5000, "length", "more than 4096"),
    ],
)
def test_an_answer_that_is_not_what_it_says_is_unusable(tokens, reason, message):
    conversation = Conversation(FakeTarget(), Prompt.of_turns("p", "seed", TURNS), 64, 4096)
    with pytest.raises(UnusableError, match=message):
        conversation.add_answer(tokens, reason)


def test_a_template_that_hides_answers_is_one_clear_error():
    with pytest.raises(DeepSpecError, match="leaves answers out of later turns"):
        between_turns(FakeTarget(DEAF), [USER], USER)


def test_end_of_answer_is_the_template_s_own_stop_token(target):
    assert end_of_answer(target) == target.end


def test_a_target_without_stop_tokens_is_one_clear_error():
    target = FakeTarget()
    target.stop_ids = frozenset()
    with pytest.raises(DeepSpecError, match="no stop token; set eos_token_id"):
        end_of_answer(target)


def test_answer_text_keeps_special_tokens():
    target = FakeTarget(CHATML)
    assert answer_text(target, target.ids("a <|start|> b .")) == "a <|start|> b ."

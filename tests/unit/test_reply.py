"""A server's reply as token ids: the server's own, or those of its text, thought and tool calls put together."""

import pytest

from deepspec.answers.conversation import Conversation, UnusableError
from deepspec.answers.history import Histories
from deepspec.answers.reply import Reader
from deepspec.errors import DeepSpecError
from deepspec.messages.prompt import Prompt
from deepspec.messages.rows import read_row
from tests.chat_templates import FAMILIES
from tests.fake_target import FakeTarget

TOOLS = [{"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"place": "Paris"}'}}


def reply(content, reason="stop", given=None, **message):
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": reason}
    return {"choices": [choice | (given or {})]}


def read(target, answer, tools=False):
    row = {"prompt": "How is it?", **({"tools": TOOLS} if tools else {})}
    histories = Histories(target)
    conversation = Conversation(
        target, Prompt("p", "file", read_row(row).chat), 400, 4000, histories, rendered=True
    )
    if callable(answer):
        answer = answer(conversation)
    tokens, reason, message = Reader(target, histories).read(answer, conversation)
    conversation.add_answer(tokens, reason, message)
    return tokens, conversation


def test_the_server_s_own_ids_are_taken_before_its_text():
    target = FakeTarget()
    half = target.ids("é")[:1]
    sampled = [*target.ids("caf"), *half]
    tokens, _ = read(target, reply("caf\ufffd", "length", {"token_ids": sampled}))
    assert tokens == sampled


def test_ids_without_the_stop_token_are_closed_by_that_which_the_server_names():
    target = FakeTarget()
    ids = target.ids("Fine.")
    for given, end in (
        ({}, target.end),
        ({"stop_reason": target.eos}, target.eos),
        ({"stop_reason": "x"}, target.end),
    ):
        assert read(target, reply("Fine.", given={"token_ids": ids, **given}))[0] == [*ids, end]
    assert read(target, reply("Fine.", given={"token_ids": [*ids, target.eos]}))[0] == [*ids, target.eos]


def test_the_server_s_prompt_must_be_ours():
    target = FakeTarget()

    def answer(ids):
        return lambda talk: (
            reply("A", given={"token_ids": target.ids("A")}) | {"prompt_token_ids": ids(talk.prompt_ids)}
        )

    assert read(target, answer(lambda ids: ids))[0] == [*target.ids("A"), target.end]
    for other in (lambda ids: [0, *ids], lambda ids: ids[:-1], lambda ids: [*ids[:-2], 9, 9]):
        with pytest.raises(DeepSpecError, match="renders prompt 'p' otherwise than data/target's template"):
            read(target, answer(other))


def test_half_a_character_at_a_cut_is_left_out():
    target = FakeTarget()
    tokens, conversation = read(target, reply("caf\ufffd", "length"))
    assert tokens == target.ids("caf") and conversation.messages[-1]["content"] == "caf"


@pytest.mark.parametrize(("text", "reason"), [("caf\ufffd", "stop"), ("a\ufffdb", "length")])
def test_half_a_character_elsewhere_fails_the_row(text, reason):
    with pytest.raises(UnusableError, match="half a character"):
        read(FakeTarget(), reply(text, reason))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_a_thought_that_a_parser_took_out_is_put_back_as_the_template_writes_it(key):
    target = FAMILIES["qwen3"].target()
    tokens, conversation = read(target, reply("\n\nFour.", **{key: "\nTwo and two.\n"}))
    assert target.text(tokens) == "<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>"
    assert conversation.rows()[0]["messages"][-1]["content"] == "<think>\nTwo and two.\n</think>\n\nFour."


def test_an_empty_thought_under_one_name_does_not_hide_another():
    tokens, _ = read(
        FAMILIES["qwen3"].target(), reply("Four.", reasoning_content="", reasoning="Two and two.")
    )
    assert "Two and two." in FAMILIES["qwen3"].target().text(tokens)


def test_a_thought_that_was_cut_stays_open():
    target = FAMILIES["qwen3"].target()
    tokens, _ = read(target, reply(None, "length", reasoning_content="Two and"))
    assert target.text(tokens) == "<think>\nTwo and"


@pytest.mark.parametrize("name", ["chatml", "llama 3", "deepseek"])
def test_a_thought_that_the_template_does_not_show_stops_the_run_and_says_what_to_change(name):
    with pytest.raises(
        DeepSpecError, match=r"took the reasoning out .* without that parser, or one that returns token"
    ):
        read(FAMILIES[name].target(), reply("Four.", reasoning_content="Two and two."))


@pytest.mark.parametrize("name", ["hermes", "qwen3", "llama 3", "granite", "glm", "harmony"])
def test_calls_that_a_parser_took_out_are_put_back(name):
    family = FAMILIES[name]
    target = family.target()
    tokens, _ = read(target, reply(None, "tool_calls", tool_calls=[CALL]), tools=True)
    text = target.text(tokens)
    assert family.call.strip() in text.replace("<think></think>", "").replace("<think>\n\n</think>", "")
    assert tokens[-1] in target.stop_ids


def test_calls_that_the_template_does_not_show_stop_the_run():
    with pytest.raises(DeepSpecError, match="took tool calls out"):
        read(FAMILIES["chatml"].target(), reply(None, "tool_calls", tool_calls=[CALL]), tools=True)


def test_calls_that_are_no_calls_fail_the_row():
    bad = {**CALL, "function": {"name": "look", "arguments": "{oops"}}
    with pytest.raises(UnusableError, match="the server's answer: a tool call is not JSON"):
        read(FAMILIES["hermes"].target(), reply(None, "tool_calls", tool_calls=[bad]), tools=True)

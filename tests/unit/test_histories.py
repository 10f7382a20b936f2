"""Rows are what an engine was sent and sent back, whatever the family's template does with earlier turns."""

import json
import re

import pytest

from deepspec.answers.conversation import Conversation, UnusableError
from deepspec.answers.history import Histories
from deepspec.errors import DeepSpecError
from deepspec.guard.flatten import Flattener
from deepspec.messages.prompt import Chat, Prompt
from deepspec.messages.rows import read_row
from deepspec.prompts.overlap import Overlap
from tests.chat_templates import FAMILIES
from tests.fake_target import FakeTarget

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look at the weather.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]
TALK = {
    "messages": [
        {"role": "system", "content": "Be a pirate."},
        {"role": "user", "content": "weather in Paris?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "abcdefghi",
                    "type": "function",
                    "function": {"name": "look", "arguments": '{"place": "Paris"}'},
                }
            ],
        },
        {"role": "tool", "content": "18 C", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "It is 18 degrees."},
        {"role": "user", "content": "thanks, and London?"},
    ],
    "tools": TOOLS,
}


def chat(system=True, tools=False):
    if tools:
        return read_row(TALK).chat
    turns = [{"role": "user", "content": text} for text in ("How are you?", "And your cat?", "Bye.")]
    return Chat(tuple([{"role": "system", "content": "Be a pirate."}] * system + turns))


def converse(family, talk, write):
    """Let `write(place)` give each answer and its stop token; return the conversation and what the engine saw."""
    target = family.target()
    conversation = Conversation(target, Prompt("p", "file", talk), 400, 4000)
    seen = []
    while conversation.prompt_ids is not None:
        text, stop = write(len(seen))
        tokens = [*target.ids(text), target.tokenizer.convert_tokens_to_ids(stop or family.stops[0])]
        seen.append((list(conversation.prompt_ids), tokens, conversation.asked))
        conversation.add_answer(tokens, "stop")
    return target, conversation, seen


def check(target, conversation, seen):
    """Every generation stands in a row, ids and mask, and every masked token is one of a generation."""
    rows = conversation.rows()
    masked = 0
    for prompt, tokens, _ in seen:
        length = len(prompt) + len(tokens)
        fits = [row for row in rows if row["input_ids"][:length] == [*prompt, *tokens]]
        assert fits and fits[0]["loss_mask"][len(prompt) : length] == [1] * len(tokens)
        masked += len(tokens)
    assert sum(sum(row["loss_mask"]) for row in rows) == masked
    flat = Flattener(target, {"p": conversation.prompt}, 8, Overlap([], 8))
    for row in rows:
        found = flat.flat({**row, "target": target.digest, "engine": "local", "temperature": 1.0, "seed": 1})
        assert {
            k: found[k] for k in ("mask_problem", "template_problem", "tool_problem", "prompt_problem")
        } == {
            "mask_problem": None,
            "template_problem": None,
            "tool_problem": None,
            "prompt_problem": None,
        }
    return rows


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_and_a_system_prompt(name):
    family = FAMILIES[name]
    said = ("Fine.", "Asleep.", "Bye!")
    target, conversation, seen = converse(
        family, chat(family.system), lambda i: (family.answer.format(said[i]), None)
    )
    rows = check(target, conversation, seen)
    assert len(seen) == 3
    if family.kept:
        assert len(rows) == 1
    for prompt, _, asked in seen:
        assert prompt == target.chat_ids(asked), "what a server would have been given"


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.thought])
def test_thoughts_are_kept_as_written_and_history_is_as_the_template_has_it(name):
    family = FAMILIES[name]
    said = ("Fine.", "Asleep.", "Bye!")
    write = lambda i: (family.thought.format(i) + family.answer.format(said[i]), None)  # noqa: E731
    target, conversation, seen = converse(family, chat(family.system), write)
    rows = check(target, conversation, seen)
    assert len(rows) == (1 if family.kept else 3)
    assert [row["id"] for row in rows] == (["p"] if family.kept else ["p-0", "p-1", "p-2"])
    assert "Hm, 2" in target.text(rows[-1]["input_ids"])
    assert ("Hm, 0" in target.text(rows[-1]["input_ids"])) == family.kept
    for prompt, _, asked in seen:
        assert prompt == target.chat_ids(asked)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.call])
def test_recorded_results_follow_the_calls_of_the_target(name):
    family = FAMILIES[name]
    thought = (family.thought or "").format("now") if name != "deepseek" else ""
    texts = (thought + family.call, family.answer.format("18 degrees, arr."), family.answer.format("Same."))
    write = lambda i: (texts[i], family.stop_of_call if i == 0 else None)  # noqa: E731
    target, conversation, seen = converse(family, chat(tools=True), write)
    check(target, conversation, seen)
    assert len(seen) == 3 and conversation.endings == []
    assert "18 C" in target.text(seen[1][0]) and "look" in target.text(seen[0][0])
    assert "London" in target.text(seen[2][0])
    assert seen[1][2][-2]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"place": "Paris"}}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_template_does_is_found_out_once(name):
    family = FAMILIES[name]
    histories = Histories(family.target())
    histories.of(Chat.of_turns(["a", "b"]))
    (found,) = histories.describe()
    assert found["history"] == ("kept" if family.kept else "rewritten")
    assert found["chat_template_kwargs"] == family.options


def test_a_template_that_cuts_thoughts_out_begins_a_row_for_every_generation():
    cutting = (
        "{% for m in messages %}<|start|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
        "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    target = FakeTarget(cutting)
    conversation = Conversation(target, Prompt.of_turns("p", "file", ("Two and two?", "Sure?")), 400, 4000)
    thought = "<think>\nlong hidden thought\n</think>\n\nFour."
    conversation.add_answer([*target.ids(thought), target.end], "stop")
    asked = conversation.asked
    assert conversation.prompt_ids == target.chat_ids(asked)
    assert "hidden" not in target.text(conversation.prompt_ids)
    conversation.add_answer([*target.ids("Yes."), target.end], "stop")
    first, second = conversation.rows()
    assert "hidden" in target.text(first["input_ids"])
    assert sum(second["loss_mask"]) == len("Yes.") + 1


def calling(text, talk=None):
    family = FAMILIES["hermes"]
    target = family.target()
    conversation = Conversation(target, Prompt("p", "file", talk or chat(tools=True)), 400, 4000)
    conversation.add_answer([*target.ids(text), target.end], "stop")
    return target, conversation


def test_ids_of_calls_that_a_template_refuses_are_shortened_alike_for_call_and_result():
    family = FAMILIES["mistral"]
    row = json.loads(json.dumps(TALK).replace("abcdefghi", "call_8f0aZ_of_an_openai_log"))
    target = family.target()
    conversation = Conversation(target, Prompt("p", "file", read_row(row).chat), 400, 4000)
    conversation.add_answer([*target.ids(family.call), target.end], "stop")
    text = target.text(conversation.prompt_ids)
    (id,) = set(re.findall(r'"call_id": "(\w+)"', text))
    assert len(id) == 9 and not conversation.endings


def test_a_message_that_the_template_leaves_out_is_counted():
    deaf = (
        "{% for m in messages if m.role in ('user', 'assistant') %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    target = FakeTarget(deaf)
    row = {
        "messages": [{"role": "developer", "content": "Be a pirate."}, {"role": "user", "content": "How?"}]
    }
    conversation = Conversation(target, Prompt("p", "file", read_row(row).chat), 400, 4000)
    conversation.add_answer([*target.ids("So."), target.end], "stop")
    assert conversation.endings == ["the template leaves a message of the developer out"]


def test_another_tool_ends_the_conversation_and_is_counted():
    other = FAMILIES["hermes"].call.replace("look", "listen")
    _, conversation = calling(other)
    assert conversation.prompt_ids is None
    assert conversation.endings == ["another tool was called than in the source"]
    assert len(conversation.rows()) == 1


def test_other_arguments_have_the_recorded_result_and_are_counted():
    target, conversation = calling(FAMILIES["hermes"].call.replace("Paris", "Rome"))
    assert "18 C" in target.text(conversation.prompt_ids)
    assert conversation.endings == ["a tool was called with other arguments than in the source"]


def test_an_answer_without_the_recorded_call_goes_on_with_the_next_user_turn():
    target, conversation = calling("I cannot know.")
    text = target.text(conversation.prompt_ids)
    assert "18 C" not in text and "I cannot know." in text and "London" in text
    assert conversation.endings == ["a tool call of the source was not made, its results are left out"]


def test_a_call_that_cannot_be_read_ends_the_conversation():
    _, conversation = calling('<tool_call>\n{"name": "look", "arguments": {"place": Paris}}\n</tool_call>')
    assert conversation.prompt_ids is None
    assert conversation.endings == ["a tool call that cannot be read"]


def test_several_calls_are_read_in_their_order():
    call = FAMILIES["hermes"].call
    histories = Histories(FAMILIES["hermes"].target())
    form = histories.of(chat(tools=True)).form
    message = form.parse(f"Let me see.\n{call}\n{call.replace('look', 'listen')}")
    assert [one["function"]["name"] for one in message["tool_calls"]] == ["look", "listen"]
    assert message["content"] == "Let me see."


def test_a_row_keeps_what_the_template_was_given():
    _, conversation = calling(FAMILIES["hermes"].call)
    (row,) = conversation.rows()
    kept = json.loads(row["chat"])
    assert kept["tools"] == TOOLS
    assert [message["role"] for message in kept["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][-1]["content"] == FAMILIES["hermes"].call, "as the target wrote it"


def test_what_was_answered_is_kept_where_the_template_refuses_the_next_turn():
    single = (
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
        "{{ messages[0].content }}<|end|>"
    )
    target = FakeTarget(single)
    conversation = Conversation(target, Prompt.of_turns("p", "file", ("a", "b")), 9, 99)
    conversation.add_answer([*target.ids("x"), target.end], "stop")
    assert conversation.prompt_ids is None and len(conversation.rows()) == 1
    assert conversation.endings == [
        "the next turn: fake: the chat template refuses this conversation: one turn only"
    ]


def test_half_a_character_in_a_message_is_one_line():
    with pytest.raises(DeepSpecError, match="half a character"):
        FakeTarget().chat_ids([{"role": "user", "content": "a \ud800 b"}])


def test_a_template_that_refuses_the_system_prompt_fails_the_row_in_its_own_words():
    with pytest.raises(UnusableError, match="System role not supported"):
        Conversation(FAMILIES["gemma"].target(), Prompt("p", "file", chat(system=True)), 9, 99)

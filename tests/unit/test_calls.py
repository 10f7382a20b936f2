"""Calls of tools are read as every family writes them: one or several, with arguments of any kind or none."""

import json
from typing import Any

import pytest

from deepspec.answers.history import Histories
from deepspec.messages.message import Message
from deepspec.messages.rows import read_row
from tests.chat_templates import FAMILIES
from tests.unit.test_histories import TALK

CALLING = [name for name, family in FAMILIES.items() if family.call and name != "deepseek"]
ONE_AT_A_TIME = ("llama 3", "harmony")
CALLS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "a text": [("look", {"place": "Paris"})],
    "signs and quotes": [("look", {"place": 'Zürich "x": [y] {z} = it\'s'})],
    "several lines": [("look", {"code": "    def f():\n        return {1: 'a'}\n", "place": "Paris"})],
    "an empty text": [("look", {"place": "", "day": "now"})],
    "numbers": [("look", {"n": 3, "f": -2.5, "place": "Paris"})],
    "truth": [("look", {"yes": True, "place": "Paris"})],
    "a list": [("look", {"places": [1, 2, 3], "place": "Paris"})],
    "no arguments": [("look", {})],
    "several": [("look", {"place": "Paris"}), ("listen.to", {"place": "Rome", "n": 7}), ("look", {"n": 8})],
    "several without arguments": [("look", {}), ("listen", {})],
}


def message(calls, content="") -> Message:
    made: list[Any] = [
        {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}


def written(name, said: Message):
    """What the template writes behind the generation prompt, up to the stop token, and its form."""
    target = FAMILIES[name].target()
    chat = read_row(TALK).chat
    asked = [one for one in chat.messages if one["role"] == "user"][:1]
    if name == "minimax":  # its generations begin with a thought
        said = {**said, "reasoning_content": "Hm."}
    before = target.chat_text(asked, True, chat.tools)
    text = target.chat_text([*asked, said], False, chat.tools).removeprefix(before)
    for stop in FAMILIES[name].stops:
        text = text.partition(stop)[0]
    return text, Histories(target).of(chat).form


def alike(own, value) -> bool:
    """Where a template writes bare texts, they are not told from numbers."""
    return own == value or own in (str(value), json.dumps(value))


@pytest.mark.parametrize("name", CALLING)
@pytest.mark.parametrize("kind", CALLS)
def test_calls_come_back_as_they_were_written(name, kind):
    if len(CALLS[kind]) > 1 and name in ONE_AT_A_TIME:
        pytest.skip("this template takes one call at a time")
    text, form = written(name, message(CALLS[kind]))
    read = form.parse(text)
    found = [(call["function"]["name"], call["function"]["arguments"]) for call in read["tool_calls"]]
    assert [tool for tool, _ in found] == [tool for tool, _ in CALLS[kind]]
    for (_, own), (_, arguments) in zip(found, CALLS[kind], strict=True):
        assert own.keys() == arguments.keys()
        assert all(alike(own[key], value) for key, value in arguments.items()), own


@pytest.mark.parametrize("name", ["hermes", "qwen3", "qwen3-coder", "pythonic", "kimi", "glm"])
def test_words_before_a_call_are_kept(name):
    text, form = written(name, message(CALLS["a text"], "Let me see."))
    read = form.parse(text)
    assert (read["content"], len(read["tool_calls"])) == ("Let me see.", 1)


@pytest.mark.parametrize("name", CALLING)
def test_words_about_calls_are_no_calls(name):
    form = written(name, message(CALLS["a text"]))[1]
    said = FAMILIES[name].answer.format('One may call look(place="Paris"), or {"name": "look"}.')
    assert "tool_calls" not in form.parse(said)


def test_blanks_that_a_target_writes_otherwise_change_nothing():
    form = written("hermes", message(CALLS["a text"]))[1]
    text = '<tool_call>{"name":"look","arguments":{"place":"Paris"}}</tool_call>'
    (call,) = form.parse(text)["tool_calls"]
    assert call["function"] == {"name": "look", "arguments": {"place": "Paris"}}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>\n{"arguments": {"place": "Paris"}, "name": "look"}\n</tool_call>'),
        ("hermes", '{}\n<tool_call>\n{{"arguments"'.format(FAMILIES["hermes"].call)),
        ("qwen3-coder", "<tool_call>\n<function=look>\n<parameter=place>\nParis"),
        ("pythonic", "<|tool_call_start|>[look(place=Paris)]<|tool_call_end|>"),
    ],
)
def test_a_call_in_another_form_is_not_taken_for_words(name, text):
    assert written(name, message(CALLS["a text"]))[1].parse(text) is None

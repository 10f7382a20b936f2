"""How a chat template writes the assistant's turns, learnt from renderings of stand-ins: no list of model families.

A template shows, when it renders a turn made of stand-ins, what it puts before and between a thought, an answer and a
tool call. The same text tells the parts of what the target wrote (`AnswerForm.parse`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from deepspec.errors import DeepSpecError
from deepspec.messages.message import Message
from deepspec.messages.tools import ToolCall

USER: Message = {"role": "user", "content": "question"}
ANSWER, THOUGHT, NAME, NAME2 = "answerQ", "thoughtQ", "nameQ", "nameZ"
KEYS, VALUES = ("keyQ", "keyZ"), ("valueQ", "valueZ")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": name,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": key} for key in KEYS},
                "required": list(KEYS),
            },
        },
    }
    for name in (NAME, NAME2)
]
CLOSING_THOUGHT = "</think>"
_SYMBOL = re.compile(r"^\s*[<\[]")


@dataclass(frozen=True)
class CallForm:
    """Text round a tool call: before its name, between the name and the arguments, between and after arguments."""

    opening: str  # of the first call
    again: str  # of any call, directly before the name
    arguments: str  # between the name and the first key
    value: str  # between a key and its value
    next: str  # between a value and the next key
    closing: str  # after the last value

    def parse(self, text: str) -> list[ToolCall] | None:
        """Return the calls of a text; empty: none; None: there are some, and their arguments cannot be read."""
        start = text.find(self.opening.strip())
        if start < 0 or (not _SYMBOL.match(self.opening) and text[:start].strip()):
            return []
        calls: list[ToolCall] = []
        for part in text[start:].split(self.again.strip() or self.opening.strip())[1:]:
            found = re.match(r"\s*([\w.\-]+)", part)
            if not found:
                return None
            arguments = self._arguments(part[found.end() :])
            if arguments is None:
                return None
            function = {"name": found[1], "arguments": arguments}
            calls.append({"id": f"call{len(calls):05d}", "type": "function", "function": function})  # type: ignore[typeddict-item]
        return calls or None

    def _arguments(self, text: str) -> dict[str, Any] | None:
        if "{" in self.arguments:
            start = text.find("{")
            try:
                value = json.JSONDecoder().raw_decode(text, start)[0] if start >= 0 else None
            except (ValueError, RecursionError):
                return None
            return value if isinstance(value, dict) else None
        body, _, _ = text.partition(self.closing.strip() or "\0")
        pairs = [pair.partition(self.value.strip()) for pair in body.split(self.next.strip() or "\0")]
        opening = self.arguments.strip()
        found = {
            key.strip().removeprefix(opening).strip(): value.strip() for key, middle, value in pairs if middle
        }
        return found or ({} if not body.strip() else None)


@dataclass(frozen=True)
class AnswerForm:
    """The parts of an assistant's turn, as the target writes them behind the generation prompt.

    Attributes:
        answer: text before an answer without a thought; often empty.
        thought: text before a thought, and between thought and answer; None: the template shows no thoughts.
        thought_call: text before a thought, and between it and the name of a tool.
        call: of tool calls; None: the template shows none, or no tools are offered.
    """

    answer: str
    thought: tuple[str, str] | None
    call: CallForm | None
    thought_call: tuple[str, str] | None = None

    def parse(self, text: str) -> Message | None:
        """Return what the target wrote as a message of the template; None: a tool call that cannot be read."""
        message: Message = {"role": "assistant", "content": text}
        thought, rest = self._split(text)
        calls = self.call.parse(rest) if self.call else []
        if calls is None:
            return None
        if calls and self.call:
            rest = rest[: rest.find(self.call.opening.strip())].strip()
            message["tool_calls"] = calls
        if thought is not None:
            message["reasoning_content"] = thought
        if calls or thought is not None or self._opened(rest):
            prefix = self.answer.strip()
            message["content"] = rest.removeprefix(prefix) if prefix else rest
        return message

    def _opened(self, rest: str) -> bool:
        return bool(self.answer.strip()) and rest.startswith(self.answer.strip())

    def _split(self, text: str) -> tuple[str | None, str]:
        """Return the thought, None where there is none, and what follows it."""
        for form in (self.thought, self.thought_call):
            opening, middle = (part.strip() for part in form or ("", ""))
            start, found, rest = text.partition(middle) if middle else ("", "", "")
            if found and start.lstrip().startswith(opening):
                if form is self.thought_call and self.call:
                    rest = self.call.opening.strip() + rest
                return start.lstrip().removeprefix(opening).strip("\n"), rest.lstrip("\n")
        return None, text


def learn_form(target: Any, tools: bool, options: Mapping[str, Any]) -> AnswerForm:
    """Learn how the target's template writes an assistant's turn.

    Args:
        tools: whether tools are offered.
        options: `chat_template_kwargs` of the conversation.
    """
    offered = TOOLS if tools else []

    def turn(message: Message) -> str | None:
        try:
            before = target.chat_text([USER], True, offered, options)
            whole = target.chat_text([USER, message], False, offered, options)
        except DeepSpecError:
            return None
        return whole[_divergence(before, whole) :]

    answer = (turn({"role": "assistant", "content": ANSWER}) or "").partition(ANSWER)[0]
    thought = None
    shown = turn({"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}) or ""
    if THOUGHT in shown and ANSWER in shown and shown.index(THOUGHT) < shown.index(ANSWER):
        opening, _, rest = shown.partition(THOUGHT)
        thought = (opening, rest.partition(ANSWER)[0])
    if not tools:
        return AnswerForm(answer, thought, None)
    pieces = _between(turn(_calling([(NAME, 0)]) | {"reasoning_content": THOUGHT}) or "", (THOUGHT, NAME))
    return AnswerForm(answer, thought, _learn_call(turn, answer), (pieces[0], pieces[1]) if pieces else None)


def _divergence(first: str, second: str) -> int:
    """Return where two texts part, not within a tag."""
    shared = commonprefix([first, second])
    tag = shared.rfind("<")
    return (
        tag
        if tag >= 0 and len(shared) < len(first) and not re.search(r"[>\s]", shared[tag:])
        else len(shared)
    )


def _calling(calls: list[tuple[str, int]]) -> Message:
    arguments = dict(zip(KEYS, VALUES, strict=True))
    made: list[ToolCall] = [
        {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for name, number in calls
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


def _learn_call(turn: Any, answer: str) -> CallForm | None:
    one = turn(_calling([(NAME, 0)])) or ""
    two = turn(_calling([(NAME, 0), (NAME2, 1)])) or ""
    pieces = _between(one, (NAME, KEYS[0], VALUES[0], KEYS[1], VALUES[1]))
    if pieces is None:
        return None
    opening = pieces[0].removeprefix(commonprefix([pieces[0], answer]))
    joints = _between(two, (NAME, VALUES[1], NAME2))
    again = _common_suffix(opening, joints[2]) if joints else opening
    return CallForm(opening, again, pieces[1], pieces[2], pieces[3], pieces[5])


def _between(text: str, marks: Sequence[str]) -> list[str] | None:
    """Return the texts before, between and after marks that follow one another; None: they do not."""
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(piece)
    return [*pieces, text]


def _common_suffix(first: str, second: str) -> str:
    return commonprefix([first[::-1], second[::-1]])[::-1]

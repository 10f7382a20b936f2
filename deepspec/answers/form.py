"""How a chat template writes the assistant's turns, learnt from renderings of stand-ins: no list of model families.

A template shows, when it renders a turn made of stand-ins, what it puts before and between a thought, an answer and a
tool call. The same text tells the parts of what the target wrote (`AnswerForm.parse`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from deepspec.answers.calls import NAME, TOOLS, CallForm, between, calling, learn_call
from deepspec.errors import DeepSpecError
from deepspec.messages.message import Message
from deepspec.messages.tools import ToolCall

USER: Message = {"role": "user", "content": "question"}
ANSWER, THOUGHT = "answerQ", "thoughtQ"
CLOSING_THOUGHT = "</think>"


@dataclass(frozen=True)
class AnswerForm:
    """The parts of an assistant's turn, as the target writes them behind the generation prompt.

    Attributes:
        answer: text before an answer without a thought; often empty.
        thought: text before a thought, and between thought and answer; None: the template shows no thoughts.
        thought_call: text before a thought, and between it and the name of a tool.
        call: of tool calls; None: the template shows none, or no tools are offered.
        ending: text between an answer and its stop token; often empty.
    """

    answer: str
    thought: tuple[str, str] | None
    call: CallForm | None
    thought_call: tuple[str, str] | None = None
    ending: str = ""

    def parse(self, text: str) -> Message | None:
        """Return what the target wrote as a message of the template; None: a tool call that cannot be read."""
        message: Message = {"role": "assistant", "content": text}
        thought, rest = self._split(text)
        calls = self._calls(rest)
        if calls is None:
            return None
        prefix = self.answer.strip()
        opened = bool(prefix) and rest.startswith(prefix)
        if calls and self.call:
            rest = rest[: self.call.begins(rest)].strip()
            message["tool_calls"] = calls
        if thought is not None:
            message["reasoning_content"] = thought
        if calls or thought is not None or opened:
            message["content"] = rest.removeprefix(prefix)
        if ending := self.ending.strip():
            message["content"] = message["content"].removesuffix(ending)
        return message

    def _calls(self, text: str) -> list[ToolCall] | None:
        """Return the calls in what follows a thought; an answer in words may begin as a call does."""
        prefix = self.answer.strip()
        if not self.call:
            return []
        if prefix and text.lstrip().startswith(prefix):
            if prefix.startswith(self.call.opening.strip()):
                return []
            text = text.lstrip().removeprefix(prefix)
        return self.call.parse(text)

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
        return _until_stop(target, whole[_divergence(before, whole) :])

    words = turn({"role": "assistant", "content": ANSWER}) or ""
    answer, _, ending = words.partition(ANSWER)
    thought = None
    shown = turn({"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}) or ""
    if THOUGHT in shown and ANSWER in shown and shown.index(THOUGHT) < shown.index(ANSWER):
        opening, _, rest = shown.partition(THOUGHT)
        thought = (opening, rest.partition(ANSWER)[0])
    if not tools:
        return AnswerForm(answer, thought, None, ending=ending)
    pieces = between(turn(calling([NAME]) | {"reasoning_content": THOUGHT}) or "", (THOUGHT, NAME))
    call = learn_call(turn, answer, words + shown)
    return AnswerForm(answer, thought, call, (pieces[0], pieces[1]) if pieces else None, ending)


def _divergence(first: str, second: str) -> int:
    """Return where two texts part, not within a tag."""
    shared = commonprefix([first, second])
    tag = shared.rfind("<")
    return (
        tag
        if tag >= 0 and len(shared) < len(first) and not re.search(r"[>\s]", shared[tag:])
        else len(shared)
    )


def _until_stop(target: Any, text: str) -> str:
    """Return a rendered turn up to its stop token."""
    for token in target.tokenizer.convert_ids_to_tokens(sorted(target.stop_ids)):
        text = text.partition(token)[0]
    return text

"""Whether a template only appends turns to a conversation or writes its history anew, found out by rendering once.

Where it appends, a conversation is one row, and an answer's ids stay as they were generated. Where it does not (earlier
thoughts are cut out, say), the next prompt begins another row: ids are always those that an engine was given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deepspec.answers.form import ANSWER, CLOSING_THOUGHT, THOUGHT, TOOLS, USER, AnswerForm, learn_form
from deepspec.answers.turns import after_answer, squeezed
from deepspec.errors import DeepSpecError
from deepspec.messages.message import Message
from deepspec.messages.prompt import Chat


class Histories:
    """What was found of the target's template, for each set of template arguments, with and without tools."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self._found: dict[str, History] = {}

    def of(self, chat: Chat) -> History:
        """Return what was found for a conversation's arguments and tools."""
        options = dict(chat.chat_template_kwargs)
        key = json.dumps([options, bool(chat.tools)], sort_keys=True, default=str)
        if key not in self._found:
            self._found[key] = History(self.target, bool(chat.tools), options)
        return self._found[key]

    def describe(self) -> list[dict[str, Any]]:
        """Return what was found, for the data set's manifest."""
        return [
            {
                "chat_template_kwargs": history.options,
                "tools": history.tools,
                "history": "kept" if history.appends else "rewritten",
                "shows_thoughts": history.form.thought is not None,
                "shows_calls": history.form.call is not None,
            }
            for _, history in sorted(self._found.items())
        ]


class History:
    """One template with one set of arguments.

    Attributes:
        form: how it writes the assistant's turns.
        appends: whether it keeps earlier turns as they were.
    """

    def __init__(self, target: Any, tools: bool, options: Mapping[str, Any]) -> None:
        self.tools, self.options = tools, {**target.chat_template_kwargs, **options}
        self._target, self._tools, self._options = target, TOOLS if tools else [], options
        self.form: AnswerForm = learn_form(target, tools, options)
        self.appends: bool = all(self._kept(text) for text in self._probes())

    def _probes(self) -> list[str]:
        """Return answers as the target may write them, with and without a thought."""
        probes = [f"{self.form.answer}{ANSWER}", f"<think>\n{THOUGHT}\n{CLOSING_THOUGHT}\n\n{ANSWER}"]
        if self.form.thought:
            opening, middle = self.form.thought
            probes.append(f"{opening}{THOUGHT}{middle}{ANSWER}")
        else:
            probes.append(f"{THOUGHT}\n{CLOSING_THOUGHT}\n\n{ANSWER}")
        return probes

    def _kept(self, text: str) -> bool:
        message = self.form.parse(text)
        if message is None:
            return False
        try:
            tail = after_answer(self._target, [USER], [USER], tools=self._tools, options=self._options)
            return closes(self._target, tail) and keeps(
                self._target, [USER], text, [USER, message, USER], self._tools, self._options
            )
        except DeepSpecError:
            return False


def keeps(
    target: Any,
    asked: Sequence[Message],
    text: str,
    then: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> bool:
    """Return whether a later prompt shows an earlier one and its answer as they were, blanks aside.

    Args:
        asked: the messages of the earlier prompt.
        text: of the answer, as the target wrote it.
        then: the messages of the later prompt.
    """
    earlier = target.chat_text(asked, True, tools, options) + text
    return squeezed(target.chat_text(then, True, tools, options)).startswith(squeezed(earlier))


def closes(target: Any, tail: Sequence[int]) -> bool:
    """Return whether what a template puts behind an answer can follow what the target wrote.

    It cannot where the history closes a turn with a token of the template with which the target ends no answer.
    """
    special = {*target.tokenizer.all_special_ids, *target.tokenizer.added_tokens_decoder}
    for token in tail:
        if token in target.stop_ids:
            return True
        if target.tokenizer.decode([token]).strip():
            return token not in special
    return True

"""A conversation as the target saw it: token ids and loss mask, turn by turn, for any chat template.

An answer's ids are kept exactly as generated, stop token included; text decoded and tokenised again can come
out as other ids, and a draft trained on those learns a sequence that the target never produced. Where the template
only appends, each turn follows the ids so far and only the template's text between two turns is tokenised
(`between_turns`): the conversation is one row. Where the next prompt does not begin with those ids, because the
template writes the history anew, it begins another row.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import dropwhile
from typing import Any

from deepspec.answers.history import Histories, keeps
from deepspec.answers.turns import answer_text, between_turns, squeezed
from deepspec.errors import DeepSpecError
from deepspec.messages.message import Message
from deepspec.messages.prompt import Prompt, Slot
from deepspec.messages.tools import ToolCall


class UnusableError(Exception):
    """This conversation cannot become a training row; the message is the reason that failures.jsonl gives."""


class Conversation:
    """One prompt on its way to its training rows.

    Let the target continue `prompt_ids` by at most `room` tokens, hand its answer to `add_answer`, and go on
    until `prompt_ids` is None. The conversation ends with its last turn, with an answer that was cut short (the target
    never closed that turn), where the next turn would not fit, or where the target calls a tool whose result the
    source does not have; `endings` says why.

    Args:
        target: anything with `tokenizer`, `stop_ids`, `max_length`, `chat_text` and `chat_ids`.
        max_new_tokens: of one answer.
        max_length: of the whole conversation, in tokens; the target's own limit holds too.
        histories: what is known of the target's template; None: to be found out.
        rendered: every prompt is rendered from the messages, as a server does it; False: answers' ids are kept.

    Attributes:
        messages: of the row that is being written: role and text, answers as the target wrote them.
        input_ids, loss_mask, finish_reasons: of the same row.
        answered: answers so far, in all rows.
        endings: what happened other than in the source, in words.
    """

    def __init__(
        self,
        target: Any,
        prompt: Prompt,
        max_new_tokens: int,
        max_length: int,
        histories: Histories | None = None,
        rendered: bool = False,
    ) -> None:
        self.target = target
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.max_length = min(max_length, target.max_length)
        self.messages: list[dict[str, str]] = []
        self.input_ids: list[int] = []
        self.loss_mask: list[int] = []
        self.finish_reasons: list[str] = []
        self.answered = 0
        self.endings: list[str] = []
        self._histories = histories or Histories(target)
        self._rendered = rendered
        self._slots: list[Slot] = prompt.chat.slots()
        self._place: int | None = 0
        self._said: list[Message] = []  # as the template is given them
        self._rows: list[dict[str, Any]] = []  # finished ones
        self.prompt_ids: list[int] | None = self._next_prompt()
        if self.prompt_ids is None:
            raise UnusableError(f"the prompt leaves no room for an answer within {self.max_length} tokens")

    @property
    def room(self) -> int:
        """Return how many tokens the next answer may have."""
        return min(self.max_new_tokens, self.max_length - len(self.prompt_ids or []))

    @property
    def slot(self) -> Slot:
        """Return the place of the next answer."""
        return self._slots[self._place or 0]

    @property
    def asked(self) -> list[Message]:
        """Return the messages that the next answer completes, as the template is given them."""
        return [*self._said, *self.slot.before]

    def add_answer(self, tokens: list[int], finish_reason: str, message: Message | None = None) -> None:
        """Append the target's answer to `prompt_ids`.

        Args:
            tokens: as generated; the last one is a stop token where `finish_reason` is "stop".
            message: what the tokens say, where it is known; None: it is read from their text.

        Raises:
            UnusableError: the answer is not what its finish reason says, or does not fit.
        """
        self._check(tokens, finish_reason)
        prompt_ids = self.prompt_ids or []
        if prompt_ids[: len(self.input_ids)] != self.input_ids:
            self._begin_row()
        asked, slot, text = self.asked, self.slot, self._text(tokens)
        message = message or self._read(text)
        shown = [{"role": one["role"], "content": one["content"]} for one in slot.before]
        self.messages = [*self.messages, *shown, {"role": "assistant", "content": text}]
        self._said = [*asked, message or {"role": "assistant", "content": text}]
        self.loss_mask += [0] * (len(prompt_ids) - len(self.input_ids)) + [1] * len(tokens)
        self.input_ids = [*prompt_ids, *tokens]
        self.finish_reasons.append(finish_reason)
        self.answered += 1
        self._place = self._next_place(slot, message) if finish_reason == "stop" else None
        try:
            self.prompt_ids = self._next_prompt(asked, text)
        except UnusableError as error:
            self._place = self.prompt_ids = None
            self.endings.append(f"the next turn: {error}")
        if self.prompt_ids is None and self._place is not None:
            self.endings.append("the next turn would not fit")

    def rows(self) -> list[dict[str, Any]]:
        """Return the columns of the training rows that differ between rows."""
        rows = [*self._rows, self._row()]
        if len(rows) > 1:
            for number, row in enumerate(rows):
                row["id"], row["prompt"] = f"{self.prompt.id}-{number}", self.prompt.id
        return rows

    def _row(self) -> dict[str, Any]:
        row = {
            "id": self.prompt.id,
            "source": self.prompt.source,
            "messages": self.messages,
            "input_ids": self.input_ids,
            "loss_mask": self.loss_mask,
            "finish_reasons": self.finish_reasons,
        }
        chat = self.prompt.chat
        if self._said != self.messages or chat.tools or chat.chat_template_kwargs:
            form = {"messages": self._said, "tools": list(chat.tools)}
            options = dict(chat.chat_template_kwargs)
            row["chat"] = json.dumps(form | {"chat_template_kwargs": options}, ensure_ascii=False)
        if chat.metadata:
            row["metadata"] = json.dumps(dict(chat.metadata), ensure_ascii=False, default=str)
        return row

    def _begin_row(self) -> None:
        self._rows.append(self._row())
        self.input_ids, self.loss_mask, self.finish_reasons = [], [], []

    def _read(self, text: str) -> Message | None:
        """Read the target's text as a message; None: it calls a tool in a way that cannot be read.

        Without tools, and where nothing follows, there is nothing to be told apart.
        """
        chat = self.prompt.chat
        if not chat.tools and (self._place or 0) + 1 == len(self._slots):
            return {"role": "assistant", "content": text}
        return self._histories.of(chat).form.parse(text)

    def _next_place(self, slot: Slot, message: Message | None) -> int | None:
        """Return the slot that the target answers next, or None where the conversation is over."""
        place = (self._place or 0) + 1
        if message is None:
            self.endings.append("a tool call that cannot be read")
            return None
        made, recorded = _called(message), _called(slot.recorded)
        if made and made != recorded:
            self.endings.append("another tool was called than in the source")
            return None
        if place == len(self._slots):
            return None
        results = self._slots[place].before[:1] and self._slots[place].before[0]["role"] == "tool"
        if made and slot.recorded:
            own, theirs = message["tool_calls"], slot.recorded["tool_calls"]
            message["tool_calls"] = [
                {**call, "id": known["id"]} for call, known in zip(own, theirs, strict=True)
            ]
            if not all(_same_arguments(*pair) for pair in zip(own, theirs, strict=True)):
                self.endings.append("a tool was called with other arguments than in the source")
        elif results:
            self.endings.append("a tool call of the source was not made, its results are left out")
            while place < len(self._slots) and not self._without_results(place):
                place += 1
        return place if place < len(self._slots) else None

    def _without_results(self, place: int) -> bool:
        """Take leading tool results out of a slot; return whether anything is left to be answered there."""
        slot = self._slots[place]
        left = tuple(dropwhile(lambda message: message["role"] == "tool", slot.before))
        self._slots[place] = replace(slot, before=left)
        return bool(left)

    def _next_prompt(self, earlier: list[Message] | None = None, text: str = "") -> list[int] | None:
        """Return the ids that the next answer continues, or None where the conversation is over.

        Args:
            earlier: the messages of the prompt before, which `text` answered.

        Raises:
            UnusableError: the template refuses the conversation.
        """
        if self._place is None:
            return None
        try:
            ids = self._prompt_ids(earlier, text)
            self._note_left_out()
        except DeepSpecError as error:
            raise UnusableError(str(error)) from None
        return ids if len(ids) < self.max_length else None

    def _note_left_out(self) -> None:
        """Note messages that the template does not show: the target never saw them."""
        chat = self.prompt.chat
        if chat.plain:
            return
        shown = squeezed(self.target.chat_text(self.asked, True, chat.tools, chat.chat_template_kwargs))
        for message in self.slot.before:
            if message["role"] != "tool" and squeezed(message["content"]) not in shown:
                self.endings.append(f"the template leaves a message of the {message['role']} out")

    def _prompt_ids(self, earlier: list[Message] | None, text: str) -> list[int]:
        chat, asked = self.prompt.chat, self.asked
        if earlier is not None and not self._rendered and self._appends(earlier, text):
            between = between_turns(
                self.target,
                earlier,
                *self.slot.before,
                answer=self._said[-1],
                tools=chat.tools,
                options=chat.chat_template_kwargs,
            )
            return [*self.input_ids, *between]
        return self.target.chat_ids(asked, True, chat.tools, chat.chat_template_kwargs)

    def _appends(self, earlier: list[Message], text: str) -> bool:
        chat = self.prompt.chat
        return self._histories.of(chat).appends and keeps(
            self.target, earlier, text, self.asked, chat.tools, chat.chat_template_kwargs
        )

    def _check(self, tokens: list[int], finish_reason: str) -> None:
        if finish_reason not in ("stop", "length"):
            raise UnusableError(f"the answer ended with {finish_reason!r}")
        body = tokens[:-1] if finish_reason == "stop" else tokens
        if not tokens or (finish_reason == "stop" and tokens[-1] not in self.target.stop_ids):
            raise UnusableError(f"the answer ended with {finish_reason!r} but has no such last token")
        if not self.target.stop_ids.isdisjoint(body):
            raise UnusableError("a stop token stands inside the answer")
        length = len(self.prompt_ids or []) + len(tokens)
        if length > self.max_length:
            raise UnusableError(f"the conversation has {length} tokens, more than {self.max_length}")

    def _text(self, tokens: list[int]) -> str:
        stopped = tokens[-1] in self.target.stop_ids
        return answer_text(self.target, tokens[:-1] if stopped else tokens)


def _same_arguments(own: ToolCall, recorded: ToolCall) -> bool:
    """Return whether a target's call has the recorded arguments; where its template writes bare texts, as texts."""
    said, known = own["function"]["arguments"], recorded["function"]["arguments"]
    return said.keys() == known.keys() and all(
        said[key] == value or said[key] in (str(value), json.dumps(value, ensure_ascii=False))
        for key, value in known.items()
    )


def _called(message: Message | None) -> list[str]:
    return [call["function"]["name"] for call in message.get("tool_calls", [])] if message else []

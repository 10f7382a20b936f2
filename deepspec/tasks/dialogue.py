"""A task's prompt as the target meets it: what it is asked before each of its answers.

It answers wherever the prompt has the assistant speak, and behind the last message (`Chat.slots`). Its own answers
stand in the history, as a user would have them there. Only a recorded call of tools stands as the source has it,
whatever the target wrote in its place: the results that follow are of that call, and every context stays the same for
every draft.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from deepspec.messages.message import Message
from deepspec.messages.prompt import Chat


def to_be_answered(chat: Chat) -> Chat:
    """Return a conversation as a task has it: without metadata, and where it is only talk, as its user turns alone."""
    talk = all(
        message.keys() == {"role", "content"}
        if message["role"] == "user"
        else message["role"] == "assistant" and not message.get("tool_calls")
        for message in chat.messages
    )
    if talk and not chat.tools and not chat.chat_template_kwargs:
        return Chat.of_turns(chat.turns)
    return replace(chat, metadata={}, reply={})


def turns_of(chat: Chat) -> list[Any]:
    """Return what is asked turn by turn, as JSON: a user's text, or the messages since the answer before.

    A prompt of user turns alone is the list of their texts; the first turn of any other has tools and template
    arguments with it.
    """
    if chat.plain:
        return list(chat.turns)
    turns: list[Any] = []
    recorded: Message | None = None
    for slot in chat.slots():
        turns.append([*_standing(recorded), *slot.before])
        recorded = slot.recorded
    first = {"messages": turns[0], "tools": list(chat.tools)}
    return [first | {"chat_template_kwargs": dict(chat.chat_template_kwargs)}, *turns[1:]]


def first_turn(chat: Chat) -> Chat:
    """Return the conversation up to the first answer."""
    return replace(chat, messages=chat.slots()[0].before)


def longest(chats: Iterable[Chat]) -> Chat:
    """Return the conversation whose first user message is the longest."""
    return max(chats, key=lambda chat: len(chat.turns[0]))


def prompt_ids(target: Any, chat: Chat, answers: Sequence[str] = ()) -> list[int]:
    """Return the ids that the target's next answer continues, in its chat template.

    Args:
        target: anything with `chat_ids`.
        answers: texts of its answers so far.

    Raises:
        DeepSpecError: the template refuses the conversation.
    """
    messages: list[Message] = []
    slots = chat.slots()
    for slot, text in zip(slots, answers, strict=False):
        own: Message = {"role": "assistant", "content": text}
        messages += [*slot.before, *(_standing(slot.recorded) or [own])]
    messages += slots[len(answers)].before
    return target.chat_ids(messages, True, chat.tools, chat.chat_template_kwargs)


def _standing(recorded: Message | None) -> list[Message]:
    """Return the recorded message where it stands in the history: where it calls tools."""
    return [recorded] if recorded and recorded.get("tool_calls") else []

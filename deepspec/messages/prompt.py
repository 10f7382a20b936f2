"""Prompts: conversations that the target is to take part in, one JSON object a line.

User turns alone are `{"id", "source", "turns": [...]}`. Whatever has more is `{"id", "source", "messages": [...]}` with
`tools`, `chat_template_kwargs` and `metadata` where there are any, or `{"id", "source", "input_ids", "loss_mask"}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any

from deepspec.errors import DeepSpecError
from deepspec.files import digest
from deepspec.messages.errors import BadRowError
from deepspec.messages.message import Message, in_order, read_messages
from deepspec.messages.tools import read_tools

MASKS = (
    "loss_mask",
    "assistant_masks",
    "completion_mask",
)  # names of a loss mask; the first that is there is taken
IGNORED = -100  # a label that is not learnt


@dataclass(frozen=True)
class Slot:
    """A place where the assistant speaks.

    Attributes:
        before: messages since the assistant spoke last.
        recorded: what the source has there; None: nothing.
    """

    before: tuple[Message, ...]
    recorded: Message | None


@dataclass(frozen=True)
class Chat:
    """A conversation as its source has it.

    Attributes:
        messages: in order (`deepspec.messages.message.in_order`); empty where the source has token ids.
        tools: as OpenAI's API has them.
        chat_template_kwargs: of this conversation, beside the target's own.
        metadata: whatever the source says of it; handed on.
        input_ids: of a conversation that was tokenised elsewhere.
        loss_mask: 1 where a token of `input_ids` is the assistant's.
        reply: what a server's log says of the last message, its answer: `finish_reason` of one that did not end by
            itself, `token_ids` and `prompt_token_ids` where the server gave them.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    input_ids: tuple[int, ...] = ()
    loss_mask: tuple[int, ...] = ()
    reply: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_turns(cls, turns: tuple[str, ...] | list[str]) -> Chat:
        """Return a conversation of user turns alone."""
        return cls(tuple({"role": "user", "content": turn} for turn in turns))

    @property
    def turns(self) -> tuple[str, ...]:
        """Return the texts of the user's messages."""
        return tuple(message["content"] for message in self.messages if message["role"] == "user")

    @property
    def plain(self) -> bool:
        """Return whether it is user turns and nothing else."""
        return not self.input_ids and self == Chat.of_turns(self.turns)

    def slots(self) -> list[Slot]:
        """Return the places where the assistant speaks.

        They are where the source has assistant messages, and after the last message; where it has none at all, after
        every user message.
        """
        recorded = any(message["role"] == "assistant" for message in self.messages)
        slots: list[Slot] = []
        before: list[Message] = []
        for message in self.messages:
            if message["role"] == "assistant":
                slots.append(Slot(tuple(before), message))
                before = []
                continue
            before.append(message)
            if not recorded and message["role"] == "user":
                slots.append(Slot(tuple(before), None))
                before = []
        if before and not recorded and slots:  # a system message behind the last turn
            before = [*slots.pop().before, *before]
        return [*slots, Slot(tuple(before), None)] if before else slots

    def fields(self) -> dict[str, Any]:
        """Return the JSON fields that `chat_of` reads back."""
        if self.plain:
            return {"turns": list(self.turns)}
        if self.input_ids:
            found: dict[str, Any] = {"input_ids": list(self.input_ids), "loss_mask": list(self.loss_mask)}
        else:
            found = {"messages": list(self.messages)}
        for name in ("tools", "chat_template_kwargs", "metadata", "reply"):
            if value := getattr(self, name):
                found[name] = list(value) if name == "tools" else dict(value)
        return found

    def id(self) -> str:
        """Return 16 hexadecimal digits that identify the conversation, wherever it came from."""
        if self.plain:
            return digest(json.dumps(list(self.turns), ensure_ascii=False))
        said = {name: value for name, value in self.fields().items() if name != "metadata"}
        return digest(json.dumps(said, ensure_ascii=False, sort_keys=True))


@dataclass(frozen=True)
class Prompt:
    """A conversation with its name."""

    id: str
    source: str
    chat: Chat

    @classmethod
    def of_turns(cls, id: str, source: str, turns: tuple[str, ...] | list[str]) -> Prompt:
        """Return a prompt of user turns alone."""
        return cls(id, source, Chat.of_turns(turns))

    @property
    def turns(self) -> tuple[str, ...]:
        """Return the texts of the user's messages."""
        return self.chat.turns


def chat_of(row: Mapping[str, Any]) -> Chat:
    """Read the fields that `Chat.fields` writes.

    Raises:
        BadRowError: they are not a conversation.
    """
    if "input_ids" in row:
        ids, mask = _tokens(row)
        return Chat(input_ids=ids, loss_mask=mask, metadata=mapping(row, "metadata"))
    messages = in_order(read_messages(row.get("messages"), "messages"))[0]
    return Chat(
        tuple(messages),
        tuple(read_tools(row.get("tools"))),
        mapping(row, "chat_template_kwargs"),
        mapping(row, "metadata"),
        reply=mapping(row, "reply"),
    )


def _tokens(row: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return `input_ids` and `loss_mask` of a row that was tokenised elsewhere."""
    given = {"input_ids": row.get("input_ids"), "loss_mask": _mask(row)}
    found = {}
    for name, values in given.items():
        if not is_ids(values):
            raise BadRowError("malformed token ids", f"{name!r} must be a list of numbers from 0 on")
        found[name] = tuple(values)
    ids, mask = found["input_ids"], found["loss_mask"]
    seen = row.get("attention_mask")
    if isinstance(seen, list) and (not all(seen) or len(seen) != len(ids)):
        raise BadRowError(
            "padded token ids", "'attention_mask' leaves tokens out; give the row without padding"
        )
    if len(ids) != len(mask) or not set(mask) <= {0, 1}:
        raise BadRowError(
            "malformed token ids", f"{len(ids)} 'input_ids' need as many 'loss_mask' of 0 and 1"
        )
    if not any(mask) or mask[0]:
        raise BadRowError(
            "malformed token ids", "'loss_mask' must mark an answer, and not from the first token on"
        )
    return ids, mask


def is_ids(values: Any) -> bool:
    """Return whether a value is a list of token ids, or of what else are numbers from 0 on."""
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values
    )


def _mask(row: Mapping[str, Any]) -> Any:
    """Return the loss mask as 0 and 1, under the names that other trainers give it, or from `labels`."""
    mask = next((row[name] for name in MASKS if row.get(name) is not None), None)
    if isinstance(mask, list):
        return [int(value) if isinstance(value, bool) else value for value in mask]
    labels, ids = row.get("labels"), row.get("input_ids")
    if mask is not None or not isinstance(labels, list) or not isinstance(ids, list):
        return mask
    if len(labels) != len(ids) or any(a not in (b, IGNORED) for a, b in zip(labels, ids, strict=True)):
        raise BadRowError("malformed token ids", f"'labels' must repeat 'input_ids', or hold {IGNORED}")
    return [int(label != IGNORED) for label in labels]


def mapping(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a field that holds an object, or JSON text of one; a missing one is empty.

    Raises:
        BadRowError: it holds something else.
    """
    value = row.get(name)
    if value in (None, ""):
        return {}
    if isinstance(value, str) and value.strip():
        with suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise BadRowError(f"malformed {name}", f"{name!r} must be an object")
    return dict(value)


def plain_line(id: str, source: str, turns: Sequence[str]) -> bytes:
    """Return the line of a prompt of user turns alone, as the prompts stage writes it."""
    texts = ", ".join(map(encode_basestring, turns))
    return f'{{"id": {encode_basestring(id)}, "source": {encode_basestring(source)}, "turns": [{texts}]}}\n'.encode()


def parse_prompt(line: bytes, where: str) -> Prompt:
    """Read one line of a prompt file.

    Raises:
        DeepSpecError: it is not a prompt; `where` it stands is named.
    """
    value = _row(line, where)
    if _is_chat(value):
        return Prompt(value["id"], value["source"], _chat(value, where))
    return Prompt.of_turns(value["id"], value["source"], value["turns"])


def check_prompt(line: bytes, where: str) -> str:
    """Return the id of one line of a prompt file, which is known to be a prompt then.

    Raises:
        DeepSpecError: it is not; `where` it stands is named.
    """
    value = _row(line, where)
    if _is_chat(value):
        _chat(value, where)
    return value["id"]


def _row(line: bytes, where: str) -> dict[str, Any]:
    """Read a line's object, and check its id, its source and its user turns where it has no more."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DeepSpecError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DeepSpecError(f"{where}: expected a JSON object, found {type(value).__name__}")
    for key in ("id", "source"):
        if not _is_text(value.get(key)):
            raise DeepSpecError(f"{where}: {key!r} must be a non-empty string, found {value.get(key)!r}")
    if _is_chat(value):
        return value
    turns = value.get("turns")
    if not isinstance(turns, list) or not turns or not all(map(_is_text, turns)):
        raise DeepSpecError(f"{where}: 'turns' must be a list of non-empty strings (prompt {value['id']!r})")
    return value


def _is_chat(value: Mapping[str, Any]) -> bool:
    return "messages" in value or "input_ids" in value


def _chat(value: Mapping[str, Any], where: str) -> Chat:
    try:
        return chat_of(value)
    except BadRowError as error:
        raise DeepSpecError(f"{where}: {error} (prompt {value['id']!r})") from None


def _is_text(value: Any) -> bool:
    """Return whether a value is non-blank text that UTF-8 can hold (JSON also spells lone surrogates)."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True

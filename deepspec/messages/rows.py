"""Rows that others wrote, read into conversations: which columns hold what, for every common layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from deepspec.messages.errors import BadRowError, RefusedRowError
from deepspec.messages.message import MEDIA, Message, in_order, read_messages
from deepspec.messages.prompt import Chat, chat_of, is_ids, mapping
from deepspec.messages.tools import read_tools

COLUMNS = (
    "turns",
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "question",
    "instruction",
    "problem",
    "query",
    "input",
)
REQUESTS = ("request", "body")  # of a server's log, with a chat request in it
CHAT = ("user", "assistant")
ENDED = (None, "stop", "tool_calls", "function_call")  # finish reasons of a whole answer
_SPARE_DEPTH = 64  # levels of nesting
_OBJECTS = re.compile(r"\s*\[\s*\{")  # the beginning of a list of objects


@dataclass(frozen=True)
class Columns:
    """Names to look for in a row; of each list, the first that the row has is taken.

    Attributes:
        messages: a string, a list of strings or a list of messages.
        system: the system prompt, of rows whose messages have none.
        answers: what was answered to a row of one prompt: a string or a list of messages.
        thoughts: what was thought before that answer.
        history: pairs of a prompt and its answer, before the messages.
        tools: as a list, or as JSON text.
        metadata: handed on as they are.
        leave_out: roles whose messages are left out, because the preset has their content from another column.
    """

    messages: tuple[str, ...] = COLUMNS
    system: tuple[str, ...] = ("system", "system_prompt")
    answers: tuple[str, ...] = ("completion", "response", "answer", "output")
    thoughts: tuple[str, ...] = ("reasoning_content", "thinking")
    history: tuple[str, ...] = ("history",)
    tools: tuple[str, ...] = ("tools", "functions")
    metadata: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()

    def first(self, row: Mapping[str, Any], kind: str) -> str | None:
        """Return the first of the names of a kind that the row has a value for."""
        return next((name for name in getattr(self, kind) if row.get(name) not in (None, "", [])), None)


USUAL = Columns()


@dataclass(frozen=True)
class Read:
    """A conversation, and what of its row was left out, in words."""

    chat: Chat
    left_out: tuple[str, ...] = ()


def read_row(row: Any, columns: Columns = USUAL) -> Read:
    """Read one row of a file or a dataset.

    Raises:
        BadRowError: it is no conversation, or one that cannot be used (`RefusedRowError`).
    """
    if not isinstance(row, Mapping):
        raise BadRowError("not an object", f"expected an object, found {type(row).__name__}")
    row, reply = _logged({name: value for name, value in row.items() if not _is_nan(value)})
    if any(row.get(name) not in (None, "", [], {}) for name in MEDIA):
        raise RefusedRowError("an image or another medium", "the row comes with an image, a video or a sound")
    column = columns.first(row, "messages")
    if column is None:
        column = next((name for name in columns.messages if row.get(name) is not None), None)
        if row.get("input_ids") is not None:
            return Read(
                _storable(replace(chat_of({**row, "metadata": None}), metadata=_metadata(row, columns)))
            )
        if column is None:
            raise BadRowError("no prompt", f"none of the fields {', '.join(columns.messages)}")
    messages = read_messages(_unpacked(row[column]), column)
    _check_turns(messages, column)
    if isinstance(row[column], str) and column == "instruction" and isinstance(row.get("input"), str):
        messages[0]["content"] += f"\n\n{row['input']}" if row["input"] else ""
    if columns.leave_out:
        messages = [message for message in messages if message["role"] not in columns.leave_out]
    messages = [*messages, *_answer(row, columns, messages)]
    messages = [
        *_system(row, columns, messages),
        *(_history(row, columns) if isinstance(row[column], str) else []),
        *messages,
    ]
    ordered, left_out = in_order(messages)
    tools = columns.first(row, "tools")
    chat = Chat(
        tuple(ordered),
        tuple(read_tools(row[tools])) if tools else (),
        mapping(row, "chat_template_kwargs"),
        _metadata(row, columns),
        reply=reply,
    )
    return Read(_storable(chat), tuple(left_out))


def _is_nan(value: Any) -> bool:
    """Return whether a value is what a table has in place of a missing one."""
    return isinstance(value, float) and value != value


def _logged(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return the conversation of a server's log, its request with the first choice of its response.

    What the server says of that answer comes with it (`Chat.reply`).
    """
    row = {name: _object(value) if name in (*REQUESTS, "response") else value for name, value in row.items()}
    request = next((row[name] for name in REQUESTS if isinstance(row.get(name), Mapping)), None)
    if request is not None and not any(row.get(name) is not None for name in COLUMNS):
        inner = request.get("body")
        request = inner if isinstance(inner, Mapping) else request
        extra = request.get("extra_body")  # of a client's log
        row = {**{name: row[name] for name in ("metadata", "response", "choices") if name in row}, **request}
        row |= extra if isinstance(extra, Mapping) else {}
    response: Mapping[str, Any] = row
    for name in ("response", "body"):
        inner = response.get(name)
        response = inner if isinstance(inner, Mapping) else response
    choices, messages = response.get("choices"), row.get("messages")
    first = choices[0] if isinstance(choices, list) and choices else None
    said = first.get("message") if isinstance(first, Mapping) else None
    if not (isinstance(first, Mapping) and isinstance(said, Mapping) and isinstance(messages, list)):
        return row, {}
    return {**row, "messages": [*messages, {"role": "assistant", **said}]}, _ended(first, response)


def _ended(choice: Mapping[str, Any], response: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the answer of a log ended, where that is otherwise than by itself, and its ids, where it has them."""
    reply: dict[str, Any] = {}
    if choice.get("finish_reason") not in ENDED:
        reply["finish_reason"] = str(choice["finish_reason"])
    if choice.get("token_ids") and is_ids(choice["token_ids"]):
        prompt = response.get("prompt_token_ids") or choice.get("prompt_token_ids")
        reply["token_ids"] = choice["token_ids"]
        reply |= {"prompt_token_ids": prompt} if prompt and is_ids(prompt) else {}
    return reply


def _object(value: Any) -> Any:
    """Return the object that a JSON text holds; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _metadata(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """Return what the row says of itself, as JSON holds it: dates and the like as text."""
    value = row.get("metadata")
    if isinstance(value, str) and value.strip():
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    found: dict[str, Any] = {} if value in (None, "") else {"metadata": value}
    found = dict(value) if isinstance(value, Mapping) else found
    found |= {name: row[name] for name in columns.metadata if name in row}
    try:
        return json.loads(json.dumps(found, default=str), parse_constant=lambda _: None)
    except (TypeError, ValueError):
        raise BadRowError(
            "malformed metadata", "'metadata' has a name or a number that JSON cannot hold"
        ) from None
    except RecursionError:
        raise BadRowError("nested too deeply") from None


def _storable(chat: Chat) -> Chat:
    """Return a conversation that can be written as JSON; with some depth to spare for whoever does.

    Raises:
        BadRowError: it holds half a character, or is nested too deeply.
    """
    if chat.plain:
        return chat
    value: Any = chat.fields()
    for _ in range(_SPARE_DEPTH):
        value = [value]
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise BadRowError("half a character", "the row holds a lone surrogate") from None
    except RecursionError:
        raise BadRowError("nested too deeply") from None
    except (TypeError, ValueError):
        raise BadRowError("a value that JSON cannot hold", "tools or arguments hold one") from None
    return chat


def _unpacked(value: Any) -> Any:
    """Return the messages of a column that holds them as JSON text; other text is a prompt."""
    if isinstance(value, str) and _OBJECTS.match(value):
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            if all(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in found):
                return found
    return value


def read_columns(row: Any, columns: Sequence[str]) -> Read:
    """Read named columns of one row: a string, a list of strings or a list of messages each, one behind the other.

    Of mere talk the user turns are read, whatever answers stand between them.

    Raises:
        BadRowError: a column holds something else, or the messages are no conversation.
    """
    if not isinstance(row, Mapping):
        raise BadRowError("not an object", f"expected an object, found {type(row).__name__}")
    messages: list[Message] = []
    for column in columns:
        found = read_messages(row.get(column), column)
        _check_turns(found, column)
        messages += found
    if all(message["role"] in ("user", "assistant") and "tool_calls" not in message for message in messages):
        return Read(Chat.of_turns([message["content"] for message in messages if message["role"] == "user"]))
    ordered, left_out = in_order(messages)
    return Read(Chat(tuple(ordered)), tuple(left_out))


def _check_turns(messages: list[Message], column: str) -> None:
    turns = [message["content"] for message in messages if message["role"] == "user"]
    if not turns or not all(turn.strip() for turn in turns):
        raise BadRowError(
            "an empty user turn" if turns else "no user turn", f"{column!r} has no user turn, or an empty one"
        )


def _system(row: Mapping[str, Any], columns: Columns, messages: list[Message]) -> list[Message]:
    """Return the system message that a column of its own gives."""
    name = columns.first(row, "system")
    if name is None or any(message["role"] in ("system", "developer") for message in messages):
        return []
    if not isinstance(row[name], str):
        raise BadRowError("a field of another type", f"{name!r} must be a string")
    return [{"role": "system", "content": row[name]}]


def _history(row: Mapping[str, Any], columns: Columns) -> list[Message]:
    """Return the turns before the prompt that a column of its own gives, pairs of a prompt and its answer."""
    name = columns.first(row, "history")
    if name is None:
        return []
    value = row[name]
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        value = [
            {"role": role, "content": text} for pair in value for role, text in zip(CHAT, pair, strict=True)
        ]
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise BadRowError("a field of another type", f"{name!r} must be a list of pairs or of messages")
    return read_messages(value, name)


def _answer(row: Mapping[str, Any], columns: Columns, messages: list[Message]) -> list[Message]:
    """Return the answer that a column of its own gives to a row of one prompt."""
    name = columns.first(row, "answers")
    if name is None or messages[-1]["role"] != "user" or sum(m["role"] == "user" for m in messages) > 1:
        return []
    value = row[name]
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    value = [value] if isinstance(value, Mapping) and "role" in value else value
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        return []  # a list of reference solutions, a number: no answer in words
    answer = read_messages(value, name)
    thought = columns.first(row, "thoughts")
    if thought and isinstance(row[thought], str) and answer and answer[0]["role"] == "assistant":
        answer[0] = {**answer[0], "reasoning_content": row[thought]}
    return answer

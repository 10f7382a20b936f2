"""One message, whoever spelt it: OpenAI's `role`/`content` and ShareGPT's `from`/`value` are read into one form.

`content` is text, `tool_calls` have objects as arguments, and every call and result has an id. What cannot be had so is
a `BadRowError`, whose kind manifests count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Required, TypedDict

from deepspec.messages.errors import BadRowError, RefusedRowError
from deepspec.messages.tools import CALL, ToolCall, has_calls, read_call, read_calls

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "claude": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "tool_results": "tool",
}
CALLING = ("function_call", "tool_call", "tool_calls")  # roles whose text is a call
CONTENT = ("content", "value", "text", "refusal")
RESULT = (*CONTENT, "output", "result")  # of a tool
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
THOUGHT_PARTS = ("thinking", "reasoning")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
MEDIUM = re.compile("image|audio|video|file|document|media", re.IGNORECASE)  # in the type of a part
ATTACHED = (*MEDIA, "image_url", "attachments")  # fields of a message that has a medium
RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)


class Message(TypedDict, total=False):
    """What a chat template is given."""

    role: Required[str]
    content: Required[str]
    reasoning_content: str
    tool_calls: list[ToolCall]
    tool_call_id: str
    name: str


def read_messages(value: Any, column: str) -> list[Message]:
    """Read a list of messages, or of user turns.

    Raises:
        BadRowError: something else, an unknown role, an image or another medium, a malformed tool call.
    """
    if isinstance(value, str):
        value = [value]
    if isinstance(value, Mapping):
        value = _items(value)
    if not isinstance(value, list):
        raise BadRowError(
            "a field of another type", f"{column!r} must be a string or a list, found {type(value).__name__}"
        )
    return [message for item in value for message in _messages(item, column)]


def _items(columns: Mapping[str, Any]) -> Any:
    """Return the messages of a struct of lists, as tables keep a list of structs; anything else as it is."""
    values = columns.values()
    lists = all(isinstance(value, list) for value in values) and len({len(value) for value in values}) == 1
    if not lists or not {"role", "from"} & columns.keys():
        return columns
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def _messages(item: Any, column: str) -> list[Message]:
    """Read one item; several results in one tool message become as many messages."""
    if isinstance(item, str):
        return [{"role": "user", "content": _text(item, column)}]
    if not isinstance(item, Mapping):
        raise BadRowError(
            "a message of another type",
            f"{column!r} must hold strings or messages, found {type(item).__name__}",
        )
    given = item.get("role") if item.get("role") is not None else item.get("from")
    spelt = given.strip().lower() if isinstance(given, str) else None
    role = ROLES.get(spelt) if spelt else None
    if role is None:
        raise BadRowError("an unknown role", f"a message in {column!r} has the role {given!r}")
    if any(item.get(name) not in (None, "", [], {}) for name in ATTACHED):
        raise RefusedRowError("an image or another medium", f"a message in {column!r} comes with one")
    content, thought = _content(item, role, column)
    if role == "tool" or (role == "user" and _only_responses(content)):
        return _results(item, content)
    message: Message = {"role": role, "content": content}
    if role == "assistant":
        calls = read_calls(item, content if spelt in CALLING else None)
        if not calls and CALL.search(content):
            calls = [read_call(found) for found in CALL.findall(content)]
            message["content"] = CALL.sub("", content).strip()
        elif spelt in CALLING:
            message["content"] = ""
        if calls:
            message["tool_calls"] = calls
        if thought:
            message["reasoning_content"] = thought
    if isinstance(item.get("name"), str) and item["name"]:
        message["name"] = item["name"]
    return [message]


def _content(item: Mapping[str, Any], role: str, column: str) -> tuple[str, str]:
    """Return a message's text and its thought."""
    names = RESULT if role == "tool" else CONTENT
    content = next((item[key] for key in names if item.get(key) is not None), None)
    thought = next((item[key] for key in THOUGHTS if item.get(key)), "")
    if not isinstance(thought, str):
        raise BadRowError("a thought that is no text", f"a message in {column!r} has one")
    if role == "tool" and content is not None and not _is_parts(content):
        content = content if isinstance(content, str) else _dumped(content)
    elif isinstance(content, list):
        parts = [_part(part, column) for part in content]
        content = "".join(text for text, _ in parts)
        thought += "".join(thought for _, thought in parts)
    if content is None and role == "assistant" and (has_calls(item) or thought):
        content = ""
    if not isinstance(content, str):
        raise BadRowError("a message without text", f"a message in {column!r} has no text")
    return _text(content, column), _text(thought, column)


def _is_parts(content: Any) -> bool:
    """Return whether a content is a list of texts and typed parts; a tool may as well have returned any list."""
    return isinstance(content, list) and all(
        isinstance(part, str) or (isinstance(part, Mapping) and isinstance(part.get("type"), str))
        for part in content
    )


def _part(part: Any, column: str) -> tuple[str, str]:
    """Return the text and the thought of one part of a content."""
    if isinstance(part, str):
        return part, ""
    if not isinstance(part, Mapping):
        raise BadRowError("a message without text", f"a message in {column!r} has a part that is no text")
    kind = part.get("type") or ("text" if "text" in part else next(iter(part), "text"))
    if kind not in (*TEXT_PARTS, *THOUGHT_PARTS):
        if isinstance(kind, str) and MEDIUM.search(kind):
            raise RefusedRowError(
                "an image or another medium", f"a message in {column!r} has a part of type {kind!r}"
            )
        raise RefusedRowError(
            "a part of an unknown type", f"a message in {column!r} has a part of type {kind!r}"
        )
    text = next((part[key] for key in (kind, "text") if part.get(key) is not None), "")
    if not isinstance(text, str):
        raise BadRowError("a message without text", f"a message in {column!r} has no text")
    return ("", text) if kind in THOUGHT_PARTS else (text, "")


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError):
        raise BadRowError("nested too deeply") from None


def _text(text: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRowError("half a character", f"{column!r} holds a lone surrogate") from None
    return text


def _only_responses(content: str) -> bool:
    """Return whether a message is results of tools and nothing else, as templates without a role for them have it."""
    return content.lstrip().startswith("<tool_response>") and not RESPONSE.sub("", content).strip()


def _results(item: Mapping[str, Any], content: str) -> list[Message]:
    found = ([text.strip() for text in RESPONSE.findall(content)] if _only_responses(content) else []) or [
        content
    ]
    extra = {key: item[key] for key in ("tool_call_id", "name") if isinstance(item.get(key), str)}
    return [{"role": "tool", "content": text, **extra} for text in found]  # type: ignore[typeddict-item]


def in_order(messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
    """Check who may speak when, pair tool results with their calls, and return what was left out, in words.

    Raises:
        BadRowError: no user turn or an empty one, a tool result without its call, a call in the middle whose result is
            not there, or two assistant turns in a row.
    """
    kept: list[Message] = []
    left_out: list[str] = []
    calls: list[ToolCall] = []  # of the last assistant turn, without a result so far
    named = False  # whether the source gave those calls ids
    for given in messages:
        message = given.copy()
        role = message["role"]
        if role == "user" and not message["content"].strip():
            raise BadRowError("an empty user turn")
        if role == "tool":
            message["tool_call_id"] = _claim(message, calls, named)
        elif calls:
            raise RefusedRowError(
                "a tool call without its result", f"no result of {calls[0]['function']['name']!r}"
            )
        if role == "assistant":
            if not any(one["role"] == "user" for one in kept):
                left_out.append("an assistant turn before the first user turn")
                continue
            if kept[-1]["role"] == "assistant":
                raise RefusedRowError("two assistant turns in a row")
            if "tool_calls" in message:
                named = all(call["id"] for call in message["tool_calls"])
                message["tool_calls"] = [
                    {**call, "id": call["id"] or f"call{len(kept):03d}{number:02d}"}
                    for number, call in enumerate(message["tool_calls"])
                ]
                calls = list(message["tool_calls"])
        kept.append(message)
    if not any(message["role"] == "user" for message in kept):
        raise BadRowError("no user turn")
    if calls and kept[-1]["role"] == "tool":
        raise RefusedRowError(
            "a tool call without its result", f"no result of {calls[0]['function']['name']!r}"
        )
    return kept, left_out


def _claim(result: Message, calls: list[ToolCall], named: bool) -> str:
    """Return the id of the call that a result belongs to, by its id, its name or its place, and take the call off."""
    wanted = result.get("tool_call_id")
    if not calls:
        raise RefusedRowError("a tool result without its call")
    known = [call for call in calls if call["id"] == wanted]
    if wanted and not known and named:
        raise RefusedRowError("a tool result without its call", f"a tool result names the call {wanted!r}")
    known = known or [call for call in calls if call["function"]["name"] == result.get("name")]
    call = known[0] if known else calls[0]
    calls.remove(call)
    return call["id"]

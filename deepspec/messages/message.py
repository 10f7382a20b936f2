"""One message, whoever spelt it: OpenAI's `role`/`content` and ShareGPT's `from`/`value` are read into one form.

`content` is text, `tool_calls` have objects as arguments, and every call and result has an id. What cannot be had so is
a `BadRowError`, whose kind manifests count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Required, TypedDict

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALLING = ("function_call", "tool_call")  # roles whose text is a call
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT_PARTS = ("thinking", "reasoning")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
RESPONSE = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)


class Function(TypedDict):
    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    id: str
    type: str
    function: Function


class Message(TypedDict, total=False):
    """What a chat template is given."""

    role: Required[str]
    content: Required[str]
    reasoning_content: str
    tool_calls: list[ToolCall]
    tool_call_id: str
    name: str


class BadRowError(ValueError):
    """A row that cannot be a prompt.

    Args:
        kind: what summaries count it under, without the row's own words.
        found: what was found; None: the kind says it.
    """

    def __init__(self, kind: str, found: str | None = None) -> None:
        super().__init__(found or kind)
        self.kind = kind


class RefusedRowError(BadRowError):
    """A well-formed row that asks for what a text target, or a record, cannot give."""


def read_messages(value: Any, column: str) -> list[Message]:
    """Read a list of messages, or of user turns.

    Raises:
        BadRowError: something else, an unknown role, an image or another medium, a malformed tool call.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise BadRowError(
            "a field of another type", f"{column!r} must be a string or a list, found {type(value).__name__}"
        )
    return [message for item in value for message in _messages(item, column)]


def _messages(item: Any, column: str) -> list[Message]:
    """Read one item; several results in one tool message become as many messages."""
    if isinstance(item, str):
        return [{"role": "user", "content": _text(item, column)}]
    if not isinstance(item, Mapping):
        raise BadRowError(
            "a message of another type",
            f"{column!r} must hold strings or messages, found {type(item).__name__}",
        )
    spelt = item.get("role", item.get("from"))
    role = ROLES.get(spelt.lower()) if isinstance(spelt, str) else None
    if role is None:
        raise BadRowError("an unknown role", f"a message in {column!r} has the role {spelt!r}")
    content, thought = _content(item, role, column)
    if role == "tool":
        return _results(item, content)
    message: Message = {"role": role, "content": content}
    if role == "assistant":
        calls = _calls(item, content if str(spelt).lower() in CALLING else None)
        if not calls and CALL.search(content):
            calls = [_call(found) for found in CALL.findall(content)]
            message["content"] = CALL.sub("", content).strip()
        elif str(spelt).lower() in CALLING:
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
    content = next((item[key] for key in ("content", "value", "text") if item.get(key) is not None), None)
    thought = next((item[key] for key in THOUGHTS if isinstance(item.get(key), str)), "")
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
            if kind in THOUGHT_PARTS:
                thought += part.get(kind) or part.get("text") or ""
            elif kind not in TEXT_PARTS:
                raise RefusedRowError(
                    "an image or another medium", f"a message in {column!r} has a part of type {kind!r}"
                )
            else:
                texts.append(part if isinstance(part, str) else part.get("text") or "")
        if not all(isinstance(text, str) for text in texts):
            raise BadRowError("a message without text", f"a message in {column!r} has no text")
        content = "".join(texts)
    if role == "tool" and not isinstance(content, str) and content is not None:
        content = json.dumps(content, ensure_ascii=False)
    if content is None and role in ("tool", "assistant") and (role == "tool" or _has_calls(item) or thought):
        content = ""
    if not isinstance(content, str):
        raise BadRowError("a message without text", f"a message in {column!r} has no text")
    return _text(content, column), _text(thought, column)


def _text(text: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRowError("half a character", f"{column!r} holds a lone surrogate") from None
    return text


def _has_calls(item: Mapping[str, Any]) -> bool:
    return bool(item.get("tool_calls") or item.get("function_call"))


def _results(item: Mapping[str, Any], content: str) -> list[Message]:
    found = RESPONSE.findall(content) or [content]
    extra = {key: item[key] for key in ("tool_call_id", "name") if isinstance(item.get(key), str)}
    return [{"role": "tool", "content": text, **extra} for text in found]  # type: ignore[typeddict-item]


def _calls(item: Mapping[str, Any], text: str | None) -> list[ToolCall]:
    if text is not None:
        return [_call(text)]
    calls = item.get("tool_calls")
    if calls is None and item.get("function_call"):
        calls = [item["function_call"]]
    if not calls:
        return []
    if not isinstance(calls, list):
        raise BadRowError("a malformed tool call", f"'tool_calls' is a {type(calls).__name__}")
    return [_call(call) for call in calls]


def _call(call: Any) -> ToolCall:
    """Read a call: OpenAI's, or a bare `{"name", "arguments"}`, as an object or as JSON text."""
    if isinstance(call, str):
        call = _json(call)
    if not isinstance(call, Mapping):
        raise BadRowError("a malformed tool call", f"a tool call is a {type(call).__name__}")
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise BadRowError("a malformed tool call", "a tool call has no name")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments) if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise BadRowError("a malformed tool call", f"the arguments of {name!r} are no object")
    return {
        "id": str(call.get("id") or ""),
        "type": "function",
        "function": {"name": name, "arguments": dict(arguments)},
    }


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError("a malformed tool call", f"a tool call is not JSON: {error}") from None


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
    """Return the id of the call that a result belongs to, by its id or its place, and take the call off the list."""
    wanted = result.get("tool_call_id")
    if not calls:
        raise RefusedRowError("a tool result without its call")
    known = [call for call in calls if call["id"] == wanted]
    if wanted and not known and named:
        raise RefusedRowError("a tool result without its call", f"a tool result names the call {wanted!r}")
    call = known[0] if known else calls[0]
    calls.remove(call)
    return call["id"]


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Read the tools of a row: a list, or JSON text of one; bare functions are wrapped as OpenAI's API has them.

    Raises:
        BadRowError: something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise BadRowError("malformed tools", "'tools' is not JSON") from None
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRowError("malformed tools", f"'tools' must be a list, found {type(value).__name__}")
    tools = []
    for tool in value:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRowError("malformed tools", "a tool has no name")
        tools.append({"type": "function", "function": dict(function)})
    return tools

"""Tools and calls of them, whoever spelt them: OpenAI's, its older form, JSON or a Python literal in the text."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypedDict

from deepspec.messages.errors import BadRowError

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_LITERAL = 1 << 16  # characters of a Python literal that is parsed


class Function(TypedDict):
    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    id: str
    type: str
    function: Function


def has_calls(item: Mapping[str, Any]) -> bool:
    """Return whether a message says that it calls a tool."""
    return bool(item.get("tool_calls") or item.get("function_call"))


def read_calls(item: Mapping[str, Any], text: str | None) -> list[ToolCall]:
    """Read the calls of a message.

    Args:
        text: of a message whose role says that its text is a call.

    Raises:
        BadRowError: they are no calls.
    """
    if text is not None and not has_calls(item):
        found = _json(text)
        return [read_call(call) for call in (found if isinstance(found, list) else [found])]
    calls = item.get("tool_calls")
    if isinstance(calls, str):
        calls = _json(calls) if calls.strip() else None
    if calls is None and item.get("function_call"):
        calls = [item["function_call"]]
    if not calls:
        return []
    if not isinstance(calls, list):
        raise BadRowError("a malformed tool call", f"'tool_calls' is a {type(calls).__name__}")
    return [read_call(call) for call in calls]


def read_call(call: Any) -> ToolCall:
    """Read a call: OpenAI's, or a bare `{"name", "arguments"}`, as an object or as text.

    Raises:
        BadRowError: it is no call.
    """
    if isinstance(call, str):
        call = _json(call)
    if not isinstance(call, Mapping):
        raise BadRowError("a malformed tool call", f"a tool call is a {type(call).__name__}")
    function = call.get("function") or call
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise BadRowError("a malformed tool call", "a tool call has no name")
    given = (function.get(key) for key in ("arguments", "parameters", "args"))
    arguments: object = next((value for value in given if value is not None), {})
    if isinstance(arguments, str):
        arguments = _json(arguments) if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise BadRowError("a malformed tool call", f"the arguments of {name!r} are no object")
    return {
        "id": str(call.get("id") or ""),
        "type": "function",
        "function": {"name": name, "arguments": dict(arguments)},
    }


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Read the tools of a row: a list, or text of one; bare functions are wrapped as OpenAI's API has them.

    Raises:
        BadRowError: something else.
    """
    if isinstance(value, str):
        value = _tool(value) if value.strip() else []
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRowError("malformed tools", f"'tools' must be a list, found {type(value).__name__}")
    tools = []
    for tool in value:
        tool = _tool(tool) if isinstance(tool, str) else tool
        function = (tool.get("function") or tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRowError("malformed tools", "a tool has no name")
        tools.append({"type": "function", "function": dict(function)})
    return tools


def _tool(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRowError("malformed tools", "'tools' is not JSON") from None


def _json(text: str) -> Any:
    """Read a call's text: JSON, or a Python literal as some data sets have it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if len(text) < _LITERAL:
            with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return json.loads(json.dumps(ast.literal_eval(text.strip())))
        raise BadRowError("a malformed tool call", f"a tool call is not JSON: {error}") from None

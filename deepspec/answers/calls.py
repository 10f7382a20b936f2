"""How a chat template writes calls of tools, learnt from renderings of stand-ins, and read from what a target wrote.

A call has a name and arguments, keys with values. The text round those is the template's. Where it is JSON's, arguments
are read as JSON; elsewhere that text tells them apart.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from deepspec.messages.message import Message
from deepspec.messages.tools import ToolCall

NAME, NAME2 = "nameQ", "nameZ"
KEYS, VALUES = ("keyQ", "keyZ"), ("valueQ", "valueZ")
NUMBERS = (7717, 7727)
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
_WORDED = re.compile(
    r"\s*(?:[\w{]|$)"
)  # an opening that is told from an answer's words only where it comes first
_MARK = re.compile(r"\s*(<[^>\s]+>|\[[A-Z_]+\])")  # that begins a call
_NAME = r"\s*([\w.\-]+)"
_ID = re.compile(r"call\d{5}")
_JSON = re.compile(r".*\{\s*\"\w+\"\s*:\s*\"", re.DOTALL)


@dataclass(frozen=True)
class ValueForm:
    """Text round the arguments of a call: stand-ins for keys in it are the keys'."""

    value: str  # between a key and its value
    next: str  # between a value and the next key
    closing: str  # after the last value

    def split(self, text: str, start: int, key: str) -> tuple[str, int, bool] | None:
        """Return the value that begins at `start`, where it ends, and whether another key follows; None: no end."""
        found = []
        for more, end in ((True, self.next), (False, self.closing)):
            pattern = re.compile(_loose(end.replace(KEYS[0], key).replace(KEYS[1], key)))
            if end.strip() and (match := pattern.search(text, start)):
                found.append((match.start(), -match.end(), more, end[: len(end) - len(end.lstrip())]))
        if not found:
            return None
        at, behind, more, blanks = min(found)
        value = text[start:at].removeprefix(self.value[len(self.value.rstrip()) :])
        return value.removesuffix(blanks), -behind, more


@dataclass(frozen=True)
class CallForm:
    """Text round a tool call: before its name, between the name and the arguments, round those."""

    opening: str  # before the name of the first call
    again: str | None  # between what closes a call and the name of the next; None: one call at a time
    arguments: str  # between the name and the first key
    quoted: ValueForm  # of texts
    bare: ValueForm  # of numbers
    empty: str | None  # after the name of a call without arguments; None: it cannot be told from others
    mark: str | None  # a tag that only calls have

    def begins(self, text: str) -> int | None:
        """Return where the calls of a text begin; None: there are none."""
        found = re.search(_loose(self.opening), text)
        if not found or (_WORDED.match(self.opening) and text[: found.start()].strip()):
            return None
        return found.start()

    def parse(self, text: str) -> list[ToolCall] | None:
        """Return the calls of a text; empty: none; None: there are some, and they cannot be read."""
        at = self.begins(text)
        if at is None:
            return None if self.mark and self.mark in text else []
        calls: list[ToolCall] = []
        joint = self.opening
        while found := _behind(text, at, joint, _NAME):
            read = self._arguments(text, found.end(), found[1])
            if read is None:
                return None
            arguments, at = read
            function = {"name": found[1], "arguments": arguments}
            calls.append({"id": f"call{len(calls):05d}", "type": "function", "function": function})  # type: ignore[typeddict-item]
            if self.again is None:
                break
            joint = self.again
        return None if not calls or (self.mark and self.mark in text[at:]) else calls

    def _arguments(self, text: str, at: int, name: str) -> tuple[dict[str, Any], int] | None:
        """Return the arguments that follow a name, and where the call ends; None: they cannot be read."""
        if _JSON.fullmatch(self.arguments + KEYS[0] + self.quoted.value):
            return self._object(text, at)
        if self.empty and (none := _behind(text, at, self.empty.replace(NAME, name))):
            return {}, none.end()
        opening = _behind(text, at, self.arguments.replace(NAME, name))
        if not opening:
            return None
        found: dict[str, Any] = {}
        at, more = opening.end(), True
        while more:
            read = self._pair(text, at)
            if read is None:
                return None
            key, found[key], at, more = read
        return found, at

    def _object(self, text: str, at: int) -> tuple[dict[str, Any], int] | None:
        start = text.find("{", at)
        try:
            value, end = json.JSONDecoder().raw_decode(text, start) if start >= 0 else (None, at)
        except (ValueError, RecursionError):
            return None
        closing = _behind(text, end, self.quoted.closing.partition("}")[2])
        return (value, closing.end() if closing else end) if isinstance(value, dict) else None

    def _pair(self, text: str, at: int) -> tuple[str, Any, int, bool] | None:
        """Return the key and the value at `at`, where they end, and whether there are more; None: no such pair."""
        quoted, bare = self.quoted.value, self.bare.value
        shared = commonprefix([quoted, bare]).strip()
        start = text.find(shared, at) if shared else -1
        if start < 0:
            return None
        key = text[at:start].strip()
        if text.startswith(quoted.strip(), start):
            split = self.quoted.split(text, start + len(quoted.strip()), key)
            return (key, *split) if split else None
        tail = _common_suffix(quoted.strip()[len(shared) :], bare.strip()[len(shared) :])
        begin = text.find(tail, start + len(shared)) + len(tail) if tail else start + len(bare.strip())
        end = _end_of_json(text, begin)
        split = self.bare.split(text, end, key)
        if split is None:
            return None
        value = _read(text[begin:end] + split[0])
        return (key, value[0], *split[1:]) if value else None


def calling(names: Sequence[str], values: Sequence[Any] = VALUES) -> Message:
    """Return a turn that calls tools of these names, all with the same arguments."""
    made: list[ToolCall] = [
        {
            "id": f"call{number:05d}",
            "type": "function",
            "function": {"name": name, "arguments": dict(zip(KEYS, values, strict=False))},
        }
        for number, name in enumerate(names)
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


def learn_call(turn: Callable[[Message], str | None], answer: str, words: str) -> CallForm | None:
    """Learn how a template writes calls; None: it shows none, or none that can be told from words.

    Args:
        turn: renders a turn of the assistant, up to its stop token; None: the template refuses it.
        answer: what it puts before an answer without a thought.
        words: turns without calls, as it writes them.
    """

    def shown(names: Sequence[str], values: Sequence[Any] = VALUES) -> str:
        return turn(calling(names, values)) or ""

    def closed(last: str, values: Sequence[Any]) -> tuple[str, str | None]:
        """Return what closes a call, and what stands between that and the name of another."""
        texts = [NAME, *map(str, values[-1:]), NAME2]
        pieces = between(shown((NAME, NAME2), values), texts)
        if pieces is None:
            return last, None
        closing = re.sub(r"<[^>]*$", "", commonprefix([last, pieces[-2]])) or last
        return closing, pieces[-2].removeprefix(closing)

    pieces = between(shown([NAME]), (NAME, KEYS[0], VALUES[0], KEYS[1], VALUES[1]))
    if pieces is None:
        return None
    opening = pieces[0].removeprefix(answer.rstrip())
    closing, again = closed(pieces[5], VALUES)
    quoted = bare = ValueForm(pieces[2], pieces[3], closing)
    numbers = [str(number) for number in NUMBERS]
    plain = between(shown([NAME], NUMBERS), (NAME, KEYS[0], numbers[0], KEYS[1], numbers[1]))
    if plain:
        bare = ValueForm(plain[2], plain[3], closed(plain[5], NUMBERS)[0])
    none = between(shown([NAME], ()), (NAME,))
    empty = closed(none[1], ())[0].strip() if none else ""
    if not opening.strip() and not answer.strip():
        return None
    mark = _MARK.match(opening)
    return CallForm(
        opening,
        again if again and again.strip() else None,
        pieces[1],
        quoted,
        bare,
        empty if empty and not pieces[1].strip().startswith(empty) else None,
        mark[1] if mark and mark[1] not in words else None,
    )


def _end_of_json(text: str, start: int) -> int:
    """Return where the JSON value ends that begins at `start`; where there is none, `start`."""
    begin = start + len(text[start:]) - len(text[start:].lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, begin)[1]
    except (ValueError, RecursionError):
        return start


def _read(text: str) -> tuple[Any] | None:
    """Return the value that a text spells as JSON or as Python does; None: it spells none."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return (read(text.strip()),)
    return None


def _behind(text: str, at: int, expected: str, more: str = "") -> re.Match | None:
    """Match a text of the template at a place, blanks aside."""
    return re.compile(r"\s*" + _loose(expected) + more).match(text, at)


def _loose(text: str) -> str:
    """Return a pattern of a text with any blanks between its words and signs, and any number or id for its own."""
    words = re.findall(r"\w+|[^\w\s]", text)
    return r"\s*".join(
        r"\d+" if word.isdigit() else r"[\w.:\-]*" if _ID.fullmatch(word) else re.escape(word)
        for word in words
    )


def between(text: str, marks: Sequence[str]) -> list[str] | None:
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

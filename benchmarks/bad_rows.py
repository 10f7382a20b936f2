"""Rows of a prompt file that cannot be used, one of each kind, and a file that has one in every hundred lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

_CALL = {"type": "function", "id": "c1", "function": {"name": "look", "arguments": '{"place": "Paris"}'}}
_ASK = {"role": "user", "content": "What is the weather in Paris?"}
_CALLING = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "tool_call_id": "c1", "content": "18 C"}
_SAY = {"role": "assistant", "content": "18 degrees."}
_IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}

KINDS = {
    "not JSON": b'{"turns": ["a"',
    "not an object": b'["a"]',
    "nested too deeply": b"[" * 100_000,
    "no prompt": b'{"text": "a"}',
    "a field of another type": b'{"turns": 3}',
    "a message of another type": b'{"turns": [3]}',
    "an empty user turn": b'{"turns": ["a", " "]}',
    "no user turn": b'{"messages": [{"role": "assistant", "content": "a"}]}',
    "a message without text": b'{"messages": [{"role": "user", "content": null}]}',
    "an unknown role": b'{"messages": [{"role": "narrator", "content": "a"}]}',
    "half a character": b'{"turns": ["a \\ud800 b"]}',
    "malformed tools": b'{"turns": ["How is it?"], "tools": "[oops"}',
    "a malformed tool call": json.dumps({"messages": [_ASK, {**_CALLING, "tool_calls": "look"}]}).encode(),
    "malformed chat_template_kwargs": b'{"turns": ["How is it?"], "chat_template_kwargs": [1]}',
    "malformed token ids": b'{"input_ids": [1, 2], "loss_mask": [1]}',
    "an image or another medium": json.dumps({"messages": [{"role": "user", "content": [_IMAGE]}]}).encode(),
    "a tool call without its result": json.dumps({"messages": [_ASK, _CALLING, _ASK]}).encode(),
    "a tool result without its call": json.dumps({"messages": [_ASK, _RESULT]}).encode(),
    "two assistant turns in a row": json.dumps({"messages": [_ASK, _SAY, _SAY]}).encode(),
    "not UTF-8": b'{"prompt": "caf\xe9"}',
}
EVERY = 100  # lines, of which the last is bad


def write_bad_file(path: Path, texts: Iterable[str]) -> Path:
    """Write a line for each text, in place of every hundredth a bad row of the kinds in turn."""
    bad = list(KINDS.values())
    with path.open("wb") as file:
        for i, text in enumerate(texts):
            good = json.dumps({"turns": [text]}).encode()
            file.write((bad[i // EVERY % len(bad)] if i % EVERY == EVERY - 1 else good) + b"\n")
    return path

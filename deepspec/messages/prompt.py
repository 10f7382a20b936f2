"""The prompts that come in: one JSON object a line, `{"id", "source", "turns": [user turn, ...]}`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.errors import DeepSpecError


@dataclass(frozen=True)
class Prompt:
    """The user's side of one conversation."""

    id: str
    source: str
    turns: tuple[str, ...]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read every prompt of a file, in its order.

    Raises:
        DeepSpecError: the file is missing or empty, a line is not a prompt (its number is named), or an id
            appears twice.
    """
    path = Path(path)
    if not path.is_file():
        raise DeepSpecError(f"{path}: no such prompt file; run the prompts stage first")
    prompts: dict[str, Prompt] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            prompt = _parse(line, f"{path}:{number}")
            if prompt.id in prompts:
                raise DeepSpecError(f"{path}:{number}: the id {prompt.id!r} was used by an earlier line")
            prompts[prompt.id] = prompt
    if not prompts:
        raise DeepSpecError(f"{path}: no prompt in the file")
    return list(prompts.values())


def _parse(line: bytes, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DeepSpecError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DeepSpecError(f"{where}: expected a JSON object, found {type(value).__name__}")
    for key in ("id", "source"):
        if not _is_text(value.get(key)):
            raise DeepSpecError(f"{where}: {key!r} must be a non-empty string, found {value.get(key)!r}")
    turns = value.get("turns")
    if not isinstance(turns, list) or not turns or not all(_is_text(turn) for turn in turns):
        raise DeepSpecError(f"{where}: 'turns' must be a list of non-empty strings (prompt {value['id']!r})")
    return Prompt(value["id"], value["source"], tuple(turns))


def _is_text(value: Any) -> bool:
    """Return whether a value is non-blank text that UTF-8 can hold (JSON also spells lone surrogates)."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True

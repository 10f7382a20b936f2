"""One function that seed prompts of the kind `code` ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Idea:
    """`sentence` starts with a verb in the imperative and names parameters as `{parameter}`."""

    name: str
    parameters: tuple[str, ...]
    returns: str
    sentence: str
    solve: Callable[..., Any]


def idea(call: str, returns: str, sentence: str, solve: Callable[..., Any]) -> Idea:
    """Make an idea: `call` has the function's name and parameters, separated by spaces; `solve` is the reference."""
    name, *parameters = call.split()
    return Idea(name, tuple(parameters), returns, sentence, solve)

"""The one exception for a user's mistake: what was wrong, what was found, what to do, in one line."""

from __future__ import annotations

import difflib
from typing import Any


class DeepSpecError(Exception):
    """Raised for bad input. Entry points print its message on one line and exit with status 2."""


def nearest(word: str, known: Any) -> str:
    """`; did you mean 'x'?` for the closest of the known names, or an empty string."""
    match = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def os_reason(error: OSError) -> str:
    """Return why the system refused a file, in its own words and in one line."""
    return error.strerror or " ".join(str(error).split()) or type(error).__name__

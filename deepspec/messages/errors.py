"""What is wrong with a row: a kind that manifests count, and what was found."""

from __future__ import annotations


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

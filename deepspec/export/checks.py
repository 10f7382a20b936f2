"""One statement about an export that holds or does not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """`message`: what was found, or where it fails, what is wrong."""

    name: str
    passed: bool
    message: str

"""Drafts that only DeepSpec writes, `DeepSpec<Algorithm>Model`: the configuration is our own, the name says whose."""

from __future__ import annotations

import re

from deepspec.drafters.published import deepseek
from deepspec.drafters.published.plan import Found, Plan


def recognise(found: Found) -> Plan | None:
    """Recognise these by their architecture; DSpark's is read beside DeepSeek's."""
    named = re.fullmatch(r"DeepSpec(\w+)Model", found.architecture)
    if named is None or found.architecture == deepseek.OURS:
        return None
    kind = named[1].lower()
    return Plan("DeepSpec", kind, kind, dict(found.config))

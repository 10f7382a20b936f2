"""Prompts written by the project: word problems, Python functions and everyday requests, a third each.

They reach what a small target would not ask itself (code stubs, arithmetic), and need no network, no model.
Templates live in `math.py`, `code.py` and `chat.py`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from deepspec.prompts.filters import duplicate_key
from deepspec.prompts.seeds import chat, code, math

# Each kind's name seeds its draws: another name is another set of prompts. (They are the names of an earlier layout.)
KINDS = {"deepspec.data.seed_math": math, "deepspec.data.seed_code": code, "deepspec.data.seed_chat": chat}
TWO_TURN_SHARE = 0.15
PATIENCE = 200  # Draws without a new prompt after which a kind counts as used up.


def iter_seeds(seed: int) -> Iterator[list[str]]:
    """Yield distinct prompts, each a list of user turns, kind after kind in turn, until one kind has nothing new."""
    kinds = [_distinct(kind, random.Random(f"{seed}:{name}")) for name, kind in KINDS.items()]
    for prompts in zip(*kinds, strict=False):
        yield from prompts


def _distinct(kind, rng: random.Random) -> Iterator[list[str]]:
    """Yield prompts of one kind whose first turns differ; templates take turns in a new order every round."""
    seen: set[str] = set()
    stale = 0
    while stale < PATIENCE:
        for template in rng.sample(kind.TEMPLATES, len(kind.TEMPLATES)):
            first, follow_ups = kind.write(template, rng)
            key = duplicate_key([first])
            stale = stale + 1 if key in seen else 0
            if key not in seen:
                seen.add(key)
                two_turns = rng.random() < TWO_TURN_SHARE
                yield [first, rng.choice(follow_ups)] if two_turns else [first]

"""Slot-filled sentences: one template and a few word lists make many natural prompts.

`{a}` is a number drawn from its range or computed from earlier ones, `{role}` a word from the list of that
name, `{role2}` another word of the same list, `{a_role}` the word with its article. Sentences start with a
capital.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Number = tuple[int, ...] | Callable[["Slots"], int | str]
SENTENCE_START = re.compile(r"(^|[.?!]\s+|\n)([a-z])")
SOUNDS_LIKE_CONSONANT = ("uni", "use", "eu", "one")
SOUNDS_LIKE_VOWEL = ("hour", "honest")


@dataclass(frozen=True)
class Template:
    """Text with slots, and how its numbers are drawn: (low, high[, step]) or a function of the others."""

    text: str
    numbers: Mapping[str, Number]

    def fill(self, rng: random.Random, lists: Mapping[str, Sequence[str]]) -> str:
        slots = Slots(rng, lists)
        for name, number in self.numbers.items():
            slots[name] = number(slots) if callable(number) else _draw(rng, *number)
        return capitalise(self.text.format_map(slots))


def template(text: str, **numbers: Number) -> Template:
    return Template(text, numbers)


class Slots(dict):
    """The words chosen so far; a slot not seen before draws a word that no other slot of its list holds."""

    def __init__(self, rng: random.Random, lists: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self._rng = rng
        self._lists = lists

    def __missing__(self, key: str) -> str:
        if key.startswith("a_"):
            return with_article(self[key[2:]])
        taken = set(self.values())
        options = self._lists[key.rstrip("0123456789")]
        self[key] = self._rng.choice([word for word in options if word not in taken])
        return self[key]


def word_lists(block: str) -> dict[str, list[str]]:
    """Parse word lists: `name: word | word | ...` a line; an indented line continues the list above it."""
    joined = re.sub(r"\n\s+", " ", block.strip())
    named = (line.split(":", 1) for line in joined.splitlines())
    return {name: [word.strip() for word in rest.split("|")] for name, rest in named}


def with_article(noun: str) -> str:
    """Return a noun with its article: `a baker`, `an engineer`, `a unicycle`, `an hour`."""
    vowel = noun[0] in "aeiouAEIOU" and not noun.lower().startswith(SOUNDS_LIKE_CONSONANT)
    return f"{'an' if vowel or noun.startswith(SOUNDS_LIKE_VOWEL) else 'a'} {noun}"


def capitalise(text: str) -> str:
    """Capitalise the first letter of every sentence."""
    return SENTENCE_START.sub(lambda match: match[1] + match[2].upper(), text)


def _draw(rng: random.Random, low: int, high: int, step: int = 1) -> int:
    return rng.randrange(low, high + 1, step)

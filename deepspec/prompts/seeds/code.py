"""Seed prompts of the kind `code`: Python functions to complete or to write, with examples that are computed.

An idea is a function's name, its parameters, its result and a sentence; a reference implementation computes
the example in the docstring, so that every prompt is right and no two need be alike.
"""

from __future__ import annotations

import random
import re

from deepspec.prompts.seeds import code_lists as seed_idea_lists
from deepspec.prompts.seeds import code_texts as seed_idea_texts
from deepspec.prompts.seeds.code_idea import Idea

# Parameter → type, other names it may go by, and how an example value is drawn.
NOUNS: tuple[str, ...] = (
    "river",
    "lamp",
    "stone",
    "garden",
    "bread",
    "cloud",
    "mirror",
    "engine",
    "pencil",
    "tiger",
    "basket",
)
NOUNS += ("window", "silver", "radar", "level", "apple", "needle", "kayak", "paper", "ladder", "noon")
VERBS = ("opens", "holds", "finds", "breaks", "carries", "paints", "follows", "needs")
PARAMETERS = {
    "values": ("list[int]", ("values", "numbers", "nums", "items"), lambda r: _ints(r, 3, 7)),
    "other": ("list[int]", ("other", "others", "second"), lambda r: _ints(r, 2, 5)),
    "amounts": ("list[float]", ("amounts", "prices", "samples"), lambda r: _halves(r)),
    "matrix": ("list[list[int]]", ("matrix", "grid", "rows"), lambda r: _matrix(r)),
    "text": ("str", ("text", "sentence", "message"), lambda r: _sentence(r)),
    "word": ("str", ("word", "s", "name"), lambda r: r.choice(NOUNS)),
    "second_word": ("str", ("second_word", "other_word", "t"), lambda r: r.choice(NOUNS)),
    "words": ("list[str]", ("words", "names", "strings"), lambda r: r.sample(NOUNS, r.randint(3, 5))),
    "n": ("int", ("n", "number", "value"), lambda r: r.randint(2, 60)),
    "k": ("int", ("k", "size", "step"), lambda r: r.randint(2, 4)),
    "limit": ("int", ("limit", "threshold", "bound"), lambda r: r.randint(1, 12)),
    "scores": ("dict[str, int]", ("scores", "counts", "stock"), lambda r: _scores(r)),
    "seconds": ("int", ("seconds", "duration", "elapsed"), lambda r: r.randint(50, 9000)),
    "pairs": ("list[tuple[str, int]]", ("pairs", "entries", "records"), lambda r: list(_scores(r).items())),
}

FRAMES = ("Complete the following Python function.",) * 5 + (
    "Finish this Python function.",
    "Here is the start of a Python function. Write its body.",
    "Implement the function below.",
)
REQUESTS = (
    "Write a Python function `{signature}` that {task}.{example}{ending}",
    "Write a Python function called `{name}` that {task}.{example}{ending}",
    "I need a Python function `{signature}` that {task}.{example}{ending}",
    "How do I write a function in Python that {task}?{example}{ending}",
    "In Python, define `{signature}`. It {task}.{example}{ending}",
)
ENDINGS = (
    "",
    "",
    " Add a docstring and type hints.",
    " Explain the solution briefly.",
    " Only show the code.",
    " Keep it short and readable.",
    " Say what happens for empty input.",
)
FOLLOW_UPS = (
    "Now write three unit tests for it with pytest.",
    "What is its time complexity?",
    "Can you write it without using any built-in helper functions?",
    "Rewrite it so that bad input raises a ValueError.",
    "Explain line by line how the function works.",
    "Show how to call it from a small command-line script.",
)

TEMPLATES = [*seed_idea_lists.IDEAS, *seed_idea_texts.IDEAS]


def write(idea: Idea, rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """Write a first turn and follow-ups that suit it; slightly more than half are stubs to complete."""
    names = {parameter: rng.choice(PARAMETERS[parameter][1]) for parameter in idea.parameters}
    sentence = re.sub(r"\{(\w+)\}", lambda match: names[match[1]], idea.sentence)
    arguments = ", ".join(f"{names[p]}: {PARAMETERS[p][0]}" for p in idea.parameters)
    if rng.random() < 0.55:
        return _stub(idea, f"{idea.name}({arguments}) -> {idea.returns}", sentence, rng), FOLLOW_UPS
    example = (
        " For example, `{}` should give `{}`.".format(*_example(idea, rng)) if rng.random() < 0.5 else ""
    )
    request = rng.choice(REQUESTS).format(
        signature=f"{idea.name}({', '.join(names.values())})",
        name=idea.name,
        task=_third_person(sentence),
        example=example,
        ending=rng.choice(ENDINGS),
    )
    return request, FOLLOW_UPS


def _stub(idea: Idea, signature: str, sentence: str, rng: random.Random) -> str:
    examples = [_example(idea, rng) for _ in range(rng.choice((1, 1, 2)))]
    if rng.random() < 0.75:
        shown = "\n".join(f"    >>> {call}\n    {result}" for call, result in examples)
    else:
        shown = "    For example:\n" + "\n".join(f"    {call} == {result}" for call, result in examples)
    docstring = f'    """{sentence}.\n\n{shown}\n    """'
    return f"{rng.choice(FRAMES)}\n\n```python\ndef {signature}:\n{docstring}\n```"


def _example(idea: Idea, rng: random.Random) -> tuple[str, str]:
    """Return a call of the function and its result, as Python writes them."""
    values = [PARAMETERS[parameter][2](rng) for parameter in idea.parameters]
    shown = ", ".join(map(repr, values))
    return f"{idea.name}({shown})", repr(idea.solve(*values))


def _third_person(sentence: str) -> str:
    """Turn `Return the sum` into `returns the sum`; the sentences start with a regular verb."""
    verb, rest = sentence.split(" ", 1)
    return f"{verb.lower()}s {rest}"


def _ints(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randint(-4, 15) for _ in range(rng.randint(low, high))]


def _halves(rng: random.Random) -> list[float]:
    return [rng.randint(1, 40) / 2 for _ in range(rng.randint(3, 5))]


def _matrix(rng: random.Random) -> list[list[int]]:
    side = rng.randint(2, 3)
    return [[rng.randint(0, 9) for _ in range(side)] for _ in range(side)]


def _sentence(rng: random.Random) -> str:
    first, second = rng.sample(NOUNS, 2)
    return f"the {first} {rng.choice(VERBS)} the {second}"


def _scores(rng: random.Random) -> dict[str, int]:
    return {noun: rng.randint(1, 20) for noun in rng.sample(NOUNS, 3)}

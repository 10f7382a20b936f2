"""Seed prompts: many, distinct, right, balanced, and none of them an evaluation prompt."""

import random
import re
from collections import Counter
from itertools import islice

import pytest

from deepspec.messages.slots import capitalise, template, with_article
from deepspec.prompts.filters import duplicate_key, noise
from deepspec.prompts.overlap import Overlap
from deepspec.prompts.seeds import chat as seed_chat
from deepspec.prompts.seeds import code as seed_code
from deepspec.prompts.seeds import math as seed_math
from deepspec.prompts.seeds.seeds import KINDS, iter_seeds
from deepspec.tasks.task import evaluation_texts


@pytest.fixture(scope="module")
def seeds():
    return list(islice(iter_seeds(0), 6000))


def test_six_thousand_prompts_are_distinct(seeds):
    assert len(seeds) == 6000
    assert len({duplicate_key([turns[0]]) for turns in seeds}) == 6000


def test_the_seed_decides(seeds):
    assert list(islice(iter_seeds(0), 50)) == seeds[:50]
    assert list(islice(iter_seeds(1), 50)) != seeds[:50]


def test_every_third_prompt_is_of_the_same_kind(seeds):
    assert list(KINDS.values()) == [seed_math, seed_code, seed_chat]
    code = [turns[0] for turns in seeds[1::3]]
    names = {idea.name for idea in seed_code.TEMPLATES}
    assert sum(bool(names & set(re.findall(r"\w+", prompt))) for prompt in code) > 0.8 * len(code)
    assert all(any(char.isdigit() for char in turns[0]) for turns in seeds[0::3])


def test_about_15_percent_have_a_second_turn(seeds):
    assert Counter(map(len, seeds)).keys() == {1, 2}
    assert 0.12 < sum(len(turns) == 2 for turns in seeds) / len(seeds) < 0.18


def test_no_seed_prompt_overlaps_an_embedded_evaluation_prompt(seeds):
    overlap = Overlap(evaluation_texts(["conversations", "humaneval", "word_problems"]), n=8)
    assert [hit for turns in seeds for turn in turns if (hit := overlap.hits(turn))] == []


def test_no_seed_prompt_looks_like_noise_or_has_an_open_slot(seeds):
    assert [turn for turns in seeds for turn in turns if noise(turn)] == []
    prose = [turn for turns in seeds[0::3] + seeds[2::3] for turn in turns]
    assert [turn for turn in prose if "{" in turn or "  " in turn] == []


def test_stubs_are_python_and_their_examples_hold(seeds):
    """The doctests in a stub are answered by the idea's reference implementation."""
    ideas = {idea.name: idea.solve for idea in seed_code.TEMPLATES}
    stubs = [turns[0] for turns in seeds[1:1500:3] if "```python" in turns[0]]
    examples = 0
    for stub in stubs:
        code = stub.split("```python\n")[1].removesuffix("\n```")
        compile(code, "stub", "exec")
        for call, result in re.findall(r">>> (.+)\n    (.+)", code):
            assert repr(eval(call, dict(ideas))) == result
            examples += 1
    assert examples > 100


def test_there_are_enough_templates_of_each_kind():
    assert len(seed_math.TEMPLATES) >= 25
    assert len({idea.name for idea in seed_code.TEMPLATES}) >= 60
    assert len(seed_chat.TEMPLATES) >= 40


def test_math_problems_divide_without_remainder_where_they_must():
    taxi = next(one for one in seed_math.TEMPLATES if "taxi" in one.text)
    rng = random.Random(0)
    for _ in range(50):
        base, per_kilometre, total = map(int, re.findall(r"\d+", taxi.fill(rng, seed_math.LISTS)))
        assert (total - base) % per_kilometre == 0 and total > base


def test_slots_take_different_words_of_a_list_and_their_article():
    pair = template("{a_role} meets {a_role2}. {role} and {role2} have {n} apples.", n=(3, 3))
    text = pair.fill(random.Random(0), {"role": ["engineer", "baker"]})
    assert text in (
        "An engineer meets a baker. Engineer and baker have 3 apples.",
        "A baker meets an engineer. Baker and engineer have 3 apples.",
    )


@pytest.mark.parametrize(
    ("noun", "phrase"), [("hour", "an hour"), ("unicycle", "a unicycle"), ("owl", "an owl")]
)
def test_articles_follow_the_sound(noun, phrase):
    assert with_article(noun) == phrase


def test_sentences_start_with_a_capital():
    assert capitalise("it rains. is it cold? yes, 3.5 degrees") == "It rains. Is it cold? Yes, 3.5 degrees"

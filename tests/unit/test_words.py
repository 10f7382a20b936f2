"""Words as numbers are the words as strings: as many, in the same places, and equal where those are."""

import random
from itertools import chain

import numpy as np
import pytest

from deepspec.prompts.overlap import Overlap, normalise
from deepspec.prompts.words import listed, runs_of, words, words_of

ODD = [
    "",
    "...",
    "It's the 3.5th of 1,000,000; 1..2, 4.,5 and .6.",
    "a'b'c'd'e f'g ''h'' 'i' don't rock'n'roll’s",
    "abc123def_ghi Straße İstanbul K CAFÉ é² ½x ²x x² ٣٫٥ ٣.٥",
    "猫が好き 7匹 한국어 abc猫def l'été l'猫 猫'l",
    "ΑΣ ὈΔΥΣΣΕΎΣ Σ",
    "two\nlines\x00and \ud800 half a character 👩‍👩‍👧",
]


def random_texts(count, seed=0):
    rng = random.Random(seed)
    pieces = [*"ab'’.,1 2_-\nÉß猫カ²Σ", "word ", "don't ", "3.5 ", "the "]
    return ["".join(rng.choices(pieces, k=rng.randrange(40))) for _ in range(count)]


@pytest.mark.parametrize(
    "texts", [ODD, random_texts(2000), [], ["", ""]], ids=["odd", "random", "none", "empty"]
)
def test_they_are_as_many_and_equal_where_the_strings_are(texts):
    found = words_of(texts)
    expected = [words(text) for text in texts]
    assert np.diff(found.offsets).tolist() == list(map(len, expected))
    known: dict[str, int] = {}
    for word, number, digit in zip(chain(*expected), found.numbers.tolist(), found.digits, strict=True):
        assert known.setdefault(word, number) == number
        assert digit == word[0].isdigit()
    assert len(set(known.values())) == len(known), "different words have different numbers"


def test_a_list_s_number_tells_its_order_and_is_that_of_a_run():
    numbers = words_of(["one two three", "three two one", "one two three", ""])
    lists = listed(numbers.numbers, numbers.offsets)
    assert lists[0] == lists[2] and len(set(lists.tolist())) == 3
    assert runs_of(numbers.numbers, 3)[[0, 3]].tolist() == lists[:2].tolist()
    assert len(runs_of(numbers.numbers[:2], 3)) == 0


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_texts_with_a_hit_are_suspects(n):
    texts = random_texts(3000, seed=1) + ODD
    overlap = Overlap([*random_texts(60, seed=2), ODD[2], ODD[5], "Go on.", "1 2", "the word"], n)
    hits = [overlap.hits(text) is not None for text in texts]
    suspects = overlap.suspects(words_of(texts)).tolist()
    assert 20 < sum(hits) < len(hits)
    assert [text for text, hit, found in zip(texts, hits, suspects, strict=True) if hit and not found] == []
    if n != 2:  # else a short prompt that matches as a whole is looked for inside texts too
        assert suspects == hits


def test_nothing_is_suspected_where_there_is_no_evaluation():
    assert not Overlap([], 8).suspects(words_of(ODD)).any()
    assert normalise("²x 7") == ["#"]

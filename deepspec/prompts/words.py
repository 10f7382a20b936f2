"""The words of a text, and those of many texts at once as numbers.

`words` gives them as strings. `words_of` finds the same ones in all texts together, in one array of their characters,
and gives each a number that follows from its letters: equal words have equal numbers, and different ones hardly ever.
Whoever looks for equal things compares numbers, and then the strings of the few that are equal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

# Scripts written without spaces (kana, Chinese characters, Hangul syllables) count a character as a word.
UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{UNSPACED}]|\d+(?:[.,]\d+)*|[^\W\d_{UNSPACED}]+(?:['’][^\W\d_{UNSPACED}]+)?")

_BETWEEN, _LETTER, _DIGIT, _ALONE, _APOSTROPHE, _POINT, _UNKNOWN = range(7)  # kinds of characters
_CHARACTERS = 0x110000
_PLACES = 8192  # in a list, that its number tells apart
_ODD = np.uint64(0x9E3779B97F4A7C15)

Numbers = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
_known = np.full(_CHARACTERS, _UNKNOWN, np.uint8)  # kinds of the characters that were seen
_digits = np.zeros(_CHARACTERS, bool)  # whether they are digits, superscripts included


def words(text: str) -> list[str]:
    """Return the words of a text in lower case; punctuation and `_` only separate, `3.5` stays one word."""
    return WORD.findall(_spelt(text))


def _spelt(text: str) -> str:
    return text.lower().replace("’", "'")


@dataclass(frozen=True)
class Words:
    """The words of some texts, one text after the other.

    Attributes:
        numbers: of each word, uint64 [words].
        digits: whether a word begins with a digit, bool [words].
        offsets: where each text begins in them, int64 [texts + 1].
    """

    numbers: Numbers
    digits: npt.NDArray[np.bool_]
    offsets: Ints


def words_of(texts: Sequence[str]) -> Words:
    """Return the words of texts, those that `words` finds in each."""
    spelt = [_spelt(text) for text in texts]
    joined = "\n".join(["", *spelt, ""])  # so that every character has one before and one behind
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _joined(_kinds(codes))
    begins = np.zeros(len(codes), bool)
    begins[1:] = (kinds[1:] != _BETWEEN) & ((kinds[1:] != kinds[:-1]) | (kinds[1:] == _ALONE))
    starts = np.flatnonzero(begins)
    values = _numbers_of_characters()[codes]
    values[kinds == _BETWEEN] = 0
    first = starts[0] if len(starts) else len(codes)
    numbers = listed(values[first:], np.append(starts, len(codes)) - first)
    lengths = np.fromiter(map(len, spelt), np.int64, len(spelt))
    places = np.cumsum(np.concatenate(([1], lengths + 1)))  # of each text's first character
    return Words(numbers, _digits[codes[starts]], np.searchsorted(starts, places))


def listed(values: Numbers, offsets: Ints) -> Numbers:
    """Return a number of each list of numbers, which tells their order too, [lists].

    Args:
        values: of all lists, one behind the other. Zeros at a list's end count for nothing.
        offsets: where each list begins, and the end of the last, [lists + 1].
    """
    places = np.arange(len(values)) - np.repeat(offsets[:-1], np.diff(offsets))
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(values * _factors().take(places, mode="clip"))))
    found = sums[offsets[1:]] - sums[offsets[:-1]]
    found ^= found >> np.uint64(31)  # else the number of a list of lists would be one of their sums
    return found * _ODD


def runs_of(values: Numbers, length: int) -> Numbers:
    """Return a number of each run of so many neighbours; the same as of a list of them (`listed`)."""
    count = max(0, len(values) - length + 1)
    found = np.zeros(count, np.uint64)
    for place, factor in enumerate(_factors().take(np.arange(length), mode="clip")):
        found += values[place : place + count] * factor
    found ^= found >> np.uint64(31)
    return found * _ODD


def _kinds(codes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    kinds = _known[codes]
    if (unknown := kinds == _UNKNOWN).any():
        for code in np.unique(codes[unknown]).tolist():
            _known[code], _digits[code] = _kind(chr(code)), chr(code).isdigit()
        kinds = _known[codes]
    return kinds


def _kind(character: str) -> int:
    if character in "',.":
        return _APOSTROPHE if character == "'" else _POINT
    if re.fullmatch(f"[{UNSPACED}]", character):
        return _ALONE
    if re.fullmatch(r"\d", character):
        return _DIGIT
    return _LETTER if re.fullmatch(r"[^\W_]", character) else _BETWEEN


def _joined(kinds: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Make what joins letters or digits one of them, and what does not a character between words."""
    before, here, behind = kinds[:-2], kinds[1:-1], kinds[2:]
    points = (here == _POINT) & (before == _DIGIT) & (behind == _DIGIT)
    apostrophes = (here == _APOSTROPHE) & (before == _LETTER) & (behind == _LETTER)
    at = _every_other(np.flatnonzero(apostrophes) + 1, kinds)
    here[points] = _DIGIT
    kinds[at] = _LETTER
    kinds[kinds > _ALONE] = _BETWEEN
    return kinds


def _every_other(at: npt.NDArray[np.intp], kinds: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """Return the apostrophes that join: a word has one at most, so of some with only letters between every other."""
    if len(at) < 2:
        return at
    spans = np.stack((at[:-1] + 1, at[1:]), 1).ravel()
    chained = np.concatenate(([False], np.logical_and.reduceat(kinds == _LETTER, spans)[::2]))
    numbers = np.arange(len(at))
    first = np.maximum.accumulate(np.where(chained, 0, numbers))
    return at[(numbers - first) % 2 == 0]


@cache
def _numbers_of_characters() -> Numbers:
    return _random(0, _CHARACTERS)


@cache
def _factors() -> Numbers:
    """Return what the value at each place of a list is multiplied by: odd, so that no bit of it is lost."""
    return _random(1, _PLACES) | np.uint64(1)


def _random(seed: int, count: int) -> Any:
    return np.random.default_rng(seed).integers(1, 2**64, count, np.uint64, endpoint=False)

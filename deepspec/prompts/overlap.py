"""Held-out means held out: finds evaluation prompts inside training prompts by shared n-grams of words.

Words are compared in lower case, without punctuation, and with every number or run of numbers as one `#`: a
word problem with other numbers is still the same problem, and two lists of numbers are nothing in common.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from deepspec.prompts.words import Ints, Numbers, Words, listed, runs_of, words, words_of

FRAME_SHARE = 0.1  # An n-gram in this share of the evaluation prompts is their frame, not their content ...
FRAME_PROMPTS = 3  # ... and it takes at least this many prompts to make a frame.
SHORTEST_INSIDE = 3  # Fewer words than this ("Go on.") match a whole prompt only, never a part of one.
_BITS = 22  # of an n-gram's number, looked up before the whole number is
_NUMBER = np.uint64(0x5851F42D4C957F2D)  # stands for every run of numbers


def normalise(text: str) -> list[str]:
    """Return `words(text)` with numbers collapsed: `[1, 2, 3] and 4` becomes `# and #`."""
    numberless = ["#" if word[0].isdigit() else word for word in words(text)]
    return [word for i, word in enumerate(numberless) if word != "#" or numberless[i - 1 : i] != ["#"]]


class Overlap:
    """Looks for evaluation prompts in other texts.

    An n-gram that many evaluation prompts share ("put your final answer within boxed") is the frame of the
    task and matches nothing: one that occurs in a tenth of the different prompts, and in three at least. A
    prompt that has no n-gram of its own, because it is all frame or shorter than n words, matches as a whole.

    Args:
        eval_texts: user turns of the evaluation prompts, without their task's frame where it is known.
        n: words in the n-gram that marks a prompt.
    """

    def __init__(self, eval_texts: Iterable[str], n: int) -> None:
        self.n = n
        prompts = {tuple(normalise(text)) for text in eval_texts} - {()}
        holders = Counter(gram for prompt in prompts for gram in set(_grams(prompt, n)))
        frame = max(FRAME_PROMPTS, math.ceil(FRAME_SHARE * len(prompts)))
        self._grams = {gram for gram, count in holders.items() if count < frame}
        self._whole: dict[int, set[tuple[str, ...]]] = {}  # number of words → texts that match as a whole
        for prompt in prompts:
            if not any(gram in self._grams for gram in _grams(prompt, n)):
                self._whole.setdefault(len(prompt), set()).add(prompt)

    def hits(self, text: str) -> str | None:
        """Return the first n-gram (or whole short prompt) that `text` shares with an evaluation prompt, or None."""
        found = normalise(text)
        for gram in _grams(found, self.n):
            if gram in self._grams:
                return " ".join(gram)
        for length, whole in self._whole.items():
            if length < SHORTEST_INSIDE and length != len(found):
                continue
            for gram in _grams(found, length):
                if gram in whole:
                    return " ".join(gram)
        return None

    def suspects(self, texts: Words) -> npt.NDArray[np.bool_]:
        """Return which texts may have a hit, [texts]: all that have one, and hardly any other."""
        found = np.zeros(len(texts.offsets) - 1, bool)
        numbers, offsets = _normalised(texts)
        for length, (beginnings, known) in self._screens.items():
            grams = runs_of(numbers, length)
            at = np.flatnonzero(beginnings[grams >> np.uint64(64 - _BITS)])
            places = np.minimum(np.searchsorted(known, grams[at]), len(known) - 1)
            at = at[known[places] == grams[at]]
            text = np.searchsorted(offsets, at, side="right") - 1
            ends = offsets[text + 1]
            if length < SHORTEST_INSIDE and length != self.n:
                found[text[(at == offsets[text]) & (at + length == ends)]] = True
            else:
                found[text[at + length <= ends]] = True
        return found

    @cached_property
    def _screens(self) -> dict[int, tuple[npt.NDArray[np.bool_], Numbers]]:
        """Return, for each length of n-grams, which first bits their numbers have, and the numbers in order."""
        lengths = {self.n: self._grams}
        for length, whole in self._whole.items():
            lengths[length] = lengths.get(length, set()) | whole
        names = sorted({word for grams in lengths.values() for gram in grams for word in gram} - {"#"})
        number = dict(zip(names, words_of(names).numbers, strict=True)) | {"#": _NUMBER}
        screens = {}
        for length, grams in lengths.items():
            if grams:
                values = np.array([number[word] for gram in grams for word in gram], np.uint64)
                known = np.sort(listed(values, np.arange(len(grams) + 1) * length))
                beginnings = np.zeros(1 << _BITS, bool)
                beginnings[known >> np.uint64(64 - _BITS)] = True
                screens[length] = beginnings, known
        return screens


def _normalised(texts: Words) -> tuple[Numbers, Ints]:
    """Return the numbers of the words of `normalise`, and where each text begins in them."""
    numbers = np.where(texts.digits, _NUMBER, texts.numbers)
    again = np.zeros(len(numbers), bool)
    again[1:] = texts.digits[1:] & texts.digits[:-1]
    firsts = texts.offsets[:-1]
    again[firsts[firsts < len(numbers)]] = False
    kept = np.concatenate(([0], np.cumsum(~again)))
    return numbers[~again], kept[texts.offsets]


def _grams(sequence: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(sequence[start:] for start in range(n)), strict=False)

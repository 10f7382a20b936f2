"""Held-out means held out: finds evaluation prompts inside training prompts by shared n-grams of words.

Words are compared in lower case, without punctuation, and with every number or run of numbers as one `#`: a
word problem with other numbers is still the same problem, and two lists of numbers are nothing in common.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

# Scripts written without spaces (kana, Chinese characters, Hangul syllables) count a character as a word.
UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{UNSPACED}]|\d+(?:[.,]\d+)*|[^\W\d_{UNSPACED}]+(?:['’][^\W\d_]+)?")

FRAME_SHARE = 0.1  # An n-gram in this share of the evaluation prompts is their frame, not their content ...
FRAME_PROMPTS = 3  # ... and it takes at least this many prompts to make a frame.
SHORTEST_INSIDE = 3  # Fewer words than this ("Go on.") match a whole prompt only, never a part of one.


def words(text: str) -> list[str]:
    """Return the words of a text in lower case; punctuation and `_` only separate, `3.5` stays one word."""
    return WORD.findall(text.lower().replace("’", "'"))


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


def _grams(sequence: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(sequence[start:] for start in range(n)), strict=False)

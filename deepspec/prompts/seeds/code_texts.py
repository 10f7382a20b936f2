"""Functions on text, whole numbers and dictionaries for the seed prompts of the kind `code`."""

from __future__ import annotations

import math
from collections import Counter
from itertools import groupby, pairwise

from deepspec.prompts.seeds.code_idea import Idea, idea


def _clock(seconds: int) -> str:
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _collatz(n: int) -> int:
    steps = 0
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    return steps


def _halvings(n: int, limit: int) -> int:
    steps = 0
    while n > limit:
        n //= 2
        steps += 1
    return steps


def _group(words: list[str]) -> dict[int, list[str]]:
    groups: dict[int, list[str]] = {}
    for word in words:
        groups.setdefault(len(word), []).append(word)
    return groups


IDEAS: tuple[Idea, ...] = (
    idea(
        "count_vowels text",
        "int",
        "Count the vowels in {text}, whatever their case",
        lambda t: sum(c in "aeiou" for c in t.lower()),
    ),
    idea(
        "title_case text",
        "str",
        "Return {text} with the first letter of every word in upper case",
        lambda t: t.title(),
    ),
    idea(
        "reverse_words text",
        "str",
        "Return {text} with its words in reverse order",
        lambda t: " ".join(t.split()[::-1]),
    ),
    idea(
        "longest_word text",
        "str",
        "Return the longest word of {text}; the first one on a tie",
        lambda t: max(t.split(), key=len),
    ),
    idea(
        "word_lengths text",
        "list[int]",
        "Return the length of each word in {text}",
        lambda t: [len(w) for w in t.split()],
    ),
    idea(
        "word_frequency text",
        "dict[str, int]",
        "Return a dictionary that maps each word of {text} to how often it occurs",
        lambda t: dict(Counter(t.split())),
    ),
    idea(
        "letter_positions text word",
        "list[int]",
        "Return every index at which the first letter of {word} occurs in {text}",
        lambda t, w: [i for i, c in enumerate(t) if c == w[0]],
    ),
    idea(
        "shorten text limit",
        "str",
        "Return {text} cut to {limit} characters, with '...' added if anything was cut off",
        lambda t, m: t if len(t) <= m else t[:m] + "...",
    ),
    idea(
        "make_slug text",
        "str",
        "Turn {text} into lower case with hyphens in place of spaces",
        lambda t: t.lower().replace(" ", "-"),
    ),
    idea(
        "initials text",
        "str",
        "Return the first letters of the words in {text}, in upper case",
        lambda t: "".join(w[0] for w in t.split()).upper(),
    ),
    idea(
        "mask_vowels text",
        "str",
        "Replace every vowel in {text} by an underscore",
        lambda t: "".join("_" if c in "aeiou" else c for c in t),
    ),
    idea(
        "next_letters word",
        "str",
        "Replace every letter of {word} by the one after it in the alphabet, and z by a",
        lambda w: "".join(chr((ord(c) - 96) % 26 + 97) for c in w),
    ),
    idea(
        "has_double_letter word",
        "bool",
        "Check whether {word} has the same letter twice in a row",
        lambda w: any(a == b for a, b in pairwise(w)),
    ),
    idea(
        "double_letters word",
        "str",
        "Return {word} with every letter written twice",
        lambda w: "".join(c * 2 for c in w),
    ),
    idea(
        "letter_counts word",
        "dict[str, int]",
        "Return how often each letter occurs in {word}, with the letters in alphabetical order",
        lambda w: dict(sorted(Counter(w).items())),
    ),
    idea(
        "run_lengths word",
        "list[tuple[str, int]]",
        "Return the runs of equal letters in {word} as pairs of letter and length",
        lambda w: [(c, len(list(g))) for c, g in groupby(w)],
    ),
    idea(
        "is_anagram word second_word",
        "bool",
        "Check whether {word} and {second_word} consist of exactly the same letters",
        lambda w, x: sorted(w) == sorted(x),
    ),
    idea(
        "shared_prefix word second_word",
        "str",
        "Find the longest prefix that {word} and {second_word} have in common",
        lambda w, x: w[
            : next((i for i, (a, b) in enumerate(zip(w, x, strict=False)) if a != b), min(len(w), len(x)))
        ],
    ),
    idea(
        "mismatches word second_word",
        "int",
        "Count the positions at which {word} and {second_word} differ, up to the shorter length",
        lambda w, x: sum(a != b for a, b in zip(w, x, strict=False)),
    ),
    idea(
        "center_word word k",
        "str",
        "Return {word} with {k} stars on either side of it",
        lambda w, k: "*" * k + w + "*" * k,
    ),
    idea(
        "repeat_word word k",
        "str",
        "Return {word} written {k} times, separated by commas",
        lambda w, k: ",".join([w] * k),
    ),
    idea(
        "sort_by_length words",
        "list[str]",
        "Return the {words} from the shortest to the longest, and alphabetically within a length",
        lambda w: sorted(w, key=lambda x: (len(x), x)),
    ),
    idea(
        "group_by_length words",
        "dict[int, list[str]]",
        "Group the {words} by their length in a dictionary",
        _group,
    ),
    idea(
        "join_words words",
        "str",
        "Join the {words} with commas, but put 'and' before the last one",
        lambda w: ", ".join(w[:-1]) + " and " + w[-1],
    ),
    idea(
        "starting_with words word",
        "list[str]",
        "Return those of the {words} that begin with the same letter as {word}",
        lambda ws, w: [x for x in ws if x[0] == w[0]],
    ),
    idea(
        "total_letters words",
        "int",
        "Return the number of letters in all the {words} together",
        lambda w: sum(map(len, w)),
    ),
    idea(
        "number_lines words",
        "list[str]",
        "Put a running number in front of each of the {words}, starting at 1",
        lambda w: [f"{i}. {x}" for i, x in enumerate(w, 1)],
    ),
    idea(
        "last_letters words",
        "str",
        "Return a string made of the final letter of each of the {words}",
        lambda w: "".join(x[-1] for x in w),
    ),
    idea(
        "digit_sum n", "int", "Return the sum of the decimal digits of {n}", lambda n: sum(map(int, str(n)))
    ),
    idea(
        "proper_divisors n",
        "list[int]",
        "Return all divisors of {n} that are smaller than {n}",
        lambda n: [d for d in range(1, n) if n % d == 0],
    ),
    idea(
        "digit_product n",
        "int",
        "Return the product of the digits of {n} that are not zero",
        lambda n: math.prod(int(d) for d in str(n) if d != "0"),
    ),
    idea(
        "collatz_steps n",
        "int",
        "Count the steps it takes to reach 1 from {n}, halving even numbers and turning odd x into 3x + 1",
        _collatz,
    ),
    idea(
        "is_perfect_square n",
        "bool",
        "Check whether {n} is the square of a whole number",
        lambda n: math.isqrt(n) ** 2 == n,
    ),
    idea(
        "to_base_two n",
        "str",
        "Return the binary digits of {n} as a string without a prefix",
        lambda n: f"{n:b}",
    ),
    idea(
        "reverse_number n",
        "int",
        "Return the number whose digits are those of {n} in reverse order",
        lambda n: int(str(n)[::-1]),
    ),
    idea(
        "count_down n k",
        "list[int]",
        "Return the numbers from {n} down to 0 in steps of {k}",
        lambda n, k: list(range(n, -1, -k)),
    ),
    idea(
        "multiples n k",
        "list[int]",
        "Return the first {k} positive multiples of {n}",
        lambda n, k: [n * i for i in range(1, k + 1)],
    ),
    idea(
        "round_down n k",
        "int",
        "Return the largest multiple of {k} that does not exceed {n}",
        lambda n, k: n // k * k,
    ),
    idea(
        "halvings n limit",
        "int",
        "Count how often {n} must be halved, rounding down, until it is at most {limit}",
        _halvings,
    ),
    idea(
        "format_time seconds",
        "str",
        "Turn {seconds}, a time in seconds, into a string of the form HH:MM:SS",
        _clock,
    ),
    idea(
        "best_key scores",
        "str",
        "Return the key with the highest value in {scores}",
        lambda s: max(s, key=s.get),
    ),
    idea(
        "keys_above scores limit",
        "list[str]",
        "Return the sorted keys of {scores} whose value is greater than {limit}",
        lambda s, m: sorted(key for key, value in s.items() if value > m),
    ),
    idea(
        "invert scores",
        "dict[int, list[str]]",
        "Return a dictionary from each value in {scores} to the list of keys that have it",
        lambda s: {v: [k for k in s if s[k] == v] for v in s.values()},
    ),
    idea(
        "add_to_all scores k",
        "dict[str, int]",
        "Return a copy of {scores} in which every value is larger by {k}",
        lambda s, k: {key: value + k for key, value in s.items()},
    ),
    idea(
        "sort_pairs pairs",
        "list[tuple[str, int]]",
        "Return the {pairs} ordered by their number, largest first",
        lambda p: sorted(p, key=lambda x: (-x[1], x[0])),
    ),
    idea(
        "sum_of_pairs pairs",
        "int",
        "Return the sum of the numbers in {pairs}",
        lambda p: sum(x for _, x in p),
    ),
    idea(
        "names_only pairs",
        "list[str]",
        "Return only the strings of the {pairs}, in alphabetical order",
        lambda p: sorted(x for x, _ in p),
    ),
)

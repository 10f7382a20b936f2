"""Functions on lists and matrices for the seed prompts of the kind `code`."""

from __future__ import annotations

from itertools import accumulate, pairwise

from deepspec.prompts.seeds.code_idea import Idea, idea


def _longest_run(values: list[int]) -> int:
    best = run = 1
    for left, right in pairwise(values):
        run = run + 1 if right > left else 1
        best = max(best, run)
    return best


def _ratio(values: list[float]) -> float:
    return round(max(values) / min(values), 2)


IDEAS: tuple[Idea, ...] = (
    idea(
        "sum_even values",
        "int",
        "Return the sum of the even entries of {values}",
        lambda v: sum(x for x in v if x % 2 == 0),
    ),
    idea(
        "second_largest values",
        "int | None",
        "Return the second largest distinct value of {values}, or None if there is none",
        lambda v: sorted(set(v))[-2] if len(set(v)) > 1 else None,
    ),
    idea(
        "running_total values",
        "list[int]",
        "Return a list whose entry at position i is the total of {values} up to and including i",
        lambda v: list(accumulate(v)),
    ),
    idea(
        "rotate values k",
        "list[int]",
        "Move every entry of {values} {k} places to the right, wrapping round at the end",
        lambda v, k: v[-k % len(v) :] + v[: -k % len(v)] if k % len(v) else v,
    ),
    idea(
        "chunk values k",
        "list[list[int]]",
        "Split {values} into consecutive pieces of length {k}; the last piece may be shorter",
        lambda v, k: [v[i : i + k] for i in range(0, len(v), k)],
    ),
    idea(
        "differences values",
        "list[int]",
        "Return the differences between each entry of {values} and the one before it",
        lambda v: [b - a for a, b in pairwise(v)],
    ),
    idea(
        "most_common values",
        "int",
        "Return the value that appears most often in {values}; on a tie, the smallest such value",
        lambda v: min(v, key=lambda x: (-v.count(x), x)),
    ),
    idea(
        "drop_duplicates values",
        "list[int]",
        "Remove repeated values from {values}, keeping the first of each",
        lambda v: list(dict.fromkeys(v)),
    ),
    idea(
        "positions_of_maximum values",
        "list[int]",
        "Return the indices at which {values} reaches its maximum",
        lambda v: [i for i, x in enumerate(v) if x == max(v)],
    ),
    idea(
        "interleave values other",
        "list[int]",
        "Return a list that alternates entries of {values} and {other}, then has the rest of the longer one",
        lambda v, w: [x for pair in zip(v, w, strict=False) for x in pair] + v[len(w) :] + w[len(v) :],
    ),
    idea(
        "only_in_one values other",
        "list[int]",
        "Return the sorted numbers that occur either in {values} or in {other} but not in both",
        lambda v, w: sorted(set(v) ^ set(w)),
    ),
    idea(
        "missing_from values other",
        "list[int]",
        "Return the entries of {values} that do not occur in {other}, in their original order",
        lambda v, w: [x for x in v if x not in w],
    ),
    idea(
        "clip_values values limit",
        "list[int]",
        "Replace every entry of {values} above {limit} by {limit}",
        lambda v, m: [min(x, m) for x in v],
    ),
    idea(
        "count_above values limit",
        "int",
        "Count how many entries of {values} are strictly greater than {limit}",
        lambda v, m: sum(x > m for x in v),
    ),
    idea(
        "first_above values limit",
        "int",
        "Return the index of the first entry of {values} greater than {limit}, or -1",
        lambda v, m: next((i for i, x in enumerate(v) if x > m), -1),
    ),
    idea(
        "insertion_point values limit",
        "int",
        "Return the leftmost index at which {limit} fits into the sorted version of {values}",
        lambda v, m: sum(x < m for x in v),
    ),
    idea(
        "window_sums values k",
        "list[int]",
        "Return the sum of every window of {k} neighbouring entries of {values}",
        lambda v, k: [sum(v[i : i + k]) for i in range(len(v) - k + 1)],
    ),
    idea(
        "longest_increase values",
        "int",
        "Return the length of the longest stretch of {values} in which each entry is larger than the "
        "previous one",
        _longest_run,
    ),
    idea(
        "split_by_sign values",
        "tuple[list[int], list[int]]",
        "Return two lists: the negative entries of {values}, and all the others",
        lambda v: ([x for x in v if x < 0], [x for x in v if x >= 0]),
    ),
    idea(
        "swap_ends values",
        "list[int]",
        "Return a copy of {values} with its first and last entries exchanged",
        lambda v: [v[-1], *v[1:-1], v[0]],
    ),
    idea(
        "every_kth values k",
        "list[int]",
        "Return every {k}-th entry of {values}, starting with the first",
        lambda v, k: v[::k],
    ),
    idea(
        "pair_count values limit",
        "int",
        "Count the pairs of positions in {values} whose entries add up to {limit}",
        lambda v, m: sum(v[i] + v[j] == m for i in range(len(v)) for j in range(i)),
    ),
    idea(
        "is_balanced values",
        "bool",
        "Check whether {values} can be cut at some point into two parts with equal sums",
        lambda v: any(sum(v[:i]) == sum(v[i:]) for i in range(1, len(v))),
    ),
    idea(
        "square_odds values",
        "list[int]",
        "Return the squares of the odd entries of {values}",
        lambda v: [x * x for x in v if x % 2],
    ),
    idea(
        "middle_value values",
        "int",
        "Return the lower median of {values}, that is the middle entry once they are in order",
        lambda v: sorted(v)[(len(v) - 1) // 2],
    ),
    idea(
        "value_range amounts",
        "float",
        "Return the distance between the smallest and the largest of the {amounts}",
        lambda a: max(a) - min(a),
    ),
    idea(
        "normalise_amounts amounts",
        "list[float]",
        "Scale the {amounts} so that they add up to 1, rounded to three decimals",
        lambda a: [round(x / sum(a), 3) for x in a],
    ),
    idea(
        "moving_average amounts k",
        "list[float]",
        "Return the mean of every {k} neighbouring {amounts}, rounded to two decimals",
        lambda a, k: [round(sum(a[i : i + k]) / k, 2) for i in range(len(a) - k + 1)],
    ),
    idea(
        "peak_ratio amounts",
        "float",
        "Return the largest of the {amounts} divided by the smallest, rounded to two decimals",
        _ratio,
    ),
    idea(
        "total_with_tax amounts limit",
        "float",
        "Add up the {amounts} and put a tax of {limit} percent on top, rounded to two decimals",
        lambda a, m: round(sum(a) * (1 + m / 100), 2),
    ),
    idea(
        "transpose matrix",
        "list[list[int]]",
        "Return the {matrix} with rows and columns exchanged",
        lambda m: [list(row) for row in zip(*m, strict=True)],
    ),
    idea(
        "diagonal_sum matrix",
        "int",
        "Return the sum of the main diagonal of a square {matrix}",
        lambda m: sum(m[i][i] for i in range(len(m))),
    ),
    idea(
        "row_maxima matrix",
        "list[int]",
        "Return the largest value of each row of the {matrix}",
        lambda m: [max(row) for row in m],
    ),
    idea(
        "flatten matrix",
        "list[int]",
        "Return all values of the {matrix} in one list, row after row",
        lambda m: [x for row in m for x in row],
    ),
    idea(
        "turn_clockwise matrix",
        "list[list[int]]",
        "Rotate the {matrix} by a quarter turn clockwise",
        lambda m: [list(row) for row in zip(*m[::-1], strict=True)],
    ),
    idea(
        "column_means matrix",
        "list[float]",
        "Return the mean of each column of the {matrix}, rounded to two decimals",
        lambda m: [round(sum(c) / len(c), 2) for c in zip(*m, strict=True)],
    ),
)

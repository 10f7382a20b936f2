"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

RULES = {"t": "---|", "n": "--:|"}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], kinds: str = "t") -> str:
    """Return a table. Line breaks in a cell become spaces, and bars are escaped.

    Args:
        kinds: a letter a column: `t` is text, `n` a number, which is set to the right; the last letter stands for all
            columns that follow.
    """
    kinds = kinds.ljust(len(header), kinds[-1])
    return "\n".join([_line(header), "|" + "".join(RULES[kind] for kind in kinds), *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"

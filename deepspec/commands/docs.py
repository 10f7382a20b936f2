"""Writes the tables of docs/ that repeat what the code says: `python -m deepspec.commands.docs`.

A table stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`; everything else on a page is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deepspec.errors import DeepSpecError
from deepspec.evaluation.figures import figures_table
from deepspec.files import write_text
from deepspec.reproduce.tolerance import KINDS


def tolerance_table() -> list[str]:
    """Return the table of docs/reproduce.md, in Markdown."""
    rows = [f"| {kind} | {same} | {differs} |" for kind, (same, differs) in KINDS.items()]
    files = "| committed files | as `dvc.lock` has them | as `dvc.lock` has them |"
    return [
        "| metric | everything the same | something differs, or `--recompute` |",
        "|---|---|---|",
        *rows,
        files,
    ]


TABLES: dict[str, tuple[str, Callable[[], list[str]]]] = {  # page → name of the table, its lines
    "docs/evaluation.md": ("figures", figures_table),
    "docs/reproduce.md": ("tolerances", tolerance_table),
}


def renewed(page: str, text: str) -> str:
    """Return a page's text with its table as the code says it now.

    Raises:
        DeepSpecError: the page lacks the markers of its table.
    """
    name, lines = TABLES[page]
    begin, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise DeepSpecError(f"{page}: lacks the lines {begin} and {end}; put them around the table")
    return "\n".join([before + begin, *lines(), end + after])


def main(root: Path = Path(".")) -> None:
    """Write every table."""
    for page in TABLES:
        write_text(root / page, renewed(page, (root / page).read_text()))


if __name__ == "__main__":
    main()

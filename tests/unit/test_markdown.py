"""Tables that Markdown reads as tables."""

from __future__ import annotations

from deepspec.markdown import markdown_table


def test_a_table_says_which_columns_are_numbers():
    assert markdown_table(("name", "τ", "speed-up"), [("a", "2.0", "1.5")], "tn").splitlines() == [
        "| name | τ | speed-up |",
        "|---|--:|--:|",
        "| a | 2.0 | 1.5 |",
    ]


def test_what_would_end_a_cell_does_not():
    last = markdown_table(("a", "b"), [("x|y", "two\nlines")]).splitlines()[-1]
    assert last == r"| x\|y | two lines |"

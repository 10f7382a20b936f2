"""The tables of docs/ that repeat the code are those that the code makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepspec.commands.docs import TABLES, renewed
from deepspec.errors import DeepSpecError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", TABLES)
def test_a_page_is_up_to_date(page):
    text = (ROOT / page).read_text()
    assert renewed(page, text) == text, "run python -m deepspec.commands.docs"


@pytest.mark.parametrize("page", TABLES)
def test_what_was_edited_by_hand_is_written_anew_and_the_rest_is_kept(page):
    text = (ROOT / page).read_text()
    name, _ = TABLES[page]
    begin = f"<!-- generated: {name} -->"
    assert renewed(page, "my words\n" + text.replace(begin, f"{begin}\n| by hand |")) == "my words\n" + text


@pytest.mark.parametrize("page", TABLES)
def test_a_page_without_markers_is_refused(page):
    with pytest.raises(DeepSpecError, match="lacks the lines <!-- generated"):
        renewed(page, "no table\n")

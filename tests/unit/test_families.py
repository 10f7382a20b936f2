"""A tenth of the families of transformers decode as docs/targets.md says (`make families` runs all, and trains)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.families import YES, examine
from benchmarks.tiny_families import families

PAGE = Path(__file__).parents[2] / "docs/targets.md"
TENTH = families()[7::10]


def listed() -> dict[str, list[str]]:
    """Family → its cells in the page, from the verdict on."""
    table = PAGE.read_text().partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows if len(row) > 4}


def test_the_page_lists_every_family():
    assert set(listed()) >= set(families())


@pytest.mark.parametrize("family", TENTH)
def test_a_family_decodes_as_the_page_says(family, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    verdict, body, chain, tree = listed()[family][:4]
    row = examine(family, tmp_path, answer=24, trained=False)
    if verdict in ("refused", "not made"):
        assert row.verdict == verdict
        return
    assert (row.body, row.decodes, row.chain) == (body, YES, chain)
    assert (row.tree == YES) == (tree == YES) and not row.tree.startswith("WRONG")

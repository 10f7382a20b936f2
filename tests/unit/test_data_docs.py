"""reports/validation.html: what was expected and what was found, in one file that asks nobody for anything."""

import re
from html.parser import HTMLParser

import pytest

from deepspec.guard.page import render
from deepspec.guard.verdict import Check, Validation
from tests.records import HOSTILE

CHECKS = [
    Check(
        "row_count",
        "enough conversations to train on",
        "at least 100",
        "900",
        True,
        params=("validate.min_rows",),
        expectation={"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": 100}},
    ),
    Check(
        "last_role",
        "a conversation ends with an answer",
        "assistant",
        "1 of 900 break it",
        False,
        [{"id": "p7", "found": HOSTILE}],
        expectation={"type": "expect_column_values_to_be_in_set", "kwargs": {"value_set": ["assistant"]}},
    ),
]


class Tags(HTMLParser):
    """The names of a page's tags, and what they link to or load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]


@pytest.fixture(scope="module")
def page():
    return render(Validation("0123456789abcdef", 900, 3, CHECKS))


def test_every_expectation_stands_there_with_its_bound_and_what_was_found(page):
    for check in CHECKS:
        assert all(text in page for text in (f'id="{check.name}"', check.meaning, check.observed))
    assert "1 of 2 expectations are met" in page
    assert "<code>validate.min_rows</code>" in page
    assert "expect_table_row_count_to_be_between(min_value=100)" in page
    assert page.index('id="last_role"') < page.index('id="row_count"'), "what is broken comes first"


def test_the_page_names_no_other_place(page):
    assert "default-src 'none'" in page
    tags = Tags(page)
    assert tags.names.isdisjoint({"script", "iframe", "object", "embed", "img"})
    assert tags.links == ["data:,"]
    assert not re.findall(r"url\(|@import|https?://", page)


def test_what_a_model_wrote_stays_text(page):
    assert HOSTILE not in page
    assert "&lt;img src=x" in page or "&lt;/script&gt;" in page


def test_it_opens_without_a_request_or_an_error(page, browser, tmp_path):
    (tmp_path / "validation.html").write_text(page)
    faults = []
    shown = browser.new_page()
    shown.on("console", lambda message: faults.append(message.text))
    shown.on("pageerror", lambda error: faults.append(str(error)))
    address = (tmp_path / "validation.html").as_uri()
    shown.on("request", lambda request: request.url in (address, "data:,") or faults.append(request.url))
    shown.goto(address)
    assert shown.title() == "Validation of the distillation data"
    assert shown.locator("article").count() == 2
    shown.set_viewport_size({"width": 375, "height": 812})
    assert shown.evaluate("document.documentElement.scrollWidth") <= 375
    shown.close()
    assert not faults

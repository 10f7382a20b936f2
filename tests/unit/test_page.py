"""reports/report.html in a real browser: every figure drawn, no request, no error, what a model wrote stays text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deepspec.report import charts, page
from deepspec.report.tables import tables
from tests.records import HOSTILE, record, write

DEMO = Path(__file__).parents[2] / "reports/report.html"  # of the last `make demo` that was committed
DESK = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 375, "height": 812}, "has_touch": True, "is_mobile": True}


def render(folder, records) -> str:
    inputs = write(folder, records)
    return page.render(inputs, charts.figures(tables(inputs)))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A page with two trained drafts, one of which changed a token, and a lookup."""
    folder = tmp_path_factory.mktemp("page")
    records = {"good": record(), "bad": record("bad", None), "lookup": record("lookup", 1.2, trained=False)}
    (folder / "report.html").write_text(render(folder, records))
    return folder / "report.html"


@pytest.fixture
def show(browser):
    """A function: (path, screen) → the page with its charts drawn; nothing may go wrong while it is open."""
    contexts, faults = [], []

    def open_page(path, **screen):
        context = browser.new_context(**screen)
        contexts.append(context)
        shown = context.new_page()
        shown.on("console", lambda message: faults.append(f"console: {message.text}"))
        shown.on("pageerror", lambda error: faults.append(f"error: {error}"))
        shown.on(
            "request",
            lambda request: request.url == path.as_uri() or faults.append(f"request: {request.url}"),
        )
        shown.goto(path.as_uri())
        wait(shown)
        return shown

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def wait(shown, theme: str | None = None) -> None:
    """Until every chart is drawn, in the theme if one is given."""
    mark = f'[data-drawn="{theme}"]' if theme else "[data-drawn]"
    shown.wait_for_function(
        f"document.querySelectorAll('.chart').length === document.querySelectorAll('.chart{mark}').length"
    )


@pytest.mark.parametrize("screen", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("made", ["full", "demo"])
def test_every_figure_is_drawn_and_nothing_is_wider_than_the_screen(full, show, made, screen):
    shown = show({"full": full, "demo": DEMO}[made], **screen)
    empty = shown.evaluate(
        "[...document.querySelectorAll('.chart')]"
        ".filter(c => !c.querySelector('svg .mark-rect path, svg .mark-line path, svg .mark-area path'))"
        ".map(c => c.dataset.chart)"
    )
    assert shown.locator(".chart").count() > 15 and empty == []
    width, inner = shown.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert width <= inner
    wide = shown.evaluate(
        "[...document.querySelectorAll('.chart')].filter(c => c.querySelector('svg').getBoundingClientRect().width"
        " > c.getBoundingClientRect().width + 1).map(c => c.dataset.chart)"
    )
    assert wide == []


def test_the_board_is_sorted_and_warnings_are_named(full, show):
    shown = show(full, **DESK)
    ways = shown.locator("#board tbody th").all_inner_texts()
    assert ways[0] == "good" and ways[-1] == "plain decoding"
    assert "2.00×" in shown.locator("h1").inner_text()
    warning = shown.locator(".hero .warning").inner_text()
    assert "bad: not_lossless" in warning and "the output changed on sums" in warning
    bad = shown.locator("#board tr", has=shown.locator("th", has_text=re.compile("^bad$"))).inner_text()
    assert "NO" in bad and "×" not in bad


def test_hovering_a_token_tells_what_the_draft_had_in_mind(full, show):
    shown = show(full, **DESK)
    tip = shown.locator("#tip")
    assert not tip.is_visible()
    shown.locator("#generation .tok").first.hover()
    text = tip.inner_text()
    for expected in ("Drafted and accepted", "round 1", "80 %", "Hi", "20.0 %"):
        assert expected in text
    shown.locator("#generation .tok").nth(3).hover()
    assert "Proposed and rejected: !" in tip.inner_text()
    shown.keyboard.press("Escape")
    assert not tip.is_visible()


def test_the_demo_s_own_tokens_tell_their_story(show):
    shown = show(DEMO, **DESK)
    shown.locator("#generation .tok").nth(5).hover()
    assert "round" in shown.locator("#tip").inner_text()


def test_tokens_answer_to_the_keyboard_and_to_a_finger(full, show):
    shown = show(full, **DESK)
    shown.locator("#generation .tok").first.focus()
    shown.keyboard.press("ArrowRight")
    assert "Looked up and accepted" in shown.locator("#tip").inner_text()
    phone = show(full, **PHONE)
    phone.locator("#generation .tok").first.tap()
    box = phone.locator("#tip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 375


def test_the_selectors_change_the_generation(full, show):
    shown = show(full, **DESK)
    assert shown.locator("#pick-drafter option").all_inner_texts() == [
        "good",
        "bad",
    ]  # a lookup left no traces
    shown.locator("#pick-drafter").select_option("1")
    assert shown.locator("#prompt").text_content().startswith("bad ")
    shown.locator("#pick-trace").select_option("1")
    assert shown.locator("#shares").inner_text() == "τ 2.00 · 4 tokens: draft 25 %, lookup 25 %, target 50 %"


def test_what_a_model_wrote_is_never_markup(full, show):
    shown = show(full, **DESK)
    shown.locator("#generation .tok").nth(2).hover()
    assert shown.title() != "owned" and shown.locator("img").count() == 0
    assert shown.locator("#generation .tok").nth(2).text_content() == HOSTILE
    assert HOSTILE in shown.locator("#tip").text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_and_the_button(full, show, scheme):
    other = {"light": "dark", "dark": "light"}[scheme]
    shown = show(full, color_scheme=scheme, **DESK)
    wait(shown, scheme)
    ground = "getComputedStyle(document.body).backgroundColor"
    label = "getComputedStyle(document.querySelector('.chart .role-axis-label text')).fill"
    before = shown.evaluate(ground), shown.evaluate(label)
    shown.locator("#theme").click()
    wait(shown, other)
    after = shown.evaluate(ground), shown.evaluate(label)
    assert before[0] != after[0] and before[1] != after[1]


def test_a_pipeline_without_a_trained_draft_has_a_page_too(tmp_path, show):
    path = tmp_path / "lookup.html"
    path.write_text(render(tmp_path, {"lookup": record("lookup", trained=False)}))
    shown = show(path, **DESK)
    assert shown.locator(".chart").count() == 12
    assert shown.locator("#tokens, #confidence, #shape, #batches, #training").count() == 0
    assert "lookup alone" in shown.locator("#board").inner_text()


def test_the_same_inputs_make_the_same_page(tmp_path):
    first = render(tmp_path, {"good": record()})
    assert first == render(tmp_path, {"good": record()})
    assert len(first) < 2_000_000


def test_the_main_figures_are_pictures_too(tmp_path):
    inputs = write(tmp_path, {"good": record()})
    found = charts.pngs(charts.figures(tables(inputs)))
    assert {
        "speedup-0.png",
        "acceptance-good-greedy.png",
        "reliability-good-greedy.png",
        "training.png",
    } <= set(found)
    assert all(image.startswith(b"\x89PNG") for image in found.values())

"""A chat template that asks for the date is given one day, for good."""

from __future__ import annotations

import json
from datetime import datetime, timedelta

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from deepspec.errors import DeepSpecError
from deepspec.export.engines import with_template
from deepspec.export.layout import Layout, tokenizer_files
from deepspec.target import template
from deepspec.target.model import load_target, resolve_target
from tests.tiny import CHAT_TEMPLATE, make_target, make_tokenizer

DATED = (
    "\n{% if strftime_now is defined %}{% set day = strftime_now('%-d %b %Y') %}{% endif %}day {{ day }}\n"
)
ASKED = [{"role": "user", "content": "a cat"}]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A target whose template prints the date."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = make_target(tmp_path / "source", layers=2)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DATED + CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def move_clock(monkeypatch, days: int) -> None:
    """Let the templates of transformers and the pins see another day."""

    class Moved(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=days)

    monkeypatch.setattr(chat_template_utils, "datetime", Moved)
    monkeypatch.setattr(template, "today", lambda: Moved.now().date().isoformat())


def prompt(path) -> str:
    return AutoTokenizer.from_pretrained(path).apply_chat_template(ASKED, tokenize=False)


def test_the_source_itself_changes_with_the_day(source, monkeypatch):
    before = prompt(source)
    move_clock(monkeypatch, 3)
    assert prompt(source) != before


def test_a_resolved_target_writes_the_same_prompt_on_every_day(source, tmp_path, monkeypatch):
    out = tmp_path / "target"
    resolve_target(str(source), None, "float32", out)
    target, expected = load_target(out), prompt(source)
    ids = target.chat_ids(ASKED)
    assert target.tokenizer.decode(ids) == expected + "<|im_start|>assistant\n"
    copied = tmp_path / "export"
    copied.mkdir()
    for name, file in tokenizer_files(out).items():
        (copied / name).write_bytes(file.read_bytes())
    move_clock(monkeypatch, 3)
    assert target.chat_ids(ASKED) == load_target(out).chat_ids(ASKED) == ids
    assert prompt(copied) == expected
    resolve_target(str(source), None, "float32", out)  # as a stage that runs again
    assert (load_target(out).chat_ids(ASKED), load_target(out).digest) == (ids, target.digest)


def test_the_day_may_be_given(source, tmp_path):
    resolve_target(str(source), None, "float32", tmp_path / "target", "2024-07-06")
    assert prompt(tmp_path / "target").startswith("\nday 6 Jul 2024\n")
    assert json.loads((tmp_path / "target/deepspec.json").read_text())["template_date"] == "2024-07-06"
    with pytest.raises(DeepSpecError, match=r"template_date: 'July' is no date like 2026-11-29$"):
        resolve_target(str(source), None, "float32", tmp_path / "other", "July")


def test_a_template_without_a_date_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = make_target(tmp_path / "source", layers=2)
    resolve_target(str(path), None, "float32", tmp_path / "target", "2024-07-06")
    assert (tmp_path / "target/chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert "template_date" not in json.loads((tmp_path / "target/deepspec.json").read_text())


@pytest.mark.parametrize("directive", ["%d", "%-d", "%e", "%B %Y", "%A, %H:%M", "%F", "100%% %j", "%y%m%d"])
def test_a_pin_spells_a_date_as_python_does(directive):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now(" + repr(directive) + ") }}"
    template.pin(tokenizer, "2024-07-06")
    assert tokenizer.apply_chat_template(ASKED, tokenize=False) == datetime(2024, 7, 6, 12).strftime(
        directive
    )
    assert template.pinned(tokenizer) == "2024-07-06"


def test_an_engine_is_given_the_pinned_template(source, tmp_path):
    files = {"chat_template.jinja": tmp_path / "chat_template.jinja"}
    layout = Layout("some", "reader", "vllm serve owner/name", copies=files)
    files["chat_template.jinja"].write_text(CHAT_TEMPLATE)
    assert with_template(layout, "vllm", "out") == layout
    pinned = make_tokenizer()
    pinned.chat_template = DATED
    template.pin(pinned, "2024-07-06")
    files["chat_template.jinja"].write_text(pinned.chat_template)
    assert with_template(layout, "vllm", "out").command.endswith(" --chat-template out/chat_template.jinja")
    assert with_template(layout, "hf", "out") == layout

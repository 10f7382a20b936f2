"""Chat templates that ask for today's date, pinned to one: a target writes the same prompts on every day.

transformers gives a template one way to the clock, the function `strftime_now`. A pinned template defines a function
of that name itself, in front of its own text, so whoever renders it (here, or an engine that serves an export) gets
the pinned date.
"""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

from deepspec.errors import DeepSpecError

CLOCK = "strftime_now"
_MARK = "{#- deepspec: dates of this template are pinned to "
_DIRECTIVES = "aAbBcdeDfFGhHIjmMnpRSTuUVwWxXyYzZ"
_UNPADDED = "dHIjmMSUWy"  # as %-d


def today() -> str:
    """Return today's date, as a pin is written."""
    return date.today().isoformat()


def check_there(source: str, tokenizer: Any) -> None:
    """Refuse a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise DeepSpecError(
            f"{source}: the tokenizer has no chat template; add the one the target was trained with"
        )


def asks_for_date(tokenizer: Any) -> bool:
    """Return whether a tokenizer's chat template reads the clock."""
    return any(CLOCK in text for text in _templates(tokenizer).values())


def is_pinned(text: str) -> bool:
    """Return whether a template is one that was pinned here."""
    return text.startswith(_MARK)


def pinned(tokenizer: Any) -> str | None:
    """Return the date that a tokenizer's template is pinned to; None if it is not."""
    for text in _templates(tokenizer).values():
        if is_pinned(text):
            return text[len(_MARK) :].split(" ", 1)[0]
    return None


def pin(tokenizer: Any, day: str) -> None:
    """Pin a tokenizer's template, all if it has several, to a day like "2026-11-29", noon; one that is pinned stays.

    Raises:
        DeepSpecError: no such day.
    """
    try:
        moment = datetime.fromisoformat(day).replace(hour=12)
    except ValueError:
        raise DeepSpecError(f"template_date: {day!r} is no date like 2026-11-29") from None
    found = {name: _pinned(text, moment, day) for name, text in _templates(tokenizer).items()}
    tokenizer.chat_template = found if isinstance(tokenizer.chat_template, dict) else found[""]


def _templates(tokenizer: Any) -> dict[str, str]:
    template = tokenizer.chat_template
    return template if isinstance(template, dict) else {"": template or ""}


def _pinned(text: str, moment: datetime, day: str) -> str:
    if CLOCK not in text or is_pinned(text):
        return text
    spelt = [(f"%{letter}", moment.strftime(f"%{letter}")) for letter in _DIRECTIVES]
    spelt += [(f"%-{letter}", moment.strftime(f"%{letter}").lstrip("0") or "0") for letter in _UNPADDED]
    replaced = "".join(f" | replace({old!r}, {new!r})" for old, new in spelt)
    body = f"format | replace('%%', '\\x00'){replaced} | replace('\\x00', '%')"
    return f"{_MARK}{day} -#}}{{%- macro {CLOCK}(format) -%}}{{{{- {body} -}}}}{{%- endmacro -%}}{{{{- '' }}}}{text}"

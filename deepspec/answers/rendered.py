"""The ids of an assistant's turn that is known as a message: as an engine would have been given and have given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepspec.answers.conversation import UnusableError
from deepspec.answers.turns import BROKEN, end_of_answer
from deepspec.errors import DeepSpecError
from deepspec.messages.message import Message


def rendered_answer(
    target: Any,
    asked: Sequence[Message],
    message: Message,
    tools: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    cut: bool = False,
) -> list[int]:
    """Return the answer's ids as the template writes it behind the generation prompt, stop token included.

    Args:
        cut: the answer was cut short: what the template puts behind its last word was never written.

    Raises:
        UnusableError: the template refuses it, leaves a part of it out, or does not begin it as a generation begins.
    """
    question = [one for one in asked if one["role"] == "user"][-1:]
    for context in (asked, question):  # some templates write the question anew behind an answer
        try:
            before = target.chat_text(context, True, tools, options)
            whole = target.chat_text([*context, message], False, tools, options)
        except DeepSpecError as error:
            raise UnusableError(str(error)) from None
        if whole.startswith(before):
            break
    else:
        raise UnusableError("the template writes this answer otherwise than a generation begins")
    text = whole[len(before) :]
    parts = [message["content"], message.get("reasoning_content", "")]
    parts += [call["function"]["name"] for call in message.get("tool_calls", [])]
    if any("".join(part.split()) not in "".join(text.split()) for part in parts):
        raise UnusableError("the template leaves a part of this answer out")
    if cut:
        text = _up_to(text, message)
        return target.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = target.tokenizer(text, add_special_tokens=False)["input_ids"]
    stop = next((i for i, token in enumerate(ids) if token in target.stop_ids), None)
    return ids[: stop + 1] if stop is not None else [*_without_blanks(target, ids), end_of_answer(target)]


def _up_to(text: str, message: Message) -> str:
    """Return a rendered answer up to its last word, without the half character at which it was cut."""
    said = message["content"].strip() or message.get("reasoning_content", "").strip()
    last = said.rstrip(BROKEN)
    start = text.rfind(last)
    if not last or start < 0 or "tool_calls" in message:
        raise UnusableError("the answer was cut short where its text does not tell the tokens")
    return text[: start + len(last)]


def _without_blanks(target: Any, ids: list[int]) -> list[int]:
    """Leave out the blanks at the end, which are the template's where it closes a turn without a token."""
    end = len(ids)
    while end and not target.tokenizer.decode([ids[end - 1]]).strip():
        end -= 1
    return ids[:end]

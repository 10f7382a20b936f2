"""The ids of an assistant's turn that is known as a message: as an engine would have been given and have given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepspec.answers.conversation import UnusableError
from deepspec.answers.turns import end_of_answer
from deepspec.errors import DeepSpecError
from deepspec.messages.message import Message


def rendered_answer(
    target: Any,
    asked: Sequence[Message],
    message: Message,
    tools: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> list[int]:
    """Return the answer's ids as the template writes it behind the generation prompt, stop token included.

    Raises:
        UnusableError: the template refuses it, leaves a part of it out, or does not begin it as a generation begins.
    """
    try:
        before = target.chat_text(asked, True, tools, options)
        whole = target.chat_text([*asked, message], False, tools, options)
    except DeepSpecError as error:
        raise UnusableError(str(error)) from None
    if not whole.startswith(before):
        raise UnusableError("the template writes this answer otherwise than a generation begins")
    text = whole[len(before) :]
    parts = [message["content"], message.get("reasoning_content", "")]
    parts += [call["function"]["name"] for call in message.get("tool_calls", [])]
    if any("".join(part.split()) not in "".join(text.split()) for part in parts):
        raise UnusableError("the template leaves a part of this answer out")
    ids = target.tokenizer(text, add_special_tokens=False)["input_ids"]
    stop = next((i for i, token in enumerate(ids) if token in target.stop_ids), None)
    return ids[: stop + 1] if stop is not None else [*_without_blanks(target, ids), end_of_answer(target)]


def _without_blanks(target: Any, ids: list[int]) -> list[int]:
    """Leave out the blanks at the end, which are the template's where it closes a turn without a token."""
    end = len(ids)
    while end and not target.tokenizer.decode([ids[end - 1]]).strip():
        end -= 1
    return ids[:end]

"""What a chat template puts round answers, as token ids: between two of them, before and behind one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deepspec.errors import DeepSpecError
from deepspec.messages.message import Message

# Two stand-in answers that differ in their last letter: whatever tokens they become, the last ones differ.
STAND_INS = ("answerQ", "answerZ")
BROKEN = "\ufffd"  # what decoding puts in place of half a character


def answer_text(target: Any, tokens: Sequence[int]) -> str:
    """Decode an answer's text (ids without the stop token), special tokens inside it included."""
    return target.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def squeezed(text: str) -> str:
    """Return a text without blanks, which templates trim and add."""
    return "".join(text.split())


def between_turns(
    target: Any,
    before: Sequence[Message],
    *after: Message,
    answer: Message | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the ids that the template puts between an answer's stop token and the next answer, next messages included.

    The conversation is rendered twice, with two stand-ins for the answer; the ids that both renderings end
    with are what follows an answer. The template's end-of-turn token is left out: the target has produced
    one.

    Args:
        before: the messages that the answer completes.
        after: the messages that follow it.
        answer: the answer, where it is more than text: one that calls tools.
        tools: that are offered.
        options: `chat_template_kwargs` of the conversation.

    Raises:
        DeepSpecError: the template shows no answers, so that conversations of several turns cannot be built.
    """
    tail = after_answer(target, before, after, answer, tools, options)
    calls = bool(answer and answer.get("tool_calls"))  # the text of the calls comes before the stop token
    for i, token in enumerate(tail):
        if token in target.stop_ids:
            return tail[i + 1 :]
        if not calls and target.tokenizer.decode([token]).strip():
            break
    return tail


def end_of_answer(target: Any) -> int:
    """Return the stop token with which the template closes an answer (the target may know several).

    Raises:
        DeepSpecError: the target knows none.
    """
    if not target.stop_ids:
        raise DeepSpecError("the target has no stop token; set eos_token_id in its generation_config.json")
    user: Message = {"role": "user", "content": "question"}
    for token in after_answer(target, [user], [user]):
        if token in target.stop_ids:
            return token
        if target.tokenizer.decode([token]).strip():
            break
    eos = target.tokenizer.eos_token_id
    return eos if eos in target.stop_ids else min(target.stop_ids)


def closed(target: Any, tokens: Sequence[int], reason: str, end: Any) -> list[int]:
    """Return an engine's ids of an answer, with the stop token that ended it where the engine leaves that out.

    Args:
        reason: why the answer ended.
        end: the stop token.
    """
    if reason != "stop" or (tokens and tokens[-1] in target.stop_ids):
        return list(tokens)
    return [*tokens, end]


def generation_prompt(target: Any, options: Mapping[str, Any] | None = None) -> list[int]:
    """Return the ids that the template puts before every answer; empty where it puts none."""
    messages = [{"role": "user", "content": "question"}]
    closed, opened = (target.chat_ids(messages, flag, (), options) for flag in (False, True))
    return opened[len(closed) :] if opened[: len(closed)] == closed else []


def after_answer(
    target: Any,
    before: Sequence[Message],
    after: Sequence[Message],
    answer: Message | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the ids with which renderings of two different answers end alike.

    Raises:
        DeepSpecError: they do not differ: the template leaves answers out.
    """
    renderings = [
        target.chat_ids([*before, _stand_in(answer, text), *after], True, tools, options)
        for text in STAND_INS
    ]
    if renderings[0] == renderings[1]:
        raise DeepSpecError(
            "the target's chat template leaves answers out of later turns; use prompts of one turn"
        )
    return list(_common_suffix(*renderings))[::-1]


def _stand_in(answer: Message | None, text: str) -> Message:
    """Return an answer of another text; one that calls tools does so with other arguments."""
    if not (answer and answer.get("tool_calls")):
        return {"role": "assistant", "content": text}
    calls = [
        {**call, "function": {**call["function"], "arguments": {"x": text}}} for call in answer["tool_calls"]
    ]
    return {"role": "assistant", "content": text, "tool_calls": calls}  # type: ignore[typeddict-item]


def _common_suffix(first: list[int], second: list[int]) -> Iterator[int]:
    for a, b in zip(reversed(first), reversed(second), strict=False):
        if a != b:
            return
        yield a

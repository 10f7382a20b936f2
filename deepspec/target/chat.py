"""Conversations under a chat template: the one place where a template is rendered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from deepspec.errors import DeepSpecError
from deepspec.files import digest

_PROBE = "deepspec"  # a word that no template has of its own
_ASKED = {"role": "user", "content": _PROBE}
_SHORT = 9  # letters and digits of an id that every template takes
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # names that templates know a thought by


class Templated:
    """What has a tokenizer with a chat template, and arguments of it that hold for every conversation."""

    tokenizer: Any
    source: str
    chat_template_kwargs: dict[str, Any]

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation under the target's own template.

        Args:
            messages: as OpenAI's API has them; the arguments of tool calls are objects.
            chat_template_kwargs: beside the target's own (`target.chat_template_kwargs` of params.yaml), which they
                go before.

        Raises:
            DeepSpecError: the template refuses the conversation.
        """
        options = {**self.chat_template_kwargs, **(chat_template_kwargs or {})}
        return render(self.tokenizer, self.source, messages, add_generation_prompt, tools, options)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of `chat_text`."""
        text = self.chat_text(messages, add_generation_prompt, tools, chat_template_kwargs)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def user_prefix_ids(self) -> list[int]:
        """Return the template up to where the user's words begin: from here the target writes a user turn (Magpie)."""
        marker = "\u2063deepspec\u2063"
        text = self.chat_text([{"role": "user", "content": marker}], add_generation_prompt=False)
        if marker not in text:
            raise DeepSpecError(
                f"{self.source}: the chat template does not show a user's words as they are, so none can be written in "
                "their place; take magpie out of prompts.mix"
            )
        return self.tokenizer(text[: text.index(marker)], add_special_tokens=False)["input_ids"]


def render(
    tokenizer: Any,
    source: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Render messages as text by the tokenizer's template.

    A thought has every name that templates know it by. The arguments of tool calls are objects to the template, as
    transformers asks; a template that joins them to its own text gets them as JSON. A template that refuses the ids of
    calls (Mistral's asks for nine letters or digits) gets others, the same for a call and its result. One that shows
    words only as parts of a message gets them so.

    Args:
        source: the target's name, for errors.

    Raises:
        DeepSpecError: the template refuses the conversation, in its own words, or a text is no Unicode.
    """
    options = dict(chat_template_kwargs or {})
    messages = with_named_thoughts(messages)
    forms: list[Sequence[Mapping[str, Any]]] = [messages]
    if any(message.get("tool_calls") for message in messages):
        named = with_short_ids(messages)
        forms += [with_text_arguments(messages), named, with_text_arguments(named)]
    asked = partial(_rendered, tokenizer, source, add_generation_prompt, tools, options)
    text, error = asked(forms)
    if (text is None or _last_words(messages) not in text) and _wants_parts(tokenizer, source, options):
        text, error = asked([in_parts(form) for form in forms])
    if text is None:
        words = " ".join(str(error).split())
        raise DeepSpecError(f"{source}: the chat template refuses this conversation: {words}") from error
    return text


def check_renders(source: str, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> None:
    """Refuse a template that takes no user's turn, with a system message before it or without, or hides its words."""
    refusal: DeepSpecError | None = None
    for before in ([], [{"role": "system", "content": "Be brief."}]):
        try:
            text = render(tokenizer, source, [*before, _ASKED], True, (), chat_template_kwargs)
        except DeepSpecError as error:
            refusal = refusal or error
            continue
        if _PROBE not in text.lower():
            raise DeepSpecError(f"{source}: the chat template does not show what a user says; mend it")
        return
    if refusal is not None:
        raise refusal


def _rendered(
    tokenizer: Any,
    source: str,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    forms: Sequence[Sequence[Mapping[str, Any]]],
) -> tuple[str | None, Exception | None]:
    """Return the text of the first form that the template takes, or why it refuses the first."""
    error: Exception | None = None
    for form in forms:
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in form],
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **options,
            )
            text.encode()
        except UnicodeEncodeError:
            raise DeepSpecError(
                f"{source}: a message holds half a character (a lone surrogate); remove it"
            ) from None
        except Exception as raised:  # whatever a template does
            error = error or raised
        else:
            return text, None
    return None, error


def _last_words(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return what the user says last, as a template that trims it shows it."""
    said = [message.get("content") for message in messages if message.get("role") == "user"]
    return said[-1].strip() if said and isinstance(said[-1], str) else ""


def _wants_parts(tokenizer: Any, source: str, options: Mapping[str, Any]) -> bool:
    """Return whether a template shows words only as parts of a message, as some of models that also see do."""
    asked = partial(_rendered, tokenizer, source, True, (), options)
    (whole, _), (parts, _) = asked([[_ASKED]]), asked([in_parts([_ASKED])])
    shown = parts is not None and _PROBE in parts and "'type'" not in parts
    return shown and (whole is None or _PROBE not in whole)


def in_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with their texts as lists of one part, as OpenAI's API has them beside images."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else dict(message)
        for message in messages
    ]


def with_named_thoughts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with a thought under every name that a template, or a server, knows it by."""
    return [
        {**dict.fromkeys(_THOUGHTS, thought), **message}
        if (thought := message.get("reasoning_content"))
        else dict(message)
        for message in messages
    ]


def with_text_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the arguments of their tool calls as JSON text, as OpenAI's API has them."""
    return [
        {
            **message,
            "tool_calls": [_with_text_arguments(call) for call in message["tool_calls"]],
        }
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def with_short_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with nine hexadecimal digits as the ids of calls, made from those that they have."""
    found = []
    for message in messages:
        changed = dict(message)
        if message.get("tool_calls"):
            changed["tool_calls"] = [{**call, "id": _short_id(call["id"])} for call in message["tool_calls"]]
        if message.get("tool_call_id"):
            changed["tool_call_id"] = _short_id(message["tool_call_id"])
        found.append(changed)
    return found


def _short_id(id: str) -> str:
    return id if len(id) == _SHORT and id.isalnum() else digest(id)[:_SHORT]


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}

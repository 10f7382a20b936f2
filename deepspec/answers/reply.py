"""A server's reply read as token ids: its own where it returns them, else those of its text, thought and tool calls."""

from __future__ import annotations

from typing import Any

from deepspec.answers.conversation import Conversation, UnusableError
from deepspec.answers.history import Histories
from deepspec.answers.rendered import rendered_answer
from deepspec.answers.turns import BROKEN, answer_text, closed, end_of_answer
from deepspec.errors import DeepSpecError
from deepspec.messages.errors import BadRowError
from deepspec.messages.message import THOUGHTS, Message, read_messages

ENDINGS = {"tool_calls": "stop", "function_call": "stop"}
ADVICE = "run the server without that parser, or one that returns token ids (vLLM's return_token_ids)"


class Reader:
    """Reads replies of chat completions.

    Args:
        histories: how the target's template writes answers.
    """

    def __init__(self, target: Any, histories: Histories) -> None:
        self.target, self.histories = target, histories
        self.stop_id = end_of_answer(target)

    def read(self, reply: dict, conversation: Conversation) -> tuple[list[int], str, Message | None]:
        """Return the answer's token ids, its finish reason, and what it says where the server told the parts apart.

        Raises:
            UnusableError: this answer cannot be a row.
            DeepSpecError: none of this server's answers could: its template is another, or its parser takes out what
                the template does not show.
        """
        try:
            choice = reply["choices"][0]
            message, reason = dict(choice["message"]), choice["finish_reason"]
        except (KeyError, IndexError, TypeError):
            raise UnusableError("the server's reply is not a chat completion") from None
        reason = ENDINGS.get(reason, reason)
        tokens = choice.get("token_ids")
        if tokens and all(isinstance(token, int) for token in tokens):
            self._check_prompt(reply.get("prompt_token_ids") or choice.get("prompt_token_ids"), conversation)
            said = choice.get("stop_reason")
            stop = said if said in self.target.stop_ids else self.stop_id
            return closed(self.target, tokens, reason, stop), reason, None
        thought = next(
            (message[key] for key in THOUGHTS if isinstance(message.get(key), str) and message[key]), ""
        )
        calls = message.get("tool_calls") or []
        text = message.get("content")
        if thought or calls:
            return self._put_together(conversation, text or "", thought, calls, reason)
        if not isinstance(text, str):
            raise UnusableError(f"the server returned no text (finish reason {reason!r})")
        return closed(self.target, self._ids(text, reason), reason, self.stop_id), reason, None

    def _check_prompt(self, given: list[int] | None, conversation: Conversation) -> None:
        ours = conversation.prompt_ids or []
        if given and given != ours:
            at = next((i for i, (a, b) in enumerate(zip(given, ours, strict=False)) if a != b), None)
            at = min(len(given), len(ours)) if at is None else at
            here, there = (self.target.tokenizer.decode(ids[at : at + 8]) for ids in (ours, given))
            raise DeepSpecError(
                f"the server renders prompt {conversation.prompt.id!r} otherwise than data/target's template: "
                f"{there!r} where ours has {here!r} (token {at}); give both the same template and "
                "target.chat_template_kwargs"
            )

    def _ids(self, text: str, reason: str) -> list[int]:
        """Return the ids of a text; the half character at which a cut answer ends is left out."""
        if reason == "length":
            text = text.rstrip(BROKEN)
        if BROKEN in text:
            raise UnusableError(
                "the answer holds half a character, whose tokens its text does not tell; use a server that returns "
                "token ids"
            )
        tokens = self.target.tokenizer(text, add_special_tokens=False)["input_ids"]
        if answer_text(self.target, tokens) != text:
            raise UnusableError("the target's tokenizer does not give this answer's text back")
        return tokens

    def _put_together(
        self, conversation: Conversation, text: str, thought: str, calls: list, reason: str
    ) -> tuple[list[int], str, Message]:
        """Write an answer whose parts the server told apart as the template does."""
        chat = conversation.prompt.chat
        form = self.histories.of(chat).form
        if thought and form.thought is None:
            raise DeepSpecError(
                f"the server took the reasoning out of the answer, and the target's template does not show it; {ADVICE}"
            )
        if calls and form.call is None:
            raise DeepSpecError(
                f"the server took tool calls out of the answer, and the target's template does not show them; {ADVICE}"
            )
        try:
            (message,) = read_messages(
                [
                    {
                        "role": "assistant",
                        "content": text.lstrip("\n") if thought else text,
                        "tool_calls": calls,
                    }
                ],
                "choices",
            )
        except BadRowError as error:
            raise UnusableError(f"the server's answer: {error}") from None
        if thought:
            message["reasoning_content"] = thought.strip("\n")
        if calls:
            tokens = rendered_answer(
                self.target, conversation.asked, message, chat.tools, chat.chat_template_kwargs
            )
            return tokens, reason, message
        opening, middle = form.thought or ("", "")
        whole = opening + message["reasoning_content"]
        if message["content"] or reason == "stop":
            whole += middle + message["content"]
        return closed(self.target, self._ids(whole, reason), reason, self.stop_id), reason, message

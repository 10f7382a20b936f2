"""A conversation as the target saw it: token ids and loss mask, turn by turn, for any chat template.

An answer's ids are kept exactly as generated, stop token included; text decoded and tokenised again can come
out as other ids, and a draft trained on those learns a sequence that the target never produced. So the whole
conversation is never rendered: each turn appends to the ids so far, and only the template's text between two
turns is tokenised (`between_turns`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepspec.errors import DeepSpecError
from deepspec.messages.prompt import Prompt

# Two stand-in answers that differ in their last letter: whatever tokens they become, the last ones differ.
STAND_INS = ("answerQ", "answerZ")


class UnusableError(Exception):
    """This conversation cannot become a training row; the message is the reason that failures.jsonl gives."""


class Conversation:
    """One prompt on its way to a training row.

    Let the target continue `prompt_ids` by at most `room` tokens, hand its answer to `add_answer`, and go on
    until `prompt_ids` is None. The conversation ends with its last user turn, with an answer that was cut
    short (the target never closed that turn), or where the next turn would not fit.

    Args:
        target: anything with `tokenizer`, `stop_ids`, `max_length` and `chat_ids`.
        max_new_tokens: of one answer.
        max_length: of the whole conversation, in tokens; the target's own limit holds too.
    """

    def __init__(self, target: Any, prompt: Prompt, max_new_tokens: int, max_length: int) -> None:
        self.target = target
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.max_length = min(max_length, target.max_length)
        self.messages: list[dict[str, str]] = []
        self.input_ids: list[int] = []
        self.loss_mask: list[int] = []
        self.finish_reasons: list[str] = []
        self.prompt_ids: list[int] | None = self._next_prompt()
        if self.prompt_ids is None:
            raise UnusableError(f"the prompt leaves no room for an answer within {self.max_length} tokens")

    @property
    def room(self) -> int:
        """Return how many tokens the next answer may have."""
        return min(self.max_new_tokens, self.max_length - len(self.prompt_ids or []))

    @property
    def asked(self) -> list[dict[str, str]]:
        """Return the messages that the next answer completes: all so far and the next user turn."""
        turn = self.prompt.turns[len(self.finish_reasons)]
        return [*self.messages, {"role": "user", "content": turn}]

    def add_answer(self, tokens: list[int], finish_reason: str) -> None:
        """Append the target's answer to `prompt_ids`.

        Args:
            tokens: as generated; the last one is a stop token where `finish_reason` is "stop".

        Raises:
            UnusableError: the answer is not what its finish reason says, or does not fit.
        """
        self._check(tokens, finish_reason)
        self.messages = [*self.asked, {"role": "assistant", "content": self._text(tokens)}]
        self.loss_mask += [0] * (len(self.prompt_ids or []) - len(self.input_ids)) + [1] * len(tokens)
        self.input_ids = [*(self.prompt_ids or []), *tokens]
        self.finish_reasons.append(finish_reason)
        self.prompt_ids = self._next_prompt()

    def row(self) -> dict[str, Any]:
        """Return the columns of a training row that differ between conversations."""
        return {
            "source": self.prompt.source,
            "messages": self.messages,
            "input_ids": self.input_ids,
            "loss_mask": self.loss_mask,
            "finish_reasons": self.finish_reasons,
        }

    def _next_prompt(self) -> list[int] | None:
        """Return the ids that the next answer continues, or None where the conversation is over."""
        answered = len(self.finish_reasons)
        if answered == len(self.prompt.turns) or (answered and self.finish_reasons[-1] != "stop"):
            return None
        if answered:
            ids = [*self.input_ids, *between_turns(self.target, self.messages[:-1], self.asked[-1])]
        else:
            ids = self.target.chat_ids(self.asked)
        return ids if len(ids) < self.max_length else None

    def _check(self, tokens: list[int], finish_reason: str) -> None:
        if finish_reason not in ("stop", "length"):
            raise UnusableError(f"the answer ended with {finish_reason!r}")
        body = tokens[:-1] if finish_reason == "stop" else tokens
        if not tokens or (finish_reason == "stop" and tokens[-1] not in self.target.stop_ids):
            raise UnusableError(f"the answer ended with {finish_reason!r} but has no such last token")
        if not self.target.stop_ids.isdisjoint(body):
            raise UnusableError("a stop token stands inside the answer")
        length = len(self.prompt_ids or []) + len(tokens)
        if length > self.max_length:
            raise UnusableError(f"the conversation has {length} tokens, more than {self.max_length}")

    def _text(self, tokens: list[int]) -> str:
        stopped = tokens[-1] in self.target.stop_ids
        return answer_text(self.target, tokens[:-1] if stopped else tokens)


def answer_text(target: Any, tokens: list[int]) -> str:
    """Decode an answer's text (ids without the stop token), special tokens inside it included."""
    return target.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def between_turns(target: Any, before: list[dict[str, str]], user: dict[str, str]) -> list[int]:
    """Return the ids that the template puts between an answer's stop token and the next answer, user turn included.

    The conversation is rendered twice, with two stand-ins for the answer; the ids that both renderings end
    with are what follows an answer. The template's end-of-turn token is left out: the target has produced
    one.

    Args:
        before: the messages that the answer completes.
        user: the message that follows it.

    Raises:
        DeepSpecError: the template shows no answers, so that conversations of several turns cannot be built.
    """
    tail = _after_answer(target, before, [user])
    for i, token in enumerate(tail):
        if token in target.stop_ids:
            return tail[i + 1 :]
        if target.tokenizer.decode([token]).strip():
            break
    return tail


def end_of_answer(target: Any) -> int:
    """Return the stop token with which the template closes an answer (the target may know several).

    Raises:
        DeepSpecError: the target knows none.
    """
    if not target.stop_ids:
        raise DeepSpecError("the target has no stop token; set eos_token_id in its generation_config.json")
    user = {"role": "user", "content": "question"}
    for token in _after_answer(target, [user], [user]):
        if token in target.stop_ids:
            return token
        if target.tokenizer.decode([token]).strip():
            break
    eos = target.tokenizer.eos_token_id
    return eos if eos in target.stop_ids else min(target.stop_ids)


def generation_prompt(target: Any) -> list[int]:
    """Return the ids that the template puts before every answer; empty where it puts none."""
    messages = [{"role": "user", "content": "question"}]
    closed, opened = (target.chat_ids(messages, add_generation_prompt=flag) for flag in (False, True))
    return opened[len(closed) :] if opened[: len(closed)] == closed else []


def _after_answer(target: Any, before: list[dict], after: list[dict]) -> list[int]:
    renderings = [
        target.chat_ids([*before, {"role": "assistant", "content": text}, *after]) for text in STAND_INS
    ]
    if renderings[0] == renderings[1]:
        raise DeepSpecError(
            "the target's chat template leaves answers out of later turns; use prompts of one turn"
        )
    return list(_common_suffix(*renderings))[::-1]


def _common_suffix(first: list[int], second: list[int]) -> Iterator[int]:
    for a, b in zip(reversed(first), reversed(second), strict=False):
        if a != b:
            return
        yield a

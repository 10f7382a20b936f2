"""A stored row as a flat one: what its columns say about a conversation, and what is wrong with it.

What can be wrong with a row is recomputed here from the stored ids and the target's tokenizer, without the
code that put the row together. What takes a tokenizer or every word (`SAMPLED`) may be left out.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

import numpy as np

from deepspec.answers.turns import answer_text, generation_prompt
from deepspec.errors import DeepSpecError
from deepspec.files import digest
from deepspec.guard.facts import script
from deepspec.messages.prompt import Prompt
from deepspec.prompts.filters import chat_key, duplicate_key
from deepspec.prompts.overlap import Overlap

KEY_CHARS = 120  # of a prompt in the table; of a longer one its beginning and a digest
SAMPLED = ("repetition", "template_problem", "script")  # and whether masked tokens spell the answer
OPTIONAL = ("prompt", "chat", "metadata", "logprob", "surprise")  # columns that may be null
LISTS = ("messages", "input_ids", "loss_mask", "finish_reasons")


class Asked(Protocol):
    """What the target was asked, by id."""

    def get(self, id: str) -> Prompt | None: ...


class Flattener:
    """Turns stored rows into flat ones.

    Args:
        target: the target that is said to have answered.
        prompts: what it was asked.
        ngram: tokens in the n-grams of which repeats are counted.
        overlap: the evaluation prompts, with which no text may share an n-gram.
    """

    def __init__(self, target: Any, prompts: Asked, ngram: int, overlap: Overlap) -> None:
        self.target, self.prompts, self.ngram, self.overlap = target, prompts, ngram, overlap
        self.stop_ids = target.stop_ids
        self.opening = generation_prompt(target)

    def flat(self, row: dict[str, Any], whole: bool = True) -> dict[str, Any]:
        """Return what the columns of a stored row say about it.

        Args:
            whole: `SAMPLED` too, and whether the masked tokens spell the answers.
        """
        tokens_only = row["engine"] == "given" and row["messages"] == []
        exempt = (*OPTIONAL, "messages") if tokens_only else OPTIONAL
        missing = [
            name for name, value in row.items() if name not in exempt and (value is None or value in ("", []))
        ]
        row = {**row, **{name: row[name] or [] for name in LISTS}}
        asked = row.get("prompt") or row["id"]
        roles = [message["role"] for message in row["messages"]]
        turns = _said(row, "user")
        answers = answer_runs(row["input_ids"], row["loss_mask"])
        prompt = self.prompts.get(asked)
        texts = [self.target.tokenizer.decode(row["input_ids"])] if tokens_only else turns
        mask_problem = self.mask_problem(row, answers, tokens_only, whole)
        chat = _chat(row)
        return {
            "id": row["id"],
            "asked": asked,
            "generation": bool(row.get("prompt")),
            "target": row["target"],
            "missing": ", ".join(missing) or None,
            "roles": None if tokens_only else " ".join(map(str, roles)),
            "last_role": None if tokens_only else roles[-1] if roles else "",
            "prompt": short_key(self.key(row)),
            "prompt_problem": prompt_problem(prompt, turns, row["input_ids"] if tokens_only else None),
            "tokens": len(row["input_ids"]),
            "answer_tokens": sum(row["loss_mask"]),
            "truncated": float("length" in row["finish_reasons"]),
            "repetition": max((repetition(answer, self.ngram) for _, answer in answers), default=0.0)
            if whole
            else np.nan,
            "mask_problem": mask_problem,
            "template_problem": None
            if mask_problem or tokens_only or not whole
            else self.template_problem(row, chat, answers),
            "tool_problem": tool_problem(chat["messages"]),
            "logprob": np.nan if row.get("logprob") is None else row["logprob"],
            "surprise": np.nan if row.get("surprise") is None else row["surprise"],
            "source": row["source"] or "",
            "script": script(" ".join(turns)) if whole else None,
            "system": bool({"system", "developer"} & set(roles)),
            "thinks": _thinks(chat["messages"]),
            "tools": bool(chat.get("tools")),
            "calls": any(message.get("tool_calls") for message in chat["messages"]),
            "overlap": next(filter(None, map(self.overlap.hits, texts)), None),
        }

    def key(self, row: dict[str, Any]) -> str:
        """Return a key that is equal for stored rows that ask the same."""
        prompt = self.prompts.get(row.get("prompt") or row["id"])
        return chat_key(prompt.chat) if prompt else duplicate_key(_said(row, "user"))

    def template_problem(
        self, row: dict[str, Any], chat: dict[str, Any], answers: list[tuple[int, list[int]]]
    ) -> str | None:
        """Return where the ids before an answer are not those that the template makes of the messages, or None."""
        messages = chat["messages"]
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"][-len(answers) :]
        end = 0
        for place, (start, answer) in zip(places, answers, strict=True):
            try:
                asked = self.target.chat_ids(
                    messages[:place], True, chat.get("tools") or (), chat.get("chat_template_kwargs")
                )
            except DeepSpecError as error:
                return str(error)
            had = row["input_ids"][end:start]
            if had != (asked[-len(had) :] if end and had else asked):
                return f"the {start - end} tokens before the answer at {start} are not those of the template"
            end = start + len(answer)
        return None

    def mask_problem(
        self,
        row: dict[str, Any],
        answers: list[tuple[int, list[int]]],
        tokens_only: bool = False,
        spell: bool = True,
    ) -> str | None:
        """Return why the loss mask does not cover exactly the answers' tokens, or None."""
        ids, mask, reasons = row["input_ids"], row["loss_mask"], row["finish_reasons"]
        texts: list[str | None] = list(_said(row, "assistant")[-len(reasons) :])
        if tokens_only or not spell:
            texts = [None] * (len(reasons) if tokens_only else len(texts))
        if len(ids) != len(mask):
            return f"{len(ids)} tokens but {len(mask)} mask values"
        if not set(mask) <= {0, 1}:
            return "mask values other than 0 and 1"
        if ids and not (min(ids) >= 0 and max(ids) < self.target.vocab_size):
            return "token ids outside the vocabulary"
        if not len(answers) == len(texts) == len(reasons):
            return f"{len(answers)} masked runs, {len(texts)} answers, {len(reasons)} finish reasons"
        for (start, answer), text, reason in zip(answers, texts, reasons, strict=True):
            opened = tokens_only or row.get("chat") or self._opened(ids[:start])
            if problem := self._answer_problem(bool(opened), answer, text, reason):
                return problem
        return None

    def _opened(self, before: list[int]) -> bool:
        return not self.opening or before[-len(self.opening) :] == self.opening

    def _answer_problem(self, opened: bool, answer: list[int], text: str | None, reason: str) -> str | None:
        stops = [i for i, token in enumerate(answer) if token in self.stop_ids]
        if reason not in ("stop", "length"):
            return f"finish reason {reason!r}"
        if reason == "stop" and stops != [len(answer) - 1]:
            return "an answer that stopped has its stop token elsewhere than at its end, or none"
        if reason == "length" and stops:
            return "an answer that was cut short has a stop token"
        if not opened:
            return "a masked run does not start where the template opens an answer"
        if text is not None and answer_text(self.target, answer[:-1] if stops else answer) != text:
            return "the masked tokens do not spell the answer"
        return None


def answer_runs(ids: list[int], mask: list[int]) -> list[tuple[int, list[int]]]:
    """Return start and tokens of every unbroken run of masked tokens."""
    masked = np.asarray(mask[: len(ids)], dtype=bool)
    edges = np.flatnonzero(np.diff(masked, prepend=False, append=False)).tolist()
    return [(start, ids[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def repetition(tokens: list[int], n: int) -> float:
    """Return the share of n-grams that occurred before: 0 where all differ, near 1 in a loop."""
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def short_key(key: str) -> str:
    """Return a key as the table has it."""
    return key if len(key) <= KEY_CHARS else f"{key[: KEY_CHARS - 17]} {digest(key)}"


def _said(row: dict[str, Any], role: str) -> list[str]:
    return [message["content"] or "" for message in row["messages"] or [] if message["role"] == role]


def tool_problem(messages: list[dict[str, Any]]) -> str | None:
    """Return which tool result does not follow its call, or which call in the middle has none; None: all is paired."""
    open_: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            if message.get("tool_call_id") not in open_:
                return f"a result of {message.get('tool_call_id')!r} without its call"
            open_.remove(message["tool_call_id"])
        elif open_:
            return f"the call {open_[0]!r} has no result"
        open_ += [call["id"] for call in message.get("tool_calls") or []]
    return None


def _thinks(messages: list[dict[str, Any]]) -> bool:
    """Return whether an answer has a thought, as a part of its own or in its text."""
    answers = [message for message in messages if message["role"] == "assistant"]
    return any(
        message.get("reasoning_content") or "</think>" in (message["content"] or "") for message in answers
    )


def _chat(row: dict[str, Any]) -> dict[str, Any]:
    """Return what the template was given."""
    return json.loads(row["chat"]) if row.get("chat") else {"messages": row["messages"]}


def prompt_problem(prompt: Prompt | None, turns: list[str], ids: list[int] | None) -> str | None:
    """Return why a row's user turns, or its ids where it has no turns, are not those of its prompt, or None."""
    if prompt is None:
        return "no prompt has this id"
    if ids is not None:
        return None if tuple(ids) == prompt.chat.input_ids else "the tokens are not those of the prompt"
    if not turns or tuple(turns) != tuple(prompt.turns[: len(turns)]):
        return "the user's turns are not those of the prompt"
    return None

"""The distillation data as a flat table: one row a conversation, with what its columns say about it.

What can be wrong with a row is recomputed here from the stored ids and the target's tokenizer, without the
code that put the row together.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas
from pyarrow import parquet

from deepspec.answers.conversation import answer_text, generation_prompt
from deepspec.messages.prompt import Prompt
from deepspec.prompts.filters import duplicate_key

BATCH_ROWS = 1024
LISTS = ("messages", "input_ids", "loss_mask", "finish_reasons")


class Flattener:
    """Turns stored rows into flat ones.

    Args:
        target: the target that is said to have answered.
        prompts: what it was asked, by id.
        ngram: tokens in the n-grams of which repeats are counted.
        overlap: an n-gram that the text shares with an evaluation prompt, or None.
    """

    def __init__(
        self, target: Any, prompts: dict[str, Prompt], ngram: int, overlap: Callable[[str], str | None]
    ) -> None:
        self.target, self.prompts, self.ngram, self.overlap = target, prompts, ngram, overlap
        self.stop_ids = target.stop_ids
        self.opening = generation_prompt(target)

    def table(self, path: Path) -> pandas.DataFrame:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=BATCH_ROWS)
        return pandas.DataFrame([self.flat(row) for batch in batches for row in batch.to_pylist()])

    def flat(self, row: dict[str, Any]) -> dict[str, Any]:
        missing = [name for name, value in row.items() if value is None or value in ("", [])]
        row = {**row, **{name: row[name] or [] for name in LISTS}}
        roles = [message["role"] for message in row["messages"]]
        turns = _said(row, "user")
        answers = answer_runs(row["input_ids"], row["loss_mask"])
        prompt = self.prompts.get(row["id"])
        return {
            "id": row["id"],
            "target": row["target"],
            "missing": ", ".join(missing) or None,
            "roles": " ".join(map(str, roles)),
            "last_role": roles[-1] if roles else "",
            "prompt": duplicate_key(prompt.turns if prompt else turns),
            "prompt_problem": _prompt_problem(prompt, turns),
            "tokens": len(row["input_ids"]),
            "answer_tokens": sum(row["loss_mask"]),
            "truncated": float("length" in row["finish_reasons"]),
            "repetition": max((repetition(answer, self.ngram) for _, answer in answers), default=0.0),
            "mask_problem": self.mask_problem(row, answers),
            "overlap": next(filter(None, map(self.overlap, turns)), None),
        }

    def mask_problem(self, row: dict[str, Any], answers: list[tuple[int, list[int]]]) -> str | None:
        """Return why the loss mask does not cover exactly the answers' tokens, or None."""
        ids, mask, reasons = row["input_ids"], row["loss_mask"], row["finish_reasons"]
        texts = _said(row, "assistant")
        if len(ids) != len(mask):
            return f"{len(ids)} tokens but {len(mask)} mask values"
        if not set(mask) <= {0, 1}:
            return "mask values other than 0 and 1"
        if not all(0 <= token < self.target.vocab_size for token in ids):
            return "token ids outside the vocabulary"
        if not len(answers) == len(texts) == len(reasons):
            return f"{len(answers)} masked runs, {len(texts)} answers, {len(reasons)} finish reasons"
        for (start, answer), text, reason in zip(answers, texts, reasons, strict=True):
            if problem := self._answer_problem(ids[:start], answer, text, reason):
                return problem
        return None

    def _answer_problem(self, before: list[int], answer: list[int], text: str, reason: str) -> str | None:
        stops = [i for i, token in enumerate(answer) if token in self.stop_ids]
        if reason not in ("stop", "length"):
            return f"finish reason {reason!r}"
        if reason == "stop" and stops != [len(answer) - 1]:
            return "an answer that stopped has its stop token elsewhere than at its end, or none"
        if reason == "length" and stops:
            return "an answer that was cut short has a stop token"
        if self.opening and before[-len(self.opening) :] != self.opening:
            return "a masked run does not start where the template opens an answer"
        if answer_text(self.target, answer[:-1] if stops else answer) != text:
            return "the masked tokens do not spell the answer"
        return None


def answer_runs(ids: list[int], mask: list[int]) -> list[tuple[int, list[int]]]:
    """Return start and tokens of every unbroken run of masked tokens."""
    runs = []
    for masked, group in groupby(range(min(len(ids), len(mask))), key=lambda i: bool(mask[i])):
        positions = list(group)
        if masked:
            runs.append((positions[0], [ids[i] for i in positions]))
    return runs


def repetition(tokens: list[int], n: int) -> float:
    """Return the share of n-grams that occurred before: 0 where all differ, near 1 in a loop."""
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _said(row: dict[str, Any], role: str) -> list[str]:
    return [message["content"] or "" for message in row["messages"] if message["role"] == role]


def _prompt_problem(prompt: Prompt | None, turns: list[str]) -> str | None:
    if prompt is None:
        return "no prompt has this id"
    if not turns or tuple(turns) != tuple(prompt.turns[: len(turns)]):
        return "the user's turns are not those of the prompt"
    return None

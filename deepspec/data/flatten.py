"""The distillation data as a flat table: one row a conversation, with what its columns say about it.

What can be wrong with a row is recomputed here from the stored ids and the target's tokenizer alone, without the
code that built them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas
from pyarrow import parquet

from deepspec.data.tokens import answer_text, generation_prompt

BATCH_ROWS = 1024


class Flattener:
    """Turns stored rows into flat ones.

    Args:
        target: the target that is said to have answered.
        ngram: tokens in the n-grams of which repeats are counted.
        overlap: an n-gram that the text shares with an evaluation prompt, or None.
    """

    def __init__(self, target: Any, ngram: int, overlap: Callable[[str], str | None]) -> None:
        self.target, self.ngram, self.overlap = target, ngram, overlap
        self.opening = generation_prompt(target)

    def table(self, path: Path) -> pandas.DataFrame:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=BATCH_ROWS)
        return pandas.DataFrame([self.flat(row) for batch in batches for row in batch.to_pylist()])

    def flat(self, row: dict[str, Any]) -> dict[str, Any]:
        missing = [name for name, value in row.items() if value is None or value == "" or value == []]
        row = {**row, **{name: [] for name in ("messages", "input_ids", "loss_mask", "finish_reasons") if name in missing}}
        turns = [message["content"] for message in row["messages"] if message["role"] == "user"]
        roles = [message["role"] for message in row["messages"]]
        answers = answer_runs(row["input_ids"], row["loss_mask"])
        return {
            "id": row["id"],
            "target": row["target"],
            "missing": ", ".join(missing) or None,
            "roles": " ".join(roles),
            "last_role": roles[-1] if roles else "",
            "prompt": "\n".join(" ".join(turn.casefold().split()) for turn in turns),
            "tokens": len(row["input_ids"]),
            "answer_tokens": sum(row["loss_mask"]),
            "truncated": float("length" in row["finish_reasons"]),
            "repetition": max((repetition(answer, self.ngram) for _, answer in answers), default=0.0),
            "mask_problem": self.mask_problem(row, answers),
            "overlap": next(filter(None, map(self.overlap, turns)), None),
        }

    def mask_problem(self, row: dict[str, Any], answers: list[tuple[int, list[int]]]) -> str | None:
        """Why the loss mask does not cover exactly the answers' tokens, or None."""
        ids, mask = row["input_ids"], row["loss_mask"]
        texts = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        if len(ids) != len(mask):
            return f"{len(ids)} tokens but {len(mask)} mask values"
        if not set(mask) <= {0, 1}:
            return "mask values other than 0 and 1"
        if not all(0 <= token < self.target.vocab_size for token in ids):
            return "token ids outside the vocabulary"
        if not len(answers) == len(texts) == len(row["finish_reasons"]):
            found = f"{len(answers)} masked runs, {len(texts)} answers, {len(row['finish_reasons'])} finish reasons"
            return found
        problems = map(self._answer_problem, [ids] * len(answers), answers, texts, row["finish_reasons"])
        return next(filter(None, problems), None)

    def _answer_problem(self, ids: list[int], run: tuple[int, list[int]], text: str, finish: str) -> str | None:
        start, answer = run
        stops = [i for i, token in enumerate(answer) if token in self.target.stop_ids]
        if finish == "stop" and stops != [len(answer) - 1]:
            return "an answer that stopped does not have its only stop token at its end"
        if finish == "length" and stops:
            return "an answer that was cut short has a stop token"
        if finish not in ("stop", "length"):
            return f"finish reason {finish!r}"
        if self.opening and ids[:start][-len(self.opening) :] != self.opening:
            return "a masked run does not start where the template opens an answer"
        if answer_text(self.target, answer[:-1] if stops else answer) != text:
            return "the masked tokens do not spell the answer"
        return None


def answer_runs(ids: list[int], mask: list[int]) -> list[tuple[int, list[int]]]:
    """Start and tokens of every unbroken run of masked tokens."""
    runs = groupby(range(min(len(ids), len(mask))), key=lambda i: mask[i])
    starts = [list(positions) for value, positions in runs if value]
    return [(positions[0], [ids[i] for i in positions]) for positions in starts]


def repetition(tokens: list[int], n: int) -> float:
    """The share of n-grams that occurred before: 0 where all differ, near 1 in a loop."""
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0

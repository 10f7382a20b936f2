"""Where answers go as they come: append-only JSON lines, one file a process, and the data set made of them.

A line is on the disk before the next is asked for, so a kill loses only what was in flight. The directory
lies outside the DVC outputs (DVC deletes those before it runs a stage again) and is named after everything
that the answers depend on, so that only a run with the same settings, target and prompts goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, disable_progress_bars
from datasets.exceptions import DatasetGenerationError

from deepspec.answers.conversation import Conversation
from deepspec.errors import DeepSpecError
from deepspec.files import digest, file_digest, replacing, write_json
from deepspec.journal import Journal, read_entry, read_journal
from deepspec.progress import Progress

FEATURES = Features(
    {
        "id": Value("string"),
        "source": Value("string"),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "input_ids": List(Value("int32")),
        "loss_mask": List(Value("int8")),
        "finish_reasons": List(Value("string")),
        "target": Value("string"),
        "temperature": Value("float64"),
        "top_p": Value("float64"),
        "seed": Value("int64"),
        "engine": Value("string"),
    }
)
# Columns that are there where a row needs them, and null in the others.
OPTIONAL = Features(
    {
        "prompt": Value("string"),  # id of the prompt, of which this is one of several generations
        "chat": Value(
            "string"
        ),  # JSON of messages, tools, chat_template_kwargs as the template was given them
        "metadata": Value("string"),  # JSON
        "logprob": Value("float32"),  # mean log-probability of the answer's tokens, given answers only
        "surprise": Value(
            "float32"
        ),  # mean of log-probability plus entropy: about 0 for the target's own words
    }
)


class Shard:
    """This process's file of finished conversations. A line is on the disk when a method returns."""

    def __init__(self, directory: Path, rank: int = 0, world: int = 1) -> None:
        self._journal = Journal(directory / f"shard-{rank}-of-{world}.jsonl", fsync=True)
        self.path = self._journal.path

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *exception: object) -> None:
        self._journal.close()

    def add_rows(self, id: str, rows: list[dict[str, Any]], endings: list[str]) -> None:
        """Keep the rows of one prompt."""
        self._journal.append({"id": id, "rows": rows, "endings": endings})

    def add_failure(self, id: str, reason: str) -> None:
        self._journal.append({"id": id, "reason": reason})


class Sink:
    """What an engine reports to: the shard and the progress display. It also hands out the seeds."""

    def __init__(self, shard: Shard, progress: Progress, seed: int) -> None:
        self.progress = progress
        self._shard, self._seed = shard, seed

    def seed(self, conversation: Conversation) -> int:
        """Return the sampler's seed for the conversation's next answer."""
        return (conversation_seed(self._seed, conversation.prompt.id) + conversation.answered) % 2**31

    def finished(self, conversation: Conversation) -> None:
        """Keep the rows of a conversation that is over."""
        self.add_rows(conversation.prompt.id, conversation.rows(), conversation.endings)

    def add_rows(self, id: str, rows: list[dict[str, Any]], endings: list[str]) -> None:
        """Keep the rows of one prompt; `endings` is what happened other than in its source."""
        seed = conversation_seed(self._seed, id)
        self._shard.add_rows(id, [{**row, "seed": seed} for row in rows], endings)
        self.progress.advance()

    def failed(self, id: str, reason: str) -> None:
        self._shard.add_failure(id, reason)
        self.progress.advance()


def conversation_seed(seed: int, id: str) -> int:
    """Derive a seed of 31 bits (some servers take no more) from the run's seed and the conversation's id alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{id}".encode()).digest()[:4]) >> 1


@dataclass
class Work:
    """What the shards of a directory hold. A prompt that failed is tried again by the next run."""

    rows: dict[str, tuple[Path, int]] = field(default_factory=dict)  # prompt → file and offset of its line
    failures: dict[str, str] = field(default_factory=dict)  # prompt → the latest reason; never one in `rows`
    endings: dict[str, list[str]] = field(default_factory=dict)  # prompt → what went other than in its source
    columns: set[str] = field(default_factory=set)  # of the rows

    def rows_of(self, id: str) -> list[dict[str, Any]]:
        """Return the rows of a prompt."""
        return read_entry(*self.rows[id])["rows"]


def read_work(directory: Path) -> Work:
    """Read all shards, however many processes wrote them; a line that is not whole is work still to be done."""
    work = Work()
    for path in sorted(directory.glob("shard-*.jsonl")):
        for offset, entry in read_journal(path):
            if "rows" in entry:
                if entry["id"] not in work.rows:
                    work.rows[entry["id"]] = path, offset
                    if entry["endings"]:
                        work.endings[entry["id"]] = entry["endings"]
                work.columns.update(*entry["rows"])
            else:
                work.failures[entry["id"]] = entry["reason"]
    for id in work.rows:
        work.failures.pop(id, None)
    return work


def assemble(
    work: Work,
    ids: list[str],
    out: Path,
    settings: dict[str, Any],
    target_digest: str,
    histories: list[dict[str, Any]] | None = None,
) -> dict:
    """Write `train.parquet`, `failures.jsonl` and `manifest.json` to `out`, in the order of `ids`.

    The directory takes its place whole, by a rename.

    Args:
        settings: what was asked of the target (`generation_settings`).
        histories: what was found of the target's template (`Histories.describe`).

    Returns:
        The manifest.

    Raises:
        DeepSpecError: no conversation succeeded, or the shards lack prompts that another process answered.
    """
    lost = len(ids) - len(work.rows.keys() | work.failures.keys())
    if lost > 0:
        raise DeepSpecError(
            f"{lost} of {len(ids)} prompts are in no shard; several machines need a shared working directory"
        )
    kept = [id for id in ids if id in work.rows]
    failed = [id for id in ids if id in work.failures]
    if not kept:
        reason = f"; the first reason: {work.failures[failed[0]]} (prompt {failed[0]!r})" if failed else ""
        raise DeepSpecError(f"no conversation could be generated out of {len(ids)} prompts{reason}")
    with replacing(out) as directory:
        directory.mkdir()
        counts = _write_parquet(work, kept, directory / "train.parquet", settings, target_digest)
        with (directory / "failures.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"id": id, "reason": work.failures[id]}) + "\n" for id in failed)
        manifest = {
            **counts,
            "conversations": len(kept),
            "failures": len(failed),
            "failure_reasons": _counted(work.failures[id] for id in failed),
            "endings": _counted(ending for id in kept for ending in work.endings.get(id, ())),
            "template": histories or [],
            "target": target_digest,
            "settings": settings,
            "digest": file_digest(directory / "train.parquet"),
        }
        write_json(directory / "manifest.json", manifest)
    return manifest


def _write_parquet(work: Work, ids: list[str], path: Path, settings: dict, target: str) -> dict[str, int]:
    """Write the data set's rows and return the numbers of tokens."""
    constants = {key: settings[key] for key in ("temperature", "top_p", "engine")} | {"target": target}
    counts = {"rows": 0, "answer_tokens": 0, "total_tokens": 0}
    features = Features(
        {**FEATURES, **{name: kind for name, kind in OPTIONAL.items() if name in work.columns}}
    )

    def rows() -> Iterator[dict[str, Any]]:
        for id in ids:
            for row in work.rows_of(id):
                counts["rows"] += 1
                counts["answer_tokens"] += sum(row["loss_mask"])
                counts["total_tokens"] += len(row["input_ids"])
                yield {**dict.fromkeys(features), **row, **constants}

    disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        try:
            data = Dataset.from_generator(
                rows, features=features, cache_dir=cache, fingerprint=digest(path.name)
            )
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None  # so that a full disk is seen as one
        data.to_parquet(path)
    return counts


def _counted(words: Iterable[str]) -> dict[str, int]:
    """Count equal reasons; numbers in them do not tell them apart."""
    return dict(sorted(Counter(re.sub(r"\d+", "…", word) for word in words).items()))

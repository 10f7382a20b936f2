"""Prompts that others wrote: JSONL files and Hugging Face datasets, both read into lists of user turns."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.errors import DeepSpecError

COLUMNS = ("turns", "messages", "conversations", "conversation", "prompt", "question", "instruction")
USER_ROLES = ("user", "human")


@dataclass(frozen=True)
class Candidate:
    """A prompt that may become part of the training set, unless its source already found a `fault`."""

    turns: list[str]
    fault: str | None = None


def jsonl_candidates(path: str, seed: int) -> Iterator[Candidate]:
    """The prompts of a JSONL file in an order drawn from `seed`. The whole file is checked first."""
    prompts = read_jsonl(path)
    random.Random(seed).shuffle(prompts)
    return (Candidate(turns) for turns in prompts)


def read_jsonl(path: str | Path) -> list[list[str]]:
    """User turns of every line of a JSONL file (`.gz` too); blank lines are skipped.

    Raises:
        DeepSpecError: no such file, or a malformed line, with its number.
    """
    path = Path(path)
    prompts = []
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                prompts.append(user_turns(json.loads(line.decode("utf-8-sig"))))
            except (ValueError, RecursionError) as error:
                raise DeepSpecError(f"{path}:{number}: malformed line: {_reason(error)}") from None
    return prompts


def hub_candidates(spec: str, seed: int) -> Iterator[Candidate]:
    """Prompts of `<dataset>[:split]` or `<dataset>:<config>/<split>` in an order drawn from `seed`.

    The dataset may be a local directory.

    Raises:
        DeepSpecError: it cannot be loaded, or none of its columns holds prompts.
    """
    dataset = _load(f"hub:{spec}").shuffle(seed=seed)
    column = next((name for name in COLUMNS if name in dataset.column_names), None)
    if column is None:
        raise DeepSpecError(
            f"hub:{spec}: no column of prompts; found {', '.join(dataset.column_names)}; "
            f"looked for {', '.join(COLUMNS)}"
        )
    return _row_candidates(dataset)


def dataset_prompts(source: str, column: str | None = None, revision: str | None = None) -> list[list[str]]:
    """User turns of every row of a dataset, in its order.

    Args:
        source: `hub:<dataset>[:split]`, `hub:<dataset>:<config>/<split>`, or `json:<address of a JSON-lines file>`.
        column: that holds the turns; None: the first of `COLUMNS` that is there.

    Raises:
        DeepSpecError: it cannot be loaded, or a row has no prompt.
    """
    prompts = []
    for number, row in enumerate(_load(source, revision), start=1):
        try:
            prompts.append(user_turns(row, column))
        except ValueError as error:
            raise DeepSpecError(f"{source}: row {number}: {error}") from None
    return prompts


def user_turns(row: Any, column: str | None = None) -> list[str]:
    """The user turns of one row: `turns`, a list of messages, or a single prompt; or what `column` holds.

    Raises:
        ValueError: the row has none of the known fields, or its field holds something else.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    names = COLUMNS if column is None else (column,)
    column = next((name for name in names if row.get(name) is not None), None)
    if column is None:
        raise ValueError(f"none of the fields {', '.join(names)}")
    value = row[column]
    if isinstance(value, str):
        value = [f"{value}\n\n{row['input']}" if column == "instruction" and row.get("input") else value]
    if not isinstance(value, list):
        raise ValueError(f"{column!r} must be a string or a list, found {type(value).__name__}")
    turns = [turn for turn in (_user_text(item, column) for item in value) if turn is not None]
    if not turns or not all(turn.strip() for turn in turns):
        raise ValueError(f"{column!r} has no user turn, or an empty one")
    return turns


def _user_text(item: Any, column: str) -> str | None:
    """The text of a turn or of a user's message; None for a message of another role."""
    if isinstance(item, str):
        return item
    if not isinstance(item, Mapping):
        raise ValueError(f"{column!r} must hold strings or messages, found {type(item).__name__}")
    if item.get("role", item.get("from", "user")) not in USER_ROLES:
        return None
    content = item.get("content", item.get("value"))
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    if not isinstance(content, str):
        raise ValueError(f"a message in {column!r} has no text")
    return content


def _row_candidates(dataset: Iterable[Mapping]) -> Iterator[Candidate]:
    """Rows of a public dataset are not the user's to mend: one without a user turn is rejected, no error."""
    for row in dataset:
        try:
            yield Candidate(user_turns(row))
        except ValueError:
            yield Candidate([], fault="no user turn")


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        raise DeepSpecError(f"{path}: no such prompt file") from None
    except (IsADirectoryError, PermissionError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DeepSpecError(f"{path}: cannot be read: {_reason(error)}") from None


def _load(source: str, revision: str | None = None) -> Any:
    """One split of a dataset, by hub name or directory. Imports `datasets` here: the core runs without it."""
    kind, _, spec = source.partition(":")
    try:
        import datasets
    except ImportError:
        raise DeepSpecError(f"{source} needs the package `datasets`: install deepspec[pipeline]") from None
    try:
        if kind == "json":
            return datasets.load_dataset("json", data_files=spec, split="train")
        name, _, part = spec.partition(":")
        config, _, split = part.rpartition("/")
        if (Path(name) / "state.json").exists():
            return datasets.load_from_disk(name)
        if (Path(name) / "dataset_dict.json").exists():
            return datasets.load_from_disk(name)[split or "train"]
        return datasets.load_dataset(name, config or None, split=split or "train", revision=revision)
    except Exception as error:  # datasets raises dozens of types, all of which mean: check the name
        raise DeepSpecError(
            f"{source}: the dataset could not be loaded ({_reason(error)}); "
            "check its name, its split (hub:<dataset>:<config>/<split>) and the network"
        ) from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(error).split()) or type(error).__name__

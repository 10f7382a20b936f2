"""Prompts that others wrote: JSONL files and Hugging Face datasets, both read into lists of user turns."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.errors import DeepSpecError

COLUMNS = ("turns", "messages", "conversations", "conversation", "prompt", "question", "instruction")
USER_ROLES = ("user", "human")
FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Candidate:
    """A prompt that may become part of the training set, unless its source already found a `fault`."""

    turns: list[str]
    fault: str | None = None


def jsonl_candidates(path: str, seed: int) -> Iterator[Candidate]:
    """Yield the prompts of a JSONL file in an order drawn from `seed`; the whole file is checked first."""
    prompts = read_jsonl(path)
    random.Random(seed).shuffle(prompts)
    return (Candidate(turns) for turns in prompts)


def read_jsonl(path: str | Path) -> list[list[str]]:
    """Read the user turns of every line of a JSONL file (`.gz` too); blank lines are skipped.

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
    """Yield prompts of `<dataset>[:split]` or `<dataset>:<config>/<split>` in an order drawn from `seed`.

    The dataset may be a local directory.

    Raises:
        DeepSpecError: it cannot be loaded, or none of its columns holds prompts.
    """
    name, _, part = spec.partition(":")
    config, _, split = part.rpartition("/")
    dataset = load_split(name, config or None, split or "train").shuffle(seed=seed)
    column = next((name for name in COLUMNS if name in dataset.column_names), None)
    if column is None:
        raise DeepSpecError(
            f"hub:{spec}: no column of prompts; found {', '.join(dataset.column_names)}; "
            f"looked for {', '.join(COLUMNS)}"
        )
    return _row_candidates(dataset)


def user_turns(row: Any, columns: Sequence[str] = ()) -> list[str]:
    """Return the user turns of one row: those of its named columns, or of the first of `COLUMNS` that it has.

    A column holds a string, a list of strings or a list of messages; several columns follow one another.

    Raises:
        ValueError: the row has none of the fields, or a field holds something else.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    if columns:
        return [turn for column in columns for turn in _turns(row.get(column), column)]
    column = next((name for name in COLUMNS if row.get(name) is not None), None)
    if column is None:
        raise ValueError(f"none of the fields {', '.join(COLUMNS)}")
    value = row[column]
    if isinstance(value, str) and column == "instruction" and row.get("input"):
        value = f"{value}\n\n{row['input']}"
    return _turns(value, column)


def _turns(value: Any, column: str) -> list[str]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{column!r} must be a string or a list, found {type(value).__name__}")
    turns = [turn for turn in (_user_text(item, column) for item in value) if turn is not None]
    if not turns or not all(turn.strip() for turn in turns):
        raise ValueError(f"{column!r} has no user turn, or an empty one")
    return turns


def _user_text(item: Any, column: str) -> str | None:
    """Return the text of a turn or of a user's message; None for a message of another role."""
    if isinstance(item, str):
        return item
    if not isinstance(item, Mapping):
        raise ValueError(f"{column!r} must hold strings or messages, found {type(item).__name__}")
    if item.get("role", item.get("from")) not in USER_ROLES:
        return None
    content = item.get("content", item.get("value"))
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    if not isinstance(content, str):
        raise ValueError(f"a message in {column!r} has no text")
    return content


def _row_candidates(dataset: Iterable[Mapping]) -> Iterator[Candidate]:
    """Yield the rows that have a user turn; others are skipped, since a user cannot mend a public dataset."""
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


def load_split(
    name: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    files: Sequence[str] = (),
) -> Any:
    """Load one split of a dataset, by hub name or directory. `datasets` is imported here: the core runs without it.

    Args:
        files: data files inside the dataset, or addresses; they alone are read, and make up the split.

    Raises:
        DeepSpecError: it cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise DeepSpecError(f"hub:{name} needs the package `datasets`: install deepspec[pipeline]") from None
    try:
        if files:
            places = [_place(name, revision, file) for file in files]
            return datasets.load_dataset(_file_type(files[0]), data_files={split: places}, split=split)
        if (Path(name) / "state.json").exists():
            return datasets.load_from_disk(name)
        if (Path(name) / "dataset_dict.json").exists():
            return datasets.load_from_disk(name)[split]
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # datasets raises dozens of types, all of which mean: check the name
        part = f"{config}/{split}" if config else split
        if "://" in name:
            where, check = f"url:{name}", "its address"
        else:
            where, check = f"hub:{name}:{part}", "its name, its split (hub:<dataset>:<config>/<split>)"
        raise DeepSpecError(
            f"{where}: the dataset could not be loaded ({_reason(error)}); check {check} and the network"
        ) from None


def _place(name: str, revision: str | None, file: str) -> str:
    """Return where a data file is: an address, a path in a directory, or a place on the hub."""
    if "://" in file:
        return file
    if Path(name).is_dir():
        return str(Path(name) / file)
    return f"hf://datasets/{name}{f'@{revision}' if revision else ''}/{file}"


def _file_type(file: str) -> str:
    suffix = Path(file.removesuffix(".gz")).suffix
    if suffix not in FILE_TYPES:
        raise ValueError(f"{file}: not one of {', '.join(FILE_TYPES)}")
    return FILE_TYPES[suffix]


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(error).split()) or type(error).__name__

"""Evaluation tasks: a small YAML says where the prompts come from; its version is recorded with every result.

`source` is one of
    hub:<dataset>              a dataset of the Hugging Face hub, or a directory with a copy of one
    url:<address>              a data file anywhere else
    package:<package>/<path>   a JSONL file (`.gz` too) inside an installed Python package
    jsonl:<path>               a JSONL file, relative to the YAML; one prompt a line
    generator:word_problems    prompts written by `deepspec/tasks/word_problems.py`

A row is read as those of `prompts.mix` are (`deepspec/messages/rows.py`): user turns, or messages with a system prompt,
tools, recorded calls and their results, template arguments. What is asked of them is in `dialogue.py`.

A file `<task>.jsonl` in the directory `$DEEPSPEC_TASKS_DIR`, or else `evaluate.tasks_dir`, takes the place of
any of them: its prompts are taken as they are, without a frame, whether or not the task has a YAML.
"""

from __future__ import annotations

import importlib.resources
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deepspec.errors import DeepSpecError, nearest
from deepspec.files import digest, file_digest
from deepspec.messages.errors import BadRowError
from deepspec.messages.hub import load_split, stored_rows, without_nulls
from deepspec.messages.prompt import Chat
from deepspec.messages.rows import Read, read_columns, read_row
from deepspec.messages.sources import read_jsonl
from deepspec.tasks.dialogue import to_be_answered, turns_of
from deepspec.tasks.word_problems import word_problems

logger = logging.getLogger(__name__)

TASKS = Path(__file__).parent
TASKS_DIR = "DEEPSPEC_TASKS_DIR"
GENERATORS = {"word_problems": word_problems}
SOURCES = ("hub", "url", "package", "jsonl", "generator")
HUB_KEYS = ("config", "split", "revision", "files")
ROW_KEYS = ("columns", "append", "placeholder")


@dataclass(frozen=True)
class Task:
    """Prompts of one kind, ready to be decoded."""

    name: str
    version: str
    category: str
    source: str
    prompts: list[Chat]
    digest: str  # of the prompts

    @property
    def asked(self) -> list[list[Any]]:
        """Return of every prompt what is asked turn by turn, as JSON."""
        return [turns_of(chat) for chat in self.prompts]


class TaskFile(BaseModel):
    """What a task's YAML may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: str = Field(description="Change it whenever the prompts change.")
    category: Literal["math", "code", "chat", "other"]
    description: str = ""
    source: str
    frame: str = Field("{prompt}", description="Text around the first turn, at `{prompt}`.")
    config: str | None = Field(None, description="Of the hub's dataset.")
    split: str = "train"
    revision: str | None = Field(None, description="Commit of the hub's dataset.")
    files: list[str] = Field([], description="Data files of the hub's dataset; they alone are read.")
    columns: list[str] = Field(
        [],
        description="Where the turns are: a string, a list of strings or of messages; several columns follow one "
        "another. Empty reads a row as those of `prompts.mix`: the first of the usual names (`turns`, `messages`, "
        "`prompt`, ...), with its system prompt, tools and template arguments.",
    )
    append: dict[str, str] = Field(
        {},
        description="Column → text after the first turn, with `{column}` in it, of rows where it is not empty.",
    )
    placeholder: str | None = Field(
        None, description="Text in rows whose prompt has to be fetched elsewhere."
    )
    count: int | None = Field(None, ge=1, description="Prompts to write (generator only).")
    seed: int = Field(0, description="Of the generator.")

    @field_validator("columns", "files", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> TaskFile:
        kind, _, rest = self.source.partition(":")
        if kind not in SOURCES or not rest:
            known = ", ".join(f"{known}:" for known in SOURCES)
            raise ValueError(f"unknown source {self.source!r}: use one of {known}")
        if kind == "generator" and rest not in GENERATORS:
            raise ValueError(f"unknown generator {rest!r}{nearest(rest, GENERATORS)}")
        if (kind == "generator") != (self.count is not None):
            raise ValueError("`count` belongs to a generator, and a generator needs it")
        for keys, kinds in ((HUB_KEYS, ("hub",)), (ROW_KEYS, ("hub", "url"))):
            for key in keys:
                if key in self.model_fields_set and kind not in kinds:
                    raise ValueError(f"`{key}` belongs to a source of {' or '.join(f'{k}:' for k in kinds)}")
        for column, text in self.append.items():
            if f"{{{column}}}" not in text:
                raise ValueError(f"`append.{column}` has no {{{column}}}")
        if "{prompt}" not in self.frame:
            raise ValueError("`frame` has no {prompt}")
        return self


def load_task(
    name_or_path: str | Path, limit: int | None = None, seed: int = 0, tasks_dir: str | Path | None = None
) -> Task:
    """Load a task by its name or the path of its YAML.

    Args:
        limit: number of prompts, sampled by `seed` and kept in the order of the source; None takes all.
        tasks_dir: directory whose `<task>.jsonl` is read instead; `$DEEPSPEC_TASKS_DIR` takes its place.

    Raises:
        DeepSpecError: unknown task, a bad YAML, or prompts that cannot be read.
    """
    task, path, local = _find(name_or_path, tasks_dir)
    if task is None or local:
        name, category = (task.name, task.category) if task else (str(name_or_path), "other")
        version, source, prompts = file_digest(path)[:16], f"jsonl:{path.name}", _local_prompts(path)
    else:
        name, category, version, source = task.name, task.category, task.version, _source(task)
        prompts = [_framed(task.frame, chat) for chat in _prompts(task, path, tasks_dir)]
    if limit is not None and limit < len(prompts):
        chosen = sorted(random.Random(seed).sample(range(len(prompts)), limit))
        prompts = [prompts[index] for index in chosen]
    asked = [turns_of(chat) for chat in prompts]
    return Task(name, version, category, source, prompts, digest(json.dumps(asked)))


def evaluation_texts(tasks: Iterable[str | Path], tasks_dir: str | Path | None = None) -> list[str]:
    """Return every user turn of the tasks' prompts, without their frame: what training must not contain."""
    texts = []
    for name in tasks:
        task, path, local = _find(name, tasks_dir)
        if task is None or local:
            prompts = _unframed(_local_prompts(path))
        else:
            prompts = _prompts(task, path, tasks_dir)
        texts += [turn for chat in prompts for turn in chat.turns]
    return texts


def task_names() -> list[str]:
    """Return the names of the tasks that come with the project."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def _find(name_or_path: str | Path, tasks_dir: str | Path | None) -> tuple[TaskFile | None, Path, bool]:
    """Find a task's YAML and its path; or the path of the JSONL that takes its place, and True."""
    name, path = str(name_or_path), Path(name_or_path)
    if name in task_names():
        path = TASKS / f"{name}.yaml"
    elif path.suffix not in (".yaml", ".yml"):
        local = _local_file(name, tasks_dir)
        if local is None:
            raise DeepSpecError(
                f"unknown evaluation task {name!r}{nearest(name, task_names())}; known: {', '.join(task_names())}; "
                f"else name the path of a .yaml, or put {path.name}.jsonl into evaluate.tasks_dir or ${TASKS_DIR}"
            )
        return None, local, True
    if not path.is_file():
        raise DeepSpecError(f"{path}: no such task file")
    task = _read(path)
    local = _local_file(task.name, tasks_dir)
    return task, local or path, local is not None


def _directory(tasks_dir: str | Path | None) -> Path | None:
    """Return the directory of local prompts: the environment's before that of params.yaml."""
    place = os.environ.get(TASKS_DIR) or tasks_dir
    if not place:
        return None
    if not Path(place).is_dir():
        key = f"${TASKS_DIR}" if os.environ.get(TASKS_DIR) else "evaluate.tasks_dir"
        raise DeepSpecError(f"{key}: {place} is not a directory")
    return Path(place)


def _local_file(name: str, tasks_dir: str | Path | None) -> Path | None:
    directory = _directory(tasks_dir)
    if directory is None or Path(name).name != name:
        return None
    files = (directory / f"{name}{suffix}" for suffix in (".jsonl", ".jsonl.gz"))
    return next((file for file in files if file.is_file()), None)


def _local_prompts(path: Path) -> list[Chat]:
    prompts = _file(path)
    if not prompts:
        raise DeepSpecError(f"{path}: has no prompts")
    return prompts


def _file(path: Path) -> list[Chat]:
    return _answerable(read_jsonl(path), str(path), "prompt")


def _answerable(rows: Sequence[Read], where: str, what: str) -> list[Chat]:
    """Return rows as a task has them; what was left out of them is a warning.

    Raises:
        DeepSpecError: a row of token ids, which cannot be asked of a target.
    """
    left_out = Counter(words for row in rows for words in row.left_out)
    for words, count in left_out.items():
        logger.warning("%s: %s, left out %d times", where, words, count)
    for number, row in enumerate(rows):
        if row.chat.input_ids:
            raise DeepSpecError(
                f"{where}, {what} {number}: token ids; a task asks in messages, so give the conversation's messages"
            )
    return [to_be_answered(row.chat) for row in rows]


def _with_first(chat: Chat, text: str) -> Chat:
    """Return the conversation with another text of its first user message."""
    messages = list(chat.messages)
    place = next(i for i, message in enumerate(messages) if message["role"] == "user")
    messages[place] = {**messages[place], "content": text}
    return replace(chat, messages=tuple(messages))


def _unframed(prompts: list[Chat]) -> list[Chat]:
    """Remove what all first turns begin and end with: the frame of prompts that came framed."""
    first = [chat.turns[0] for chat in prompts]
    start = len(os.path.commonprefix(first))
    end = len(os.path.commonprefix([turn[start:][::-1] for turn in first]))
    bare = [turn[start : len(turn) - end] for turn in first]
    if not all(text.strip() for text in bare):  # one prompt, or one within another: no telling the frame
        return prompts
    return [_with_first(chat, text) for text, chat in zip(bare, prompts, strict=True)]


def _read(path: Path) -> TaskFile:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return TaskFile.model_validate(raw)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DeepSpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            message = f"unknown key {key!r}{nearest(key, TaskFile.model_fields)}"
        else:
            message = f"{key}: {first['msg']}".removeprefix(": ").removeprefix("Value error, ")
        raise DeepSpecError(f"{path}: {message}") from None


def _prompts(task: TaskFile, path: Path, tasks_dir: str | Path | None) -> list[Chat]:
    """Return all prompts of a task without its frame."""
    kind, _, rest = task.source.partition(":")
    if task.count is not None:  # a generator's
        return [Chat.of_turns(turns) for turns in GENERATORS[rest](task.count, task.seed)]
    if kind in ("hub", "url"):
        prompts = _rows(task, _instead(task, tasks_dir))
    else:
        prompts = _file(path.parent / rest if kind == "jsonl" else _package_file(rest, task.name))
    if not prompts:
        raise DeepSpecError(f"{path}: {task.source} has no prompts")
    return prompts


def _rows(task: TaskFile, instead: str) -> list[Chat]:
    """Return the prompts of a dataset; `instead` says in an error how else to supply them."""
    kind, _, rest = task.source.partition(":")
    try:
        files = [rest] if kind == "url" else task.files
        dataset = load_split(rest, task.config, task.split, task.revision, files)
    except DeepSpecError as error:
        raise DeepSpecError(f"task {task.name}: {error}; {instead}") from None
    wanted = [*task.columns, *task.append]
    absent = [column for column in wanted if column not in dataset.column_names]
    if absent:
        raise DeepSpecError(
            f"task {task.name}: {_source(task)} has no column {absent[0]!r}; found {', '.join(dataset.column_names)}"
        )
    if task.columns:
        dataset = dataset.select_columns(wanted)
    rows = []
    for number, row in enumerate(stored_rows(dataset)):
        try:
            found = read_columns(row, task.columns) if task.columns else read_row(without_nulls(row))
        except BadRowError as error:
            raise DeepSpecError(f"task {task.name}: {_source(task)}, row {number}: {error}") from None
        more = "".join(
            text.replace(f"{{{name}}}", row[name]) for name, text in task.append.items() if row[name]
        )
        rows.append(_appended(found, more) if more else found)
    prompts = _answerable(rows, f"task {task.name}: {_source(task)}", "row")
    unfilled = (
        sum(any(task.placeholder in turn for turn in chat.turns) for chat in prompts)
        if task.placeholder
        else 0
    )
    if unfilled:
        raise DeepSpecError(
            f"task {task.name}: {unfilled} of the {len(prompts)} prompts of {_source(task)} are placeholders, "
            f"to be filled by the dataset's own script; {instead}"
        )
    return prompts


def _appended(row: Read, more: str) -> Read:
    return row if row.chat.input_ids else replace(row, chat=_with_first(row.chat, row.chat.turns[0] + more))


def _instead(task: TaskFile, tasks_dir: str | Path | None) -> str:
    directory = _directory(tasks_dir)
    place = (
        f"into {directory}"
        if directory
        else f"into a directory that evaluate.tasks_dir or ${TASKS_DIR} names"
    )
    return f"or put {task.name}.jsonl, one prompt a line (docs/data.md), {place}"


def _source(task: TaskFile) -> str:
    """Return the source of the prompts as results record it: a directory's name, a dataset with its commit."""
    kind, _, rest = task.source.partition(":")
    if kind != "hub":
        return task.source
    name = Path(rest).resolve().name if Path(rest).is_dir() else rest
    part = f"{task.config}/{task.split}" if task.config else task.split
    commit = f"@{task.revision}" if task.revision and not Path(rest).is_dir() else ""
    return f"hub:{name}:{part}{commit}"


def _package_file(place: str, task: str) -> Path:
    package, _, inside = place.partition("/")
    try:
        return Path(str(importlib.resources.files(package) / inside))
    except ModuleNotFoundError:
        raise DeepSpecError(
            f"task {task} needs the Python package {package!r}, which is not installed: "
            "install deepspec[pipeline]"
        ) from None


def _framed(frame: str, chat: Chat) -> Chat:
    return _with_first(chat, frame.replace("{prompt}", chat.turns[0].strip("\n")))

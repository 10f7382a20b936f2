"""Evaluation tasks: a small YAML says where the prompts come from; its version is recorded with every result.

`source` is one of
    package:<package>/<path>   a JSONL file (`.gz` too) inside an installed Python package
    jsonl:<path>               a JSONL file, relative to the YAML; `{"turns": [...]}` a line
    generator:word_problems    prompts written by `deepspec/evaluation/word_problems.py`
    hub:<dataset>[:<split>]    a dataset of the Hugging Face hub, `hub:<dataset>:<config>/<split>` too, or a directory
    json:<address>             a JSON-lines file elsewhere

A directory of JSONL files stands in for any of them: where `$DEEPSPEC_TASKS_DIR`, or `evaluate.tasks_dir`, has
`<task>.jsonl`, its prompts are taken as they are.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deepspec.data.prompt_sources import dataset_prompts, read_jsonl
from deepspec.errors import DeepSpecError, nearest
from deepspec.evaluation.word_problems import word_problems
from deepspec.files import digest, file_digest

TASKS = Path(__file__).parent / "tasks"
TASKS_DIR = "DEEPSPEC_TASKS_DIR"  # environment variable
KINDS = ("package", "jsonl", "generator", "hub", "json")
GENERATORS = {"word_problems": word_problems}


@dataclass(frozen=True)
class Task:
    """Prompts of one kind, ready to be decoded: each is the list of its user turns.

    `version` is the YAML's, or the digest of a JSONL file that stands in for it; `digest` is that of the prompts.
    """

    name: str
    version: str
    category: str
    source: str
    prompts: list[list[str]]

    @property
    def digest(self) -> str:
        return digest(json.dumps(self.prompts))


class TaskFile(BaseModel):
    """What a task's YAML may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: str = Field(description="Change it whenever the prompts change.")
    category: Literal["math", "code", "chat", "other"]
    description: str = ""
    source: str
    frame: str = Field("{prompt}", description="Text around the first turn, at `{prompt}`.")
    count: int | None = Field(None, ge=1, description="Prompts to write (generator only).")
    seed: int = Field(0, description="Of the generator.")
    column: str | None = Field(
        None, description="Of a dataset: what holds the turns (default: the usual names)."
    )
    revision: str | None = Field(None, description="Of a dataset of the hub: a commit.")

    @model_validator(mode="after")
    def _consistent(self) -> TaskFile:
        kind, _, rest = self.source.partition(":")
        if kind not in KINDS or not rest:
            raise ValueError(f"unknown source {self.source!r}: use {', '.join(f'{kind}:' for kind in KINDS)}")
        if (self.column or self.revision) and kind not in ("hub", "json"):
            raise ValueError("`column` and `revision` belong to a dataset")
        if kind == "generator" and rest not in GENERATORS:
            raise ValueError(f"unknown generator {rest!r}{nearest(rest, GENERATORS)}")
        if (kind == "generator") != (self.count is not None):
            raise ValueError("`count` belongs to a generator, and a generator needs it")
        if "{prompt}" not in self.frame:
            raise ValueError("`frame` has no {prompt}")
        return self


def load_task(
    name_or_path: str | Path, limit: int | None = None, seed: int = 0, tasks_dir: str | Path | None = None
) -> Task:
    """A task by its name or the path of its YAML.

    Args:
        limit: number of prompts, sampled by `seed` and kept in the order of the source; None takes all.
        tasks_dir: directory of `<task>.jsonl` files that stand in for the tasks' own sources; the environment
            variable `DEEPSPEC_TASKS_DIR` goes before it.

    Raises:
        DeepSpecError: unknown task, a bad YAML, or prompts that cannot be read.
    """
    task, prompts = _whole(name_or_path, tasks_dir)
    prompts = [[_framed(task.frame, turns[0]), *turns[1:]] for turns in prompts]
    if limit is not None and limit < len(prompts):
        chosen = sorted(random.Random(seed).sample(range(len(prompts)), limit))
        prompts = [prompts[index] for index in chosen]
    return Task(task.name, task.version, task.category, task.source, prompts)


def evaluation_texts(tasks: Iterable[str | Path], tasks_dir: str | Path | None = None) -> list[str]:
    """Every user turn of every prompt of the tasks, without their frame: what training must not contain."""
    return [turn for name in tasks for turns in _whole(name, tasks_dir)[1] for turn in turns]


def task_names() -> list[str]:
    """The tasks that come with the project."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def _whole(name_or_path: str | Path, tasks_dir: str | Path | None) -> tuple[TaskFile, list[list[str]]]:
    """A task and all its prompts, without its frame."""
    local = _local(str(name_or_path), tasks_dir)
    if local is None:
        path = _find(name_or_path)
        task = _read(path)
        return task, _prompts(task, path)
    known = _read(TASKS / f"{name_or_path}.yaml") if str(name_or_path) in task_names() else None
    prompts = read_jsonl(local)
    if not prompts:
        raise DeepSpecError(f"{local} has no prompts")
    task = TaskFile(
        name=str(name_or_path),
        version=file_digest(local)[:16],
        category=known.category if known else "other",
        source=f"jsonl:{local.name}",
    )
    return task, prompts


def _local(name: str, tasks_dir: str | Path | None) -> Path | None:
    """The JSONL file that stands in for a task."""
    directory = os.environ.get(TASKS_DIR) or tasks_dir
    if not directory or Path(name).suffix:
        return None
    if not Path(directory).is_dir():
        raise DeepSpecError(f"{directory}: no such directory of tasks (${TASKS_DIR} or evaluate.tasks_dir)")
    files = (Path(directory) / f"{name}{suffix}" for suffix in (".jsonl", ".jsonl.gz"))
    return next((file for file in files if file.is_file()), None)


def _find(name_or_path: str | Path) -> Path:
    if str(name_or_path) in task_names():
        return TASKS / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        known = ", ".join(task_names())
        raise DeepSpecError(
            f"unknown evaluation task {str(name_or_path)!r}{nearest(str(name_or_path), task_names())}; "
            f"known: {known}, <task>.jsonl in evaluate.tasks_dir or ${TASKS_DIR}, or the path of a .yaml"
        )
    if not path.is_file():
        raise DeepSpecError(f"{path}: no such task file")
    return path


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


def _prompts(task: TaskFile, path: Path) -> list[list[str]]:
    """All prompts of a task without its frame."""
    kind, _, rest = task.source.partition(":")
    if kind == "generator":
        return GENERATORS[rest](task.count, task.seed)
    if kind in ("hub", "json"):
        try:
            prompts = dataset_prompts(task.source, task.column, task.revision)
        except DeepSpecError as error:
            raise DeepSpecError(
                f"task {task.name}: {error}; without it: {task.name}.jsonl in a directory named by evaluate.tasks_dir "
                f"or ${TASKS_DIR}"
            ) from None
    else:
        prompts = read_jsonl(path.parent / rest if kind == "jsonl" else _package_file(rest, task.name))
    if not prompts:
        raise DeepSpecError(f"{path}: {task.source} has no prompts")
    return prompts


def _package_file(place: str, task: str) -> Path:
    package, _, inside = place.partition("/")
    try:
        return Path(str(importlib.resources.files(package) / inside))
    except ModuleNotFoundError:
        raise DeepSpecError(
            f"task {task} needs the Python package {package!r}, which is not installed: "
            "install deepspec[pipeline]"
        ) from None


def _framed(frame: str, prompt: str) -> str:
    return frame.replace("{prompt}", prompt.strip("\n"))

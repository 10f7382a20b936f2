"""What is decoded here beside the evaluation: some drafts, the target and the tasks, in resumable pieces."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import Engine, generate
from deepspec.decoding.request import Generation, Request
from deepspec.device import describe_device
from deepspec.drafters.checkpoint import draft_digest
from deepspec.drafters.load import load_drafter
from deepspec.errors import DeepSpecError
from deepspec.evaluation.runs import prompt_seed
from deepspec.evaluation.work import Work, process_state
from deepspec.files import digest, write_json
from deepspec.lineage import code_digest
from deepspec.target.model import Target, load_target
from deepspec.tasks.dialogue import prompt_ids
from deepspec.tasks.task import Task, load_task
from paper.params import PaperParams

TARGET, DRAFTS = Path("data/target"), Path("data/drafts")
WORK = Path(".deepspec/paper")


def trained(params: PaperParams, seed: int, names: Sequence[str]) -> dict[str, Path]:
    """The directories of drafts of one of the study's seeds."""
    seeds = params.study.seeds
    if seed not in seeds:
        raise DeepSpecError(f"--seed {seed}: the study has {', '.join(map(str, seeds))}")
    return {name: DRAFTS / f"seed-{seed}" / name for name in names}


def run(engine: Engine, requests: list[Request]) -> list[Generation]:
    """All of them, in their order.

    Raises:
        DeepSpecError: one of them failed.
    """
    queue = iter([replace(request, id=i) for i, request in enumerate(requests)])
    done = sorted(engine.run(lambda: next(queue, None)), key=lambda generation: generation.id)
    for generation in done:
        if generation.error:
            raise DeepSpecError(f"prompt {generation.id}: {generation.error}")
    return done


class Bench:
    """
    Args:
        drafts: name → directory.
        prompts: of each task.
        script: the file whose results are kept; its code is part of their key.
        settings: whatever else they depend on.
    """

    def __init__(
        self, params: PaperParams, drafts: Mapping[str, Path], prompts: int, script: str, *settings: Any
    ):
        self.params, self.study, self.drafts = params, params.study, drafts
        evaluate = params.evaluate
        self.tasks: list[Task] = [
            load_task(task, prompts, params.seed, evaluate.tasks_dir) for task in evaluate.tasks
        ]
        digests = {name: draft_digest(directory) for name, directory in drafts.items()}
        code = code_digest(f"paper.{Path(script).stem}")
        target = load_target(TARGET).digest
        where = (
            describe_device(process_state().device),
            params.target.dtype,
        )  # seconds of two machines do not mix
        what = (digests, target, code, where, [task.asked for task in self.tasks], params.seed, settings)
        key = f"{Path(script).stem}-{digest(json.dumps(what, default=str))}"
        self.work = Work(process_state(), WORK, key)

    @cached_property
    def target(self) -> Target:
        return load_target(TARGET)

    @cached_property
    def exact(self) -> Target:
        """The target in float32, where token identity is checked."""
        return load_target(TARGET, dtype="float32")

    @cached_property
    def drafters(self) -> dict[str, Drafter]:
        return {name: self.load(name, self.target) for name in self.drafts}

    def load(self, name: str, target: Target) -> Drafter:
        """The draft alone: no lookup before it."""
        return load_drafter(self.drafts[name], target)

    def prompts(self, task: Task, target: Target | None = None) -> list[list[int]]:
        """First turns in the target's chat template."""
        return [prompt_ids(target or self.target, chat) for chat in task.prompts]

    def seeds(self, task: Task) -> list[int]:
        """Of sampling: those of the evaluation."""
        return [prompt_seed(self.params.seed, task.name, turns, 0) for turns in task.asked]

    def write(self, path: Path, found: Any) -> None:
        """The result of a script, written by one process; the pieces that it was made of are no longer needed."""
        if self.work.main:
            write_json(path, found)
        self.work.remove()

    @cached_property
    def plain(self) -> dict[str, list[Any]]:
        """Task → greedy generations of the float32 target alone, for the check of token identity."""
        evaluate = self.params.evaluate
        return {
            task.name: generate(
                self.exact,
                None,
                self.prompts(task, self.exact)[: evaluate.lossless_prompts],
                max_new_tokens=evaluate.lossless_new_tokens,
            )
            for task in self.tasks
        }

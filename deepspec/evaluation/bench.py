"""The bench on which drafters are measured: what all phases of an evaluation share, loaded when first asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deepspec.decoding.cost import CostCurve
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.params import ControllerChoice
from deepspec.decoding.profiles import load_or_measure
from deepspec.drafters.deployment import Deployment
from deepspec.drafters.load import is_trained, load_drafter
from deepspec.drafters.params import DEFAULT_LOOKUP
from deepspec.drafters.registry import algorithms
from deepspec.errors import DeepSpecError
from deepspec.evaluation.contest import Computed, DecodingConfig
from deepspec.evaluation.params import EvaluateParams
from deepspec.evaluation.record import DRAFT, LOOKUP
from deepspec.evaluation.runs import PLAIN
from deepspec.evaluation.work import Work
from deepspec.target.ends import Ends
from deepspec.target.model import Target, load_target
from deepspec.tasks.dialogue import prompt_ids, turns_of
from deepspec.tasks.task import Task


@dataclass
class Bench:
    """One evaluation at work."""

    drafts: Mapping[str, str | Path]
    digests: Mapping[str, str]
    target_dir: Path
    tasks: list[Task]
    params: EvaluateParams
    seed: int
    device: str | None
    work: Work

    def forget(self) -> None:
        """Make room for the float32 copy."""
        for name in ("target", "drafters"):
            self.__dict__.pop(name, None)

    @cached_property
    def target(self) -> Target:
        return load_target(self.target_dir, device=self.device)

    @cached_property
    def drafters(self) -> dict[str, Drafter]:
        """Each draft alone."""
        return {name: load_drafter(path, self.target) for name, path in self.drafts.items()}

    @cached_property
    def baseline(self) -> Drafter:
        """The lookup alone: that of `decode`, or the default one."""
        chosen = self.params.decode.lookup or DEFAULT_LOOKUP
        return algorithms()[chosen.type].make(chosen)

    @cached_property
    def costs(self) -> dict[str, Any]:
        """Cost curves by drafter: one measurement for all processes and all runs on this machine."""
        batches = (1, *self.params.throughput.batches) if self.params.throughput else (1,)

        def measure(key: str) -> Any:
            drafter = self.drafters[key.removeprefix("costs ")]
            shape = self.params.decode.tree
            return load_or_measure(self.target, drafter, batches=sorted(set(batches)), shape=shape).to_json()

        found = self.work.do("costs", [f"costs {name}" for name in self.drafts], measure)
        return {key.removeprefix("costs "): curve for key, curve in found.items()}

    @cached_property
    def curves(self) -> dict[str, CostCurve]:
        return {name: CostCurve.from_json(curve) for name, curve in self.costs.items()}

    def is_trained(self, name: str) -> bool:
        return is_trained(Path(self.drafts[name]))


def decoding_configs(bench: Bench) -> list[DecodingConfig]:
    """Return plain decoding, the lookup alone, and each draft under the deployed and the other controllers.

    Without the lookup where it is computed (`computed_configs`).
    """
    decode = bench.params.decode
    found = [DecodingConfig(PLAIN)]
    if not bench.params.computed:
        found.append(DecodingConfig(LOOKUP, bench.baseline))
    for name, drafter in bench.drafters.items():
        others = {
            label_of(chosen): chosen for chosen in bench.params.controllers if chosen != decode.controller
        }
        used = Deployment.of(bench.target, drafter, decode, bench.curves[name])
        controllers = {label: chosen.make(bench.curves[name]) for label, chosen in others.items()}
        for label, controller in {DRAFT: used.controller, **controllers}.items():
            found.append(DecodingConfig(f"{name}/{label}", used.drafter, used.tree, used.verify, controller))
    return found


def computed_configs(bench: Bench) -> Computed | None:
    """Return the lookup along the first draft's answers, where it is not decoded."""
    if not bench.params.computed:
        return None
    first = next(iter(bench.drafts))
    return Computed([DecodingConfig(LOOKUP, bench.baseline)], f"{first}/{DRAFT}", bench.curves[first])


def label_of(controller: ControllerChoice) -> str:
    """Return a controller's name in a table: `fixed`, `threshold 0.5`."""
    options = [
        (name, value)
        for name, value in vars(controller).items()
        if name != "type" and value is not None and value is not False
    ]
    return " ".join([controller.type, *(name if value is True else f"{value:g}" for name, value in options)])


def check_prompts(target: Ends, tasks: Sequence[Task]) -> None:
    """Refuse prompts that the target cannot be asked, before any is decoded; its answers are stood in for.

    Raises:
        DeepSpecError: the template refuses one, or one leaves no room for an answer.
    """
    for task in tasks:
        for number, chat in enumerate(task.prompts):
            turns = 1 if chat.plain else len(turns_of(chat))
            try:
                ids = [prompt_ids(target, chat, ["answer"] * turn) for turn in range(turns)]
            except DeepSpecError as error:
                raise DeepSpecError(f"task {task.name}, prompt {number}: {error}") from None
            if (length := max(map(len, ids))) >= target.max_length:
                raise DeepSpecError(
                    f"task {task.name}, prompt {number}: {length} tokens leave no room for an answer: the target has "
                    f"{target.max_length} positions; leave the prompt out"
                )

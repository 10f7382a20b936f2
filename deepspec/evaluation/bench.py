"""The bench on which drafters are measured: everything that decodes, in pieces of work that `work.py` keeps and shares.

What the pieces add up to is put together in `benchmark.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deepspec.decoding import train_parity as promise
from deepspec.decoding.calibration import TEMPERATURES
from deepspec.decoding.cost import CostCurve, load_or_measure
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import generate
from deepspec.decoding.params import ControllerChoice
from deepspec.decoding.request import Generation
from deepspec.decoding.tree import CHAIN, Shape
from deepspec.drafters.checkpoint import read_config
from deepspec.drafters.deployment import Deployment, with_lookup
from deepspec.drafters.load import load_drafter
from deepspec.drafters.registry import algorithms, reader
from deepspec.evaluation import alone, sweep, throughput
from deepspec.evaluation.contest import Contest, Contestant
from deepspec.evaluation.identity import check_identity
from deepspec.evaluation.native import native_tokens_per_second
from deepspec.evaluation.params import EvaluateParams
from deepspec.evaluation.record import DRAFT, LOOKUP, Identity, Throughput
from deepspec.evaluation.runs import PLAIN, PromptRuns, from_json, prompt_seed, to_json
from deepspec.evaluation.throughput import Server, Setting
from deepspec.evaluation.trace import trace
from deepspec.evaluation.work import Work
from deepspec.target.model import Target, load_target
from deepspec.tasks.task import Task


@dataclass
class Bench:
    """One evaluation at work. What a phase needs is loaded when its first missing piece asks for it."""

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
        chosen = self.params.decode.lookup or type(self.params.decode)().lookup
        return algorithms()[chosen.type].make(chosen)

    def costs(self) -> dict[str, Any]:
        """Cost curves by drafter: one measurement for all processes and all runs on this machine."""
        batches = (1, *self.params.throughput.batches) if self.params.throughput else (1,)

        def measure(key: str) -> Any:
            drafter = self.drafters[key.removeprefix("costs ")]
            return load_or_measure(self.target, drafter, batches=sorted(set(batches))).to_json()

        found = self.work.do("costs", [f"costs {name}" for name in self.drafts], measure)
        return {key.removeprefix("costs "): curve for key, curve in found.items()}

    @cached_property
    def curves(self) -> dict[str, CostCurve]:
        return {name: CostCurve.from_json(curve) for name, curve in self.costs().items()}

    def _contestants(self) -> list[Contestant]:
        decode = self.params.decode
        found = [Contestant(PLAIN), Contestant(LOOKUP, self.baseline)]
        for name, drafter in self.drafters.items():
            others = {
                _label(chosen): chosen for chosen in self.params.controllers if chosen != decode.controller
            }
            used = Deployment.of(self.target, drafter, decode, self.curves[name])
            controllers = {label: chosen.make(self.curves[name]) for label, chosen in others.items()}
            for label, controller in {DRAFT: used.controller, **controllers}.items():
                found.append(Contestant(f"{name}/{label}", used.drafter, used.tree, used.verify, controller))
        return found

    def contest(self) -> dict[tuple[str, float], list[PromptRuns]]:
        """All prompts of all tasks at all temperatures."""
        pieces = {
            f"{task.name} T={temperature:g} {i}": (task, temperature, i)
            for temperature in self.params.temperatures
            for task in self.tasks
            for i in range(len(task.prompts))
        }
        self.costs()  # measured before any process decodes

        @_once
        def contest() -> Contest:
            found = Contest(self.target, self._contestants(), self.params.max_new_tokens, self.seed)
            longest = max((prompt[0] for task in self.tasks for prompt in task.prompts), key=len)
            found.warm_up(longest, self.params.temperatures)
            return found

        def decode(key: str) -> Any:
            task, temperature, i = pieces[key]
            return to_json(contest().prompt(task.name, task.prompts[i], temperature, i))

        found = self.work.do("measuring", list(pieces), decode)
        results: dict[tuple[str, float], list[PromptRuns]] = {}
        for key, (task, temperature, _) in pieces.items():
            results.setdefault((task.name, temperature), []).append(from_json(found[key]))
        return results

    def native(self) -> dict[str, float]:
        """Tokens/s of `transformers.generate` by task: the best plain decoding that needs none of our engine."""

        def measure(_: str) -> Any:
            ids = {task.name: self._prompt_ids(task, 1)[0] for task in self.tasks}
            return native_tokens_per_second(self.target_dir, self.target.dtype, self.target.device, ids)

        return self.work.do("transformers.generate", ["native"], measure)["native"]

    def parts(self, name: str) -> dict[str, Any]:
        """What is said of a trained draft alone."""
        trained = self._is_trained(name)
        return {
            **(self._alone(name) if trained else {"blocks": None, "confidence": None}),
            "throughput": self._throughput(name) if trained and self.params.throughput else None,
        }

    def _is_trained(self, name: str) -> bool:
        return reader(read_config(Path(self.drafts[name]))).network is not None

    def _alone(self, name: str) -> dict[str, Any]:
        pieces = {
            f"alone {name} {mode} {task.name}": (mode, task) for mode in TEMPERATURES for task in self.tasks
        }

        def decode(key: str) -> Any:
            mode, task = pieces[key]
            limit = self.params.max_new_tokens
            return alone.decode_blocks(self.target, self.drafters[name], task, mode, limit, self.seed)

        found = self.work.do(f"{name} alone", list(pieces), decode)
        by_mode: dict[str, dict[str, Any]] = {mode: {} for mode in TEMPERATURES}
        for key, (mode, task) in pieces.items():
            by_mode[mode][task.name] = alone.from_json(found[key])
        return {
            "blocks": {mode: alone.acceptance(tasks) for mode, tasks in by_mode.items()},
            "confidence": alone.confidence(
                self.drafters[name], {mode: list(tasks.values()) for mode, tasks in by_mode.items()}
            ),
        }

    def promise(self, name: str) -> promise.Check | None:
        kept = promise.load(self.drafts[name])

        def measure(_: str) -> Any:
            check = promise.check(self.target, self.drafters[name], kept)
            return check and asdict(check)

        found = self.work.do(f"{name}: training's promise", [f"promise {name}"], measure) if kept else {}
        return next((promise.Check(**check) for check in found.values() if check), None)

    def traces(self, name: str) -> list[dict[str, Any]]:
        pieces = {
            f"trace {name} {task.name} T={temperature:g} {i}": (task, temperature, i)
            for task in self.tasks
            for temperature in self.params.temperatures
            for i in range(min(self.params.traces, len(task.prompts)))
        }

        @_once
        def contestant() -> Contestant:
            return next(each for each in self._contestants() if each.name == f"{name}/{DRAFT}")

        def decode(key: str) -> Any:
            task, temperature, i = pieces[key]
            (ids,) = self._prompt_ids(task, 1, i)
            seed = prompt_seed(self.seed, task.name, task.prompts[i], 0)
            limit = self.params.max_new_tokens
            shown = trace(self.target, contestant(), ids, temperature, limit, seed)
            return {"task": task.name, "temperature": temperature, "prompt": task.prompts[i][0], **shown}

        return list(self.work.do(f"{name}, token by token", list(pieces), decode).values())

    def sweeps(self, name: str) -> dict[str, list[PromptRuns]] | None:
        chosen = self.params.sweeps
        if chosen is None or not self._is_trained(name):
            return None
        pieces = {
            f"sweep {name} {task.name} {i}": (task, i)
            for task in self.tasks
            for i in range(min(chosen.prompts, len(task.prompts)))
        }

        @_once
        def contest() -> Contest:
            drafter = self.drafters[name]
            found = Contest(self.target, sweep.contestants(drafter, chosen), chosen.max_new_tokens, self.seed)
            found.warm_up(self.tasks[0].prompts[0][0], [0.0])
            return found

        def decode(key: str) -> Any:
            task, i = pieces[key]
            return to_json(contest().prompt(task.name, task.prompts[i][:1], 0.0, i))

        found = self.work.do(f"{name}: sweeps", list(pieces), decode)
        results: dict[str, list[PromptRuns]] = {}
        for key, (task, _) in pieces.items():
            results.setdefault(task.name, []).append(from_json(found[key]))
        return results

    def _throughput(self, name: str) -> list[Throughput]:
        chosen = self.params.throughput
        settings = [Setting(t, batch) for t in chosen.temperatures for batch in chosen.batches]

        @_once
        def server() -> Server:
            drafter = self.drafters[name]
            entrants = throughput.contestants(self.curves[name], chosen.lengths, drafter.block_size)
            return Server(self.target, drafter, entrants, chosen.max_new_tokens, self.seed)

        @_once
        def prompts() -> list[list[int]]:
            return [ids for task in self.tasks for ids in self._prompt_ids(task)]

        pieces = {f"throughput {name} T={s.temperature:g} batch={s.batch}": s for s in settings}

        def decode(key: str) -> Any:
            return throughput.measure(server(), pieces[key], prompts(), chosen.groups)

        found = self.work.do(f"{name}: full batches", list(pieces), decode)
        return throughput.rows({pieces[key]: throughput.from_json(runs) for key, runs in found.items()})

    def identities(self, name: str) -> dict[str, dict[str, Identity]]:
        """The float32 check of each path and task. It always drafts: a controller would only leave rounds unchecked."""
        trained = self._is_trained(name)
        paths = [DRAFT, LOOKUP]
        if trained and (self.params.sweeps or self.params.throughput):
            paths.append("alone")
        if trained and self.params.sweeps:
            paths.append("tree")
        pieces = {
            f"identity {name} {path} {task.name}": (path, task) for path in paths for task in self.tasks
        }

        @_once
        def loaded() -> tuple[Target, Drafter]:
            target = load_target(self.target_dir, dtype="float32", device=self.device)
            return target, load_drafter(self.drafts[name], target)

        limit = self.params.lossless_new_tokens
        plain: dict[str, list[Generation]] = {}

        def check(key: str) -> Any:
            path, task = pieces[key]
            target, drafter = loaded()
            if task.name not in plain:
                ids = self._prompt_ids(task, self.params.lossless_prompts, of=target)
                plain[task.name] = generate(target, None, ids, max_new_tokens=limit)
            references = plain[task.name] if path in (DRAFT, "alone") else plain[task.name][:1]
            way, tree = {
                DRAFT: (with_lookup(drafter, self.params.decode.lookup), self.params.decode.tree),
                LOOKUP: (self.baseline, CHAIN),
                "alone": (drafter, CHAIN),
                "tree": (drafter, self._largest_tree(drafter)),
            }[path]
            found = check_identity(
                target, way, self.target_dir, references, limit, tree, together=path == "alone"
            )
            return asdict(found)

        found = self.work.do(f"{name}: token identity in float32", list(pieces), check)
        identities: dict[str, dict[str, Identity]] = {}
        for key, (path, task) in pieces.items():
            identities.setdefault(path, {})[task.name] = Identity(**found[key])
        return identities

    def _largest_tree(self, drafter: Drafter) -> Shape:
        return sweep.largest_tree(drafter.block_size, self.params.sweeps) if self.params.sweeps else CHAIN

    def _prompt_ids(
        self, task: Task, count: int | None = None, start: int = 0, of: Target | None = None
    ) -> list[list[int]]:
        """First turns in the target's chat template."""
        chosen = task.prompts[start : None if count is None else start + count]
        target = of or self.target
        return [target.chat_ids([{"role": "user", "content": turns[0]}]) for turns in chosen]


def _label(controller: ControllerChoice) -> str:
    """`fixed`, `threshold 0.5`"""
    options = [value for name, value in vars(controller).items() if name != "type" and value is not None]
    return " ".join([controller.type, *(f"{value:g}" for value in options)])


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    """The same object at every call, made by the first."""
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get

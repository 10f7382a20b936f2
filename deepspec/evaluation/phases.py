"""The phases of an evaluation: everything that decodes, in pieces of work that `work.py` keeps and shares.

What the pieces add up to is put together in `measure.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from deepspec.decoding import train_parity
from deepspec.decoding.calibration import TEMPERATURES
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Generation
from deepspec.decoding.shapes import CHAIN, Shape
from deepspec.drafters.deployment import with_lookup
from deepspec.drafters.load import load_drafter
from deepspec.evaluation import alone, sweep, throughput
from deepspec.evaluation.bench import Bench, computed_configs, decoding_configs
from deepspec.evaluation.contest import Contest, DecodingConfig
from deepspec.evaluation.identity import check_identity, sum_of
from deepspec.evaluation.native import native_tokens_per_second
from deepspec.evaluation.params import ThroughputParams
from deepspec.evaluation.parts import Throughput
from deepspec.evaluation.record import DRAFT, LOOKUP, Identity
from deepspec.evaluation.runs import PromptRuns, from_json, prompt_seed, to_json
from deepspec.evaluation.throughput import Server, Setting
from deepspec.evaluation.trace import trace
from deepspec.target.model import Target, load_target
from deepspec.tasks.dialogue import first_turn, longest, prompt_ids, turns_of

Made = TypeVar("Made")
_TRACED = 64  # tokens of a generation that is shown token by token


def run_contest(bench: Bench) -> dict[tuple[str, float], list[PromptRuns]]:
    """Return (task, temperature) → the runs of its prompts by all decoding configurations."""
    pieces = {
        f"{task.name} T={temperature:g} {i}": (task, temperature, i)
        for temperature in bench.params.temperatures
        for task in bench.tasks
        for i in range(len(task.prompts))
    }
    _ = bench.costs  # measured before any process decodes

    @_once
    def contest() -> Contest:
        found = Contest(
            bench.target,
            decoding_configs(bench),
            bench.params.max_new_tokens,
            bench.seed,
            bench.params.plain_new_tokens,
            computed_configs(bench),
        )
        prompts = (chat for task in bench.tasks for chat in task.prompts)
        found.warm_up(longest(prompts), bench.params.temperatures)
        return found

    def decode(key: str) -> Any:
        task, temperature, i = pieces[key]
        return to_json(contest().prompt(task.name, task.prompts[i], temperature, i))

    found = bench.work.do("measuring", list(pieces), decode)
    results: dict[tuple[str, float], list[PromptRuns]] = {}
    for key, (task, temperature, _) in pieces.items():
        results.setdefault((task.name, temperature), []).append(from_json(found[key]))
    return results


def run_native(bench: Bench) -> dict[str, float]:
    """Return tokens/s of `transformers.generate` by task: the best plain decoding that needs none of our engine."""

    def measure(_: str) -> Any:
        ids = {task.name: prompt_ids(bench.target, task.prompts[0]) for task in bench.tasks}
        return native_tokens_per_second(bench.target_dir, bench.target.dtype, bench.target.device, ids)

    return bench.work.do("transformers.generate", ["native"], measure)["native"]


def measure_alone(bench: Bench, name: str) -> dict[str, Any]:
    """Return the record's sections that are measured of a trained draft without lookup and controller."""
    trained, batches = bench.is_trained(name), bench.params.throughput
    return {
        **(_blocks(bench, name) if trained else {"blocks": None, "confidence": None}),
        "throughput": _throughput(bench, name, batches) if trained and batches else None,
    }


def _blocks(bench: Bench, name: str) -> dict[str, Any]:
    pieces = {
        f"alone {name} {mode} {task.name}": (mode, task) for mode in TEMPERATURES for task in bench.tasks
    }

    def decode(key: str) -> Any:
        mode, task = pieces[key]
        limit = bench.params.max_new_tokens
        return alone.decode_blocks(bench.target, bench.drafters[name], task, mode, limit, bench.seed)

    found = bench.work.do(f"{name} alone", list(pieces), decode)
    by_mode: dict[str, dict[str, Any]] = {mode: {} for mode in TEMPERATURES}
    for key, (mode, task) in pieces.items():
        by_mode[mode][task.name] = alone.from_json(found[key])
    return {
        "blocks": {mode: alone.acceptance(tasks) for mode, tasks in by_mode.items()},
        "confidence": alone.confidence(
            bench.drafters[name], {mode: list(tasks.values()) for mode, tasks in by_mode.items()}
        ),
    }


def check_train_parity(bench: Bench, name: str) -> train_parity.Check | None:
    """Return whether decoding accepts what training expected; None of a draft that kept no blocks for it."""
    kept = train_parity.load(bench.drafts[name])

    def measure(_: str) -> Any:
        check = train_parity.check(bench.target, bench.drafters[name], kept)
        return check and asdict(check)

    found = bench.work.do(f"{name}: training's promise", [f"promise {name}"], measure) if kept else {}
    return next((train_parity.Check(**check) for check in found.values() if check), None)


def take_traces(bench: Bench, name: str) -> list[dict[str, Any]]:
    """Return a few generations of each task, token by token."""
    pieces = {
        f"trace {name} {task.name} T={temperature:g} {i}": (task, temperature, i)
        for task in bench.tasks
        for temperature in bench.params.temperatures
        for i in range(min(bench.params.traces, len(task.prompts)))
    }

    @_once
    def config() -> DecodingConfig:
        return next(each for each in decoding_configs(bench) if each.name == f"{name}/{DRAFT}")

    def decode(key: str) -> Any:
        task, temperature, i = pieces[key]
        chat = task.prompts[i]
        ids = prompt_ids(bench.target, chat)
        seed = prompt_seed(bench.seed, task.name, turns_of(chat), 0)
        limit = min(bench.params.max_new_tokens, _TRACED)
        shown = trace(bench.target, config(), ids, temperature, limit, seed)
        return {"task": task.name, "temperature": temperature, "prompt": chat.turns[0], **shown}

    return list(bench.work.do(f"{name}, token by token", list(pieces), decode).values())


def run_sweeps(bench: Bench, name: str) -> dict[str, list[PromptRuns]] | None:
    """Return task → the runs of its prompts by plain decoding and every point of the sweeps; None without sweeps."""
    chosen = bench.params.sweeps
    if chosen is None or not bench.is_trained(name):
        return None
    pieces = {
        f"sweep {name} {task.name} {i}": (task, i)
        for task in bench.tasks
        for i in range(min(chosen.prompts, len(task.prompts)))
    }

    @_once
    def contest() -> Contest:
        curve = bench.curves[name] if bench.params.computed else None
        found = sweep.contest(bench.target, bench.drafters[name], chosen, bench.seed, curve)
        found.warm_up(bench.tasks[0].prompts[0], [0.0])
        return found

    def decode(key: str) -> Any:
        task, i = pieces[key]
        return to_json(contest().prompt(task.name, first_turn(task.prompts[i]), 0.0, i))

    found = bench.work.do(f"{name}: sweeps", list(pieces), decode)
    results: dict[str, list[PromptRuns]] = {}
    for key, (task, _) in pieces.items():
        results.setdefault(task.name, []).append(from_json(found[key]))
    return results


def _throughput(bench: Bench, name: str, chosen: ThroughputParams) -> list[Throughput]:
    settings = [Setting(t, batch) for t in chosen.temperatures for batch in chosen.batches]

    @_once
    def server() -> Server:
        tree = bench.params.decode.tree
        configs = throughput.configs(bench.drafters[name], bench.curves[name], chosen.lengths, tree=tree)
        return Server(bench.target, configs, chosen.max_new_tokens, bench.seed)

    @_once
    def prompts() -> list[list[int]]:
        return [prompt_ids(bench.target, chat) for task in bench.tasks for chat in task.prompts]

    pieces = {f"throughput {name} T={s.temperature:g} batch={s.batch}": s for s in settings}

    def decode(key: str) -> Any:
        return throughput.measure(server(), pieces[key], prompts(), chosen.groups)

    found = bench.work.do(f"{name}: full batches", list(pieces), decode)
    return throughput.rows({pieces[key]: throughput.from_json(runs) for key, runs in found.items()})


def check_identities(bench: Bench, name: str, shape: Shape) -> dict[str, dict[str, Identity]]:
    """Return path → task → the float32 check.

    Args:
        shape: what the draft as it is used proposes, which in float32 might be another.

    It always drafts: a controller would only leave rounds unchecked. Of the draft's prompts the first of a task is
    decoded alone and the others in one batch, the two ways in which the engine runs; what was not decoded for its
    speed is not decoded here either.
    """
    trained = bench.is_trained(name)
    measured_sweeps = bench.params.sweeps if not bench.params.computed else None
    paths = [DRAFT] if bench.params.computed else [DRAFT, LOOKUP]
    if trained and (measured_sweeps or bench.params.throughput):
        paths.append("alone")
    if trained and measured_sweeps:
        paths.append("tree")
    pieces = {f"identity {name} {path} {task.name}": (path, task) for path in paths for task in bench.tasks}

    @_once
    def loaded() -> tuple[Target, Drafter]:
        target = load_target(bench.target_dir, dtype="float32", device=bench.device)
        return target, load_drafter(bench.drafts[name], target)

    limit = bench.params.lossless_new_tokens
    sweeps = bench.params.sweeps
    plain: dict[str, list[Generation]] = {}

    def check(key: str) -> Any:
        path, task = pieces[key]
        target, drafter = loaded()
        if task.name not in plain:
            ids = [prompt_ids(target, chat) for chat in task.prompts[: bench.params.lossless_prompts]]
            plain[task.name] = generate(target, None, ids, max_new_tokens=limit)
        references = plain[task.name] if path in (DRAFT, "alone") else plain[task.name][:1]
        largest_tree = sweep.largest_tree(drafter.block_size, sweeps) if sweeps else CHAIN
        checked, tree = {
            DRAFT: (with_lookup(drafter, bench.params.decode.lookup), shape.greedy),
            LOOKUP: (bench.baseline, CHAIN),
            "alone": (drafter, CHAIN),
            "tree": (drafter, largest_tree),
        }[path]
        groups = [(references, path == "alone")]
        if path == DRAFT:
            groups = [(references[:1], False), (references[1:], True)]
        found = [
            check_identity(target, checked, bench.target_dir, group, limit, tree, together=together)
            for group, together in groups
            if group
        ]
        return asdict(sum_of(found))

    found = bench.work.do(f"{name}: token identity in float32", list(pieces), check)
    identities: dict[str, dict[str, Identity]] = {}
    for key, (path, task) in pieces.items():
        identities.setdefault(path, {})[task.name] = Identity(**found[key])
    return identities


def _once(make: Callable[[], Made]) -> Callable[[], Made]:
    """Return a function that gives the same object at every call, made by the first."""
    made: list[Made] = []

    def get() -> Made:
        if not made:
            made.append(make())
        return made[0]

    return get

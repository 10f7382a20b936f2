"""Measures one drafter: every evaluation prompt decoded without and with the draft, in the same engine.

What makes the numbers honest. Both runs of a turn see the same context (in a conversation the earlier
answers are the plain run's), the same seed and the same machine one right after the other, and which of
them goes first alternates by prompt. Seconds are wall-clock time of the whole call less the target's
prefill, the work that both share: drafting, verification, Python and what the draft itself makes of the
prompt are all in. Token identity is checked apart, in float32 (`identity.py`), and a drafter that fails it
gets no speed-up (`record.py`).

Every finished prompt goes to a work file, so a killed evaluation goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from deepspec.config import EvaluateParams
from deepspec.data.progress import Progress
from deepspec.decoding.cost import CostCurve, load_or_measure
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Generation
from deepspec.decoding.scheduler import Controller, make_controller
from deepspec.decoding.shapes import make_shape
from deepspec.decoding.tree import Shape
from deepspec.device import describe_device
from deepspec.drafters.base import Drafter
from deepspec.drafters.checkpoint import load_drafter
from deepspec.evaluation.identity import check_identity
from deepspec.evaluation.native import native_tokens_per_second
from deepspec.evaluation.record import EVAL_VERSION, Identity, PromptResult, Subject, build_record
from deepspec.evaluation.task import Task, load_task
from deepspec.evaluation.worklog import WorkLog
from deepspec.files import digest, file_digest
from deepspec.target import RECORD, Target, load_target

WORK_DIR = Path(".deepspec/evaluate")


def evaluate(
    name: str,
    target_dir: str | Path,
    drafter_dir: str | Path,
    params: EvaluateParams,
    seed: int = 0,
    work_dir: str | Path = WORK_DIR,
    device: str | None = None,
) -> dict:
    """The evaluation record (DESIGN.md §4) of the drafter in `drafter_dir`.

    Raises:
        DeepSpecError: an unknown task, a draft of another target, a corrupt checkpoint, or a failed run.
    """
    tasks = [load_task(task, params.prompts_per_task, seed) for task in params.tasks]
    target = load_target(target_dir, device=device)
    subject = Subject(
        drafter=name,
        target=_origin(target_dir),
        target_digest=target.digest,
        device=describe_device(target.device),
        dtype=str(target.dtype).removeprefix("torch."),
        seed=seed,
    )
    log = WorkLog(Path(work_dir) / f"{name}-{_work_key(subject, drafter_dir, params, tasks)}.jsonl")
    results = _measure(target, drafter_dir, tasks, params, seed, log)
    native = _native(target, target_dir, tasks, log)
    del target  # makes room for the float32 copy
    identities = _identities(target_dir, drafter_dir, tasks, params, seed, device, log)
    record = build_record(subject, tasks, results, identities, native) | {"round_costs": log.get("costs")}
    log.remove()
    return record


@dataclass(frozen=True)
class Bench:
    """A target and a draft, ready to decode prompts in pairs."""

    target: Target
    drafter: Drafter
    tree: Shape
    controller: Controller
    params: EvaluateParams
    seed: int

    def prompt(self, turns: list[str], temperature: float, index: int) -> PromptResult:
        """One conversation, turn by turn; the drafted run goes first where `index` is odd."""
        result = PromptResult()
        messages: list[dict[str, str]] = []
        outputs: list[list[int]] = []
        for turn, text in enumerate(turns):
            messages.append({"role": "user", "content": text})
            prompt_ids = self.target.chat_ids(messages)
            generate(self.target, self.drafter, prompt_ids, max_new_tokens=1)  # kernels for this length
            seed = self.seed + 1000 * index + turn
            order = (False, True) if index % 2 == 0 else (True, False)
            runs = {with_draft: self.run(with_draft, prompt_ids, temperature, seed) for with_draft in order}
            (plain, plain_s), (drafted, drafted_s) = runs[False], runs[True]
            result.add(plain, plain_s, drafted, drafted_s)
            outputs.append(drafted.tokens)
            answer = self.target.tokenizer.decode(plain.tokens, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer})
        result.output_hash = digest(json.dumps(outputs))
        return result

    def run(
        self, with_draft: bool, prompt_ids: list[int], temperature: float, seed: int
    ) -> tuple[Generation, float]:
        """A generation and its wall-clock seconds, less the target's prefill."""
        start = time.perf_counter()
        (generation,) = generate(
            self.target,
            self.drafter if with_draft else None,
            prompt_ids,
            max_new_tokens=self.params.max_new_tokens,
            temperature=temperature,
            seed=seed,
            tree=self.tree,
            verify=self.params.decode.verify,
            controller=self.controller if with_draft else None,
        )
        return generation, time.perf_counter() - start - generation.stats.prefill_s


def _open_bench(
    target: Target,
    drafter_dir: str | Path,
    tasks: list[Task],
    params: EvaluateParams,
    seed: int,
    log: WorkLog,
) -> Bench:
    """A bench whose kernels, caches, compiled shapes and cost figures are made before the clock starts."""
    drafter = load_drafter(drafter_dir, target, params.decode)
    chosen = params.decode.controller
    controller = make_controller(chosen.type, _curve(target, drafter, log), **chosen.options())
    bench = Bench(target, drafter, _tree(params), controller, params, seed)
    longest = max((prompt[0] for task in tasks for prompt in task.prompts), key=len)
    prompt_ids = target.chat_ids([{"role": "user", "content": longest}])
    for temperature in params.temperatures:
        for with_draft in (False, True):
            bench.run(with_draft, prompt_ids, temperature, seed)
    return bench


def _tree(params: EvaluateParams) -> Shape:
    return make_shape(params.decode.tree.type, **params.decode.tree.options())


def _curve(target: Target, drafter: Drafter, log: WorkLog) -> CostCurve:
    """The cost curve, measured once an evaluation: a resumed one goes on with the same controller."""
    if log.get("costs") is None:
        trained = getattr(drafter, "trained", drafter)  # behind a lookup, it is what costs
        log.add("costs", load_or_measure(target, trained, batches=(1,)).to_json())
    return CostCurve.from_json(log.get("costs"))


def _measure(
    target: Target,
    drafter_dir: str | Path,
    tasks: list[Task],
    params: EvaluateParams,
    seed: int,
    log: WorkLog,
) -> dict[tuple[str, float], list[PromptResult]]:
    """All prompts of all tasks at all temperatures; finished ones come from the log."""
    pieces = [
        (task, temperature, i)
        for temperature in params.temperatures
        for task in tasks
        for i in range(len(task.prompts))
    ]
    missing = [piece for piece in pieces if log.get(_key(*piece)) is None]
    if missing:
        bench = _open_bench(target, drafter_dir, tasks, params, seed, log)
    with Progress("measuring", len(pieces), len(pieces) - len(missing)) as progress:
        for task, temperature, i in missing:
            result = bench.prompt(task.prompts[i], temperature, i)
            log.add(_key(task, temperature, i), asdict(result))
            progress.tokens(result.plain_tokens + result.drafted_tokens)
            progress.advance()
    results: dict[tuple[str, float], list[PromptResult]] = {}
    for task, temperature, i in pieces:
        row = PromptResult(**log.get(_key(task, temperature, i)))
        results.setdefault((task.name, temperature), []).append(row)
    return results


def _native(target: Target, target_dir: str | Path, tasks: list[Task], log: WorkLog) -> dict[str, float]:
    """Tokens/s of `transformers.generate` by task: the best plain decoding that needs none of our engine."""
    if log.get("native") is None:
        first = {task.name: [{"role": "user", "content": task.prompts[0][0]}] for task in tasks}
        ids = {name: target.chat_ids(messages) for name, messages in first.items()}
        log.add("native", native_tokens_per_second(target_dir, target.dtype, target.device, ids))
    return log.get("native")


def _identities(
    target_dir: str | Path,
    drafter_dir: str | Path,
    tasks: list[Task],
    params: EvaluateParams,
    seed: int,
    device: str | None,
    log: WorkLog,
) -> dict[str, Identity]:
    """The float32 check of each task. It always drafts: a controller would only leave rounds unchecked."""
    missing = [task for task in tasks if log.get(f"identity {task.name}") is None]
    if missing:
        target = load_target(target_dir, dtype="float32", device=device)
        drafter = load_drafter(drafter_dir, target, params.decode)
        with Progress("token identity in float32", len(tasks), len(tasks) - len(missing)) as progress:
            for task in missing:
                prompts = [prompt[0] for prompt in task.prompts[: params.lossless_prompts]]
                ids = [target.chat_ids([{"role": "user", "content": prompt}]) for prompt in prompts]
                identity = check_identity(
                    target, drafter, target_dir, ids, params.lossless_new_tokens, seed, _tree(params)
                )
                log.add(f"identity {task.name}", asdict(identity))
                progress.advance()
    return {task.name: Identity(**log.get(f"identity {task.name}")) for task in tasks}


def _origin(target_dir: str | Path) -> str:
    """Where the target came from, `source[@revision]`, as `resolve_target` wrote it down; else the path."""
    file = Path(target_dir) / RECORD
    if not file.exists():
        return str(target_dir)
    origin = json.loads(file.read_text())
    return f"{origin['source']}@{origin['revision']}" if origin.get("revision") else origin["source"]


def _key(task: Task, temperature: float, index: int) -> str:
    return f"{task.name} T={temperature:g} {index}"


def _work_key(subject: Subject, drafter_dir: str | Path, params: EvaluateParams, tasks: list[Task]) -> str:
    """Digest of all that a stored result depends on, so that none is taken over from another setting."""
    files = {file.name: file_digest(file) for file in sorted(Path(drafter_dir).glob("*")) if file.is_file()}
    prompts = [(task.name, task.version, task.prompts) for task in tasks]
    return digest(json.dumps([EVAL_VERSION, asdict(subject), files, params.model_dump(), prompts]))

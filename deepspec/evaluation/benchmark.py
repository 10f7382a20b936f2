"""Measures one drafter: every evaluation prompt decoded without and with the draft, in the same engine.

What makes the numbers honest. Both runs of a turn see the same context (in a conversation the earlier
answers are the plain run's), the same seed and the same machine one right after the other, and which of
them goes first alternates by prompt. Seconds are wall-clock time of the whole call less the plain run's
prefill, the work that both share: drafting, verification, Python and what the draft itself makes of the
prompt are all in. Token identity is checked apart, in float32 (`identity.py`), and a drafter that fails it
gets no speed-up (`record.py`).

Every finished prompt goes to a work file, so a killed evaluation goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepspec.config import EvaluateParams
from deepspec.data.progress import Progress
from deepspec.decoding import generate
from deepspec.decoding.request import Generation
from deepspec.drafters import load_drafter
from deepspec.evaluation.device import describe_device
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
    record = build_record(subject, tasks, results, identities, native)
    log.remove()
    return record


def _measure(
    target: Target,
    drafter_dir: str | Path,
    tasks: list[Task],
    params: EvaluateParams,
    seed: int,
    log: WorkLog,
) -> dict[tuple[str, float], list[PromptResult]]:
    """All prompts of all tasks at all temperatures; finished ones come from the log."""
    drafter = load_drafter(drafter_dir, target, params.decode)
    pieces = [
        (task, temperature, i)
        for temperature in params.temperatures
        for task in tasks
        for i in range(len(task.prompts))
    ]
    finished = sum(log.get(_key(*piece)) is not None for piece in pieces)
    if finished < len(pieces):
        _warm_up(target, drafter, tasks, params)
    results: dict[tuple[str, float], list[PromptResult]] = {}
    with Progress("measuring", len(pieces), finished) as progress:
        for task, temperature, i in pieces:
            stored = log.get(_key(task, temperature, i))
            if stored is None:
                result = _prompt(
                    target, drafter, task.prompts[i], temperature, params.max_new_tokens, i, seed
                )
                log.add(_key(task, temperature, i), asdict(result))
                progress.tokens(result.plain_tokens + result.drafted_tokens)
                progress.advance()
            else:
                result = PromptResult(**stored)
            results.setdefault((task.name, temperature), []).append(result)
    return results


def _prompt(
    target: Target,
    drafter: Any,
    turns: list[str],
    temperature: float,
    max_new_tokens: int,
    index: int,
    seed: int,
) -> PromptResult:
    """One conversation, turn by turn; the drafted run goes first where `index` is odd."""
    result = PromptResult()
    messages: list[dict[str, str]] = []
    outputs: list[list[int]] = []
    for turn, text in enumerate(turns):
        messages.append({"role": "user", "content": text})
        prompt_ids = target.chat_ids(messages)
        generate(target, None, prompt_ids, max_new_tokens=1)  # kernels for a prompt of this length
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        runs: dict[Any, tuple[Generation, float]] = {}
        for one in (None, drafter) if index % 2 == 0 else (drafter, None):
            runs[one] = _timed(target, one, prompt_ids, seed=seed + 1000 * index + turn, **options)
        (plain, plain_s), (drafted, drafted_s) = runs[None], runs[drafter]
        prefill_s = plain.stats.prefill_s
        result.add(plain, plain_s - prefill_s, drafted, drafted_s - prefill_s)
        outputs.append(drafted.tokens)
        answer = target.tokenizer.decode(plain.tokens, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    result.output_hash = digest(json.dumps(outputs))
    return result


def _timed(target: Target, drafter: Any, prompt_ids: list[int], **options: Any) -> tuple[Generation, float]:
    """A generation and its wall-clock seconds."""
    start = time.perf_counter()
    generation = generate(target, drafter, prompt_ids, **options)[0]
    return generation, time.perf_counter() - start


def _warm_up(target: Target, drafter: Any, tasks: list[Task], params: EvaluateParams) -> None:
    """Kernels, caches and compiled shapes are made before the clock starts: a full run of each kind."""
    longest = max((prompt[0] for task in tasks for prompt in task.prompts), key=len)
    prompt_ids = target.chat_ids([{"role": "user", "content": longest}])
    for temperature in params.temperatures:
        for one in (None, drafter):
            generate(
                target, one, prompt_ids, max_new_tokens=params.max_new_tokens, temperature=temperature, seed=0
            )


def _native(target: Target, target_dir: str | Path, tasks: list[Task], log: WorkLog) -> dict[str, float]:
    """Tokens/s of `transformers.generate` by task: the best plain decoding that needs none of our engine."""
    key = "native"
    if log.get(key) is None:
        ids = {
            task.name: target.chat_ids([{"role": "user", "content": task.prompts[0][0]}]) for task in tasks
        }
        log.add(key, native_tokens_per_second(target_dir, target.dtype, target.device, ids))
    return log.get(key)


def _identities(
    target_dir: str | Path,
    drafter_dir: str | Path,
    tasks: list[Task],
    params: EvaluateParams,
    seed: int,
    device: str | None,
    log: WorkLog,
) -> dict[str, Identity]:
    missing = [task for task in tasks if log.get(f"identity {task.name}") is None]
    if missing:
        target = load_target(target_dir, dtype="float32", device=device)
        drafter = load_drafter(drafter_dir, target, params.decode)
        with Progress(
            "checking token identity in float32", len(tasks), len(tasks) - len(missing)
        ) as progress:
            for task in missing:
                prompts = [prompt[0] for prompt in task.prompts[: params.lossless_prompts]]
                ids = [target.chat_ids([{"role": "user", "content": prompt}]) for prompt in prompts]
                identity = check_identity(target, drafter, target_dir, ids, params.lossless_new_tokens, seed)
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

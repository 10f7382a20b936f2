"""Measure drafters: every evaluation prompt decoded without and with each draft, in the same engine and run.

Drafters × tasks × temperatures × controllers meet prompt by prompt (`contest.py`), with plain decoding and the lookup
alone as baselines on the same prompts; how all are timed is in `timing.py`. Apart from that, and shorter: the draft
alone (`alone.py`), whether decoding accepts what training expected (`decoding/train_parity.py`), sweeps (`sweep.py`),
full batches (`throughput.py`), and a few generations token by token (`trace.py`). Token identity is checked in
float32 (`identity.py`); a path that fails it gets no speed-up (`record.py`).

Everything is a piece of work (`phases.py`) with a key (`work.py`): a killed evaluation goes on where it stopped, and
several processes share the pieces. What a piece decodes depends on its prompt and the seed alone, so τ does not
depend on how many processes there are (unless a controller corrects its curve by seconds); their seconds do, where they
share a machine.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.decoding.drafter import settle
from deepspec.device import describe_device
from deepspec.drafters.checkpoint import RECORD as DRAFT_RECORD
from deepspec.drafters.checkpoint import draft_digest
from deepspec.errors import DeepSpecError
from deepspec.evaluation import phases, sweep
from deepspec.evaluation.bench import Bench, check_prompts
from deepspec.evaluation.params import EvaluateParams
from deepspec.evaluation.parts import Decode, DraftProvenance, RoundCosts, Throughput
from deepspec.evaluation.record import DRAFT, EVAL_VERSION, LOOKUP, Record
from deepspec.evaluation.runs import PLAIN, PromptRuns, to_json
from deepspec.evaluation.summarise import Measured, Subject, build_record
from deepspec.evaluation.work import Work, process_state
from deepspec.files import digest
from deepspec.lineage import code_digest
from deepspec.provenance import provenance
from deepspec.target.identity import RECORD
from deepspec.target.model import load_target
from deepspec.tasks.task import load_task

WORK_DIR = Path(".deepspec/evaluate")


@dataclass(frozen=True)
class Outcome:
    """Of one drafter: its record, its measurements prompt by prompt, and generations to look at."""

    record: Record
    prompts: list[dict[str, Any]]
    traces: list[dict[str, Any]]


def evaluate(
    drafts: Mapping[str, str | Path],
    target_dir: str | Path,
    params: EvaluateParams,
    seed: int = 0,
    work_dir: str | Path = WORK_DIR,
    device: str | None = None,
    save: Callable[[dict[str, Outcome]], None] = lambda outcomes: None,
) -> dict[str, Outcome] | None:
    """Measure drafts together: name → directory, name → outcome. None in all processes but the main one.

    Args:
        save: writes the outcomes, in the main process; until it has returned, all finished work is kept.

    Raises:
        DeepSpecError: an unknown task, two of one name, a draft of another target, a corrupt checkpoint, or a failed
            run.
    """
    tasks = [load_task(task, params.prompts_per_task, seed, params.tasks_dir) for task in params.tasks]
    if twice := [name for name, count in Counter(task.name for task in tasks).items() if count > 1]:
        raise DeepSpecError(
            f"evaluate.tasks: two tasks are named {twice[0]!r}; give one of them another name"
        )
    digests = {name: draft_digest(Path(directory)) for name, directory in drafts.items()}
    prompts = [(task.name, task.version, task.asked) for task in tasks]
    state = process_state()
    if device is None and state.device.type == "cuda":
        device = str(state.device)  # one each
    target = load_target(target_dir, device=device)
    check_prompts(target, tasks)
    code = code_digest(__name__)
    settings = (
        EVAL_VERSION,
        digests,
        target.digest,
        target.precision,
        describe_device(target.device),  # seconds of another machine are not those of this one
        params.model_dump(),
        seed,
        prompts,
        code,
    )
    work = Work(state, work_dir, f"{'-'.join(drafts)}-{digest(json.dumps(settings))}")
    bench = Bench(drafts, digests, Path(target_dir), tasks, params, seed, device, work)
    bench.target = target
    del target  # the bench lets go of it before it loads the float32 copy
    outcomes = _outcomes(bench)
    if work.main:
        save(outcomes)
    work.remove()
    return outcomes if work.main else None


def _outcomes(bench: Bench) -> dict[str, Outcome]:
    """Run all phases, the timed ones first, and put a record of each drafter together."""
    contest = phases.run_contest(bench)
    native = phases.run_native(bench)
    sections = {name: phases.measure_alone(bench, name) for name in bench.drafts}
    kept = {name: phases.check_train_parity(bench, name) for name in bench.drafts}
    traces = {name: phases.take_traces(bench, name) for name in bench.drafts}
    sweeps = {name: phases.run_sweeps(bench, name) for name in bench.drafts}
    subjects = {name: _subject(bench, name) for name in bench.drafts}
    shapes = {
        name: settle(bench.params.decode.tree, bench.target, bench.drafters[name]) for name in bench.drafts
    }
    bench.forget()
    identities = {name: phases.check_identities(bench, name, shapes[name]) for name in bench.drafts}
    outcomes = {}
    for name in bench.drafts:
        own = _of(name, contest)
        checked = identities[name]
        runs = sweeps[name]
        whole = checked[DRAFT]  # stands for what was not decoded
        chains, trees = checked.get("alone", whole), checked.get("tree", whole)
        points = sweep.points(runs, chains, trees, bench.seed) if runs else None
        section = sections[name] | {"sweeps": points}
        if not all(identity.lossless for identity in checked.get("alone", {}).values()):
            section["throughput"] = _without_speed(section["throughput"])
        measured = Measured(
            own,
            checked,
            native,
            decode=Decode(**bench.params.decode.model_dump(mode="json")),
            provenance=DraftProvenance(**provenance_of(bench.drafts[name])),
            round_costs=RoundCosts(**bench.costs[name]),
            promise=kept[name],
            **section,
        )
        record = build_record(subjects[name], bench.tasks, measured)
        outcomes[name] = Outcome(record, lines_of(own), traces[name])
    return outcomes


def _subject(bench: Bench, name: str) -> Subject:
    return Subject(
        drafter=name,
        draft_digest=bench.digests[name],
        target=origin_of(bench.target_dir),
        target_digest=bench.target.digest,
        device=describe_device(bench.target.device),
        dtype=bench.target.precision,
        seed=bench.seed,
        processes=bench.work.processes,
        max_new_tokens=bench.params.max_new_tokens,
        plain_new_tokens=bench.params.plain_new_tokens,
    )


def provenance_of(draft: str | Path) -> dict[str, Any]:
    """Return by what a draft's record is made, and what the draft was made of."""
    file = Path(draft) / DRAFT_RECORD
    made = json.loads(file.read_text()) if file.exists() else {}
    of_draft = {"data_digest": made.get("data_digest"), "trained_at_commit": made.get("git_commit")}
    return provenance() | of_draft


def _of(
    name: str, contest: Mapping[tuple[str, float], list[PromptRuns]]
) -> dict[tuple[str, float], list[PromptRuns]]:
    """Return the contest as one drafter's record sees it: the baselines, and its own runs without its name."""
    return {
        key: [
            {
                each.removeprefix(f"{name}/"): run
                for each, run in row.items()
                if each in (PLAIN, LOOKUP) or each.startswith(f"{name}/")
            }
            for row in rows
        ]
        for key, rows in contest.items()
    }


def lines_of(contest: Mapping[tuple[str, float], list[PromptRuns]]) -> list[dict[str, Any]]:
    """Return the measurements prompt by prompt, as JSON holds them."""
    return [
        {"task": task, "temperature": temperature, "index": i, "runs": to_json(row)}
        for (task, temperature), rows in contest.items()
        for i, row in enumerate(rows)
    ]


def _without_speed(rows: list[Throughput] | None) -> list[Throughput] | None:
    """Return the rows without speed-ups: none is reported for a path that changed a token."""
    return rows and [row.model_copy(update={"speedup": None, "against_best_fixed": None}) for row in rows]


def origin_of(target_dir: Path) -> str:
    """Return where the target came from, `source[@revision]`, as `resolve_target` wrote it down; else the path."""
    file = target_dir / RECORD
    if not file.exists():
        return str(target_dir)
    origin = json.loads(file.read_text())
    return f"{origin['source']}@{origin['revision']}" if origin.get("revision") else origin["source"]

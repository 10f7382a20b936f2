"""What the stages left behind, as numbers for `dvc metrics` and a table for people; figures come from `tables.py`.

Everything is read from `reports/` and `data/distill`; nothing is measured here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.errors import DeepSpecError
from deepspec.evaluation.parts import Mean, TaskEntry
from deepspec.evaluation.record import LOOKUP, Record
from deepspec.markdown import markdown_table

COLUMNS = (
    "drafter",
    "task",
    "T",
    "τ",
    "tokens/s plain",
    "tokens/s with draft",
    "speed-up (95 %)",
    "lossless",
)
PLACES = (
    ("reports/report.html", "all of this with figures, and generations token by token"),
    ("data/target", "the target"),
    ("data/distill", "the answers it was trained on"),
    ("data/drafts", "the drafts"),
    ("reports/eval", "every number, by task and by prompt; `deepspec compare A B`"),
    ("reports/validation.json", "the data's checks"),
    ("reports/plots", "curves: `dvc plots show`"),
    ("reports/metrics.json", "headline numbers: `dvc metrics show`, `dvc metrics diff`"),
)
METHOD = (
    "Speed is decoding alone, from the end of the prefill, against plain decoding in the same engine; the "
    "two runs of a prompt follow one another. Lossless: on the prompts and tokens that each record counts under "
    "`lossless_checked`, the greedy output in float32 is token by token that of plain decoding, but for proven "
    "ties (logits less than 1e-4 apart in float64), given in brackets."
)


@dataclass(frozen=True)
class Inputs:
    """What the stages left behind. `records`, `training` and `traces` are by drafter name."""

    records: dict[str, Record]
    training: dict[str, list[dict]]
    traces: dict[str, list[dict]]
    validation: dict
    manifest: dict


@dataclass(frozen=True)
class Row:
    """One line of the table; `macro` marks the mean over a drafter's tasks."""

    cells: tuple[str, ...]
    macro: bool


def load_inputs(drafters: list[str], root: str | Path = ".") -> Inputs:
    """Read the reports of the named drafters; one that left no training log was not trained.

    Raises:
        DeepSpecError: a drafter without evaluation record or with one of another version, or a file that is not JSON.
    """
    root = Path(root)
    records, training, traces = {}, {}, {}
    for name in drafters:
        record = root / "reports/eval" / f"{name}.json"
        records[name] = Record.read(record)
        records[name].require_version(record)
        traces[name] = _optional(record.with_suffix(".traces.json"), [])
        log = root / "reports/train" / f"{name}.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        training[name] = [_json(log, line) for line in lines if line.strip()]
    return Inputs(
        records,
        training,
        traces,
        _optional(root / "reports/validation.json", {}),
        _optional(root / "data/distill/manifest.json", {}),
    )


def metrics(inputs: Inputs) -> dict[str, float | int]:
    """Flat numbers: `<drafter>.speedup`, `<drafter>.<task>@T=0.tau`, ... without what was not measured."""
    flat: dict[str, Any] = {}
    for name, record in inputs.records.items():
        for key in ("tau", "speedup", "speedup_vs_hf", "lossless"):
            flat[f"{name}.{key}"] = getattr(record.summary, key)
        for task, entry in record.tasks.items():
            for key in ("tau", "speedup", "tokens_per_second", "baseline_tokens_per_second"):
                flat[f"{name}.{task}.{key}"] = getattr(entry, key)
        flat[f"{name}.heldout_tau"] = max(
            (line["heldout_tau"] for line in inputs.training[name] if "heldout_tau" in line), default=None
        )
    return {key: int(v) if isinstance(v, bool) else v for key, v in flat.items() if v is not None}


def table(inputs: Inputs) -> list[Row]:
    """Return a row per drafter, temperature and task, and one for the mean over its tasks."""
    rows = []
    for name, record in inputs.records.items():
        for temperature, mean in record.summary.by_temperature.items():
            entries = {k: e for k, e in record.tasks.items() if f"{e.temperature:g}" == temperature}
            for key, entry in entries.items():
                cells = (
                    name,
                    key.rsplit("@", 1)[0],
                    temperature,
                    _number(entry.tau),
                    _number(entry.baseline_tokens_per_second, 1),
                    _number(entry.tokens_per_second, 1),
                    _speedup(entry),
                    _lossless(entry.lossless, entry.ties),
                )
                rows.append(Row(cells, macro=False))
            ties = sum(entry.ties for entry in entries.values())
            lossless = _lossless(record.summary.lossless, ties)
            cells = (
                name,
                "mean of tasks",
                temperature,
                _number(mean.tau),
                "",
                "",
                _speedup(mean),
                lossless,
            )
            rows.append(Row(cells, macro=True))
    return rows


def markdown(inputs: Inputs) -> str:
    """Write the Markdown of `reports/report.md`."""
    parts = ["# Speculative decoding, measured", "", _markdown(table(inputs)), ""]
    parts += [
        METHOD,
        "",
        *_facts(inputs),
        "",
        markdown_table(("where", "what"), [(f"`{place}`", what) for place, what in PLACES]),
        "",
    ]
    return "\n".join(parts)


def _markdown(rows: list[Row]) -> str:
    cells = [[f"**{cell}**" if row.macro and cell else cell for cell in row.cells] for row in rows]
    return markdown_table(COLUMNS, cells, "ttnnnnnt")


def _facts(inputs: Inputs) -> list[str]:
    """Return what was measured on which machine, from which data."""
    first = next(iter(inputs.records.values()))
    facts = [
        f"- Target: {first.target} ({first.dtype}, digest {first.target_digest})",
        f"- Machine: {first.device}",
        f"- Evaluation version {first.eval_version}, seed {first.seed}",
    ]
    for name, record in inputs.records.items():
        facts += [f"- Warning, {name}: {w.name}: {w.message}" for w in record.warnings]
        facts += [f"- {name}: {remark}" for remark in unmeasured(record)]
        if record.summary.speedup_vs_hf is not None:
            ratio = _number(record.summary.speedup_vs_hf)
            facts.append(f"- {name} against `transformers.generate`: {ratio}×")
    rows = inputs.manifest.get("rows")
    if rows is not None:
        facts.append(f"- Distilled conversations: {rows}")
    if "passed" in inputs.validation:
        facts.append(f"- Data checks: {'passed' if inputs.validation['passed'] else 'FAILED'}")
    return facts


def unmeasured(record: Record) -> list[str]:
    """Return in words what an evaluation left out, computed or cut short; nothing where it measured everything."""
    besides = {name: figures for entry in record.tasks.values() for name, figures in entry.beside.items()}
    trained = record.blocks is not None
    missing = {
        "other controllers": not set(besides) - {LOOKUP},
        "sweeps over lengths and trees": trained and record.sweeps is None,
        "full batches": trained and record.throughput is None,
    }
    computed = {
        "the lookup alone": LOOKUP in besides and besides[LOOKUP].computed,
        "sweeps over lengths and trees": record.sweeps is not None and record.sweeps.computed,
    }
    parts = []
    if named := [what for what, is_so in missing.items() if is_so]:
        parts.append(f"not measured: {', '.join(named)}")
    if named := [what for what, is_so in computed.items() if is_so]:
        parts.append(
            f"computed, not decoded: {', '.join(named)} (rounds counted along decoded answers, which is exact; "
            "seconds by the plain run and the cost curve)"
        )
    if record.plain_new_tokens:
        parts.append(f"plain runs end after {record.plain_new_tokens} tokens where no later turn follows")
    return [*parts, "`deepspec evaluate --full` decodes all of it"] if parts else []


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _speedup(entry: TaskEntry | Mean) -> str:
    if entry.speedup is None:
        return "–"
    if entry.speedup_ci95 is None:  # of one prompt
        return f"{entry.speedup:.2f}×"
    low, high = entry.speedup_ci95
    return f"{entry.speedup:.2f}× ({low:.2f}–{high:.2f})"


def _lossless(lossless: bool, ties: int) -> str:
    if not lossless:
        return "NO"
    return f"yes ({ties} {'tie' if ties == 1 else 'ties'})" if ties else "yes"


def _optional(path: Path, default: Any) -> Any:
    return _json(path, path.read_text()) if path.exists() else default


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DeepSpecError(f"{path}: not JSON ({error}); run the stage that writes it again") from None

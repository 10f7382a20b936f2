"""reports/report.html: one file that needs nothing else, with charts, tables and generations token by token.

All data are inlined as JSON, and nothing in it is ever made into markup: what a model wrote is shown as text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from markupsafe import Markup

from deepspec.evaluation.parts import Bounds, TaskEntry
from deepspec.evaluation.record import LOOKUP, Record
from deepspec.html import templates
from deepspec.report.drawing import Figure
from deepspec.report.inputs import Inputs, unmeasured
from deepspec.report.tables import task_of, way_name

ASSETS = Path(__file__).parent / "assets"
SECTIONS = {
    "speed": ("Speed", "What the draft gains on each task, and what the baselines gain."),
    "acceptance": ("Acceptance and time", "Why: how many tokens are accepted where, and what a round costs."),
    "shape": ("Length, depth and size", "What other chains and trees would give."),
    "confidence": ("Confidence", "Whether the draft knows when it is right: controllers rely on it."),
    "batches": ("Several requests at once", "Verified tokens are free only while the machine has room."),
    "training": ("Training", "How the draft came about."),
}


def render(inputs: Inputs, figures: list[Figure]) -> str:
    """Render the page. The same inputs give the same text."""
    environment = templates(ASSETS)
    environment.filters |= {"number": _number, "interval": _interval}
    several = len(inputs.records) > 1
    shown = [figure for figure in figures if figure.section in SECTIONS]
    return environment.get_template("page.html").render(
        board=leaderboard(inputs),
        temperatures=_temperatures(inputs),
        headline=_headline(inputs),
        unmeasured={n: found for n, record in inputs.records.items() if (found := unmeasured(record))},
        warnings=[{"drafter": n, **dict(w)} for n, record in inputs.records.items() for w in record.warnings],
        sections=[
            (key, *words, [figure for figure in shown if figure.section == key])
            for key, words in SECTIONS.items()
        ],
        confidence=_confidence(inputs),
        traces=any(inputs.traces.values()),
        validation=inputs.validation,
        provenance={name: _provenance(record) for name, record in inputs.records.items()},
        several=several,
        style=Markup((ASSETS / "page.css").read_text()),
        script=Markup((ASSETS / "page.js").read_text()),
        vega=Markup(_vega()),
        specs=_json({figure.name: figure.spec for figure in shown}),
        generations=_json(inputs.traces),
    )


def _vega() -> str:
    """Return the charts' JavaScript, of the Vega-Lite version that they are written for."""
    version = ".".join(alt.VEGALITE_VERSION.split(".")[:2])
    return vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]  # its stub lacks a default


def leaderboard(inputs: Inputs) -> list[dict[str, Any]]:
    """Return a row for each way of decoding, the fastest first, plain decoding last; cells by temperature."""
    several = len(inputs.records) > 1
    rows: list[dict[str, Any]] = []
    for name, record in inputs.records.items():
        summary = record.summary
        for beside in [None, *next(iter(record.tasks.values())).beside]:
            cells = {}
            for temperature, mean in summary.by_temperature.items():
                found = mean if beside is None else mean.beside[beside]
                cells[temperature] = {key: getattr(found, key) for key in ("tau", "speedup", "speedup_ci95")}
            kept = [entry if beside is None else entry.beside[beside] for entry in record.tasks.values()]
            rows.append(
                {
                    "way": way_name(name, beside, several),
                    "kind": "draft" if beside is None else "baseline" if beside == LOOKUP else "variant",
                    "cells": cells,
                    "lossless": all(entry.lossless for entry in kept),
                    "ties": sum(entry.ties for entry in _checks(record).values()) if beside is None else 0,
                    "speedup_vs_hf": summary.speedup_vs_hf if beside is None else None,
                    "computed": any(getattr(entry, "computed", False) for entry in kept),
                }
            )
    first = f"{next(iter(inputs.records.values())).summary.temperature:g}"
    rows.sort(key=lambda row: -(row["cells"][first]["speedup"] or 0))
    plain = {t: {"tau": 1.0, "speedup": 1.0, "speedup_ci95": None} for t in _temperatures(inputs)}
    rows.append({"way": "plain decoding", "kind": "baseline", "cells": plain, "lossless": True, "ties": 0,
                 "speedup_vs_hf": None, "computed": False})  # fmt: skip
    return rows


def _temperatures(inputs: Inputs) -> list[str]:
    return list(dict.fromkeys(t for record in inputs.records.values() for t in record.summary.by_temperature))


def _headline(inputs: Inputs) -> dict[str, Any]:
    """Return the fastest drafter, and where it gains least."""
    name, record = max(inputs.records.items(), key=lambda item: item[1].summary.speedup or 0)
    measured = {key: entry.speedup for key, entry in record.tasks.items() if entry.speedup is not None}
    weakest = min(measured, key=lambda key: measured[key], default=None)
    checks = _checks(record).values()
    return {
        "drafter": name,
        "summary": record.summary,
        "tokens": sum(entry.lossless_checked.tokens for entry in checks),
        "prompts": sum(entry.lossless_checked.prompts for entry in checks),
        "ties": sum(entry.ties for entry in checks),
        "weakest": weakest and {"task": task_of(weakest), **dict(record.tasks[weakest])},
        "target": record.target,
        "device": record.device,
    }


def _checks(record: Record) -> dict[str, TaskEntry]:
    """Return one entry for each task: those of every temperature carry the same check of losslessness."""
    return {task_of(key): entry for key, entry in record.tasks.items()}


def _confidence(inputs: Inputs) -> list[dict[str, Any]]:
    return [
        {"drafter": name, "mode": mode, **{key: getattr(quality, key) for key in ("blocks", "ece", "auc")}}
        for name, record in inputs.records.items()
        for mode, quality in (record.confidence or {}).items()
    ]


def _provenance(record: Record) -> list[tuple[str, str]]:
    """Return the versions, machine and settings of the run as (name, value)."""
    made = record.provenance
    commit = f"{made.git_commit or 'none'}{' with changes' if made.git_dirty else ''}"
    promise = record.train_parity
    facts = {
        "target": f"{record.target}, {record.dtype}, digest {record.target_digest}",
        "draft": f"digest {record.draft_digest}, data {made.data_digest or '–'}, "
        f"trained at commit {made.trained_at_commit or '–'}",
        "device": record.device,
        "processes": str(record.processes),
        "commit": commit,
        "command": made.command,
        "packages": ", ".join(f"{name} {version}" for name, version in made.packages.items()),
        "evaluation": f"version {record.eval_version}, seed {record.seed}",
        "decoding": json.dumps(record.decode.model_dump(mode="json"), ensure_ascii=False),
        "answers": f"up to {record.max_new_tokens} tokens",
        "tasks": "; ".join(
            f"{task} {entry.task_version} ({entry.prompts} prompts, digest {entry.prompts_digest})"
            for task, entry in _checks(record).items()
        ),
    }
    if promise:
        alike = ", ".join(f"{share:.1%}" for share in promise.agreement)
        facts["training's promise"] = (
            f"acceptance at position 1 {promise.promised:.3f} in training, {promise.measured:.3f} in decoding, "
            f"on the same {promise.blocks} held-out contexts; drafted tokens alike by position: {alike}"
        )
    return list(facts.items())


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(bounds: Bounds | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.2f}–{bounds[1]:.2f}"


def _json(value: Any) -> Markup:
    """Encode as JSON that is safe inside a script element: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))

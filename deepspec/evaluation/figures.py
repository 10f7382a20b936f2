"""The record's figures in words, for `deepspec evaluate --help` and docs/evaluation.md."""

from __future__ import annotations

import textwrap

from deepspec.evaluation.parts import (
    BesideFigures,
    Blocks,
    Confidence,
    ContextBin,
    Part,
    PassCosts,
    StateCosts,
    Summary,
    SweepPoint,
    Sweeps,
    TaskEntry,
    Throughput,
    TrainParity,
)
from deepspec.evaluation.record import Record, described

SHOWN: dict[str, tuple[type[Part], tuple[str, ...]]] = {  # prefix of the key → model, its fields (none: all)
    "tasks.*": (TaskEntry, ()),
    "tasks.*.beside.*": (BesideFigures, ("ratio", "ratio_ci95", "computed")),
    "summary": (Summary, ("speedup_vs_hf", "by_temperature")),
    "": (
        Record,
        (
            "blocks",
            "confidence",
            "sweeps",
            "throughput",
            "promise",
            "warnings",
            "round_costs",
            "states",
            "contexts",
            "pass_costs",
            "plain_new_tokens",
            "engine",
        ),
    ),
    "blocks.*.*": (Blocks, ()),
    "confidence.*": (Confidence, ()),
    "sweeps": (Sweeps, ("computed",)),
    "sweeps.points": (SweepPoint, ()),
    "throughput": (Throughput, ()),
    "promise.*": (TrainParity, ()),
    "states.*": (StateCosts, ()),
    "contexts.*": (ContextBin, ()),
    "pass_costs.*": (PassCosts, ()),
}
HELPED = ("tasks.*", "tasks.*.beside.*", "summary", "")  # sections of the help text
_COLUMN, _WIDTH = 27, 118


def figures(sections: tuple[str, ...] = tuple(SHOWN)) -> dict[str, str]:
    """Return the description of each figure by its key in the record, `*` for names: `tasks.*.tau`."""
    return {
        f"{prefix}.{name}" if prefix else name: text
        for prefix in sections
        for name, text in described(SHOWN[prefix][0])
        if not SHOWN[prefix][1] or name in SHOWN[prefix][1]
    }


def figures_help() -> str:
    """Return the text below the flags of `deepspec evaluate --help`."""
    lines = ["what the record says, and how it is computed (docs/evaluation.md has more):"]
    for key, text in figures(HELPED).items():
        name = key.rsplit(".", 1)[-1]
        indent = " " * _COLUMN
        lines += textwrap.wrap(
            text, _WIDTH, initial_indent=f"  {name}".ljust(_COLUMN - 1) + " ", subsequent_indent=indent
        )
    return "\n".join(lines) + "\n"


def figures_table() -> list[str]:
    """Return the table of docs/evaluation.md, in Markdown."""
    return ["| figure | what it is and how it is computed |", "|---|---|"] + [
        f"| `{key}` | {text} |" for key, text in figures().items()
    ]

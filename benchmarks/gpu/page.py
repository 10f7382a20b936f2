"""The page of what the steps found: `gpu.md`, and `gpu.html` in one file that asks nobody for anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.gpu.findings import read_findings
from deepspec.errors import DeepSpecError
from deepspec.files import write_json, write_text

DRY = "A dry run at a small size on a CPU: nothing here is a measurement of a device."
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .6rem;border-bottom:1px solid #ccc;"
    "text-align:right}td:first-child,th:first-child{text-align:left}"
)
# Of a piece that is one number or a few: name → heading, factor, digits.
_COLUMNS: dict[str, tuple[str, float, int]] = {
    "bytes_per_second": ("GB/s", 1e-9, 1),
    "bfloat16_flops": ("bfloat16 TFLOP/s", 1e-12, 1),
    "float32_flops": ("float32 TFLOP/s", 1e-12, 1),
    "passed": ("passed", 1, 0),
    "ms": ("ms", 1, 3),
    "round_ms": ("ms a round", 1, 3),
    "step_ms": ("ms a step", 1, 1),
    "floor_ms": ("floor, ms", 1, 3),
    "over_floor": ("× floor", 1, 2),
    "tokens_per_second": ("tokens/s", 1, 1),
    "plain": ("plain, tokens/s", 1, 1),
    "drafted": ("drafted, tokens/s", 1, 1),
    "ratio": ("× plain", 1, 2),
    "tau": ("τ", 1, 3),
    "ties": ("ties", 1, 0),
    "draws": ("draws", 1, 0),
    "p": ("p", 1, 3),
    "accepted": ("accepted", 1, 3),
    "host_share": ("host's share", 1, 3),
    "waiting_share": ("waiting", 1, 3),
    "mfu": ("MFU", 1, 3),
    "peak_bytes": ("peak, GiB", 2**-30, 2),
    "away": ("difference", 1, 6),
    "seconds": ("s", 1, 1),
    "conversations": ("conversations", 1, 0),
    "steps": ("steps", 1, 0),
}


@dataclass(frozen=True)
class Table:
    heads: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    title: str
    notes: list[str]
    tables: list[Table] = field(default_factory=list)


def write_page(output: Path, folder: Path) -> None:
    """Write the page of the JSON files in `output` to `folder`, and the JSON beside it.

    Raises:
        DeepSpecError: nothing was found yet, or a dry run's results where reports of devices are kept.
    """
    records = read_findings(output)
    if not records:
        raise DeepSpecError(f"{output}: no step has found anything there; run one first")
    if any(record["dry"] for record in records) and folder.resolve().parent.name == "reports":
        raise DeepSpecError(
            f"{output}: a dry run is no report of a device; give another folder than {folder}"
        )
    first = records[0]
    title = "The GPU path" + ": a dry run" * first["dry"]
    sections = [Section(title, [*([DRY] if first["dry"] else []), f"Device: {first['device']}"])]
    sections += [section(record) for record in records]
    write_text(folder / "gpu.md", "\n".join(_markdown(sections)) + "\n")
    write_text(folder / "gpu.html", _html(sections))
    write_json(folder / "gpu.json", records)


def section(record: Mapping[str, Any]) -> Section:
    """What one step found."""
    pieces: dict[str, dict[str, Any]] = record["pieces"]
    failed = {key: piece["error"] for key, piece in pieces.items() if "error" in piece}
    commit = record["provenance"]["git_commit"] or "unknown"
    state = "finished" if record["finished"] else "not finished"
    notes = [f"{record['when']} UTC, commit {commit[:12]}, {record['seconds']:.0f} s, {state}."]
    notes += [f"Failed: {key}: {error}" for key, error in failed.items()]
    tables = list(_tables({key: piece for key, piece in pieces.items() if key not in failed}))
    return Section(f"{record['step']}. {record['title']}", notes, tables)


def _tables(pieces: Mapping[str, dict[str, Any]]) -> Iterator[Table]:
    """Pieces of the same columns share a table; a pass's widths have a row each."""
    groups: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for key, piece in pieces.items():
        columns = tuple(name for name in _COLUMNS if name in piece)
        groups.setdefault(columns, {})[key] = piece
        for width, row in piece.get("widths", {}).items():
            inner = tuple(name for name in _COLUMNS if name in row)
            groups.setdefault(inner, {})[f"{key}, {width} tokens"] = row
    for columns, rows in groups.items():
        if columns:
            heads = ["", *(_COLUMNS[name][0] for name in columns)]
            yield Table(heads, [[key, *_cells(columns, row)] for key, row in rows.items()])


def _cells(columns: Iterable[str], row: Mapping[str, Any]) -> Iterator[str]:
    for name in columns:
        _, factor, digits = _COLUMNS[name]
        yield "–" if row[name] is None else f"{row[name] * factor:.{digits}f}"


def _markdown(sections: list[Section]) -> Iterator[str]:
    for i, one in enumerate(sections):
        yield f"{'#' if i == 0 else '##'} {one.title}"
        for note in one.notes:
            yield f"\n{note}"
        for table in one.tables:
            yield "\n| " + " | ".join(table.heads) + " |"
            yield "|---|" + "---:|" * (len(table.heads) - 1)
            yield from ("| " + " | ".join(row) + " |" for row in table.rows)
        yield ""


def _html(sections: list[Section]) -> str:
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(sections[0].title)}</title>',
        f"<style>{_STYLE}</style>",
    ]
    for i, one in enumerate(sections):
        level = 1 if i == 0 else 2
        parts.append(f"<h{level}>{escape(one.title)}</h{level}>")
        parts += [f"<p>{escape(note)}</p>" for note in one.notes]
        for table in one.tables:
            heads = "".join(f"<th>{escape(head)}</th>" for head in table.heads)
            rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.rows)
            parts.append(f"<table><tr>{heads}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
    return "\n".join(parts) + "</html>\n"

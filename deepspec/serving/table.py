"""The table that `deepspec serve-check` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepspec.evaluation.parts import Bounds
from deepspec.serving.record import ServingRecord

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = (
    "draft",
    "K",
    "accepted",
    "ours",
    "ratio (95 %)",
    "tokens/s plain",
    "with draft",
    "speed-up (95 %)",
    "ours",
)


def console() -> Console:
    """Return where tables are printed: as wide as the terminal, or 120 columns."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=120)


def show(records: list[ServingRecord]) -> None:
    """Engine beside ours, a line a draft; then warnings."""
    from rich.table import Table

    printer = console()
    first = records[0]
    grid = Table(title=f"{first.engine} {first.engine_version or ''}, {first.dtype}, T = 0, batch 1")
    for i, column in enumerate(COLUMNS):
        grid.add_column(column, justify="right" if i else "left")
    for record in records:
        served, own = record.served, record.ours
        grid.add_row(
            record.drafter,
            str(record.speculative_tokens),
            _number(served.mean_accepted_length),
            _number(own.mean_accepted_length),
            _interval(record.ratio_accepted_length, record.ratio_ci95),
            _number(served.tokens_per_second_plain, 1),
            _number(served.tokens_per_second, 1),
            _interval(served.speedup, served.speedup_ci95, "×"),
            _number(own.speedup, 2, "×"),
        )
    printer.print(grid)
    for record in records:
        for warning in record.warnings:
            printer.print(f"warning: {record.drafter}: {warning}", highlight=False, soft_wrap=True)


def _number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def _interval(value: float | None, bounds: Bounds | None, unit: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:.2f}{unit}" + (f" ({bounds[0]:.2f}–{bounds[1]:.2f})" if bounds else "")

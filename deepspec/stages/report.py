"""Sum up the pipeline in reports/metrics.json, reports/plots and reports/report.md, and print the table."""

from __future__ import annotations

import argparse
from pathlib import Path

from deepspec.config import Params
from deepspec.files import write_json, write_text
from deepspec.stages.common import stage


def main(params: Params, flags: argparse.Namespace) -> None:
    from deepspec.evaluation import report

    inputs = report.load_inputs(params.pipeline)
    write_json("reports/metrics.json", report.metrics(inputs))
    for name, text in report.plots(inputs).items():
        write_text(Path("reports/plots") / name, text)
    write_text("reports/report.md", report.markdown(inputs))
    show(report.table(inputs), report.COLUMNS, next(iter(inputs.records.values()))["device"])


def show(rows: list, columns: tuple[str, ...], device: str) -> None:
    """Print the table; in a file or a pipe it keeps its full width."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    grid = Table(title="With and without the draft", caption=device)
    for i, column in enumerate(columns):
        grid.add_column(column, justify="right" if 2 <= i <= 6 else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row.cells, style="bold" if row.macro else None, end_section=row.macro)
    console.print(grid)
    console.print("Everything: [bold]reports/report.md[/bold]; the drafts: [bold]data/drafts[/bold]")


if __name__ == "__main__":
    stage(main)

"""Sum up the pipeline: reports/report.html, report.md, metrics.json and plots; print the table."""

from __future__ import annotations

import argparse

from deepspec.config import Params
from deepspec.files import replacing, write_json, write_text
from deepspec.stages.common import stage


def main(params: Params, flags: argparse.Namespace) -> None:
    from deepspec.report import charts, page, tables
    from deepspec.report import inputs as report

    inputs = report.load_inputs(params.pipeline)
    found = tables.tables(inputs)
    figures = charts.figures(found)
    write_json("reports/metrics.json", report.metrics(inputs))
    with replacing("reports/plots") as folder:
        folder.mkdir()
        for name, rows in found.items():
            write_text(folder / f"{name}.csv", tables.to_csv(name, rows))
        for name, image in charts.pngs(figures).items():
            (folder / name).write_bytes(image)
    write_text("reports/report.html", page.render(inputs, figures))
    write_text("reports/report.md", report.markdown(inputs))
    show(report.table(inputs), report.COLUMNS, next(iter(inputs.records.values())).device)


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
    console.print("Everything: [bold]reports/report.html[/bold]; the drafts: [bold]data/drafts[/bold]")


if __name__ == "__main__":
    stage(main)

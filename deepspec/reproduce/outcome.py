"""What a reproduction came to, for programs and for a person."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from deepspec.reproduce.checkout import Settings
from deepspec.reproduce.tolerance import Difference, Row


@dataclass(frozen=True)
class Outcome:
    """Every metric with its verdict, by drafter what was not as it was, and whose records came from changed code."""

    rows: list[Row]
    differences: dict[str, list[Difference]]
    dirty: list[str]

    @property
    def passed(self) -> bool:
        return all(row.matches is not False for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "metrics": [asdict(row) | {"verdict": row.verdict} for row in self.rows],
            "differences": {
                name: [asdict(fact) for fact in facts] for name, facts in self.differences.items()
            },
            "uncommitted_code": self.dirty,
        }


def show(settings: Settings, outcome: Outcome) -> None:
    """Print what was not as it was, the table and the verdict."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    grid = Table(title=f"{settings.tag}, committed and now")
    for i, column in enumerate(("metric", "committed", "now", "tolerance", "verdict")):
        grid.add_column(column, justify="right" if i in (1, 2) else "left", overflow="fold")
    for row in outcome.rows:
        style = None if row.matches else "red" if row.matches is False else "dim"
        grid.add_row(
            row.metric, _text(row.committed), _text(row.now), row.tolerance, row.verdict, style=style
        )
    console.print(grid)
    for name in outcome.dirty:
        console.print(f"note: {name} was measured with uncommitted changes of the code", highlight=False)
    for fact, names in _by_fact(outcome.differences).items():
        effect = "" if fact.decides else " (decides no token)"
        console.print(
            f"{', '.join(names)}: {fact.name} was {fact.then}, is {fact.now}{effect}", highlight=False
        )
    counts = [sum(row.matches is kind for row in outcome.rows) for kind in (True, False, None)]
    console.print(
        f"{counts[0]} of {counts[0] + counts[1]} match, {counts[2]} not compared: "
        f"{settings.tag} {'is reproduced' if outcome.passed else 'is NOT reproduced'}",
        highlight=False,
    )
    for row in outcome.rows:
        if row.matches is False:
            console.print(f"differs: {row.metric}: {row.committed} committed, {row.now} now", highlight=False)


def _by_fact(differences: dict[str, list[Difference]]) -> dict[Difference, list[str]]:
    found: dict[Difference, list[str]] = {}
    for name, facts in differences.items():
        for fact in facts:
            found.setdefault(fact, []).append(name)
    return found


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)

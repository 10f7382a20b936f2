"""The tables that `deepspec serve-check --engine llamacpp` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepspec.evaluation.parts import Bounds
from deepspec.serving.llamacpp.record import Cost, LlamaCppRecord
from deepspec.serving.table import console

if TYPE_CHECKING:
    from rich.console import Console


def show(record: LlamaCppRecord) -> None:
    """Print costs by length, and every way of decoding."""
    from rich.table import Table

    printer = console()
    where = f"{record.engine_version}, target in {record.precision}, {record.threads} threads"
    printer.print(f"{record.drafter}: {where}", highlight=False, soft_wrap=True)
    if record.plain_seconds is not None:
        _show_costs(record, printer, record.plain_seconds)
    ways = Table(title="greedy, interleaved")
    for i, column in enumerate(
        ("way", "tokens/s", "× plain (95 %)", "tokens a pass", "drafted a pass", "same text")
    ):
        ways.add_column(column, justify="right" if i else "left")
    for way in record.ways:
        same = f"{way.same_as_plain.identical} of {way.same_as_plain.prompts}"
        rates = [_number(x, d) for x, d in ((way.tokens_per_turn, 2), (way.drafted_per_turn, 1))]
        ways.add_row(
            way.name, _number(way.tokens_per_second, 1), _times(way.speedup, way.speedup_ci95), *rates, same
        )
    printer.print(ways)
    printer.print(record.fastest, highlight=False, soft_wrap=True)
    there, here = record.served.mean_accepted_length, record.ours.mean_accepted_length
    ratio = _times(record.ratio_accepted_length, record.ratio_ci95).replace("×", "")
    printer.print(f"accepted: {_number(there, 2)} there, {_number(here, 2)} here: {ratio}", highlight=False)
    if record.law:
        law = record.law
        said = f"T = 1: second tokens p = {law.p_second_token:.3f}, lengths p = {law.p_length:.3f}"
        seen = f"{law.change:g} of the second tokens moved onto one are seen with probability {law.power:.2f}"
        told = f"{said} ({law.prompts} questions, {law.draws} answers each way: {seen})"
        printer.print(told, highlight=False, soft_wrap=True)


def _show_costs(record: LlamaCppRecord, printer: Console, plain: float) -> None:
    from rich.table import Table

    printer.print(f"a plain pass takes {1000 * plain:.1f} ms", highlight=False)
    grid = Table(title="costs in plain passes")
    for i, column in enumerate(("n", "pass over n", "round that drafts n", "expected × plain")):
        grid.add_column(column, justify="right" if i else "left")
    passes, rounds = ({cost.tokens: cost for cost in costs} for costs in (record.passes, record.rounds))
    gains = {choice.drafted: choice for choice in record.expected}
    for n in sorted({*passes, *rounds}):
        gain = gains.get(n)
        told = _times(gain.speedup, gain.speedup_ci95) if gain else "–"
        grid.add_row(str(n), _cost(passes.get(n)), _cost(rounds.get(n)), told)
    printer.print(grid)


def _cost(cost: Cost | None) -> str:
    return _times(cost.plain_passes, cost.plain_passes_ci95) if cost else "–"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _times(value: float | None, bounds: Bounds | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}×" + (f" ({bounds[0]:.2f}–{bounds[1]:.2f})" if bounds else "")

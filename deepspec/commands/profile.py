"""`deepspec profile`: what a target pass and a draft cost on this machine, measured, kept and shown.

The curve is what the controllers "cost" and "scheduler" decide with. Beside it stands the memory floor: a pass reads
every weight once, so it cannot be faster than that."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from deepspec.decoding.cost import CostCurve
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.pass_times import WIDTHS
from deepspec.decoding.profiles import load_or_measure, profile_path
from deepspec.decoding.shapes import AUTO
from deepspec.drafters.checkpoint import draft_directory
from deepspec.drafters.load import load_drafter
from deepspec.errors import DeepSpecError
from deepspec.progress import Progress
from deepspec.target.model import Target, load_target

MOST_REQUESTS = 256


@dataclass(frozen=True)
class Settings:
    """The command's options; see `deepspec profile --help`."""

    target: str
    drafter: str | None
    batches: str
    weights: str = "dense"
    force: bool = False


def run(settings: Settings) -> None:
    """Measure what is not known yet, and print the table.

    Raises:
        DeepSpecError: no such target or draft, or batches that are no numbers.
    """
    batches = parse_batches(settings.batches)
    target = load_target(settings.target, weights=settings.weights)
    drafter = load_drafter(draft_directory(settings.drafter), target) if settings.drafter else None
    curve = _measured(target, drafter, batches, settings.force)
    console = Console(highlight=False)
    console.print(curve_table(curve, batches))
    console.print(_floor_line(target, curve.verify(1, 1)))
    if curve.slopes:
        console.print(_context_line(curve))
    console.print(f"a token drawn from a draft's law adds {1e6 * curve.verdict:.0f} µs for its verdict")
    console.print(f"kept in {profile_path(target)}", soft_wrap=True)
    if drafter and drafter.digest:
        console.print(f"and     {profile_path(target, drafter, AUTO)}", soft_wrap=True)


def parse_batches(text: str) -> list[int]:
    """Parse `1,4,16` to [1, 4, 16]."""
    try:
        batches = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise DeepSpecError(f"--batches takes numbers like 1,4,16, found {text!r}") from None
    if not 1 <= batches[0] <= batches[-1] <= MOST_REQUESTS:
        raise DeepSpecError(f"--batches takes numbers from 1 to {MOST_REQUESTS}, found {text!r}")
    return batches


def curve_table(curve: CostCurve, batches: list[int]) -> Table:
    """Tabulate milliseconds of a pass by new tokens and requests, each with its ratio to one token a request."""
    table = Table(
        title="a target pass, and a draft", caption="× : as long as a pass over one token a request"
    )
    table.add_column("new tokens\na request", justify="right")
    for requests in batches:
        table.add_column(f"{requests} request{'s' * (requests > 1)}\nms", justify="right")
        table.add_column("\n×", justify="right", style="dim")

    def cells(row: list[float]) -> list[str]:
        """Seconds of each batch, and how they stand to a pass over one token a request."""
        return [
            cell
            for requests, seconds in zip(batches, row, strict=True)
            for cell in (f"{1000 * seconds:.1f}", f"{seconds / curve.verify(requests, requests):.2f}")
        ]

    for width in WIDTHS:
        row = cells([curve.verify(requests, requests * width) for requests in batches])
        table.add_row(str(width), *row, end_section=width == WIDTHS[-1])
    drafts = {"draft": False} if not curve.chain_drafts else {"draft: a tree": False, "a chain": True}
    for name, chains in drafts.items() if curve.drafts else ():
        table.add_row(name, *cells([curve.draft(requests, chains) for requests in batches]))
    return table


def _context_line(curve: CostCurve) -> str:
    more = ", ".join(f"{1e6 * seconds:.2f} over {width:g}" for width, seconds in curve.slopes)
    return (
        f"at {curve.context} tokens of context; a thousand more add so many ms to a request's pass, by its new tokens: "
        f"{more}"
    )


def weight_bytes(target: Target) -> int:
    """Return the bytes of weights that a pass reads: the decoder layers' and the head's, each tensor once."""
    modules = [*target.layers.modules(), *target._head.modules()]
    tensors = {
        id(value): value
        for module in modules
        for value in (
            *vars(module).values(),
            *module.parameters(recurse=False),
            *module.buffers(recurse=False),
        )
        if isinstance(value, torch.Tensor)
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def read_bandwidth(device: torch.device, megabytes: int = 512, repeats: int = 8) -> float:
    """Measure bytes a second at which torch with all threads reads a buffer that no cache holds: the best of a few."""
    buffer = torch.ones(megabytes << 18, device=device)  # float32
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        float(buffer.sum())
        best = min(best, time.perf_counter() - began)
    return buffer.nbytes / best


def _measured(target: Target, drafter: Drafter | None, batches: list[int], force: bool) -> CostCurve:
    """Return the cost curve; where it must be measured, a bar shows how far that is."""
    bar: Progress | None = None
    with ExitStack() as stack:

        def watch(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                bar = stack.enter_context(Progress("measuring passes", total))
            bar.advance(done - bar.done)

        return load_or_measure(target, drafter, batches=batches, shape=AUTO, force=force, watch=watch)


def _floor_line(target: Target, step_s: float) -> str:
    size, bandwidth = weight_bytes(target), read_bandwidth(target.device)
    floor_s = size / bandwidth
    return (
        f"memory floor: {size / 1e6:.0f} MB of weights ({target.precision}) at {bandwidth / 1e9:.1f} GB/s take "
        f"{1000 * floor_s:.1f} ms; a pass over one token takes {step_s / floor_s:.1f} times that"
    )

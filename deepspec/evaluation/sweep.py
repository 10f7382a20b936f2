"""How long chains and how large trees pay: the trained draft alone, everything verified, at T = 0.

Three sweeps: `block_length`, chains of so many tokens; `depth`, best-first trees no deeper than that; `nodes`,
best-first trees of so many nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from deepspec.decoding.cost import CostCurve
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.shapes import BestFirst, Chain, Shape
from deepspec.evaluation.contest import Computed, Contest, DecodingConfig
from deepspec.evaluation.params import SweepParams
from deepspec.evaluation.parts import SweepPoint, Sweeps
from deepspec.evaluation.record import Identity
from deepspec.evaluation.runs import PLAIN, PromptRuns, pair, tau_table
from deepspec.evaluation.stats import bootstrap, macro_speedup, quotient
from deepspec.target.model import Target

_WIDTH = 8


def shapes(block_size: int, params: SweepParams) -> dict[str, Shape]:
    """`<sweep> <value>` → the shape."""
    lengths = range(1, block_size + 1)
    chains = {f"block_length {n}": Chain(n) for n in lengths}
    depths = {f"depth {n}": BestFirst(_WIDTH, n, params.depth_nodes) for n in lengths}
    nodes = {f"nodes {n}": BestFirst(_WIDTH, block_size, n) for n in params.nodes}
    return {**chains, **depths, **nodes}


def largest_tree(block_size: int, params: SweepParams) -> Shape:
    """Return the tree that stands for the others in the check of losslessness."""
    return BestFirst(_WIDTH, block_size, max(params.depth_nodes, *params.nodes))


def contest(
    target: Target, drafter: Drafter, params: SweepParams, seed: int, curve: CostCurve | None
) -> Contest:
    """Return the contest of plain decoding and every point.

    Args:
        curve: of the costs where the points are computed along the plain answers; None: they are decoded.
    """
    points = [
        DecodingConfig(name, drafter, shape) for name, shape in shapes(drafter.block_size, params).items()
    ]
    plain = DecodingConfig(PLAIN)
    if curve is None:
        return Contest(target, [plain, *points], params.max_new_tokens, seed)
    return Contest(target, [plain], params.max_new_tokens, seed, computed=Computed(points, PLAIN, curve))


def points(
    by_task: Mapping[str, list[PromptRuns]],
    chains: Mapping[str, Identity],
    trees: Mapping[str, Identity],
    seed: int,
) -> Sweeps:
    """Return the record's section.

    No speed-up without losslessness, which was checked on whole chains and largest trees.
    """
    tasks = list(by_task.values())
    rows = []
    for name in tasks[0][0]:
        if name == PLAIN:
            continue
        sweep, _, value = name.partition(" ")
        checked = chains if sweep == "block_length" else trees
        sound = all(checked[task].lossless for task in by_task)
        gain = macro_speedup([[pair(row[PLAIN], row[name]) for row in prompts] for prompts in tasks], seed)
        tau = bootstrap([tau_table(row[name] for row in prompts) for prompts in tasks], quotient, seed)
        shown = gain if sound else None
        rows.append(
            SweepPoint(
                sweep=sweep,
                value=int(value),
                tau=tau and tau.value,
                speedup=shown and shown.value,
                speedup_ci95=shown and shown.bounds,
                round_ms=1000
                * fmean(
                    run.seconds / run.rounds for run in (row[name] for p in tasks for row in p) if run.rounds
                ),
            )
        )
    computed = any(run.computed for prompts in tasks for row in prompts for run in row.values())
    return Sweeps(temperature=0.0, prompts=sum(map(len, tasks)), points=rows, computed=computed)

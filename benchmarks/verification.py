"""What better verification and better trees are worth, in tokens committed per verification (τ), on a trained draft.

    python -m benchmarks.verification --target data/target --drafter data/drafts/dspark --prompts humaneval

Rules, at the given temperature: standard against block on sampled chains, recursive against traversal on sampled
trees. Every setting decodes the same prompts with the same seeds. The luck of accepting is averaged out of the rules'
figures: each drawn draft counts with the number of tokens that its rule accepts *in expectation*, and "same drafts"
compares two rules on the very drafts that were drawn, whichever of them decided.

Shapes, at temperature 0 and at the given one: chain, static, beam and best-first trees of equal size.

Intervals are paired bootstraps over prompts (95 %). Finished runs are kept in a work file: a killed benchmark goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.common import (
    REPORTS,
    TASKS,
    WORK_DIR,
    Prompt,
    command_line,
    load_prompts,
    work_key,
    write_report,
)
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import generate
from deepspec.decoding.shapes import Beam, BestFirst, Chain, Sampled, Shape, Static
from deepspec.decoding.tree import Proposal
from deepspec.decoding.verify import RULES, Law, Pick, Rule, Uniform
from deepspec.drafters.load import load_drafter
from deepspec.errors import DeepSpecError
from deepspec.evaluation.stats import COVERAGE, RESAMPLES, Interval
from deepspec.journal import WorkLog
from deepspec.markdown import markdown_table
from deepspec.progress import Progress
from deepspec.target.model import Target, load_target

# Of the static tree: how often a parent's child of each rank is right, roughly.
RANK_CHANCES = [0.55, 0.16, 0.08, 0.05, 0.03, 0.02]
_SIBLINGS = {"standard": "block", "block": "standard", "recursive": "traversal", "traversal": "recursive"}


@dataclass(frozen=True)
class Setting:
    """How a prompt is decoded."""

    name: str
    temperature: float
    shape: Shape
    rule: str | None = None  # of a drawn draft


@dataclass
class Count:
    """Tokens committed in how many rounds; of a watched rule the expected ones, also under its sibling rule."""

    tokens: float = 0.0
    rounds: int = 0
    sibling_tokens: float = 0.0

    def add(self, other: Count) -> None:
        self.tokens += other.tokens
        self.rounds += other.rounds
        self.sibling_tokens += other.sibling_tokens


@dataclass
class Branches:
    """One way through a rule's decisions: those of `script`, then the first possible ones; the others are `open`."""

    script: list[bool]
    place: int = 0
    probability: float = 1.0
    open: list[list[bool]] = field(default_factory=list)

    def uniform(self) -> Coin:
        return Coin(self)

    def below(self, bound: float) -> bool:
        chance = min(max(bound, 0.0), 1.0)
        if self.place == len(self.script):
            if 0 < chance < 1:
                self.open.append([*self.script, False])
            self.script.append(chance > 0)
        decision = self.script[self.place]
        self.place += 1
        self.probability *= chance if decision else 1 - chance
        return decision


@dataclass(frozen=True)
class Coin:
    """A uniform number of which only comparisons are asked: each is a branch."""

    branches: Branches

    def __lt__(self, bound: float) -> bool:
        return self.branches.below(bound)

    def __ge__(self, bound: float) -> bool:
        return not self.branches.below(bound)


def expected_accepted(rule: Rule, proposal: Proposal, law: Law) -> float:
    """How many tokens of a drawn proposal the rule accepts on average, over all its decisions."""
    total, scripts = 0.0, [[]]
    while scripts:
        branches = Branches(scripts.pop())
        accepted, _ = rule(proposal, law, branches.uniform, lambda weights: 0)
        total += branches.probability * len(accepted)
        scripts += branches.open
    return total


class Watched:
    """The rule `name`, which also notes what it and its sibling accept of each draft in expectation."""

    def __init__(self, name: str):
        self.name = name
        self.count = Count()

    def __call__(self, proposal: Proposal, law: Law, uniform: Uniform, pick: Pick) -> tuple[list[int], int]:
        self.count.rounds += 1
        self.count.tokens += 1 + expected_accepted(RULES[self.name], proposal, law)
        self.count.sibling_tokens += 1 + expected_accepted(RULES[_SIBLINGS[self.name]], proposal, law)
        return RULES[self.name](proposal, law, uniform, pick)


def run(
    target: Target, drafter: Drafter, setting: Setting, prompt: list[int], tokens: int, seed: int
) -> Count:
    """Decode one prompt."""
    watched = Watched(setting.rule) if setting.rule else None
    (generation,) = generate(
        target,
        drafter,
        prompt,
        max_new_tokens=tokens,
        temperature=setting.temperature,
        seed=seed,
        tree=setting.shape,
        verify=watched,
    )
    stats = generation.stats
    if watched is None:
        return Count(stats.committed, stats.rounds)
    unwatched = stats.rounds - watched.count.rounds  # rounds without a draft commit one token
    watched.count.add(Count(unwatched, unwatched, unwatched))
    return watched.count


def settings(
    temperature: float, nodes: int, width: int, branching: tuple[int, ...], block: int
) -> list[Setting]:
    trees = {
        "static": Static.likeliest(RANK_CHANCES, nodes, block),
        "beam": Beam(width, None, nodes),
        "best-first": BestFirst(width, None, nodes),
    }
    likeliest = Static(tuple((0,) * depth for depth in range(1, block + 1)))
    drawn = [
        Setting("chain, standard", temperature, Chain(), "standard"),
        Setting("chain, block", temperature, Chain(), "block"),
        Setting("argmax chain", temperature, likeliest),
        Setting("sampled tree, recursive", temperature, Sampled(branching, nodes), "recursive"),
        Setting("sampled tree, traversal", temperature, Sampled(branching, nodes), "traversal"),
    ]
    ranked = [Setting(name, t, shape) for t in (0.0, temperature) for name, shape in trees.items()]
    return [Setting("chain", 0.0, Chain()), *drawn, *ranked]


def measure(
    target: Target,
    drafter: Drafter,
    chosen: list[Setting],
    prompts: list[Prompt],
    tokens: int,
    seeds: int,
    log: WorkLog,
) -> dict[str, list[Count]]:
    """Setting → the count of each prompt, its seeds added up. A greedy run needs one seed only."""
    pieces = [
        (setting, i, seed)
        for i in range(len(prompts))
        for seed in range(seeds)
        for setting in chosen
        if setting.temperature > 0 or seed == 0
    ]
    missing = [piece for piece in pieces if log.get(_key(*piece)) is None]
    with Progress("verification", len(pieces), len(pieces) - len(missing)) as progress:
        for setting, i, seed in missing:
            count = run(target, drafter, setting, prompts[i].ids, tokens, 1000 * seed + i)
            log.add(_key(setting, i, seed), asdict(count))
            progress.tokens(round(count.tokens))
            progress.advance()
    counts = {_label(setting): [Count() for _ in prompts] for setting in chosen}
    for setting, i, seed in pieces:
        counts[_label(setting)][i].add(Count(**log.get(_key(setting, i, seed))))
    return counts


def interval(table: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
    """Of a statistic of column sums; table [prompts, columns], prompts are resampled."""
    picks = np.random.default_rng(0).integers(len(table), size=(RESAMPLES, len(table)))
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(statistic(table[picks].sum(1)), [tail, 1 - tail])
    return Interval(float(statistic(table.sum(0))), float(low), float(high))


def tau(counts: list[Count]) -> Interval:
    table = np.array([(c.tokens, c.rounds) for c in counts], dtype=float)
    return interval(table, lambda sums: sums[..., 0] / sums[..., 1])


@dataclass(frozen=True)
class Comparison:
    """Two τ on the same prompts: their ratio and their difference."""

    name: str
    ratio: Interval
    difference: Interval


def compare(name: str, ours: list[Count], theirs: list[Count]) -> Comparison:
    table = np.array(
        [(a.tokens, a.rounds, b.tokens, b.rounds) for a, b in zip(ours, theirs, strict=True)], dtype=float
    )
    return Comparison(
        name,
        interval(table, lambda s: (s[..., 0] / s[..., 1]) / (s[..., 2] / s[..., 3])),
        interval(table, lambda s: s[..., 0] / s[..., 1] - s[..., 2] / s[..., 3]),
    )


def comparisons(counts: Mapping[str, list[Count]], temperature: float) -> list[Comparison]:
    at = f", T = {temperature:g}"
    rows = []
    for drawn, better, worse in (
        ("chain", "block", "standard"),
        ("sampled tree", "traversal", "recursive"),
    ):
        ours, theirs = counts[f"{drawn}, {better}{at}"], counts[f"{drawn}, {worse}{at}"]
        rows.append(compare(f"{better} / {worse}, same drafts{at}", *_same_drafts(ours, theirs)))
        rows.append(compare(f"{better} / {worse}, each its own run{at}", ours, theirs))
    block = counts[f"chain, block{at}"]
    traversal = counts[f"sampled tree, traversal{at}"]
    rows.append(compare(f"sampled tree, traversal / chain, block{at}", traversal, block))
    for t, chain in ((0.0, counts["chain, T = 0"]), (temperature, block)):
        for name in (
            ("argmax chain", "static", "beam", "best-first") if t else ("static", "beam", "best-first")
        ):
            rows.append(compare(f"{name} / chain, T = {t:g}", counts[f"{name}, T = {t:g}"], chain))
    return rows


def _same_drafts(ours: list[Count], theirs: list[Count]) -> tuple[list[Count], list[Count]]:
    """Both rules on all drafts that were drawn in the runs of either."""
    pairs = list(zip(ours, theirs, strict=True))
    return (
        [Count(a.tokens + b.sibling_tokens, a.rounds + b.rounds) for a, b in pairs],
        [Count(a.sibling_tokens + b.tokens, a.rounds + b.rounds) for a, b in pairs],
    )


def _label(setting: Setting) -> str:
    return f"{setting.name}, T = {setting.temperature:g}"


def _key(setting: Setting, prompt: int, seed: int) -> str:
    return f"{_label(setting)} prompt {prompt} seed {seed}"


def _cell(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} – {interval.high:.3f})"


def report(counts: Mapping[str, list[Count]], chosen: list[Setting], rows: list[Comparison]) -> str:
    """Two Markdown tables: τ of each setting, and what was compared."""
    shapes = {_label(setting): setting.shape for setting in chosen}
    settings_table = markdown_table(
        ["setting", "nodes", "rounds", "τ"],
        [
            (label, str(shapes[label].nodes or "γ"), str(sum(c.rounds for c in of)), _cell(tau(of)))
            for label, of in counts.items()
        ],
        "tn",
    )
    comparison_table = markdown_table(
        ["comparison of τ", "ratio", "difference"],
        [(row.name, _cell(row.ratio), _cell(row.difference)) for row in rows],
        "tn",
    )
    return f"{settings_table}\n\n{comparison_table}"


def arguments() -> argparse.ArgumentParser:
    parser = command_line("verification", __doc__)
    add = parser.add_argument
    add("--target", required=True, help="target directory")
    add("--drafter", required=True, help="directory of a trained draft for it")
    add(
        "--prompts",
        nargs="+",
        default=TASKS,
        metavar="SOURCE",
        help='evaluation tasks (names or .yaml) or .jsonl files of {"turns": [...]} (default: the project\'s three)',
    )
    add("--count", type=int, default=10, help="prompts of each source (default 10)")
    add("--max-new-tokens", type=int, default=128, help="of an answer (default 128)")
    add("--temperature", type=float, default=1.0, help="of the sampled runs (default 1)")
    add("--seeds", type=int, default=2, help="sampled runs of each prompt (default 2)")
    add("--nodes", type=int, default=24, help="of every tree (default 24)")
    add("--width", type=int, default=8, help="children of a node in beam and best-first trees (default 8)")
    add(
        "--branching",
        type=int,
        nargs="+",
        default=[8, 4, 2, 1, 1],
        help="most children of a node of the sampled tree, by depth (default 8 4 2 1 1)",
    )
    add("--output", type=Path, default=REPORTS, help="folder of the report")
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = arguments().parse_args(argv)
    try:
        target = load_target(flags.target)
        drafter = load_drafter(flags.drafter, target)
        prompts = load_prompts(target, flags.prompts, flags.count)
        chosen = settings(
            flags.temperature, flags.nodes, flags.width, tuple(flags.branching), drafter.block_size
        )
        what = ([prompt.ids for prompt in prompts], chosen, flags.max_new_tokens)
        log = WorkLog(WORK_DIR / f"verification-{work_key(target, [flags.drafter], *what)}.jsonl")
        counts = measure(target, drafter, chosen, prompts, flags.max_new_tokens, flags.seeds, log)
    except DeepSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = comparisons(counts, flags.temperature)
    data = {
        "settings": {
            label: {"tau": asdict(tau(of)), "rounds": sum(c.rounds for c in of)}
            for label, of in counts.items()
        },
        "comparisons": [asdict(row) for row in rows],
        "prompts": len(prompts),
    }
    write_report(
        flags.output,
        "verification",
        "Verification rules and tree shapes",
        report(counts, chosen, rows),
        data,
        target,
    )
    log.remove()
    return 0


if __name__ == "__main__":
    sys.exit(main())

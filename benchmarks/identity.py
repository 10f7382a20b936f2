"""Does any draft change a token? Greedy decoding in float32, compared with plain decoding one prompt at a time.

    python -m benchmarks.identity --target data/target --drafters data/drafts/dspark --prompts humaneval --count 200

Every drafter (those given, n-gram lookup, suffix lookup, and each given one behind the suffix lookup) with every tree
(chain, static, beam, best-first) at every batch size; lookups propose chains
only. Plain decoding in batches is checked too.

A pass over several tokens rounds differently from passes over one. So where two runs part, the target's two top
logits at that place are computed again in float64: closer than 1e-4 they are a tie, counted, and the rest of that
answer is not compared. Anything else is a difference, and the benchmark fails (exit status 1).

Every finished prompt is kept in a work file: a killed benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import (
    REPORTS,
    TASKS,
    WORK_DIR,
    command_line,
    load_prompts,
    work_key,
    write_report,
)
from benchmarks.verification import RANK_CHANCES
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import Engine
from deepspec.decoding.request import Generation, Request
from deepspec.decoding.shapes import Beam, BestFirst, Chain, Shape, Static
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.drafters.algorithms.suffix import SuffixDrafter
from deepspec.drafters.load import load_drafter
from deepspec.drafters.lookup_first import LookupFirst
from deepspec.errors import DeepSpecError
from deepspec.evaluation.identity import TIE, top_two_gap
from deepspec.journal import WorkLog
from deepspec.markdown import markdown_table
from deepspec.progress import Progress
from deepspec.target.model import Target, load_target

MATCH, LOOKUP_BLOCK = 3, 10  # of the lookups: tokens that must match, tokens drafted


@dataclass(frozen=True)
class Setting:
    """A drafter (None: plain decoding) with a tree, decoding `batch` requests at once."""

    drafter_name: str
    tree_name: str
    batch: int
    drafter: Drafter | None
    tree: Shape

    @property
    def label(self) -> str:
        return f"{self.drafter_name}, {self.tree_name}, batch {self.batch}"


@dataclass(frozen=True)
class Verdict:
    """One prompt under one setting. `tokens` were found equal; `gap` is that of the two top logits where runs part."""

    tokens: int
    committed: int
    rounds: int
    parted: bool = False
    gap: float | None = None  # None where one run merely ends before the other, which no rounding explains

    @property
    def tie(self) -> bool:
        return self.parted and self.gap is not None and self.gap < TIE

    @property
    def different(self) -> bool:
        return self.parted and not self.tie


def settings(
    directories: list[str], target: Target, batches: list[int], nodes: int, width: int
) -> list[Setting]:
    suffix = SuffixDrafter(LOOKUP_BLOCK, MATCH)
    chains: dict[str, Drafter] = {"n-gram": LookupDrafter(LOOKUP_BLOCK, MATCH), "suffix": suffix}
    drafters: dict[str, Drafter] = {}
    for directory in directories:
        name = Path(directory).name
        drafters[name] = load_drafter(directory, target)
        drafters[f"suffix or {name}"] = LookupFirst(suffix, drafters[name])
    found = [Setting("none", "chain", batch, None, Chain()) for batch in batches if batch > 1]
    found += [
        Setting(name, "chain", batch, drafter, Chain())
        for name, drafter in chains.items()
        for batch in batches
    ]
    for name, drafter in drafters.items():
        trees = {
            "chain": Chain(),
            "static": Static.likeliest(RANK_CHANCES, nodes, drafter.block_size),
            "beam": Beam(width, None, nodes),
            "best-first": BestFirst(width, None, nodes),
        }
        found += [
            Setting(name, tree, batch, drafter, shape) for tree, shape in trees.items() for batch in batches
        ]
    return found


def decode(
    target: Target, setting: Setting, prompts: dict[int, list[int]], tokens: int
) -> Iterator[Generation]:
    """Greedy answers to prompts by index, as they finish; a generation's `id` is its prompt's."""
    requests = iter([Request(ids, tokens, id=i) for i, ids in prompts.items()])
    engine = Engine(target, setting.drafter, batch_size=setting.batch, tree=setting.tree)
    for generation in engine.run(lambda: next(requests, None)):
        if generation.error:
            raise DeepSpecError(f"prompt {generation.id}: {generation.error}")
        yield generation


def judge(reference: list[int], run: Generation, target_path: str) -> Verdict:
    """Compare a run with the plain one."""
    most = min(len(reference), len(run.tokens))
    same = next((i for i in range(most) if reference[i] != run.tokens[i]), most)
    counts = (same, run.stats.committed, run.stats.rounds)
    if reference == run.tokens:
        return Verdict(*counts)
    gap = top_two_gap(target_path, run.prompt_ids + reference[:same]) if same < most else None
    return Verdict(*counts, parted=True, gap=gap)


class Check:
    """All settings on all prompts; what is done is in the log."""

    def __init__(self, target: Target, prompts: list[list[int]], tokens: int, log: WorkLog, path: str):
        self.target, self.prompts, self.tokens, self.log, self.path = target, prompts, tokens, log, path

    def run(self, chosen: list[Setting]) -> dict[str, list[Verdict]]:
        plain = Setting("none", "chain", 1, None, Chain())
        labels = [plain.label, *(setting.label for setting in chosen)]
        total = len(labels) * len(self.prompts)
        missing = sum(len(self._missing(label)) for label in labels)
        with Progress("token identity", total, total - missing) as progress:
            for run in decode(self.target, plain, self._missing(plain.label), self.tokens):
                self._keep(plain.label, run.id, run.tokens, len(run.tokens), progress)
            for setting in chosen:
                for run in decode(self.target, setting, self._missing(setting.label), self.tokens):
                    verdict = judge(self.log.get(_key(plain.label, run.id)), run, self.path)
                    self._keep(setting.label, run.id, asdict(verdict), len(run.tokens), progress)
        numbers = range(len(self.prompts))
        return {
            setting.label: [Verdict(**self.log.get(_key(setting.label, i))) for i in numbers]
            for setting in chosen
        }

    def _missing(self, label: str) -> dict[int, list[int]]:
        return {i: ids for i, ids in enumerate(self.prompts) if self.log.get(_key(label, i)) is None}

    def _keep(self, label: str, prompt: int, result: object, tokens: int, progress: Progress) -> None:
        self.log.add(_key(label, prompt), result)
        progress.tokens(tokens)
        progress.advance()


def _key(label: str, prompt: int) -> str:
    return f"{label}, prompt {prompt}"


def report(verdicts: dict[str, list[Verdict]], chosen: list[Setting]) -> str:
    """A Markdown table, a row a setting."""
    rows = []
    for setting in chosen:
        of = verdicts[setting.label]
        tau = sum(v.committed for v in of) / sum(v.rounds for v in of)
        numbers = (len(of), sum(v.tokens for v in of), f"{tau:.2f}", sum(v.tie for v in of))
        different = sum(v.different for v in of)
        rows.append(
            (f"{setting.drafter_name}, {setting.tree_name}", *map(str, (setting.batch, *numbers, different)))
        )
    header = ["drafter, tree", "batch", "prompts", "tokens compared", "τ", "ties", "differences"]
    every = [verdict for of in verdicts.values() for verdict in of]
    summary = (
        f"{len(every)} answers, {sum(v.tokens for v in every)} tokens compared: "
        f"**{sum(v.different for v in every)} differences**, {sum(v.tie for v in every)} ties "
        f"(two top logits closer than {TIE:g} in float64)."
    )
    return f"{markdown_table(header, rows, 'tn')}\n\n{summary}"


def arguments() -> argparse.ArgumentParser:
    parser = command_line("identity", __doc__)
    add = parser.add_argument
    add("--target", required=True, help="target directory; loaded in float32")
    add("--drafters", nargs="*", default=[], metavar="DIR", help="directories of trained drafts for it")
    add(
        "--prompts",
        nargs="+",
        default=TASKS,
        metavar="SOURCE",
        help='evaluation tasks (names or .yaml) or .jsonl files of {"turns": [...]} (default: the project\'s three)',
    )
    add("--count", type=int, default=84, help="prompts of each source (default 84: 200 in all)")
    add("--max-new-tokens", type=int, default=64, help="of an answer (default 64)")
    add("--batch-sizes", type=int, nargs="+", default=[1, 4, 16], help="requests at once (default 1 4 16)")
    add("--nodes", type=int, default=24, help="of the static, beam and best-first trees (default 24)")
    add("--width", type=int, default=8, help="children of a node in beam and best-first trees (default 8)")
    add("--output", type=Path, default=REPORTS, help="folder of the report")
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = arguments().parse_args(argv)
    try:
        target = load_target(flags.target, dtype="float32")
        prompts = [prompt.ids for prompt in load_prompts(target, flags.prompts, flags.count)]
        chosen = settings(flags.drafters, target, flags.batch_sizes, flags.nodes, flags.width)
        key = work_key(target, flags.drafters, prompts, flags.max_new_tokens, flags.nodes, flags.width)
        log = WorkLog(WORK_DIR / f"identity-{key}.jsonl")
        verdicts = Check(target, prompts, flags.max_new_tokens, log, flags.target).run(chosen)
    except DeepSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    data = {
        "tie": TIE,
        "prompts": len(prompts),
        "settings": {
            label: [asdict(verdict) for verdict in of if verdict.parted] for label, of in verdicts.items()
        },
    }
    write_report(
        flags.output, "identity", "Token identity with plain decoding", report(verdicts, chosen), data, target
    )
    log.remove()
    return 1 if any(verdict.different for of in verdicts.values() for verdict in of) else 0


if __name__ == "__main__":
    sys.exit(main())

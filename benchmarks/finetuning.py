"""Fine-tuning: a draft of one kind of text, continued on another for a tenth of the steps.

The conversations of `data/distill` are of kinds: those that the project wrote are math, code or chat, others are called
by their source. A draft learns one kind, `--first`, another learns a second, `--then`, for as many steps, and the first
goes on (`start: <directory>`) on the second kind for a tenth of them; one that had only that tenth stands beside.
Expected τ at T = 1 is measured in answers of both kinds that no draft has seen, a block at every third token. Intervals
are over conversations, by which ratios are paired. What is trained already is not trained again.

    python -m benchmarks.finetuning --steps 200
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import torch

from benchmarks.common import REPORTS, WORK_DIR, command_line, write_report
from benchmarks.drafters import with_steps
from deepspec.config import Params, load_params
from deepspec.drafters.checkpoint import RECORD
from deepspec.drafters.load import open_draft
from deepspec.drafters.loss_params import LossParams
from deepspec.drafters.registry import algorithms
from deepspec.errors import DeepSpecError, nearest
from deepspec.evaluation.stats import Interval, against, bootstrap, quotient
from deepspec.features.local import CachedFeatures
from deepspec.features.sequences import Sequences
from deepspec.files import digest
from deepspec.markdown import markdown_table
from deepspec.messages.prompt import Chat
from deepspec.prompts.seeds.seeds import KINDS, iter_seeds
from deepspec.target.model import Target, load_target
from deepspec.training.batches import Batches
from deepspec.training.finish import finish
from deepspec.training.losses import expected_tau
from deepspec.training.objective import BlockObjective
from deepspec.training.paths import TrainingPaths
from deepspec.training.prepare import DATA, WORK, TrainingData, make_network, prepare
from deepspec.training.run import fit, make_accelerator, own_loss, tracked_to_its_end

TARGET = Path("data/target")
SHARE = 10  # of the steps, the part that the continued draft has
_EVERY = 3  # tokens from one measured block to the next
Table = npt.NDArray[np.float64]  # [conversations, 2]: the sum of expected τ over blocks, and blocks


@dataclass(frozen=True)
class Run:
    """A training run.

    Args:
        kind: what it learns, `first` or `then`.
        start: the run whose draft it goes on from.
    """

    name: str
    kind: str
    steps: int
    start: str | None = None


def row_kinds(directory: Path, seed: int) -> list[str]:
    """Return the kind of each row of a data set whose prompts were drawn with a seed."""
    path = directory / "train.parquet"
    names = {"id", "source", "prompt"} & set(pyarrow.parquet.read_schema(path).names)
    written = seed_kinds(seed)
    rows = pyarrow.parquet.read_table(path, columns=sorted(names)).to_pylist()
    return [written.get(row.get("prompt") or row["id"], row["source"]) for row in rows]


@cache
def seed_kinds(seed: int) -> dict[str, str]:
    """Return id → kind of each prompt that the project writes."""
    names = [module.__name__.rpartition(".")[2] for module in KINDS.values()]
    return {
        Chat.of_turns(turns).id(): kind for turns, kind in zip(iter_seeds(seed), cycle(names), strict=False)
    }


def parted(
    sequences: Sequences, kinds: list[str], wanted: Collection[str], measured: int, seed: int
) -> tuple[TrainingData, Sequences]:
    """Return the conversations of some kinds to learn from, and `measured` others to measure on.

    Raises:
        DeepSpecError: no conversation of a kind, or too few altogether.
    """
    for kind in wanted:
        if kind not in kinds:
            raise DeepSpecError(f"{DATA} has no conversation of kind {kind!r}{nearest(kind, set(kinds))}")
    rows = [i for i, kind in enumerate(kinds) if kind in wanted and sequences.answered[i]]
    groups = np.unique(sequences.groups[rows])
    if len(groups) <= measured:
        raise DeepSpecError(
            f"{' and '.join(wanted)}: {len(groups)} conversations, of which {measured} are to be measured on"
        )
    kept_out = set(np.random.default_rng(seed).permutation(groups)[:measured].tolist())
    sides: tuple[list[int], list[int]] = ([], [])
    for i in rows:
        sides[int(sequences.groups[i]) in kept_out].append(i)
    learnt, held = (Sequences.of(sequences[i] for i in side) for side in sides)
    return TrainingData(learnt, learnt.digest), held


def check_section(params: Params, name: str) -> None:
    """Refuse a drafter that cannot go on from a draft.

    Raises:
        DeepSpecError: no such drafter, or one whose section has no `start`.
    """
    if name not in params.drafters:
        raise DeepSpecError(f"no drafter {name!r}{nearest(name, params.drafters)}")
    own = params.drafters[name]
    if "start" not in type(own).model_fields:
        raise DeepSpecError(f"drafter {name!r} is of type {own.type}, which cannot go on from a draft")


def section(params: Params, name: str, start: Path | None) -> Any:
    """Return a drafter's section; of one that goes on nothing is asked for, so all of the draft stays."""
    own = params.drafters[name]
    return own if start is None else type(own).model_validate({"type": own.type, "start": str(start)})


def trained(
    run: Run, params: Params, name: str, data: TrainingData, target: Target, start: Path | None
) -> Path:
    """Return the draft of a run, trained unless it is there."""
    params = with_steps(own_loss(params, name), run.steps)
    train = params.train.model_copy(update={"real_decode": False})
    params = params.model_copy(update={"train": train, "drafters": {name: section(params, name, start)}})
    decides = params.train, params.drafters, params.seed, data.digest, target.digest
    place = WORK_DIR / "finetuning" / digest(repr(decides)) / name
    paths = TrainingPaths(place, place.with_suffix(".jsonl"), place.with_suffix(".features.json"))
    if not paths.history.exists():
        accelerator = make_accelerator(params, name)
        network = make_network(params, name, target)
        with tracked_to_its_end(accelerator):
            prepared = prepare(params, name, network, target, lambda: target, data, accelerator)
            finish(prepared, fit(prepared, accelerator), paths)
    return place


@torch.no_grad()
def measure(draft: Path, target: Target, rows: Sequences) -> Table:
    """Return the expected τ of a draft in the answers of each conversation."""
    kind, checkpoint = open_draft(draft, target)
    read = algorithms()[kind].read
    if read is None:
        raise DeepSpecError(f"{draft}: a {kind} is not trained")
    model = read(checkpoint, target).eval()
    objective = BlockObjective(model, LossParams())
    features = CachedFeatures.below(
        WORK / "features", target, rows, model.config.target_layer_ids, rows.digest
    )
    features.build()
    batches = Batches(features, list(range(len(rows))), 1, 1, model.config.block_size, 0)
    table = []
    for i in range(len(rows)):
        anchors = torch.tensor(batches.starts(i, answers_only=True)[::_EVERY])
        batch = batches.at([i], anchors[None], answers_only=True)
        taus = expected_tau(objective.acceptance(batch), batch.valid)
        table.append((float(taus.sum()), taus.numel()))
    return np.array(table, dtype=np.float64)


def report(
    runs: list[Run], tables: dict[str, dict[str, Table]], minutes: dict[str, float], against_run: str
) -> tuple[str, dict[str, Any]]:
    """The table, and the same as data.

    Args:
        tables: run → kind → its table.
        against_run: the run that others are compared with, on the kind that it learnt.
    """
    kinds = list(tables[against_run])
    second = next(run.kind for run in runs if run.name == against_run)
    lines, data = [], {}
    for run in runs:
        taus = {kind: bootstrap([tables[run.name][kind]], quotient) for kind in kinds}
        ratio = compared(tables[run.name][second], tables[against_run][second])
        said = [str(taus[kind]) for kind in kinds]
        lines.append((run.name, str(run.steps), f"{minutes[run.name]:.1f}", *said, str(ratio)))
        data[run.name] = {
            "steps": run.steps,
            "minutes": minutes[run.name],
            "tau": {kind: asdict(tau) for kind, tau in taus.items() if tau},
            "ratio": asdict(ratio) if ratio else None,
        }
    heads = ["draft", "steps", "minutes", *(f"expected τ, {kind}" for kind in kinds), f"× {against_run}"]
    return markdown_table(heads, lines, "tn"), data


def compared(ours: Table, theirs: Table) -> Interval | None:
    """Return the ratio of two τ, paired by conversation."""
    return bootstrap([np.hstack((theirs, ours))], against(quotient))


def lineage(draft: Path) -> dict[str, Any]:
    """Return what the record of a draft says of where it comes from."""
    record = json.loads((draft / RECORD).read_text())
    return {key: record.get(key) for key in ("data_digest", "start", "parents")}


def main(argv: list[str] | None = None) -> int:
    parser = command_line("finetuning", __doc__)
    add = parser.add_argument
    add("--params", default="params.yaml", help="seed, section and `train` (default: %(default)s)")
    add("--drafter", default="dspark", help="one of its drafters (default: %(default)s)")
    add("--first", nargs="+", default=["code"], metavar="KIND", help="learnt first (default: code)")
    add("--then", nargs="+", default=["chat"], metavar="KIND", help="learnt then (default: chat)")
    add("--steps", type=int, default=200, help="of a draft from nothing (default 200)")
    add("--measured", type=int, default=40, help="conversations of each kind to measure on (default 40)")
    add("--output", type=Path, default=REPORTS, help="folder of the report")
    flags = parser.parse_args(argv)
    try:
        params = load_params(flags.params)
        check_section(params, flags.drafter)
        target = load_target(TARGET)
        sequences = TrainingData.read(params.train).sequences
        kinds = row_kinds(DATA, params.seed)
        first, then = "+".join(flags.first), "+".join(flags.then)
        parts = {
            name: parted(sequences, kinds, wanted, flags.measured, params.seed)
            for name, wanted in ((first, flags.first), (then, flags.then))
        }
        tenth = max(flags.steps // SHARE, 1)
        runs = [
            Run(first, first, flags.steps),
            Run(then, then, flags.steps),
            Run(f"{then}, a tenth", then, tenth),
            Run(f"{first}, then {then}", then, tenth, start=first),
        ]
        drafts: dict[str, Path] = {}
        tables, minutes = {}, {}
        for run in runs:
            start = drafts[run.start] if run.start else None
            place = trained(run, params, flags.drafter, parts[run.kind][0], target, start)
            drafts[run.name] = place
            last = place.with_suffix(".jsonl").read_text().splitlines()[-1]
            minutes[run.name] = 60 * json.loads(last)["hours"]
            tables[run.name] = {kind: measure(place, target, held) for kind, (_, held) in parts.items()}
    except DeepSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table, data = report(runs, tables, minutes, then)
    record = lineage(drafts[runs[-1].name])
    counts = {kind: len(data.sequences) for kind, (data, _) in parts.items()}
    learnt = ", ".join(f"{count} of {kind}" for kind, count in counts.items())
    said = f"Rows learnt from: {learnt}; measured on {flags.measured} conversations of each kind."
    parent = f"Record of the last: data {record['data_digest']}, parents {json.dumps(record['parents'])}"
    body = f"{table}\n\n{said}\n\n{parent}"
    title = f"{flags.drafter}: {first}, continued on {then}"
    write_report(flags.output, "finetuning", title, body, {"runs": data, "record": record}, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())

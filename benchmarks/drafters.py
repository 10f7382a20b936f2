"""τ of drafts after equal training time: drafters, losses, data forms, whatever a file of variants names.

Variants are changes to params.yaml: a drafter's section and keys of `train` (benchmarks/variants/*.yaml). All are
trained on the same data, each for the number of steps that fits `--minutes` at its own speed, measured first in turns
on an idle machine; then each decodes the same prompts, at T = 0 and 1, whole blocks as chains and, with `--tree`, as
best-first trees, without a lookup. τ is tokens committed per verification; ratios to the first variant are paired by
prompt and, with several `--seeds`, of which each trains every variant once, by seed. `--speed` decodes every prompt
plainly beside each draft. A variant that is trained already, with the same steps, is not trained again; a killed run
goes on.

    python -m benchmarks.drafters benchmarks/variants/drafters.yaml --minutes 6
    python -m benchmarks.drafters benchmarks/variants/nine.yaml --minutes 6 --seeds 0 1 2 --tree 16 --speed
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator

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
from deepspec.config import Params, load_params
from deepspec.decoding.engine import generate
from deepspec.decoding.shapes import CHAIN, BestFirst, Shape
from deepspec.drafters.load import load_drafter
from deepspec.errors import DeepSpecError
from deepspec.evaluation.stats import COVERAGE, RESAMPLES, Interval, Pair, macro_speedup
from deepspec.files import digest
from deepspec.journal import WorkLog
from deepspec.markdown import markdown_table
from deepspec.progress import Progress
from deepspec.target.model import Target, load_target
from deepspec.training.paths import TrainingPaths
from deepspec.training.prepare import TrainingData, make_network, prepare
from deepspec.training.run import make_trainer, train

TARGET = Path("data/target")
TEMPERATURES = (0.0, 1.0)
_TIMED_ROUNDS = 9
_UNTIMED_ROUNDS = 3

Table = (
    np.ndarray
)  # [prompts, 2]: tokens and verifications; or [prompts, 5]: also seconds, plain tokens and seconds
Way = tuple[str, float]  # name of the shape and temperature


def read_variants(path: Path, params: Params) -> dict[str, Params]:
    """Name → the parameters of the run that trains it; its drafter has the variant's name.

    Raises:
        DeepSpecError: no such file, or a variant that params.yaml could not hold.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise DeepSpecError(f"{path}: {error}") from None
    variants = {}
    for name, changes in raw.items():
        whole = params.model_dump(by_alias=True)
        whole["drafters"] = {name: changes["drafter"]}
        whole["pipeline"] = [name]
        _merge(whole["train"], changes.get("train", {}))
        try:
            variants[name] = Params.model_validate(whole)
        except ValueError as error:
            raise DeepSpecError(f"{path}: {name}: {' '.join(str(error).split())}") from None
    return variants


def _merge(into: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict) and "type" not in value:
            _merge(into[key], value)
        else:
            into[key] = value


def with_steps(params: Params, steps: int) -> Params:
    every = max(steps // 4, 1)
    changed = params.train.model_copy(update={"steps": steps, "eval_every": every, "save_every": every})
    return params.model_copy(update={"train": changed})


def step_seconds(variants: dict[str, Params], target: Target) -> dict[str, float]:
    """The median time of a training step, all variants taking turns."""
    accelerator = Accelerator(mixed_precision=next(iter(variants.values())).train.mixed_precision)
    trainers = {}
    for name, params in variants.items():
        data = TrainingData.read(params.train)
        network = make_network(params, name, target)
        prepared = prepare(params, name, network, target, lambda: target, data, accelerator)
        trainers[name] = make_trainer(prepared, accelerator)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(_UNTIMED_ROUNDS + _TIMED_ROUNDS):
        for name, trainer in trainers.items():
            began = time.perf_counter()
            trainer.train_step()
            trainer.step += 1
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[_UNTIMED_ROUNDS:]) for name, times in seconds.items()}


def decode(
    name: str,
    draft: Path,
    target: Target,
    prompts: list[Prompt],
    tokens: int,
    log: WorkLog,
    shapes: dict[str, Shape],
    timed: bool,
) -> dict[Way, Table]:
    """Way of decoding → counts of each prompt, and seconds if `timed`."""
    drafter = load_drafter(draft, target)
    pieces = [(shape, t, i) for i in range(len(prompts)) for t in TEMPERATURES for shape in shapes]
    keys = {piece: f"{name} {drafter.digest} {piece[0]} T={piece[1]:g} {piece[2]}" for piece in pieces}
    missing = [piece for piece in pieces if log.get(keys[piece]) is None]
    with Progress(f"decoding {name}", len(pieces), len(pieces) - len(missing)) as progress:
        for shape, temperature, i in missing:
            options: dict[str, Any] = {"max_new_tokens": tokens, "temperature": temperature, "seed": i}
            (out,) = generate(target, drafter, prompts[i].ids, tree=shapes[shape], **options)
            counts: list[float] = [out.stats.committed, out.stats.rounds]
            if timed:
                (plain,) = generate(target, None, prompts[i].ids, **options)
                counts += [out.stats.decode_s, plain.stats.committed, plain.stats.decode_s]
            log.add(keys[shape, temperature, i], counts)
            progress.tokens(len(out.tokens))
            progress.advance()
    return {
        (shape, t): np.array([log.get(keys[shape, t, i]) for i in range(len(prompts))], dtype=float)
        for shape in shapes
        for t in TEMPERATURES
    }


def macro_tau(tables: list[Table], picks: list[np.ndarray] | None = None) -> np.ndarray:
    """Mean over tasks of tokens over verifications; of resampled prompts, if `picks` [resamples, prompts] are given."""
    if picks is None:
        sums = [table.sum(0) for table in tables]
    else:
        sums = [table[pick].sum(1) for table, pick in zip(tables, picks, strict=True)]
    return np.mean([s[..., 0] / s[..., 1] for s in sums], axis=0)


def compared(ours: list[Table], theirs: list[Table]) -> Interval:
    """The ratio of two macro τ on the same prompts, which are resampled within each task."""
    rng = np.random.default_rng(0)
    picks = [rng.integers(len(table), size=(RESAMPLES, len(table))) for table in ours]
    ratios = macro_tau(ours, picks) / macro_tau(theirs, picks)
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(float(macro_tau(ours) / macro_tau(theirs)), float(low), float(high))


def by_task(table: Table, prompts: list[Prompt]) -> list[Table]:
    """In the order of the tasks' first prompts."""
    sources = list(dict.fromkeys(prompt.source for prompt in prompts))
    return [table[[i for i, p in enumerate(prompts) if p.source == source]] for source in sources]


def speed_up(tables: list[Table]) -> Interval | None:
    """The mean of tasks of decode seconds a token, plain over drafted."""
    return macro_speedup([[Pair(row[4], row[3], row[2], row[0]) for row in table] for table in tables])


def in_cell(ratio: Interval) -> str:
    return f"{ratio.value:.3f}" + ("" if ratio.low is None else f" ({ratio.low:.3f} – {ratio.high:.3f})")


def report(
    results: dict[str, dict[Way, Table]], training: dict[str, dict[str, float]], prompts: list[Prompt]
) -> tuple[str, dict[str, Any]]:
    """The table, and the same as data.

    Args:
        prompts: one of each row of the tables.
    """
    sources = list(dict.fromkeys(prompt.source for prompt in prompts))
    first = next(iter(results))
    ways = list(results[first])
    timed = results[first][ways[0]].shape[1] > 2
    rows, data = [], {}
    for name, of in results.items():
        cells: list[str] = []
        entry: dict[str, Any] = dict(training[name])
        for way in ways:
            tables = by_task(of[way], prompts)
            ratio = compared(tables, by_task(results[first][way], prompts))
            taus = [float(macro_tau([table])) for table in tables]
            cells += [f"{macro_tau(tables):.3f}", " / ".join(f"{tau:.2f}" for tau in taus), in_cell(ratio)]
            found: dict[str, Any] = {
                "tau": float(macro_tau(tables)),
                "tasks": dict(zip(sources, taus, strict=True)),
                "ratio": asdict(ratio),
            }
            if timed and (gain := speed_up(tables)) is not None:
                cells.append(in_cell(gain))
                found["speedup"] = asdict(gain)
            entry[label(way)] = found
        speed = f"{training[name]['step_s']:.2f}"
        rows.append((name, str(training[name]["steps"]), speed, f"{training[name]['heldout']:.3f}", *cells))
        data[name] = entry
    tasks = " / ".join(sources)
    heads = ["variant", "steps", "s a step", "expected τ, held out"]
    for way in ways:
        heads += [f"τ, {label(way)}", tasks, f"× {first}", *(["speed-up"] if timed else [])]
    return markdown_table(heads, rows, "tn"), data


def label(way: Way) -> str:
    """Say how it was decoded: chains by their temperature alone."""
    shape, temperature = way
    return f"T={temperature:g}" if shape == "chain" else f"{shape}, T={temperature:g}"


def trained(params: Params, name: str, place: Path) -> float:
    """Train a draft into `place` unless it is there; its best expected τ on held-out conversations."""
    history = place.with_suffix(".jsonl")
    if not history.exists():
        train(params, name, TARGET, TrainingPaths(place, history, place.with_suffix(".features.json")))
    lines = [yaml.safe_load(line) for line in history.read_text().splitlines()]
    return max((line.get("heldout_tau", 0.0) for line in lines), default=0.0)


def arguments() -> argparse.ArgumentParser:
    parser = command_line("drafters", __doc__)
    add = parser.add_argument
    add("variants", type=Path, help="YAML: name → {drafter: {...}, train: {...}}")
    add("--params", default="params.yaml", help="what the variants change (default: %(default)s)")
    add("--minutes", type=float, default=6.0, help="training time of each (default 6)")
    add("--steps", type=int, help="the same number of steps for all, in place of the same time")
    add("--seeds", type=int, nargs="+", help="each trains every variant (default: that of the parameters)")
    add("--tree", type=int, metavar="NODES", help="decode best-first trees of so many nodes too")
    add(
        "--speed", action="store_true", help="decode plainly beside each draft, and say how much faster it is"
    )
    add("--prompts", nargs="+", default=TASKS, metavar="SOURCE", help="evaluation tasks or .jsonl files")
    add("--count", type=int, default=12, help="prompts of each source (default 12)")
    add("--max-new-tokens", type=int, default=96, help="of an answer (default 96)")
    add("--output", type=Path, default=REPORTS, help="folder of the report")
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = arguments().parse_args(argv)
    try:
        variants = read_variants(flags.variants, load_params(flags.params))
        target = load_target(TARGET)
        prompts = load_prompts(target, flags.prompts, flags.count)
        shapes: dict[str, Shape] = {"chain": CHAIN}
        if flags.tree:
            shapes["tree"] = BestFirst(nodes=flags.tree)
        seeds = flags.seeds or [next(iter(variants.values())).seed]
        settings = {name: (params.drafters, params.train) for name, params in variants.items()}
        what = ([prompt.ids for prompt in prompts], flags.max_new_tokens, flags.minutes, flags.steps)
        key = work_key(target, [], str(settings), *what, seeds, flags.tree, flags.speed)
        log = WorkLog(WORK_DIR / f"drafters-{key}.jsonl")
        if log.get("step_s") is None:
            log.add("step_s", step_seconds(variants, target))
        seconds = log.get("step_s")
        results, training = {}, {}
        for name, params in variants.items():
            steps = flags.steps or max(round(60 * flags.minutes / seconds[name]), 1)
            heldout, tables = [], []
            for seed in seeds:
                run = with_steps(params.model_copy(update={"seed": seed}), steps)
                place = (
                    WORK_DIR / "drafts" / digest(repr((settings[name], seed, steps, target.digest))) / name
                )
                heldout.append(trained(run, name, place))
                tables.append(
                    decode(name, place, target, prompts, flags.max_new_tokens, log, shapes, flags.speed)
                )
            training[name] = {"steps": steps, "step_s": seconds[name], "heldout": statistics.mean(heldout)}
            results[name] = {way: np.concatenate([table[way] for table in tables]) for way in tables[0]}
    except DeepSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table, data = report(results, training, prompts * len(seeds))
    title = f"τ of {flags.variants.stem} after equal training {'steps' if flags.steps else 'time'}"
    write_report(flags.output, flags.variants.stem, title, table, data, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())

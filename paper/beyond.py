"""What the paper leaves out: the table's drafts under block verification and with trees, at T = 0 and 1, timed.

Every prompt is decoded by all configurations one right after the other (`evaluation/contest.py`), whole proposals, no
lookup, no controller. The trees are parent-conditioned: a node's law is the drafter's after that node's own parent.
Token identity is checked for each shape in float32 at T = 0; a shape that changes a token shows no speed-up.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from deepspec.decoding.shapes import CHAIN, BestFirst, Sampled, Shape
from deepspec.device import describe_device
from deepspec.evaluation.contest import Contest, DecodingConfig
from deepspec.evaluation.identity import check_identity
from deepspec.evaluation.runs import PLAIN, PromptRuns, from_json, pair, tau_table, to_json
from deepspec.evaluation.stats import Interval, against, bootstrap, macro_speedup, quotient
from deepspec.stages.common import stage
from deepspec.tasks.dialogue import first_turn
from paper.bench import TARGET, Bench, trained
from paper.params import PaperParams

STANDARD = "chain, standard"
WIDTH = 8

Way = tuple[Shape, str | None]


def ways(nodes: int, temperature: float) -> dict[str, Way]:
    """At T = 0 all chains are one and all trees are ranked."""
    best: dict[str, Way] = {
        STANDARD: (CHAIN, "standard"),
        "tree, best first": (BestFirst(WIDTH, None, nodes), None),
    }
    if temperature == 0:
        return best
    sampled = Sampled((WIDTH, WIDTH // 2, WIDTH // 4, 1), nodes)
    return {**best, "chain, block verification": (CHAIN, "block"), "tree, sampled": (sampled, "traversal")}


def summary(
    results: Mapping[float, list[list[PromptRuns]]],
    lossless: Mapping[str, Mapping[str, bool]],
    names: list[str],
) -> list[dict[str, Any]]:
    """Return a row for each temperature, drafter and configuration.

    Args:
        results: temperature → of each task its prompts.
        lossless: drafter → way → verdict of the check.
    """
    rows = []
    for temperature, tasks in results.items():
        for name in names:
            for config in (each for each in tasks[0][0] if each.startswith(f"{name}/")):
                way = config.removeprefix(f"{name}/")
                own = [tau_table(row[config] for row in rows_) for rows_ in tasks]
                chain = [tau_table(row[f"{name}/{STANDARD}"] for row in rows_) for rows_ in tasks]
                both = [np.concatenate(pair_, axis=1) for pair_ in zip(chain, own, strict=True)]
                gain = macro_speedup([[pair(row[PLAIN], row[config]) for row in part] for part in tasks])
                sound = lossless[name][way]
                rows.append(
                    {
                        "drafter": name,
                        "way": way,
                        "temperature": temperature,
                        "tau": _shown(bootstrap(own, quotient)),
                        "against_standard": _shown(bootstrap(both, against(quotient))),
                        "speedup": _shown(gain if sound else None),
                        "lossless": sound,
                    }
                )
    return rows


def _shown(found: Interval | None) -> dict[str, float] | None:
    return found and asdict(found)


def measure(bench: Bench) -> dict[float, list[list[PromptRuns]]]:
    """Temperature → task → prompts."""
    evaluate = bench.params.evaluate
    contests: dict[float, Contest] = {}

    def contest(temperature: float) -> Contest:
        if temperature not in contests:
            configs = [
                DecodingConfig(f"{name}/{way}", drafter, shape, rule)
                for name, drafter in bench.drafters.items()
                for way, (shape, rule) in ways(bench.study.nodes, temperature).items()
            ]
            configs = [DecodingConfig(PLAIN), *configs]
            made = Contest(bench.target, configs, evaluate.max_new_tokens, bench.params.seed)
            made.warm_up(bench.tasks[0].prompts[0], [temperature])
            contests[temperature] = made
        return contests[temperature]

    pieces = {
        f"{task.name} T={temperature:g} {i}": (task, temperature, i)
        for temperature in evaluate.temperatures
        for task in bench.tasks
        for i in range(len(task.prompts))
    }

    def decode(key: str) -> Any:
        task, temperature, i = pieces[key]
        return to_json(contest(temperature).prompt(task.name, first_turn(task.prompts[i]), temperature, i))

    done = bench.work.do("ways to verify", list(pieces), decode)
    return {
        temperature: [
            [from_json(done[f"{task.name} T={temperature:g} {i}"]) for i in range(len(task.prompts))]
            for task in bench.tasks
        ]
        for temperature in evaluate.temperatures
    }


def check(bench: Bench) -> dict[str, dict[str, bool]]:
    """Drafter → way → whether its shape keeps every token."""
    limit = bench.params.evaluate.lossless_new_tokens
    chosen = ways(bench.study.nodes, 1.0)
    pieces = {f"identity {name} {way}": (name, way) for name in bench.drafts for way in chosen}

    def piece(key: str) -> bool:
        name, way = pieces[key]
        drafter, shape = bench.load(name, bench.exact), chosen[way][0]
        found = [check_identity(bench.exact, drafter, TARGET, r, limit, shape) for r in bench.plain.values()]
        return all(identity.lossless for identity in found)

    done = bench.work.do("token identity in float32", list(pieces), piece)
    verdicts: dict[str, dict[str, bool]] = {}
    for key, (name, way) in pieces.items():
        verdicts.setdefault(name, {})[way] = done[key]
    return verdicts


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, required=True, help="one of study.seeds")


def main(params: PaperParams, flags: argparse.Namespace) -> None:
    study = params.study
    names = list(dict.fromkeys(study.roles.values()))
    drafts = trained(params, flags.seed, names)
    bench = Bench(params, drafts, study.timed_prompts, __file__, params.evaluate.model_dump(), study.nodes)
    results, lossless = measure(bench), check(bench)
    found = {
        "seed": flags.seed,
        "prompts": {task.name: len(task.prompts) for task in bench.tasks},
        "nodes": study.nodes,
        "device": describe_device(bench.target.device),
        "ways": summary(results, lossless, names),
    }
    bench.write(Path("reports/beyond.json"), found)


if __name__ == "__main__":
    stage(main, add_flags, params=PaperParams)

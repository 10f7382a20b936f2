"""For Table 1 and Figures 2 to 4: rounds at T = 1 without a draw of the draft, on answers that the target sampled.

Standard speculative sampling of chains, in expectation over what is drafted (`expectation.py`), on the same
texts for all drafters (`answers.py`).

reports/expected/seed-<n>.json, and ablation-<name>.json of each of `study.ablations`:
    drafters   drafter → task → of each prompt, summed over its answers
        tokens
        rounds           of blocks cut to 1 … γ tokens
        reached, stood   of whole blocks: rounds that drafted position 1 … γ, all before having stood; that stood there
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from deepspec.errors import DeepSpecError, nearest
from deepspec.files import file_digest
from deepspec.stages.common import stage
from paper.answers import ANSWERS, BATCH, SAMPLING, read
from paper.bench import DRAFTS, Bench, trained
from paper.expectation import Text, chances, rounds
from paper.params import PaperParams

DIGITS = 5


def summed(tables: Sequence[Tensor]) -> dict[str, Any]:
    """Of the chances [tokens, γ] of one prompt's answers."""
    lengths = range(1, tables[0].shape[1] + 1)
    cut = [[rounds(table, length) for length in lengths] for table in tables]
    parts = {
        "rounds": [[own.total for own in by_length] for by_length in cut],
        "reached": [by_length[-1].reached for by_length in cut],
        "stood": [by_length[-1].stood for by_length in cut],
    }
    sums = {key: np.round(np.sum(values, axis=0), DIGITS).tolist() for key, values in parts.items()}
    return {"tokens": sum(len(table) for table in tables), **sums}


def measure(bench: Bench) -> dict[str, Any]:
    answers = read()
    pieces = {f"{name} {task}": (name, task) for task in answers for name in bench.drafts}

    def piece(key: str) -> Any:
        name, task = pieces[key]
        texts = [Text(own["prompt"], tokens) for own in answers[task] for tokens in own["answers"]]
        found = iter(chances(bench.target, bench.drafters[name], texts, SAMPLING, BATCH))
        return [summed([next(found) for _ in own["answers"]]) for own in answers[task]]

    done = bench.work.do("expected", list(pieces), piece)
    drafters = {name: {task: done[f"{name} {task}"] for task in answers} for name in bench.drafts}
    return {"temperature": SAMPLING.temperature, "drafters": drafters}


def add_flags(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, help="the pipeline's drafts of one of study.seeds")
    which.add_argument("--ablation", metavar="NAME", help="the draft of one of study.ablations")


def main(params: PaperParams, flags: argparse.Namespace) -> None:
    study = params.study
    if name := flags.ablation:
        if name not in study.ablations:
            known = ", ".join(study.ablations) or "none"
            raise DeepSpecError(
                f"--ablation {name}: study.ablations has {known}{nearest(name, study.ablations)}"
            )
        record, drafts = f"ablation-{name}", {name: DRAFTS / "ablations" / name}
    else:
        record, drafts = f"seed-{flags.seed}", trained(params, flags.seed, params.pipeline)
    bench = Bench(params, drafts, study.texts, __file__, file_digest(ANSWERS))
    bench.write(Path(f"reports/expected/{record}.json"), measure(bench))


if __name__ == "__main__":
    stage(main, add_flags, params=PaperParams)

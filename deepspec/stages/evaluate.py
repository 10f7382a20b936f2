"""Measure one drafter on the evaluation tasks: data/drafts/NAME → reports/eval/NAME.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from deepspec.config import Params
from deepspec.errors import DeepSpecError, nearest
from deepspec.files import write_json
from deepspec.stages.common import stage


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--drafter", required=True, help="a name under `drafters` in params.yaml")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")


def main(params: Params, flags: argparse.Namespace) -> None:
    name = flags.drafter
    if name not in params.drafters:
        raise DeepSpecError(f"unknown drafter {name!r}{nearest(name, params.drafters)}")
    draft = Path("data/drafts") / name
    if not draft.is_dir():
        raise DeepSpecError(f"{draft}: no such draft; train it first (deepspec train --drafter {name})")
    from deepspec.evaluation.benchmark import evaluate

    record = evaluate(name, "data/target", draft, params.evaluate, params.seed, device=flags.device)
    write_json(f"reports/eval/{name}.json", record)


if __name__ == "__main__":
    stage(main, add_flags)

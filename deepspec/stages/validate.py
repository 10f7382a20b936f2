"""Check data/distill before anything is trained on it: reports/validation.json, .md and .html."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from deepspec.config import Params
from deepspec.errors import DeepSpecError
from deepspec.files import write_json, write_text
from deepspec.stages.common import stage

REPORT = Path("reports/validation.json")


def main(params: Params, flags: argparse.Namespace) -> None:
    """Check the data; the reports are written in any case, then a failed check ends the stage with an error."""
    from deepspec.guard.facts import prompt_facts
    from deepspec.guard.page import render
    from deepspec.guard.suite import validate_data
    from deepspec.messages.prompts import read_prompts
    from deepspec.prompts.overlap import Overlap
    from deepspec.target.model import load_where_it_runs
    from deepspec.tasks.task import evaluation_texts

    texts = evaluation_texts(params.evaluate.tasks, params.evaluate.tasks_dir)
    overlap = Overlap(texts, params.prompts.overlap_ngram)
    target = load_where_it_runs("data/target")
    validation = validate_data(
        "data/distill",
        read_prompts("data/prompts/train.jsonl"),
        params.validate_,
        min(params.generate.max_length, target.max_length),
        target,
        overlap,
    )
    manifest = Path("data/prompts/manifest.json")
    if manifest.exists():
        found = prompt_facts(json.loads(manifest.read_text(encoding="utf-8")))
        validation = replace(validation, facts=validation.facts | found)
    write_json(REPORT, validation.to_dict())
    write_text(REPORT.with_suffix(".md"), validation.to_markdown())
    write_text(REPORT.with_suffix(".html"), render(validation))
    for warning in validation.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if validation.failed:
        raise DeepSpecError(
            f"the distillation data is not fit to train on: {validation.summary()}; see {REPORT.with_suffix('.md')}"
        )
    print(f"{REPORT}: {validation.rows} conversations, all {len(validation.checks)} checks passed")


if __name__ == "__main__":
    stage(main)

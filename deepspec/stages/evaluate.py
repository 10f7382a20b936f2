"""Measure drafters on the evaluation tasks, all in one interleaved run: data/drafts/NAME → reports/eval/NAME.json."""

from __future__ import annotations

import argparse
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspec.config import Params
from deepspec.errors import DeepSpecError, nearest
from deepspec.evaluation.figures import figures_help
from deepspec.files import write_json, write_text
from deepspec.stages.common import stage

if TYPE_CHECKING:
    from deepspec.evaluation.measure import Outcome
    from deepspec.evaluation.params import EvaluateParams


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = figures_help()
    parser.add_argument(
        "--drafter",
        action="append",
        help="a name under `drafters` in params.yaml; several (repeat the flag) meet on the same prompts "
        "(default: all of `pipeline`)",
    )
    parser.add_argument(
        "--drafts", type=Path, default=Path("data/drafts"), help="their folder (default: %(default)s)"
    )
    parser.add_argument("--tasks", help="comma-separated, in place of evaluate.tasks")
    parser.add_argument("--prompts", type=int, help="per task, in place of evaluate.prompts_per_task")
    parser.add_argument(
        "--full",
        action="store_true",
        help="decode what params.yaml has computed or left out: plain answers to their end, the lookup alone, other "
        "controllers, sweeps, full batches; two to three times as long",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("reports/eval"),
        help="folder of the records (default: %(default)s)",
    )


def main(params: Params, flags: argparse.Namespace) -> None:
    drafts = {}
    for name in flags.drafter or params.pipeline:
        if name not in params.drafters:
            raise DeepSpecError(f"unknown drafter {name!r}{nearest(name, params.drafters)}")
        drafts[name] = flags.drafts / name
        if not drafts[name].is_dir():
            raise DeepSpecError(
                f"{drafts[name]}: no such draft; train it first (deepspec train --drafter {name})"
            )
    if flags.prompts is not None and flags.prompts < 1:
        raise DeepSpecError(f"--prompts must be >= 1, found {flags.prompts}")
    names = [name.strip() for name in (flags.tasks or "").split(",") if name.strip()]
    changes = {"tasks": names, "prompts_per_task": flags.prompts}
    chosen = params.evaluate.model_copy(update={key: value for key, value in changes.items() if value})
    if flags.full:
        chosen = chosen.full()
    from deepspec.evaluation.measure import evaluate

    def save(outcomes: dict[str, Outcome]) -> None:
        for name, outcome in outcomes.items():
            lines = "".join(json.dumps(line) + "\n" for line in outcome.prompts)
            write_text(flags.output / f"{name}.prompts.jsonl", lines)
            write_json(flags.output / f"{name}.traces.json", outcome.traces)
            outcome.record.write(flags.output / f"{name}.json")

    if params.target.engine == "vllm":
        return save(_evaluate_served(drafts, params, chosen))
    evaluate(drafts, "data/target", chosen, params.seed, device=flags.device, save=save)


def _evaluate_served(drafts: dict[str, Path], params: Params, chosen: EvaluateParams) -> dict[str, Outcome]:
    """Measure in a vLLM that is started anew for each way of decoding.

    Raises:
        DeepSpecError: running servers are named, which have no drafts, or vLLM cannot be set up or does not start.
    """
    from deepspec.serving.environment import find_or_set_up
    from deepspec.serving.evaluation import Engine, evaluate_served
    from deepspec.stages.body import server
    from deepspec.target.ends import load_ends

    if params.target.vllm.base_urls:
        raise DeepSpecError(
            "evaluate starts vLLM with each draft, and target.vllm.base_urls names servers without; leave it empty for "
            "this stage"
        )
    environment = find_or_set_up()

    def start(name: str, speculative: dict[str, Any] | None, max_length: int) -> AbstractContextManager[str]:
        return server(environment, params.target, speculative, max_length, f"evaluate-{name}", 4)

    engine = Engine(environment.version, start)
    return evaluate_served(drafts, load_ends("data/target"), chosen, params.seed, engine)


if __name__ == "__main__":
    stage(main, add_flags)
